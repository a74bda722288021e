// How registers of matrices hold elements, and in what products are summed.
#pragma once

#include <immintrin.h>

#include "ptx.h"

#pragma GCC visibility push(hidden)
namespace emulator {

// Floating point numbers in double, which is rounded once, at the end, while a card rounds in an order and width of its
// own; bytes in float, in which 32 products are exact.

struct F16 {
  static constexpr int kPer = 2;
  using Sum = double;
  static void decode(const uint32_t* bits, int registers, float* out) {
    for (int i = 0; i < registers; i += 4) {
      const auto halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + i));
      _mm256_storeu_ps(out + 2 * i, _mm256_cvtph_ps(halves));
    }
  }
};

struct Bf16 {
  static constexpr int kPer = 2;
  using Sum = double;
  static void decode(const uint32_t* bits, int registers, float* out) {
    for (int i = 0; i < registers; ++i) {
      out[2 * i] = as<float>(bits[i] << 16);
      out[2 * i + 1] = as<float>(bits[i] & 0xffff0000u);
    }
  }
};

struct Tf32 {
  static constexpr int kPer = 1;
  using Sum = double;
  static void decode(const uint32_t* bits, int registers, float* out) {
    for (int i = 0; i < registers; ++i) out[i] = as<float>(bits[i] & ~0x1fffu);  // the rest is ignored
  }
};

struct S8 {
  static constexpr int kPer = 4;
  using Sum = float;
  static void decode(const uint32_t* bits, int registers, float* out) {
    const auto* bytes = reinterpret_cast<const int8_t*>(bits);
    for (int i = 0; i < 4 * registers; ++i) out[i] = bytes[i];
  }
};

inline uint32_t rounded(double sum, uint32_t c) { return as<uint32_t>(static_cast<float>(sum + as<float>(c))); }
inline uint32_t rounded(float sum, uint32_t c) { return c + static_cast<int32_t>(sum); }  // wraps around

}  // namespace emulator
#pragma GCC visibility pop
