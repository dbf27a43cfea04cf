// Products with weights that were laid out once for them: W x + b for each of R rows, R being few as a rule.
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

constexpr int64_t BLOCK = 2 * WIDTH;             // outputs that are summed up together
constexpr int ROWS = (REGISTERS - 4) / 2 / 2 * 2;  // rows, at most, that are: two sums each, and the weights, in registers

// A layer's weight [O, I]. In fp32 it is laid out as [ceil(O / BLOCK), I, BLOCK], and multiplied by what is below; else as
// oneDNN wants it, and where it is small as it was, too: for one row, oneDNN's call costs more than the product.
struct Weight {
  Tensor packed;
  std::optional<Tensor> bias, small;
  int64_t outputs;

  bool is_own() const { return packed.scalar_type() == at::kFloat && packed.layout() == at::kStrided; }
  int64_t blocks() const { return packed.size(0); }
};

inline Tensor pack(const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1), blocks = (outputs + BLOCK - 1) / BLOCK;
  const Tensor given = weight.contiguous();
  Tensor packed = at::zeros({blocks, inputs, BLOCK}, weight.options());
  const float* from = given.const_data_ptr<float>();
  float* to = packed.mutable_data_ptr<float>();
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t end) {
    for (int64_t o = first * BLOCK; o < std::min(end * BLOCK, outputs); ++o) {
      for (int64_t i = 0; i < inputs; ++i) to[(o / BLOCK * inputs + i) * BLOCK + o % BLOCK] = from[o * inputs + i];
    }
  });
  return packed;
}

// A block of outputs, `count` of them in use, of a few rows: out = x W + bias, or out += x W + bias.
template <int COUNT>
void tile(const float* x, const float* weights, const float* bias, bool add, int64_t inputs, int64_t outputs, int64_t count, float* out) {
  Floats left[COUNT], right[COUNT];
#pragma GCC unroll 16
  for (int r = 0; r < COUNT; ++r) {
    left[r] = bias ? load(bias, count) : Floats{};
    right[r] = bias ? load(bias + WIDTH, count - WIDTH) : Floats{};
    if (add) left[r] += load(out + r * outputs, count), right[r] += load(out + r * outputs + WIDTH, count - WIDTH);
  }
  for (int64_t i = 0; i < inputs; ++i) {
    const Floats a = load(weights + i * BLOCK), b = load(weights + i * BLOCK + WIDTH);
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; ++r) {
      left[r] += x[r * inputs + i] * a;
      right[r] += x[r * inputs + i] * b;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < COUNT; ++r) {
    store(left[r], out + r * outputs, count);
    store(right[r], out + r * outputs + WIDTH, count - WIDTH);
  }
}

template <int COUNT, typename... Others>
void tile_of(int64_t rows, Others... others) {
  if (rows == COUNT) return tile<COUNT>(others...);
  if constexpr (COUNT > 1) tile_of<COUNT - 1>(rows, others...);
}

// One block of a weight's outputs, for all rows.
inline void multiply(const float* x, int64_t rows, const Weight& weight, int64_t block, bool add, float* out) {
  const int64_t inputs = weight.packed.size(1), groups = (rows + ROWS - 1) / ROWS, at = block * BLOCK;
  const float* weights = weight.packed.const_data_ptr<float>() + at * inputs;
  const float* bias = weight.bias.has_value() ? weight.bias->const_data_ptr<float>() + at : nullptr;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = rows * group / groups, end = rows * (group + 1) / groups;
    tile_of<ROWS>(end - first, x + first * inputs, weights, bias, add, inputs, weight.outputs,
                  std::min(BLOCK, weight.outputs - at), out + first * weight.outputs + at);
  }
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
  TORCH_CHECK(given.size(-1) == weight.packed.size(1) && given.scalar_type() == at::kFloat, "not an input of this weight");
  const Tensor rows = given.contiguous();
  std::vector<int64_t> shape = rows.sizes().vec();
  shape.back() = weight.outputs;
  Tensor out = at::empty(shape, rows.options());
  const float* x = rows.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, weight.blocks(), 1, [&](int64_t first, int64_t end) {
    for (int64_t block = first; block < end; ++block) multiply(x, rows.numel() / rows.size(-1), weight, block, false, to);
  });
  return out;
}

// Weights by the numbers that Python and its compiler know them by.
inline std::unordered_map<int64_t, Weight> weights;
inline std::mutex guard;

inline void hold(int64_t number, const Tensor& packed, const std::optional<Tensor>& bias, const std::optional<Tensor>& small, int64_t outputs) {
  const std::lock_guard<std::mutex> lock(guard);
  weights[number] = {packed, bias, small, outputs};
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
