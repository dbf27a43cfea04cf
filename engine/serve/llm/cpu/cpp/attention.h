// Attention over slots: each sequence's new tokens attend to the keys and values in its own slot of the KV cache.
// Shapes: T tokens of the step, N slots, C capacity of a slot, H query heads, K key heads, D width of a head.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <cmath>
#include <optional>
#include <vector>

#include "vectors.h"

namespace manta {

using at::Tensor;

// A sequence's part of the step: `count` tokens from `row` on, after `num_computed` tokens that are in its slot.
struct ScheduledSequence {
  int64_t row, count, slot, num_computed;
};

struct Step {
  std::vector<Tensor> keys, values;  // of each layer: [N, K, C, D]
  std::vector<ScheduledSequence> batch;
  int64_t max_row_tokens;  // of a sequence, for which attention is computed row by row
};

inline thread_local Step current_step;

inline void begin(std::vector<Tensor> keys, std::vector<Tensor> values, at::IntArrayRef table, int64_t max_row_tokens) {
  current_step = {std::move(keys), std::move(values), {}, max_row_tokens};
  for (size_t i = 0; i < table.size(); i += 4) {
    current_step.batch.push_back({table[i], table[i + 1], table[i + 2], table[i + 3]});
  }
}

// Call `use` with a head's width in vectors, as a constant for common widths, whose vectors then stay in registers.
template <typename Use>
void with_vectors(int64_t width, Use use) {
  switch (width % WIDTH ? 0 : width / WIDTH) {
    case 1: return use(std::integral_constant<int, 1>());
    case 2: return use(std::integral_constant<int, 2>());
    case 4: return use(std::integral_constant<int, 4>());
    case 6: return use(std::integral_constant<int, 6>());
    case 8: return use(std::integral_constant<int, 8>());
    default: return use(std::integral_constant<int, 0>());
  }
}

// scores[j] = scale * query . keys[j]
template <int VECTORS, typename T>
void dots(const T* query, const T* keys, int64_t length, int64_t width, float scale, float* scores) {
  if constexpr (VECTORS == 0) {
    for (int64_t j = 0; j < length; ++j) {
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < width; ++d) dot += static_cast<float>(query[d]) * static_cast<float>(keys[j * width + d]);
      scores[j] = dot * scale;
    }
  } else {
    Floats own[VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) own[i] = load(query + i * WIDTH) * scale;
#pragma GCC unroll 4
    for (int64_t j = 0; j < length; ++j) {
      Floats products = {};
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; ++i) products += own[i] * load(keys + (j * VECTORS + i) * WIDTH);
      scores[j] = sum(products);
    }
  }
}

// out = factor * sum of weights[j] * values[j]
template <int VECTORS, typename T>
void mix(const float* weights, const T* values, int64_t length, int64_t width, float factor, T* out) {
  if constexpr (VECTORS == 0) {
    for (int64_t d = 0; d < width; ++d) {
      float sum = 0;
      for (int64_t j = 0; j < length; ++j) sum += weights[j] * static_cast<float>(values[j * width + d]);
      out[d] = static_cast<T>(sum * factor);
    }
  } else {
    Floats even[VECTORS] = {}, odd[VECTORS] = {};  // two independent sums, to hide latency
    int64_t j = 0;
    for (; j + 2 <= length; j += 2) {
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; ++i) {
        even[i] += weights[j] * load(values + (j * VECTORS + i) * WIDTH);
        odd[i] += weights[j + 1] * load(values + ((j + 1) * VECTORS + i) * WIDTH);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) {
      if (j < length) even[i] += weights[j] * load(values + (j * VECTORS + i) * WIDTH);
      store((even[i] + odd[i]) * factor, out + i * WIDTH);
    }
  }
}

// One query against the first `length` keys and values of a slot's head.
template <typename T>
void attend_row(const T* query, const T* keys, const T* values, int64_t length, int64_t key_width, int64_t value_width,
                float scale, float* scores, T* out) {
  using Class = at::vec::Vectorized<float>;
  with_vectors(key_width, [&](auto it) { dots<decltype(it)::value>(query, keys, length, key_width, scale, scores); });
  const float max_score = at::vec::reduce_all<float>([](Class a, Class b) { return at::vec::maximum(a, b); }, scores, length);
  at::vec::map<float>([max_score](Class score) { return (score - Class(max_score)).exp(); }, scores, scores, length);
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < length; ++j) total += scores[j];
  with_vectors(value_width, [&](auto it) { mix<decltype(it)::value>(scores, values, length, value_width, 1 / total, out); });
}

