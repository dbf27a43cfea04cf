// A decoder of Llama's kind (Touvron et al. 2023), in fp32 or bf16, with 8-bit weights or not: RMSNorm (Zhang and Sennrich
// 2019) before attention and before the gated MLP, and rotary position embeddings (Su et al. 2021), which rotate a head's
// first half with its second. A step is one call: the products of a small model take less time than Python takes to call
// them. In bf16, inputs and outputs of attention and of oneDNN's products are bf16; everything between them is fp32.
// Shapes: T tokens of the step, D width of the model, V vocabulary.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tensor.h>
#include <torch/custom_class.h>

#include <array>
#include <utility>
#include <vector>

#include "attention.h"
#include "products.h"

namespace manta {

constexpr int64_t GRAIN = 1 << 15;  // elements for each thread, at least: fewer are not worth starting one

inline void normalize(const float* from, const Tensor& weight, float epsilon, float* to) {
  const int64_t width = weight.numel();
  const float* factors = weight.const_data_ptr<float>();
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < width; ++d) squares += from[d] * from[d];
  const float scale = 1 / std::sqrt(squares / width + epsilon);
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) to[d] = factors[d] * (from[d] * scale);
}

// gate = silu(gate) * up (Shazeer 2020)
inline void activate(float* gate, const float* up, int64_t count) {
  using Class = at::vec::Vectorized<float>;
  at::vec::map2<float>([](Class a, Class b) { return a / (Class(1) + a.neg().exp()) * b; }, gate, gate, up, count);
}

struct Layer {
  Tensor before, after, query_norm, key_norm;  // weights of norms; the last two are empty where heads have no norms
  Weight query, key, value, out, gate, up, down;
};

// The cosines and sines of each token's rotary embedding, [T, half of a head's width].
struct Rotations {
  std::vector<float> cosines, sines;
  int64_t half;
};

struct Decoder : torch::CustomClassHolder {
  Tensor table, scales;  // [V, D] embeddings; [V] their scales, or empty
  Tensor norm, frequencies;  // [D]; radians per token, [half of a head's width]
  std::vector<Layer> layers;
  Weight head;
  float epsilon, factor;  // of the norms; of the cosines and sines

  // `shared`: the four tensors above; `norms`: four of each layer; `products`: numbers of each layer's seven weights, and the head's.
  Decoder(std::vector<Tensor> shared, std::vector<Tensor> norms, std::vector<int64_t> products, double epsilon, double factor)
      : table(shared.at(0)), scales(shared.at(1)), norm(shared.at(2)), frequencies(shared.at(3)), head(held(products.back())),
        epsilon(epsilon), factor(factor) {
    for (size_t i = 0; i < norms.size() / 4; ++i) {
      const auto norm_of = [&](size_t j) { return norms.at(4 * i + j); };
      const auto of = [&](size_t j) { return held(products.at(7 * i + j)); };
      layers.push_back({norm_of(0), norm_of(1), norm_of(2), norm_of(3), of(0), of(1), of(2), of(3), of(4), of(5), of(6)});
    }
  }

  // Run the tokens of this thread's step; return the logits of those at `logit_rows`: [rows, V].
  Tensor run(const std::vector<int64_t>& ids, const std::vector<int64_t>& logit_rows) const {
    const int64_t tokens = ids.size();
    const Rotations rotations = rotations_of(current_step.batch, tokens);
    const Tensor numbers = at::tensor(ids);
    Tensor hidden = at::embedding(table, numbers).to(at::kFloat);
    if (scales.numel()) hidden.mul_(scales.index_select(0, numbers).unsqueeze(1));
    for (size_t i = 0; i < layers.size(); ++i) {
      const Layer& layer = layers[i];
      auto [query, key, value] = projected(layer, normalized(hidden, layer.before));
      rotate(query, layer.query_norm, rotations);
      rotate(key, layer.key_norm, rotations);
      const Tensor attended = attend(heads(own(query)), heads(own(key)), heads(own(value)), i, std::nullopt, std::nullopt);
      add(attended.view({tokens, -1}), layer.out, hidden);
      add(gated(layer, normalized(hidden, layer.after)), layer.down, hidden);
    }
    return product(own(normalized(hidden.index_select(0, at::tensor(logit_rows)), norm)), head);
  }

 private:
  // Cast to the precision of products and attention.
  static Tensor own(const Tensor& rows) { return rows.to(current_step.keys.at(0).scalar_type()); }

  Rotations rotations_of(const std::vector<ScheduledSequence>& batch, int64_t tokens) const {
    const int64_t half = frequencies.numel();
    const float* frequency = frequencies.const_data_ptr<float>();
    Rotations result{std::vector<float>(tokens * half), std::vector<float>(tokens * half), half};
    for (const ScheduledSequence& inputs : batch) {
      for (int64_t i = 0; i < inputs.count * half; ++i) {
        const float angle = static_cast<float>(inputs.num_computed + i / half) * frequency[i % half];
        result.cosines[inputs.row * half + i] = std::cos(angle) * factor;
        result.sines[inputs.row * half + i] = std::sin(angle) * factor;
      }
    }
    return result;
  }

