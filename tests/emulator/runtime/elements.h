// How registers of matrices hold elements, and in what products are summed.
#pragma once

#include <immintrin.h>

#include "ptx.h"

#pragma GCC visibility push(hidden)
namespace emulator {

// Eight columns of a row.
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

// Floating point numbers are summed as Ampere's tensor cores do it (Fasi et al. 2021, Numerical behavior of NVIDIA
// tensor cores): of some products and the sum so far, what lies below the 25th bit of the largest is cut off, and of
// their sum what lies below its 24th. Later cards take more at once, and cut one bit later.
template <int products_at_once>
struct FloatSums {
  using Sums = Floats;
  // b: `depth` rows, `stride` apart.
  static Floats add(Floats sum, const float* a, const Floats* b, int stride, int depth) {
    for (int k = 0; k < depth; k += products_at_once) {
      Floats terms[products_at_once + 1];
      for (int i = 0; i < products_at_once; ++i) terms[i] = a[k + i] * b[(k + i) * stride];  // exact
      terms[products_at_once] = sum;
      sum = add_terms(terms);
    }
    return sum;
  }

 private:
  static Floats add_terms(const Floats (&terms)[products_at_once + 1]) {
    Ints largest = {};
    for (Floats x : terms) {
      const Ints magnitude = reinterpret_cast<Ints>(x) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    const Ints is_not_finite = largest >= 0x7f800000;
    Ints exponent = largest >> 23;
    exponent = exponent < 25 ? 25 : exponent;
    const auto units = reinterpret_cast<Floats>((278 - exponent) << 23);  // 2^24 / 2^exponent
    Ints total = {};
    Floats plain = {};
    for (Floats x : terms) {
      total += __builtin_convertvector(x * units, Ints);  // towards 0
      plain += x;
    }
    Floats rounded = __builtin_convertvector(total, Floats);
    const Ints excess = __builtin_convertvector(rounded, Ints) - total;
    const Ints is_away = ((total > 0) & (excess > 0)) | ((total < 0) & (excess < 0));
    rounded = reinterpret_cast<Floats>(reinterpret_cast<Ints>(rounded) + is_away);  // by -1: towards 0
    return is_not_finite ? plain : rounded * reinterpret_cast<Floats>((exponent - 24) << 23);
  }
};

struct F16 : FloatSums<8> {
  static constexpr int kPer = 2;
  static void decode(const uint32_t* bits, int registers, float* out) {
    for (int i = 0; i < registers; i += 4) {
      const auto halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + i));
      _mm256_storeu_ps(out + 2 * i, _mm256_cvtph_ps(halves));
    }
  }
};

struct Bf16 : FloatSums<8> {
  static constexpr int kPer = 2;
  static void decode(const uint32_t* bits, int registers, float* out) {
    for (int i = 0; i < registers; ++i) {
      out[2 * i] = as<float>(bits[i] << 16);
      out[2 * i + 1] = as<float>(bits[i] & 0xffff0000u);
    }
  }
};

struct Tf32 : FloatSums<4> {
  static constexpr int kPer = 1;
  static void decode(const uint32_t* bits, int registers, float* out) {
    for (int i = 0; i < registers; ++i) out[i] = as<float>(bits[i] & ~0x1fffu);  // the rest is ignored
  }
};

// Sums wrap around.
struct S8 {
  using Sums = Ints;
  static constexpr int kPer = 4;
  static void decode(const uint32_t* bits, int registers, float* out) {
    const auto* bytes = reinterpret_cast<const int8_t*>(bits);
    for (int i = 0; i < 4 * registers; ++i) out[i] = bytes[i];
  }
  static Ints add(Ints sum, const float* a, const Floats* b, int stride, int depth) {
    return sum + products(a, b, stride, depth);
  }

 protected:
  static Ints products(const float* a, const Floats* b, int stride, int depth) {
    Floats sum = {};  // exact for 32 products
    for (int k = 0; k < depth; ++k) sum += a[k] * b[k * stride];
    return __builtin_convertvector(sum, Ints);
  }
};

struct S8Saturating : S8 {
  static Ints add(Ints sum, const float* a, const Floats* b, int stride, int depth) {
    const Ints more = products(a, b, stride, depth);
    for (int i = 0; i < 8; ++i) sum[i] = clamp<int32_t>(static_cast<int64_t>(sum[i]) + more[i]);
    return sum;
  }
};

// Eight columns of D, as registers hold them: + a @ b.
template <class T>
void add_products(uint32_t* d, const float* a, const Floats* b, int stride, int depth) {
  typename T::Sums sums;
  memcpy(&sums, d, sizeof sums);
  sums = T::add(sums, a, b, stride, depth);
  memcpy(d, &sums, sizeof sums);
}

}  // namespace emulator
#pragma GCC visibility pop
