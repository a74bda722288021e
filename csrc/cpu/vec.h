// Vector registers of each instruction set under one set of names: Float (float lanes) and Double (double lanes), which
// load from and store to float32, float64, float16 and bfloat16 memory, rounding to nearest even. Unaligned addresses
// are fine.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace bigkern {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Two adjacent bfloat16 elements: a lane of Float that holds their bits, where the set has products of pairs.
struct BFloat16Pair {
  uint16_t first, second;
  explicit operator float() const {
    float bits;
    std::memcpy(&bits, this, sizeof(bits));
    return bits;
  }
};

namespace scalar {

template <class T>
struct Lane {
  using Scalar = T;
  using Reg = T;
  static constexpr int kWidth = 1;
  static constexpr bool kHasPairs = false;
  template <class Memory>
  static Reg load(const Memory* p) {
    return static_cast<T>(*p);
  }
  template <class Memory>
  static void store(Memory* p, Reg a) {
    *p = static_cast<Memory>(a);
  }
  static Reg set(T a) { return a; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg sqrt(Reg a) { return std::sqrt(a); }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }  // b where either is NaN
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg round(Reg a) { return std::nearbyint(a); }
  static Reg scale(Reg a, Reg n) { return a * std::exp2(n); }                            // a * 2^n, n whole
  static Reg keep_unless_less(Reg a, Reg x, Reg bound) { return x < bound ? T(0) : a; }  // else 0
  static T sum(Reg a) { return a; }
  static T reduce_max(Reg a) { return a; }
};

using Float = Lane<float>;
using Double = Lane<double>;

}  // namespace scalar

#if defined(__x86_64__)

