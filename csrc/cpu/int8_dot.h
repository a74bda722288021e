// The inner step of int8 products for each instruction set, under one set of names: a register Reg of kCols int32 sums,
// one for each column; Right, a group of four rows of B by kCols columns; dot(), which adds to N sums the products of
// four elements of a row of A, and N such groups. kRows by kRegs sums are kept in registers.
//
// B is b + 128 in uint8. Two ways to multiply it:
// - by bytes, vpdpbusd (AVX512-VNNI, AVX-VNNI): a . (b + 128), four products a lane.
// - by pair sums, without VNNI: vpmaddubsw saturates, so 16 bits it must be, and of two vpmaddwd for four products one
//   is saved by Winograd's identity (1968), x0 y0 + x1 y1 = (x0 + y1) (x1 + y0) - x0 x1 - y0 y1. Additions of words
//   run on more ports. The last two terms are sums over a row of A or a column of B, counted when those are packed.
// All is modulo 2^32. Assembly where GCC 12 keeps sums on the stack.
#pragma once

#include <cstring>

#include "int8_pack.h"
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bigkern {

template <class T>
T read_as(const char* p) {
  T value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

namespace scalar {

struct Int8Dot {
  static constexpr LeftFormat kLeft = LeftFormat::kBytes;
  static constexpr int kCols = 16, kRows = 1, kRegs = 1;
  struct Reg {
    uint32_t lanes[kCols];
  };
  using Right = const uint8_t*;
  static Reg load(const int32_t* p) { return read_as<Reg>(reinterpret_cast<const char*>(p)); }
  static void store(int32_t* p, const Reg& a) { std::memcpy(p, &a, sizeof(a)); }
  static Reg set(int32_t a) {
    Reg reg;
    for (uint32_t& lane : reg.lanes) lane = a;
    return reg;
  }
  static Right load_right(const char* p) { return reinterpret_cast<const uint8_t*>(p); }
  static void dot(Reg (&sum)[1], const char* left, const Right (&b)[1]) {
    const int8_t* a = reinterpret_cast<const int8_t*>(left);
    for (int j = 0; j < kCols; ++j) {
      for (int r = 0; r < kGroupDepth; ++r) sum[0].lanes[j] += a[r] * b[0][j * kGroupDepth + r];
    }
  }
};

}  // namespace scalar

#if defined(__x86_64__)

namespace avx2 {

#define BK_DOT BK_TARGET_AVX2 __attribute__((always_inline)) static inline

struct Int8Dot {
  static constexpr LeftFormat kLeft = LeftFormat::kPairSums;
  static constexpr int kCols = 8, kRows = 4, kRegs = 2;
  using Reg = __m256i;
  struct Right {
    __m256i even, odd;  // int16
  };
  BK_DOT Reg load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  BK_DOT void store(int32_t* p, Reg a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  BK_DOT Reg set(int32_t a) { return _mm256_set1_epi32(a); }
  BK_DOT Reg add(Reg a, Reg b) { return _mm256_add_epi32(a, b); }
  BK_DOT Right load_right(const char* p) {
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_and_si256(b, _mm256_set1_epi16(255)), _mm256_srli_epi16(b, 8)};
  }
  BK_DOT void store_wide(char* p, const Right& b) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), b.even);
    _mm256_store_si256(reinterpret_cast<__m256i*>(p) + 1, b.odd);
  }
  BK_DOT Right load_wide(const char* p) {
    return {_mm256_load_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_load_si256(reinterpret_cast<const __m256i*>(p) + 1)};
  }
  BK_DOT void dot(Reg (&sum)[1], const char* left, const Right (&b)[1]) {
    const __m256i x = _mm256_add_epi16(_mm256_set1_epi32(read_as<int32_t>(left)), b[0].odd);
    const __m256i y = _mm256_add_epi16(_mm256_set1_epi32(read_as<int32_t>(left + 4)), b[0].even);
    sum[0] = _mm256_add_epi32(sum[0], _mm256_madd_epi16(x, y));
  }
  BK_DOT void dot(Reg (&sum)[2], const char* left, const Right (&b)[2]) {
    using Four = const char[4];
    __m256i even, odd, x, y;
    asm("vpbroadcastd %6, %2\n\t"
        "vpbroadcastd %7, %3\n\t"
        "vpaddw %9, %2, %4\n\t"
        "vpaddw %8, %3, %5\n\t"
        "vpaddw %11, %2, %2\n\t"
        "vpaddw %10, %3, %3\n\t"
        "vpmaddwd %4, %5, %4\n\t"
        "vpmaddwd %2, %3, %2\n\t"
        "vpaddd %4, %0, %0\n\t"
        "vpaddd %2, %1, %1"
        : "+x"(sum[0]), "+x"(sum[1]), "=&x"(even), "=&x"(odd), "=&x"(x), "=&x"(y)
        : "m"(*reinterpret_cast<Four*>(left)), "m"(*reinterpret_cast<Four*>(left + 4)), "x"(b[0].even), "x"(b[0].odd),
          "x"(b[1].even), "x"(b[1].odd));
  }
};