// Write the tokens' keys and values into a layer's slots, and attend for the sequences with few tokens.
template <typename T>
void attend_rows(const Step& step, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
                 float scale, Tensor& out) {
  const int64_t heads = query.size(1), key_heads = key.size(1), group = heads / key_heads, capacity = keys.size(2);
  const int64_t key_width = key.size(3), value_width = value.size(3);
  const T* q = query.const_data_ptr<T>();
  const T* k = key.const_data_ptr<T>();
  const T* v = value.const_data_ptr<T>();
  T* all_keys = keys.mutable_data_ptr<T>();
  T* all_values = values.mutable_data_ptr<T>();
  T* o = out.mutable_data_ptr<T>();
  const int64_t num_tasks = static_cast<int64_t>(step.batch.size()) * key_heads;  // a sequence and a key head each
  at::parallel_for(0, num_tasks, 1, [&](int64_t first, int64_t end) {
    std::vector<float> scores(capacity);
    for (int64_t task = first; task < end; ++task) {
      const ScheduledSequence& inputs = step.batch[task / key_heads];
      const int64_t h = task % key_heads, start = (inputs.slot * key_heads + h) * capacity;
      T* own_keys = all_keys + start * key_width;
      T* own_values = all_values + start * value_width;
      for (int64_t i = 0; i < inputs.count; ++i) {
        const int64_t t = inputs.row + i, at = inputs.num_computed + i;
        std::copy_n(k + h * key.stride(1) + t * key.stride(2), key_width, own_keys + at * key_width);
        std::copy_n(v + h * value.stride(1) + t * value.stride(2), value_width, own_values + at * value_width);
        for (int64_t g = h * group; inputs.count <= step.max_row_tokens && g < (h + 1) * group; ++g) {
          attend_row(q + g * query.stride(1) + t * query.stride(2), own_keys, own_values, at + 1, key_width, value_width, scale,
                     scores.data(), o + (t * heads + g) * value_width);
        }
      }
    }
  });
}

// Write the step's keys and values [1, K, T, D] into a layer's slots, and attend to each sequence's own: [1, T, H, D].
inline Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, int64_t layer, std::optional<double> scaling,
                     std::optional<int64_t> window) {
  const Step& step = current_step;
  for (const ScheduledSequence& inputs : step.batch) {
    const int64_t length = inputs.num_computed + inputs.count;
    TORCH_CHECK(!window.has_value() || !*window || length <= *window, length, " tokens are over its window of ", *window);
  }
  TORCH_CHECK(query.scalar_type() == at::kFloat || query.scalar_type() == at::kBFloat16, "neither fp32 nor bf16");
  const int64_t heads = query.size(1), group = heads / key.size(1);
  const Tensor& keys = step.keys.at(layer);
  const Tensor& values = step.values.at(layer);
  const float scale = scaling.has_value() ? *scaling : 1 / std::sqrt(static_cast<double>(query.size(3)));
  Tensor out = at::empty({1, query.size(2), heads, value.size(3)}, query.options());
  (query.scalar_type() == at::kFloat ? attend_rows<float> : attend_rows<at::BFloat16>)(step, query, key, value, keys, values, scale, out);
  for (const ScheduledSequence& inputs : step.batch) {  // chunks of prompts
    if (inputs.count <= step.max_row_tokens) continue;
    const int64_t length = inputs.num_computed + inputs.count;
    std::optional<Tensor> mask;
    if (inputs.num_computed) mask = at::ones({inputs.count, length}, query.options().dtype(at::kBool)).tril(inputs.num_computed);
    const auto own = [&](const Tensor& all) { return all.narrow(0, inputs.slot, 1).narrow(2, 0, length); };
    const Tensor attended = at::scaled_dot_product_attention(query.narrow(2, inputs.row, inputs.count), own(keys), own(values), mask, 0.0,
                                                             !inputs.num_computed, scale, group > 1);
    out.narrow(1, inputs.row, inputs.count).copy_(attended.transpose(1, 2));
  }
  return out;
}

}  // namespace manta
