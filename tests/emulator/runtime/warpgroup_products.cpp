// What a product of a warpgroup computes.
#include "elements.h"
#include "warpgroups.h"

namespace emulator {

namespace {

constexpr int kRows = 64, kWords = 8, kMaxColumns = 256;  // words of a row of A or a column of B

// Rows of A, or columns of B, from shared memory.
template <class T>
void read_matrix(const Site& site, uint64_t matrix, bool is_transposed, int rows, uint32_t (*out)[kWords]) {
  constexpr int kBytes = 4 / T::kPer;
  for (int row = 0; row < rows; ++row) {
    for (int word = 0; word < kWords; ++word) {
      uint32_t bits = 0;
      if (!is_transposed) {
        bits = load<uint32_t>(block.smem + matrix_offset(site, matrix, false, row, 4 * word, 1));
      } else {
        for (int i = 0; i < T::kPer; ++i) {
          const uint32_t offset = matrix_offset(site, matrix, true, row, word * T::kPer + i, kBytes);
          bits |= static_cast<uint32_t>(load<uint16_t>(block.smem + offset)) << 16 * i;
        }
      }
      out[row][word] = bits;
    }
  }
}

// The first column of the pair of D's register i: a thread has pairs of rows lane / 4 and the eighth after it.
int row_of(int thread, int i) { return thread / kWarp * 16 + thread % kWarp / 4 + i / 2 % 2 * 8; }
int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

}  // namespace

template <class T>
void multiply_warpgroup(const Site& site, const Product* products, uint32_t* const* sums) {
  constexpr int kDepth = kWords * T::kPer;
  const Product& first = products[0];
  static uint32_t a_bits[kRows][kWords], b_bits[kMaxColumns][kWords];
  for (int t = 0; t < 4 * kWarp; ++t) {
    const Product& p = products[t];
    if (p.b_matrix != first.b_matrix || p.a_matrix != first.a_matrix || p.accumulates != first.accumulates) {
      fail("%s at %s: thread %d of the warpgroup has other matrices than the first", site.what, site.source, t);
    }
    for (int r = 0; r < 4 && p.a; ++r) {
      a_bits[t / kWarp * 16 + t % kWarp / 4 + r % 2 * 8][t % 4 + r / 2 * 4] = *p.a[r];
    }
  }
  if (!first.a) read_matrix<T>(site, first.a_matrix, first.a_transposed, kRows, a_bits);
  read_matrix<T>(site, first.b_matrix, first.b_transposed, first.n, b_bits);
  static float a[kRows][kDepth], b_transposed[kMaxColumns][kDepth];
  T::decode(a_bits[0], kRows * kWords, a[0]);
  T::decode(b_bits[0], first.n * kWords, b_transposed[0]);
  alignas(32) static float b[kDepth][kMaxColumns];
  alignas(32) static uint32_t d[kRows][kMaxColumns];
  const int sign = first.a_sign * first.b_sign;
  for (int k = 0; k < kDepth; ++k) {
    for (int column = 0; column < first.n; ++column) b[k][column] = sign * b_transposed[column][k];
  }
  for (int t = 0; t < 4 * kWarp; ++t) {
    for (int i = 0; i < first.n / 2; ++i) d[row_of(t, i)][column_of(t, i)] = first.accumulates ? sums[t][i] : 0;
  }
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < first.n; column += 8) {
      const auto* b_columns = reinterpret_cast<const Floats*>(&b[0][column]);
      add_products<T>(&d[row][column], a[row], b_columns, kMaxColumns / 8, kDepth);
    }
  }
  for (int t = 0; t < 4 * kWarp; ++t) {
    for (int i = 0; i < first.n / 2; ++i) sums[t][i] = d[row_of(t, i)][column_of(t, i)];
  }
}

template void multiply_warpgroup<F16>(const Site&, const Product*, uint32_t* const*);
template void multiply_warpgroup<Bf16>(const Site&, const Product*, uint32_t* const*);
template void multiply_warpgroup<Tf32>(const Site&, const Product*, uint32_t* const*);
template void multiply_warpgroup<S8>(const Site&, const Product*, uint32_t* const*);
template void multiply_warpgroup<S8Saturating>(const Site&, const Product*, uint32_t* const*);

}  // namespace emulator
