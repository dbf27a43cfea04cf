// What a step's forward asks of a processor: attention over lanes, and products with weights in oneDNN's own order without
// Python in between. `kernels.py` builds it; these are the same operations as in `forward` and `linear`.
// Shapes: T tokens of the step, N lanes, C tokens a lane, H query heads, K key heads, D width of a head.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

namespace {

using at::Tensor;

// A sequence's part of the step: `count` tokens from `row` on, `past` before them in its lane.
struct Part {
  int64_t row, count, lane, past;
};

struct Step {
  std::vector<Tensor> keys, values;  // of each layer: [N, K, C, D]
  std::vector<Part> parts;
  int64_t few;  // tokens, at most, of a part that is attended row by row
};

thread_local Step under_way;

void begin(std::vector<Tensor> keys, std::vector<Tensor> values, at::IntArrayRef parts, int64_t few) {
  under_way = {std::move(keys), std::move(values), {}, few};
  for (size_t i = 0; i < parts.size(); i += 4) {
    under_way.parts.push_back({parts[i], parts[i + 1], parts[i + 2], parts[i + 3]});
  }
}

// One query against the first `length` keys and values of a lane's head.
template <typename T>
void attend_row(const T* query, const T* keys, const T* values, int64_t length, int64_t key_width, int64_t value_width,
                float scale, float* scores, float* sums, T* out) {
  using Floats = at::vec::Vectorized<float>;
  float most = std::numeric_limits<float>::lowest();
  for (int64_t j = 0; j < length; ++j) {
    const T* key = keys + j * key_width;
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < key_width; ++d) dot += static_cast<float>(query[d]) * static_cast<float>(key[d]);
    scores[j] = dot * scale;
    most = std::max(most, scores[j]);
  }
  at::vec::map<float>([most](Floats it) { return (it - Floats(most)).exp(); }, scores, scores, length);
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < length; ++j) total += scores[j];
  std::fill_n(sums, value_width, 0.f);
  for (int64_t j = 0; j < length; ++j) {
    const T* value = values + j * value_width;
#pragma omp simd
    for (int64_t d = 0; d < value_width; ++d) sums[d] += scores[j] * static_cast<float>(value[d]);
  }
  for (int64_t d = 0; d < value_width; ++d) out[d] = static_cast<T>(sums[d] / total);
}

// Write the step's keys and values [1, K, T, D] into a layer's lanes, and attend to each sequence's own: [1, T, H, D].
Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, int64_t layer, std::optional<double> scaling,
              std::optional<int64_t> window) {
  const Step& step = under_way;
  for (const Part& part : step.parts) {
    const int64_t length = part.past + part.count;
    TORCH_CHECK(!window.has_value() || !*window || length <= *window, length, " tokens are over its window of ", *window);
  }
  const int64_t heads = query.size(1), tokens = query.size(2), key_width = query.size(3);
  const int64_t key_heads = key.size(1), value_width = value.size(3), group = heads / key_heads;
  const Tensor& keys = step.keys.at(layer);
  const Tensor& values = step.values.at(layer);
  const int64_t capacity = keys.size(2);
  const float scale = scaling.has_value() ? *scaling : 1 / std::sqrt(static_cast<double>(key_width));
  Tensor out = at::empty({1, tokens, heads, value_width}, query.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, query.scalar_type(), "attend", [&] {
    const scalar_t* q = query.const_data_ptr<scalar_t>();
    const scalar_t* k = key.const_data_ptr<scalar_t>();
    const scalar_t* v = value.const_data_ptr<scalar_t>();
    scalar_t* all_keys = keys.mutable_data_ptr<scalar_t>();
    scalar_t* all_values = values.mutable_data_ptr<scalar_t>();
    scalar_t* o = out.mutable_data_ptr<scalar_t>();
    const int64_t pieces = static_cast<int64_t>(step.parts.size()) * key_heads;  // a sequence's part, for one key head
    at::parallel_for(0, pieces, 1, [&](int64_t first, int64_t end) {
      std::vector<float> scores(capacity), sums(value_width);
      for (int64_t piece = first; piece < end; ++piece) {
        const Part& part = step.parts[piece / key_heads];
        const int64_t h = piece % key_heads;
        const int64_t lane = (part.lane * key_heads + h) * capacity;
        scalar_t* own_keys = all_keys + lane * key_width;
        scalar_t* own_values = all_values + lane * value_width;
        for (int64_t i = 0; i < part.count; ++i) {
          const int64_t t = part.row + i, at = part.past + i;
          std::copy_n(k + h * key.stride(1) + t * key.stride(2), key_width, own_keys + at * key_width);
          std::copy_n(v + h * value.stride(1) + t * value.stride(2), value_width, own_values + at * value_width);
          for (int64_t g = h * group; part.count <= step.few && g < (h + 1) * group; ++g) {
            attend_row(q + g * query.stride(1) + t * query.stride(2), own_keys, own_values, at + 1, key_width, value_width,
                       scale, scores.data(), sums.data(), o + (t * heads + g) * value_width);
          }
        }
      }
    });
  });
  for (const Part& part : step.parts) {  // parts of prompts
    if (part.count <= step.few) continue;
    const int64_t length = part.past + part.count;
    std::optional<Tensor> mask;
    if (part.past) mask = at::ones({part.count, length}, query.options().dtype(at::kBool)).tril(part.past);
    const auto own = [&](const Tensor& all) { return all.narrow(0, part.lane, 1).narrow(2, 0, length); };
    const Tensor attended = at::scaled_dot_product_attention(query.narrow(2, part.row, part.count), own(keys), own(values),
                                                             mask, 0.0, !part.past, scale, group > 1);
    out.narrow(1, part.row, part.count).copy_(attended.transpose(1, 2));
  }
  return out;
}

struct Weight {
  Tensor packed;
  std::optional<Tensor> bias, small;
};

std::unordered_map<int64_t, Weight> weights;
std::mutex guard;

void hold(int64_t number, const Tensor& packed, const std::optional<Tensor>& bias, const std::optional<Tensor>& small) {
  const std::lock_guard<std::mutex> lock(guard);
  weights[number] = {packed, bias, small};
}

void release(int64_t number) {
  const std::lock_guard<std::mutex> lock(guard);
  weights.erase(number);
}

Tensor linear(const Tensor& given, int64_t number, int64_t outputs) {
  static const auto product = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
                                  .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, c10::string_view,
                                                c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>)>();
  Weight weight;
  {
    const std::lock_guard<std::mutex> lock(guard);
    weight = weights.at(number);
  }
  if (weight.small.has_value() && given.numel() == given.size(-1)) return at::linear(given, *weight.small, weight.bias);
  return product.call(given, weight.packed, weight.bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(manta, m) {
  m.def("begin(Tensor[] keys, Tensor[] values, int[] parts, int few) -> ()", begin);
  m.def("hold(int number, Tensor packed, Tensor? bias, Tensor? small) -> ()", hold);
  m.def("release(int number) -> ()", release);
}

TORCH_LIBRARY_IMPL(manta, CPU, m) {
  m.impl("attend", attend);
  m.impl("linear", linear);
}
