// Vectors of floats as wide as the processor's, in the compiler's own terms: ATen's class of them doesn't stay in registers
// where many are summed up at once, and is a quarter as fast there.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>

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
  V found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

inline Floats load(const float* from) { return read<Floats>(from); }

inline Floats load(const at::BFloat16* from) {  // the upper halves of floats
  const auto halves = read<Vector<uint16_t, WIDTH>>(from);
  return read<Floats>(&(const Vector<uint32_t, WIDTH>&)(__builtin_convertvector(halves, Vector<uint32_t, WIDTH>) << 16));
}

// The first `count` of a vector's floats, which may be none; the others are zero.
inline Floats load(const float* from, int64_t count) {
  if (count >= WIDTH) return load(from);
  Floats found = {};
  if (count > 0) std::memcpy(&found, from, count * sizeof(float));
  return found;
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