#undef BK_DOT

}  // namespace avx2

// AVX-VNNI, of CPUs that have no AVX-512: no set of its own, since nothing else differs.
#define BK_TARGET_AVX2_VNNI __attribute__((target("avx2,avxvnni,fma,f16c")))

namespace avx2_vnni {

#define BK_DOT BK_TARGET_AVX2_VNNI __attribute__((always_inline)) static inline

struct Int8Dot {
  static constexpr LeftFormat kLeft = LeftFormat::kBytes;
  static constexpr int kCols = 8, kRows = 6, kRegs = 2;
  using Reg = __m256i;
  using Right = __m256i;
  BK_DOT Reg load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  BK_DOT void store(int32_t* p, Reg a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  BK_DOT Reg set(int32_t a) { return _mm256_set1_epi32(a); }
  BK_DOT Right load_right(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  template <int N>
  BK_DOT void dot(Reg (&sum)[N], const char* left, const Right (&b)[N]) {
    const __m256i a = _mm256_set1_epi32(read_as<int32_t>(left));
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) sum[j] = _mm256_dpbusd_avx_epi32(sum[j], b[j], a);
  }
};

#undef BK_DOT

}  // namespace avx2_vnni

namespace avx512 {

#define BK_DOT BK_TARGET_AVX512 __attribute__((always_inline)) static inline

struct Int8Sums {
  static constexpr int kCols = 16, kRows = 6;
  using Reg = __m512i;
  BK_DOT Reg load(const int32_t* p) { return _mm512_loadu_si512(p); }
  BK_DOT void store(int32_t* p, Reg a) { _mm512_storeu_si512(p, a); }
  BK_DOT Reg set(int32_t a) { return _mm512_set1_epi32(a); }
  BK_DOT Reg add(Reg a, Reg b) { return _mm512_add_epi32(a, b); }
};

struct Int8Dot : Int8Sums {
  static constexpr LeftFormat kLeft = LeftFormat::kPairSums;
  static constexpr int kRegs = 2;
  struct Right {
    __m512i even, odd;  // int16
  };
  BK_DOT Right load_right(const char* p) {
    const __m512i b = _mm512_loadu_si512(p);
    return {_mm512_and_si512(b, _mm512_set1_epi16(255)), _mm512_srli_epi16(b, 8)};
  }
  BK_DOT void store_wide(char* p, const Right& b) {
    _mm512_store_si512(p, b.even);
    _mm512_store_si512(p + 64, b.odd);
  }
  BK_DOT Right load_wide(const char* p) { return {_mm512_load_si512(p), _mm512_load_si512(p + 64)}; }
  template <int N>
  BK_DOT void dot(Reg (&sum)[N], const char* left, const Right (&b)[N]) {
    const __m512i even = _mm512_set1_epi32(read_as<int32_t>(left)), odd = _mm512_set1_epi32(read_as<int32_t>(left + 4));
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) {
      const __m512i x = _mm512_add_epi16(even, b[j].odd), y = _mm512_add_epi16(odd, b[j].even);
      sum[j] = _mm512_add_epi32(sum[j], _mm512_madd_epi16(x, y));
    }
  }
};

#undef BK_DOT

}  // namespace avx512

namespace avx512_vnni {

#define BK_DOT BK_TARGET_AVX512_VNNI __attribute__((always_inline)) static inline

struct Int8Dot : avx512::Int8Sums {
  static constexpr LeftFormat kLeft = LeftFormat::kBytes;
  static constexpr int kRegs = 4;
  using Right = __m512i;
  BK_DOT Right load_right(const char* p) { return _mm512_loadu_si512(p); }
  template <int N>
  BK_DOT void dot(Reg (&sum)[N], const char* left, const Right (&b)[N]) {
    const __m512i a = _mm512_set1_epi32(read_as<int32_t>(left));
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[j] = _mm512_dpbusd_epi32(sum[j], b[j], a);
  }
};

#undef BK_DOT

}  // namespace avx512_vnni

#endif

}  // namespace bigkern
