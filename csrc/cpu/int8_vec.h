// Integers in and out of the registers of vec.h.
#pragma once

#include "vec.h"

namespace bigkern {

namespace scalar {

template <class V>
float load_int(const int32_t* p) {
  return static_cast<float>(*p);
}
template <class V>
float load_int(const int8_t* p) {
  return static_cast<float>(*p);
}
// Rounded half to even; from -128 to 127.
template <class V>
void store_int8(int8_t* p, float a) {
  *p = static_cast<int8_t>(std::nearbyint(a));
}

}  // namespace scalar

#if defined(__x86_64__)

namespace avx2 {

#define BK_VEC       \
  template <class V> \
  BK_TARGET_AVX2 __attribute__((always_inline)) inline

BK_VEC __m256 load_int(const int32_t* p) {
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
BK_VEC __m256 load_int(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
BK_VEC void store_int8(int8_t* p, __m256 a) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_setzero_si256());
  const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm_unpacklo_epi64(low, high), _mm_setzero_si128()));
}

#undef BK_VEC

}  // namespace avx2

namespace avx512 {

#define BK_VEC       \
  template <class V> \
  BK_TARGET_AVX512 __attribute__((always_inline)) inline

BK_VEC __m512 load_int(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
BK_VEC __m512 load_int(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
BK_VEC void store_int8(int8_t* p, __m512 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
}

#undef BK_VEC

}  // namespace avx512

#endif

}  // namespace bigkern
