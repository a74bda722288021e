// How registers of matrices hold elements, and in what products are summed.
#pragma once

#include <immintrin.h>

#include "ptx.h"

#pragma GCC visibility push(hidden)
namespace emulator {

// Floating point numbers in double, which is rounded once, at the end, while a card rounds in an order and width of its
// own; bytes in float, in which 32 products are exact.

// The sum with C, as the bits of a register.
struct FloatSums {
  using Sum = double;
  static uint32_t add(double sum, uint32_t c) { return as<uint32_t>(static_cast<float>(sum + as<float>(c))); }
};

struct F16 : FloatSums {
  static constexpr int kPer = 2;
  static void decode(const uint32_t* bits, int registers, float* out) {
    for (int i = 0; i < registers; i += 4) {
      const auto halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + i));
      _mm256_storeu_ps(out + 2 * i, _mm256_cvtph_ps(halves));
    }
  }
};

struct Bf16 : FloatSums {
  static constexpr int kPer = 2;
  static void decode(const uint32_t* bits, int registers, float* out) {
    for (int i = 0; i < registers; ++i) {
      out[2 * i] = as<float>(bits[i] << 16);
      out[2 * i + 1] = as<float>(bits[i] & 0xffff0000u);
    }
  }
};

struct Tf32 : FloatSums {
  static constexpr int kPer = 1;
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
  static uint32_t add(float sum, uint32_t c) { return c + static_cast<int32_t>(sum); }  // wraps around
};

struct S8Saturating : S8 {
  static uint32_t add(float sum, uint32_t c) {
    return clamp<int32_t>(static_cast<int64_t>(sum) + static_cast<int32_t>(c));
  }
};

}  // namespace emulator
#pragma GCC visibility pop
