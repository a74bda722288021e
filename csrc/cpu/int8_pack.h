// Operands of int8 products in the order that the kernels read. SSE2, which every x86-64 has, suffices: each element is
// packed once and multiplied often.
#pragma once

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "../int8_mm.h"

namespace bigkern {

// A block of a panel: see kBlockDepth. `depth` rows of B by `cols` columns, at most kPanelCols.
inline void pack_block(const Int8Matrix& b, int64_t depth, int64_t cols, char* to) {
  int32_t* const pair_sums = reinterpret_cast<int32_t*>(to);  // [kPanelCols]
  uint8_t* group = reinterpret_cast<uint8_t*>(to) + kBlockHeader;
  std::memset(pair_sums, 0, kBlockHeader);
  int64_t k = 0;
#if defined(__x86_64__)
  const __m128i offset = _mm_set1_epi8(-128), low_byte = _mm_set1_epi16(255);
  __m128i sums[4] = {};
  const auto store = [&](uint8_t* g, int part, __m128i values) {  // four columns
    values = _mm_xor_si128(values, offset);
    _mm_store_si128(reinterpret_cast<__m128i*>(g) + part, values);
    const __m128i products = _mm_madd_epi16(_mm_and_si128(values, low_byte), _mm_srli_epi16(values, 8));
    sums[part] = _mm_sub_epi32(sums[part], products);
  };
  const auto load = [](const int8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
  if (cols == kPanelCols && b.row == 1) {  // columns are adjacent: four groups of four columns at once
    for (; k + 16 <= depth; k += 16, group += 4 * kGroupBytes) {
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const int8_t* column = b.at(k, 4 * part);
        const __m128i c0 = load(column), c1 = load(column + b.col);
        const __m128i c2 = load(column + 2 * b.col), c3 = load(column + 3 * b.col);
        const __m128i low01 = _mm_unpacklo_epi32(c0, c1), high01 = _mm_unpackhi_epi32(c0, c1);
        const __m128i low23 = _mm_unpacklo_epi32(c2, c3), high23 = _mm_unpackhi_epi32(c2, c3);
        store(group, part, _mm_unpacklo_epi64(low01, low23));
        store(group + kGroupBytes, part, _mm_unpackhi_epi64(low01, low23));
        store(group + 2 * kGroupBytes, part, _mm_unpacklo_epi64(high01, high23));
        store(group + 3 * kGroupBytes, part, _mm_unpackhi_epi64(high01, high23));
      }
    }
  } else if (cols == kPanelCols && b.col == 1) {  // rows are adjacent
    for (; k + 4 <= depth; k += 4, group += kGroupBytes) {
      const __m128i r0 = load(b.at(k, 0)), r1 = load(b.at(k + 1, 0));
      const __m128i r2 = load(b.at(k + 2, 0)), r3 = load(b.at(k + 3, 0));
      const __m128i low01 = _mm_unpacklo_epi8(r0, r1), high01 = _mm_unpackhi_epi8(r0, r1);
      const __m128i low23 = _mm_unpacklo_epi8(r2, r3), high23 = _mm_unpackhi_epi8(r2, r3);
      store(group, 0, _mm_unpacklo_epi16(low01, low23));
      store(group, 1, _mm_unpackhi_epi16(low01, low23));
      store(group, 2, _mm_unpacklo_epi16(high01, high23));
      store(group, 3, _mm_unpackhi_epi16(high01, high23));
    }
  }
  for (int part = 0; part < 4; ++part) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(pair_sums) + part, sums[part]);
  }
#endif
  for (; k < depth; k += kGroupDepth, group += kGroupBytes) {
    std::memset(group, 0, kGroupBytes);
    const int64_t n = std::min(kGroupDepth, depth - k);
    for (int64_t j = 0; j < cols; ++j) {
      uint8_t* const to_col = group + j * kGroupDepth;
      for (int64_t r = 0; r < n; ++r) to_col[r] = static_cast<uint8_t>(*b.at(k + r, j) + 128);
      pair_sums[j] -= to_col[0] * to_col[1] + to_col[2] * to_col[3];
    }
  }
}

// What becomes of a group of four elements of a row of A: int8 as they are, or for the kernels of pair sums int16, the
// even ones before the odd ones.
enum class LeftFormat { kBytes, kPairSums };

constexpr int64_t left_group_bytes(LeftFormat format) { return format == LeftFormat::kBytes ? 4 : 8; }

// A row of A in groups that are `step` bytes apart, the last one filled up with zeros. Returns what its sums begin
// with, modulo 2^32: minus 128 times the sum of the row, since B is greater by 128, and minus its own products of
// pairs.
inline uint32_t pack_left(LeftFormat format, const int8_t* row, int64_t stride, int64_t depth, char* to, int64_t step) {
  uint32_t sum = 0, products = 0;
  int64_t k = 0;
#if defined(__x86_64__)
  if (stride == 1) {
    const __m128i offset = _mm_set1_epi8(-128);
    __m128i sums = _mm_setzero_si128(), pairs = _mm_setzero_si128();
    for (; k + 16 <= depth; k += 16, to += 4 * step) {
      const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k));
      sums = _mm_add_epi64(sums, _mm_sad_epu8(_mm_xor_si128(a, offset), _mm_setzero_si128()));  // of a + 128
      if (format == LeftFormat::kBytes) {
        int32_t groups[4];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(groups), a);
        for (int g = 0; g < 4; ++g) std::memcpy(to + g * step, groups + g, sizeof(int32_t));
      } else {
        const __m128i even = _mm_srai_epi16(_mm_slli_epi16(a, 8), 8), odd = _mm_srai_epi16(a, 8);
        pairs = _mm_add_epi32(pairs, _mm_madd_epi16(even, odd));
        const __m128i low = _mm_unpacklo_epi32(even, odd), high = _mm_unpackhi_epi32(even, odd);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), low);
        _mm_storeh_pd(reinterpret_cast<double*>(to + step), _mm_castsi128_pd(low));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 2 * step), high);
        _mm_storeh_pd(reinterpret_cast<double*>(to + 3 * step), _mm_castsi128_pd(high));
      }
    }
    uint32_t lanes[4];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes), sums);
    sum = lanes[0] + lanes[2] - 128u * static_cast<uint32_t>(k);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes), pairs);
    products = lanes[0] + lanes[1] + lanes[2] + lanes[3];
  }
#endif
  for (; k < depth; k += kGroupDepth, to += step) {
    int8_t group[kGroupDepth] = {};
    for (int64_t r = 0; r < kGroupDepth && k + r < depth; ++r) group[r] = row[(k + r) * stride];
    for (const int8_t a : group) sum += a;
    if (format == LeftFormat::kBytes) {
      std::memcpy(to, group, sizeof(group));
    } else {
      const int16_t words[] = {group[0], group[2], group[1], group[3]};
      std::memcpy(to, words, sizeof(words));
      products += group[0] * group[1] + group[2] * group[3];
    }
  }
  return -128u * sum - (format == LeftFormat::kPairSums ? products : 0u);
}

}  // namespace bigkern
