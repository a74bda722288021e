// The inner step of int8 products for each instruction set, under one set of names: a register Reg of kCols int32 sums,
// one for each column; Right, a group of four rows of B by kCols columns; Left, four elements of a row of A.
//
// B is b + 128 in uint8. Two ways to multiply it:
// - by bytes, vpdpbusd (VNNI): a . (b + 128), four products a lane.
// - by pair sums, without VNNI: vpmaddubsw saturates, so 16 bits it must be, and of two vpmaddwd for four products one
//   is saved by Winograd's identity (1968), x0 y0 + x1 y1 = (x0 + y1) (x1 + y0) - x0 x1 - y0 y1. Additions of words
//   run on more ports. The last two terms are sums over a row of A or a column of B, counted when those are packed.
// All is modulo 2^32. Assembly where GCC 12 would keep the sums on the stack.
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
  using Left = const int8_t*;
  using Right = const uint8_t*;
  static Reg load(const int32_t* p) { return read_as<Reg>(reinterpret_cast<const char*>(p)); }
  static void store(int32_t* p, const Reg& a) { std::memcpy(p, &a, sizeof(a)); }
  static Reg set(int32_t a) {
    Reg reg;
    for (uint32_t& lane : reg.lanes) lane = a;
    return reg;
  }
  static Left load_left(const char* p) { return reinterpret_cast<const int8_t*>(p); }
  static Right load_right(const char* p) { return reinterpret_cast<const uint8_t*>(p); }
  static void dot(Reg& sum, Left a, const Right& b) {
    for (int j = 0; j < kCols; ++j) {
      for (int r = 0; r < kGroupDepth; ++r) sum.lanes[j] += a[r] * b[j * kGroupDepth + r];
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
  struct Pair {
    __m256i even, odd;  // int16
  };
  using Left = Pair;
  using Right = Pair;
  BK_DOT Reg load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  BK_DOT void store(int32_t* p, Reg a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  BK_DOT Reg set(int32_t a) { return _mm256_set1_epi32(a); }
  BK_DOT Reg add(Reg a, Reg b) { return _mm256_add_epi32(a, b); }
  BK_DOT Left load_left(const char* p) {
    return {_mm256_set1_epi32(read_as<int32_t>(p)), _mm256_set1_epi32(read_as<int32_t>(p + 4))};
  }
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
  BK_DOT void dot(Reg& sum, const Left& a, const Right& b) {
    __m256i x, y;
    asm("vpaddw %4, %3, %1\n\t"
        "vpaddw %6, %5, %2\n\t"
        "vpmaddwd %1, %2, %1\n\t"
        "vpaddd %1, %0, %0"
        : "+x"(sum), "=&x"(x), "=&x"(y)
        : "x"(a.even), "xm"(b.odd), "x"(a.odd), "xm"(b.even));
  }
};

#undef BK_DOT

}  // namespace avx2

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
  struct Pair {
    __m512i even, odd;  // int16
  };
  using Left = Pair;
  using Right = Pair;
  BK_DOT Left load_left(const char* p) {
    return {_mm512_set1_epi32(read_as<int32_t>(p)), _mm512_set1_epi32(read_as<int32_t>(p + 4))};
  }
  BK_DOT Right load_right(const char* p) {
    const __m512i b = _mm512_loadu_si512(p);
    return {_mm512_and_si512(b, _mm512_set1_epi16(255)), _mm512_srli_epi16(b, 8)};
  }
  BK_DOT void store_wide(char* p, const Right& b) {
    _mm512_store_si512(p, b.even);
    _mm512_store_si512(p + 64, b.odd);
  }
  BK_DOT Right load_wide(const char* p) { return {_mm512_load_si512(p), _mm512_load_si512(p + 64)}; }
  BK_DOT void dot(Reg& sum, const Left& a, const Right& b) {
    __m512i x, y;
    asm("vpaddw %4, %3, %1\n\t"
        "vpaddw %6, %5, %2\n\t"
        "vpmaddwd %1, %2, %1\n\t"
        "vpaddd %1, %0, %0"
        : "+v"(sum), "=&v"(x), "=&v"(y)
        : "v"(a.even), "vm"(b.odd), "v"(a.odd), "vm"(b.even));
  }
};

struct Int8Vnni : Int8Sums {
  static constexpr LeftFormat kLeft = LeftFormat::kBytes;
  static constexpr int kRegs = 4;
  using Left = __m512i;
  using Right = __m512i;
  BK_DOT Left load_left(const char* p) { return _mm512_set1_epi32(read_as<int32_t>(p)); }
  BK_DOT Right load_right(const char* p) { return _mm512_loadu_si512(p); }
  // Assembly also so that the set needn't be a target.
  BK_DOT void dot(Reg& sum, Left a, Right b) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a)); }
};

#undef BK_DOT

}  // namespace avx512

#endif

}  // namespace bigkern