namespace avx2 {

#define BK_VEC BK_TARGET_AVX2 __attribute__((always_inline)) static inline

struct Float {
  using Scalar = float;
  using Reg = __m256;
  static constexpr int kWidth = 8;
  static constexpr bool kHasPairs = false;
  BK_VEC Reg load(const float* p) { return _mm256_loadu_ps(p); }
  BK_VEC Reg load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  BK_VEC Reg load(const BFloat16* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  BK_VEC void store(float* p, Reg a) { _mm256_storeu_ps(p, a); }
  BK_VEC void store(Half* p, Reg a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  BK_VEC void store(BFloat16* p, Reg a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0b1000);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  BK_VEC Reg set(float a) { return _mm256_set1_ps(a); }
  BK_VEC Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  BK_VEC Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  BK_VEC Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  BK_VEC Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  BK_VEC Reg sqrt(Reg a) { return _mm256_sqrt_ps(a); }
  BK_VEC Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  BK_VEC Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  BK_VEC Reg round(Reg a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  BK_VEC Reg scale(Reg a, Reg n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
  }
  BK_VEC Reg keep_unless_less(Reg a, Reg x, Reg bound) {
    return _mm256_and_ps(a, _mm256_cmp_ps(x, bound, _CMP_NLT_UQ));
  }
  BK_VEC float sum(Reg a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  BK_VEC float reduce_max(Reg a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
};

struct Double {
  using Scalar = double;
  using Reg = __m256d;
  static constexpr int kWidth = 4;
  static constexpr bool kHasPairs = false;
  BK_VEC Reg load(const double* p) { return _mm256_loadu_pd(p); }
  BK_VEC Reg load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  BK_VEC Reg load(const Half* p) {
    return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  BK_VEC Reg load(const BFloat16* p) {
    const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
  }
  BK_VEC void store(double* p, Reg a) { _mm256_storeu_pd(p, a); }
  BK_VEC Reg set(double a) { return _mm256_set1_pd(a); }
  BK_VEC Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  BK_VEC Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  BK_VEC Reg div(Reg a, Reg b) { return _mm256_div_pd(a, b); }
  BK_VEC Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  BK_VEC Reg sqrt(Reg a) { return _mm256_sqrt_pd(a); }
  BK_VEC Reg max(Reg a, Reg b) { return _mm256_max_pd(a, b); }
  BK_VEC Reg sub(Reg a, Reg b) { return _mm256_sub_pd(a, b); }
  BK_VEC Reg round(Reg a) { return _mm256_round_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  BK_VEC Reg scale(Reg a, Reg n) {
    const __m256i exponent = _mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n)), 52);
    return _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(a), exponent));
  }
  BK_VEC Reg keep_unless_less(Reg a, Reg x, Reg bound) {
    return _mm256_and_pd(a, _mm256_cmp_pd(x, bound, _CMP_NLT_UQ));
  }
  BK_VEC double reduce_max(Reg a) {
    const __m128d pair = _mm_max_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_max_sd(pair, _mm_unpackhi_pd(pair, pair)));
  }
  BK_VEC double sum(Reg a) {
    const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
  }
};

#undef BK_VEC

}  // namespace avx2

namespace avx512 {

#define BK_VEC BK_TARGET_AVX512 __attribute__((always_inline)) static inline

struct Float {
  using Scalar = float;
  using Reg = __m512;
  static constexpr int kWidth = 16;
  static constexpr bool kHasPairs = true;  // on CPUs of kAvx512Bf16: assembly, so that the set needn't be a target
  BK_VEC Reg load(const float* p) { return _mm512_loadu_ps(p); }
  BK_VEC Reg load(const BFloat16Pair* p) { return _mm512_loadu_ps(p); }
  // c + a.first * b.first + a.second * b.second
  BK_VEC Reg dot_pairs(Reg a, Reg b, Reg c) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
  // Lanes (first, second) of two registers that were loaded from bfloat16.
  BK_VEC Reg pair_up(Reg first, Reg second) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(second)));
  }
  BK_VEC void store_as_pairs(BFloat16* p, Reg a) {
    __m256i rounded;
    asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(a));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
  }
  BK_VEC Reg load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  BK_VEC Reg load(const BFloat16* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  BK_VEC void store(float* p, Reg a) { _mm512_storeu_ps(p, a); }
  BK_VEC void store(Half* p, Reg a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  BK_VEC void store(BFloat16* p, Reg a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i value = _mm512_mask_blend_epi32(is_nan, rounded, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(value, 16)));
  }
  BK_VEC Reg set(float a) { return _mm512_set1_ps(a); }
  BK_VEC Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  BK_VEC Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  BK_VEC Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  BK_VEC Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  BK_VEC Reg sqrt(Reg a) { return _mm512_sqrt_ps(a); }
  BK_VEC Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  BK_VEC Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  BK_VEC Reg round(Reg a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  BK_VEC Reg scale(Reg a, Reg n) { return _mm512_scalef_ps(a, n); }
  BK_VEC Reg keep_unless_less(Reg a, Reg x, Reg bound) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), a);
  }
  BK_VEC float sum(Reg a) { return _mm512_reduce_add_ps(a); }
  BK_VEC float reduce_max(Reg a) { return _mm512_reduce_max_ps(a); }
};

struct Double {
  using Scalar = double;
  using Reg = __m512d;
  static constexpr int kWidth = 8;
  static constexpr bool kHasPairs = false;
  BK_VEC Reg load(const double* p) { return _mm512_loadu_pd(p); }
  BK_VEC Reg load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  BK_VEC Reg load(const Half* p) {
    return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  BK_VEC Reg load(const BFloat16* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
  }
  BK_VEC void store(double* p, Reg a) { _mm512_storeu_pd(p, a); }
  BK_VEC Reg set(double a) { return _mm512_set1_pd(a); }
  BK_VEC Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  BK_VEC Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  BK_VEC Reg div(Reg a, Reg b) { return _mm512_div_pd(a, b); }
  BK_VEC Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  BK_VEC Reg sqrt(Reg a) { return _mm512_sqrt_pd(a); }
  BK_VEC Reg max(Reg a, Reg b) { return _mm512_max_pd(a, b); }
  BK_VEC Reg sub(Reg a, Reg b) { return _mm512_sub_pd(a, b); }
  BK_VEC Reg round(Reg a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  BK_VEC Reg scale(Reg a, Reg n) { return _mm512_scalef_pd(a, n); }
  BK_VEC Reg keep_unless_less(Reg a, Reg x, Reg bound) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x, bound, _CMP_NLT_UQ), a);
  }
  BK_VEC double reduce_max(Reg a) { return _mm512_reduce_max_pd(a); }
  BK_VEC double sum(Reg a) { return _mm512_reduce_add_pd(a); }
};

#undef BK_VEC

}  // namespace avx512

#endif

}  // namespace bigkern
