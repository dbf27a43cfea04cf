// Products with packed weights: W x + b for each of R rows, usually few.
// Shapes: R rows, I inputs, O outputs.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>

#include <mutex>
#include <optional>
#include <unordered_map>

#include "vectors.h"

namespace manta {

using at::Tensor;

constexpr int64_t BLOCK = 2 * WIDTH;               // outputs that are summed together
constexpr int ROWS = (REGISTERS - 4) / 2 / 2 * 2;  // rows summed together, at most: two sums each, and the weights, in registers

// A layer's weight [O, I]. In fp32, and in 8 bits with a scale for each output, its layout is [ceil(O / BLOCK), I, BLOCK], for
// the products below; else oneDNN's, and a small weight is kept unpacked, too: for one row, calling oneDNN costs more than the
// product.
struct Weight {
  Tensor packed;
  std::optional<Tensor> bias, small, scale;
  int64_t outputs;

  bool is_own() const { return packed.layout() == at::kStrided && packed.scalar_type() != at::kBFloat16; }
  int64_t blocks() const { return packed.size(0); }
};

template <typename T>
void pack_as(const Tensor& weight, Tensor& packed) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const T* from = weight.const_data_ptr<T>();
  T* to = packed.mutable_data_ptr<T>();
  at::parallel_for(0, packed.size(0), 1, [&](int64_t first, int64_t end) {
    for (int64_t o = first * BLOCK; o < std::min(end * BLOCK, outputs); ++o) {
      for (int64_t i = 0; i < inputs; ++i) to[(o / BLOCK * inputs + i) * BLOCK + o % BLOCK] = from[o * inputs + i];
    }
  });
}

inline Tensor pack(const Tensor& weight) {
  const Tensor given = weight.contiguous();
  Tensor packed = at::zeros({(given.size(0) + BLOCK - 1) / BLOCK, given.size(1), BLOCK}, given.options());
  given.scalar_type() == at::kChar ? pack_as<int8_t>(given, packed) : pack_as<float>(given, packed);
  return packed;
}

// What follows a product: times the scale, plus the bias, plus the value in the output; each is optional.
struct Epilogue {
  const float *scale, *bias;
  bool add;
};

// A block of outputs, of which `count` are used, for a few rows.
template <int COUNT, typename T>
void tile(const float* x, const T* weights, Epilogue epilogue, int64_t inputs, int64_t outputs, int64_t count, float* out) {
  Floats left[COUNT] = {}, right[COUNT] = {};
  for (int64_t i = 0; i < inputs; ++i) {
    const Floats a = load(weights + i * BLOCK), b = load(weights + i * BLOCK + WIDTH);
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; ++r) {
      left[r] += x[r * inputs + i] * a;
      right[r] += x[r * inputs + i] * b;
    }
  }
  const auto end = [&](Floats sums, int64_t at, float* to) {
    if (epilogue.scale) sums *= load(epilogue.scale + at, count - at);
    if (epilogue.bias) sums += load(epilogue.bias + at, count - at);
    if (epilogue.add) sums += load(to + at, count - at);
    store(sums, to + at, count - at);
  };
#pragma GCC unroll 16
  for (int r = 0; r < COUNT; ++r) {
    end(left[r], 0, out + r * outputs);
    end(right[r], WIDTH, out + r * outputs);
  }
}

template <int COUNT, typename... Others>
void tile_of(int64_t rows, Others... others) {
  if (rows == COUNT) return tile<COUNT>(others...);
  if constexpr (COUNT > 1) tile_of<COUNT - 1>(rows, others...);
}

template <typename T>
void multiply_by(const T* weights, const float* x, int64_t rows, const Weight& weight, int64_t block, bool add, float* out) {
  const int64_t inputs = weight.packed.size(1), groups = (rows + ROWS - 1) / ROWS, at = block * BLOCK;
  const auto from = [at](const std::optional<Tensor>& tensor) { return tensor.has_value() ? tensor->const_data_ptr<float>() + at : nullptr; };
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = rows * group / groups, end = rows * (group + 1) / groups;
    tile_of<ROWS>(end - first, x + first * inputs, weights + at * inputs, Epilogue{from(weight.scale), from(weight.bias), add}, inputs,
                  weight.outputs, std::min(BLOCK, weight.outputs - at), out + first * weight.outputs + at);
  }
}

// One block of a weight's outputs, for all rows; `add`: to the values in the output.
inline void multiply(const float* x, int64_t rows, const Weight& weight, int64_t block, bool add, float* out) {
  if (weight.scale.has_value()) return multiply_by(weight.packed.const_data_ptr<int8_t>(), x, rows, weight, block, add, out);
  multiply_by(weight.packed.const_data_ptr<float>(), x, rows, weight, block, add, out);
}

inline Tensor by_onednn(const Tensor& given, const Weight& weight) {
  static const auto product = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
                                  .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, c10::string_view,
                                                c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>)>();
  if (weight.small.has_value() && given.numel() == given.size(-1)) return at::linear(given, *weight.small, weight.bias);
  return product.call(given, weight.packed, weight.bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

inline Tensor product(const Tensor& given, const Weight& weight) {
  if (!weight.is_own()) return by_onednn(given, weight);
  TORCH_CHECK(given.size(-1) == weight.packed.size(1), "not an input of this weight");
  const Tensor rows = given.to(at::kFloat).contiguous();
  std::vector<int64_t> shape = rows.sizes().vec();
  shape.back() = weight.outputs;
  Tensor out = at::empty(shape, rows.options());
  const float* x = rows.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, weight.blocks(), 1, [&](int64_t first, int64_t end) {
    for (int64_t block = first; block < end; ++block) multiply(x, rows.numel() / rows.size(-1), weight, block, false, to);
  });
  return out.to(given.scalar_type());
}

// Weights by number; Python and torch's compiler pass the number.
inline std::unordered_map<int64_t, Weight> weights;
inline std::mutex guard;

inline void hold(int64_t number, const Tensor& packed, const std::optional<Tensor>& bias, const std::optional<Tensor>& small,
                 const std::optional<Tensor>& scale, int64_t outputs) {
  const std::lock_guard<std::mutex> lock(guard);
  weights[number] = {packed, bias, small, scale, outputs};
}

inline void release(int64_t number) {
  const std::lock_guard<std::mutex> lock(guard);
  weights.erase(number);
}

inline Weight held(int64_t number) {
  const std::lock_guard<std::mutex> lock(guard);
  return weights.at(number);
}

inline Tensor linear(const Tensor& given, int64_t number, int64_t outputs) { return product(given, held(number)); }

}  // namespace manta
