// Transposing bytes. SSE2, which every x86-64 has, suffices.
#pragma once

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include <cstdint>

namespace bigkern {

#if defined(__x86_64__)
// 16 by 16 bytes, from rows `from_row` apart to rows `to_row` apart.
inline void transpose_16x16(const int8_t* from, int64_t from_row, int8_t* to, int64_t to_row) {
  __m128i a[16], b[16];
  for (int r = 0; r < 16; ++r) a[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * from_row));
  // Four times, rows r and r + 8 are interleaved to rows 2 r and 2 r + 1.
  const auto interleave = [](const __m128i* x, __m128i* y) {
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      y[2 * r] = _mm_unpacklo_epi8(x[r], x[r + 8]);
      y[2 * r + 1] = _mm_unpackhi_epi8(x[r], x[r + 8]);
    }
  };
  interleave(a, b);
  interleave(b, a);
  interleave(a, b);
  interleave(b, a);
  for (int r = 0; r < 16; ++r) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + r * to_row), a[r]);
}
#endif

// [rows, cols], from rows `from_row` apart, to [cols, rows].
inline void transpose_bytes(const int8_t* from, int64_t from_row, int64_t rows, int64_t cols, int8_t* to,
                            int64_t to_row) {
  int64_t j = 0;
#if defined(__x86_64__)
  if (rows == 16) {
    for (; j + 16 <= cols; j += 16) transpose_16x16(from + j, from_row, to + j * to_row, to_row);
  }
#endif
  for (; j < cols; ++j) {
    for (int64_t i = 0; i < rows; ++i) to[j * to_row + i] = from[i * from_row + j];
  }
}

}  // namespace bigkern