  Tensor normalized(const Tensor& rows, const Tensor& weight) const {
    Tensor result = at::empty_like(rows);
    const float* from = rows.const_data_ptr<float>();
    each_row(result, [&](int64_t i, float* to) { normalize(from + i * rows.size(1), weight, epsilon, to); });
    return result;
  }

  void rotate(Tensor& rows, const Tensor& norm, const Rotations& by) const {
    each_row(rows, [&](int64_t i, float* row) {
      const float* cosines = by.cosines.data() + i * by.half;
      const float* sines = by.sines.data() + i * by.half;
      for (float* head = row; head < row + rows.size(1); head += 2 * by.half) {
        if (norm.numel()) normalize(head, norm, epsilon, head);
#pragma omp simd
        for (int64_t d = 0; d < by.half; ++d) {
          const float a = head[d], b = head[d + by.half];
          head[d] = a * cosines[d] - b * sines[d];
          head[d + by.half] = b * cosines[d] + a * sines[d];
        }
      }
    });
  }

  // View rows of concatenated heads as attention takes them: [1, heads, T, width].
  Tensor heads(const Tensor& rows) const { return rows.view({1, rows.size(0), -1, 2 * frequencies.numel()}).transpose(1, 2); }

  // Queries, keys and values in fp32: [T, outputs] each.
  static std::array<Tensor, 3> projected(const Layer& layer, const Tensor& rows) {
    if (!layer.query.is_own()) return {by_float(rows, layer.query), by_float(rows, layer.key), by_float(rows, layer.value)};
    const std::array<const Weight*, 3> weights{&layer.query, &layer.key, &layer.value};
    std::array<Tensor, 3> result;
    std::vector<std::pair<size_t, int64_t>> tasks;  // index of the weight, and block
    for (size_t j = 0; j < weights.size(); ++j) {
      result[j] = at::empty({rows.size(0), weights[j]->outputs}, rows.options());
      for (int64_t block = 0; block < weights[j]->blocks(); ++block) tasks.emplace_back(j, block);
    }
    const float* x = rows.const_data_ptr<float>();
    at::parallel_for(0, tasks.size(), 1, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        const auto [j, block] = tasks[i];
        multiply(x, rows.size(0), *weights[j], block, false, result[j].mutable_data_ptr<float>());
      }
    });
    return result;
  }

  // Input of the MLP's down projection: [T, outputs of the gate].
  static Tensor gated(const Layer& layer, const Tensor& rows) {
    const int64_t width = layer.gate.outputs;
    if (!layer.gate.is_own()) {
      Tensor gate = by_float(rows, layer.gate);
      const Tensor up = by_float(rows, layer.up);
      each_row(gate, [&](int64_t i, float* row) { activate(row, up.const_data_ptr<float>() + i * width, width); });
      return gate;
    }
    Tensor gate = at::empty({rows.size(0), width}, rows.options()), up = at::empty_like(gate);
    const float* x = rows.const_data_ptr<float>();
    float* gates = gate.mutable_data_ptr<float>();
    float* ups = up.mutable_data_ptr<float>();
    at::parallel_for(0, layer.gate.blocks(), 1, [&](int64_t first, int64_t end) {
      for (int64_t block = first; block < end; ++block) {
        multiply(x, rows.size(0), layer.gate, block, false, gates);
        multiply(x, rows.size(0), layer.up, block, false, ups);
        const int64_t from = block * BLOCK, count = std::min(BLOCK, width - from);
        for (int64_t at = from; at < rows.size(0) * width; at += width) activate(gates + at, ups + at, count);
      }
    });
    return gate;
  }

  static void add(const Tensor& rows, const Weight& weight, Tensor& to) {
    if (!weight.is_own()) return (void)to.add_(product(own(rows), weight));
    const Tensor floats = rows.to(at::kFloat);
    const float* x = floats.const_data_ptr<float>();
    float* sums = to.mutable_data_ptr<float>();
    at::parallel_for(0, weight.blocks(), 1, [&](int64_t first, int64_t end) {
      for (int64_t block = first; block < end; ++block) multiply(x, rows.size(0), weight, block, true, sums);
    });
  }

  static Tensor by_float(const Tensor& rows, const Weight& weight) { return product(own(rows), weight).to(at::kFloat); }

  // Call `use` with each row's index and first element.
  template <typename Use>
  static void each_row(Tensor& rows, Use use) {
    const int64_t width = rows.size(1);
    float* first = rows.mutable_data_ptr<float>();
    at::parallel_for(0, rows.size(0), std::max<int64_t>(GRAIN / width, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) use(i, first + i * width);
    });
  }
};

}  // namespace manta
