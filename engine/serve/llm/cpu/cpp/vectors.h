// Vectors of floats as wide as the CPU's, as the compiler's vector extension: ATen's vector class doesn't stay in registers
// where many are summed at once, and is a quarter as fast there.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace manta {

#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;  // floats
constexpr int REGISTERS = 32;
#else
constexpr int64_t WIDTH = 8;
constexpr int REGISTERS = 16;
#endif

template <typename T, int64_t COUNT>
using Vector __attribute__((vector_size(COUNT * sizeof(T)))) = T;
using Floats = Vector<float, WIDTH>;

template <typename V>
inline V read(const void* from) {
  V result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline Floats load(const float* from) { return read<Floats>(from); }

// Converted by the CPU's own instructions where it has them: the compiler turns the general form into one for each element.
#if defined(__AVX512F__)
inline Floats load(const at::BFloat16* from) {  // bf16 is the upper half of a float
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(from)), 16));
}
inline Floats load(const int8_t* from) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(from))); }
#elif defined(__AVX2__)
inline Floats load(const at::BFloat16* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(from)), 16));
}
inline Floats load(const int8_t* from) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from))); }
#else
template <typename T>
inline Floats widened(const T* from) {
  Floats result = {};
  for (int64_t i = 0; i < WIDTH; ++i) result[i] = static_cast<float>(from[i]);
  return result;
}
inline Floats load(const at::BFloat16* from) { return widened(from); }
inline Floats load(const int8_t* from) { return widened(from); }
#endif

// The first `count` floats of a vector, which may be none; the others are zero.
inline Floats load(const float* from, int64_t count) {
  if (count >= WIDTH) return load(from);
  Floats result = {};
  if (count > 0) std::memcpy(&result, from, count * sizeof(float));
  return result;
}

template <typename T>
inline void store(Floats numbers, T* to) {
  for (int64_t i = 0; i < WIDTH; ++i) to[i] = static_cast<T>(numbers[i]);
}

inline void store(Floats numbers, float* to, int64_t count) {
  if (count >= WIDTH) return (void)std::memcpy(to, &numbers, sizeof numbers);
  if (count > 0) std::memcpy(to, &numbers, count * sizeof(float));
}

template <int64_t COUNT = WIDTH>
inline float sum(Vector<float, COUNT> numbers) {
  if constexpr (COUNT == 4) {
    return (numbers[0] + numbers[2]) + (numbers[1] + numbers[3]);
  } else {
    using Half = Vector<float, COUNT / 2>;
    const float* first = reinterpret_cast<const float*>(&numbers);
    return sum<COUNT / 2>(read<Half>(first) + read<Half>(first + COUNT / 2));
  }
}

}  // namespace manta
