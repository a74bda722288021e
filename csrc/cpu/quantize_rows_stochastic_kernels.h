// Stochastic rounding to int8 for one instruction set; included by each_isa.h.
#include "philox_kernels.h"

// Columns that one call of philox rounds: 16 counters of 4 words each.
constexpr int64_t kPhiloxColumns = 4 * kPhiloxLanes;

// v = x * factor, with zeros up to the next whole register; returns max|v|, or NaN if one of them isn't finite.
template <class T>
BK_TARGET float scaled_row(const T* x, const float* factor, int64_t n, float* v) {
  using V = Float;
  typename V::Reg largest = V::set(0), not_finite = V::set(0);
  T tail[V::kWidth] = {};
  float tail_factor[V::kWidth] = {};
  for (int64_t j = 0; j < n; j += V::kWidth) {
    const T* from = x + j;
    const float* by = factor ? factor + j : nullptr;
    if (j + V::kWidth > n) {
      std::copy_n(from, n - j, tail);
      from = tail;
      if (factor) std::copy_n(by, n - j, tail_factor);
      by = tail_factor;
    }
    typename V::Reg a = V::load(from);
    if (factor) a = V::mul(a, V::load(by));
    V::store(v + j, a);
    largest = V::max(V::max(a, V::sub(V::set(0), a)), largest);
    not_finite = V::fma(a, V::set(0), not_finite);
  }
  return V::reduce_max(largest) + V::sum(not_finite);
}

// The 64 words for row i from column j on. Not inline: GCC would unroll it, as c2 is constant, and not vectorize it.
BK_TARGET __attribute__((noinline)) void draw(const StochasticRows& p, int64_t i, int64_t j,
                                              uint32_t (&words)[4][kPhiloxLanes]) {
  philox(j / 4, i, 0, p.offset, p.seed, words);
}

// values = floor(v / scale + u) of 64 elements, with u from 0 to below 1.
BK_TARGET __attribute__((noinline)) void round_down(const float* v, float scale, const uint32_t* words,
                                                    int8_t* values) {
  int32_t steps[kPhiloxColumns];
  for (int64_t c = 0; c < kPhiloxColumns; ++c) {
    const float u = static_cast<float>(static_cast<int32_t>(words[c] >> 8)) * 0x1p-24f;
    const float t = v[c] / scale + u;
    const int32_t q = static_cast<int32_t>(t);
    // -128 where v / scale is rounded to beyond -127.
    steps[c] = std::max(std::min(q - (t < static_cast<float>(q)), 127), -127);
  }
  for (int64_t c = 0; c < kPhiloxColumns; ++c) values[c] = static_cast<int8_t>(steps[c]);
}

// Rows [begin, end) of x [rows, columns].
template <class T>
BK_TARGET void quantize_rows_stochastic(const StochasticRows& p, int64_t begin, int64_t end) {
  const int64_t padded = round_up(p.columns, kPhiloxColumns);
  float* v = Workspace::of_this_thread().take<float>(padded);
  std::fill(v + p.columns, v + padded, 0.0f);
  for (int64_t i = begin; i < end; ++i) {
    const float largest = scaled_row(static_cast<const T*>(p.x) + i * p.columns, p.factor, p.columns, v);
    const float scale = p.scale[i] = largest / 127;
    int8_t* values = p.values + i * p.columns;
    if (!(scale > 0)) {  // zeros, or not finite
      std::fill_n(values, p.columns, int8_t{0});
      continue;
    }
    for (int64_t j = 0; j < p.columns; j += kPhiloxColumns) {
      uint32_t words[4][kPhiloxLanes];
      draw(p, i, j, words);
      int8_t block[kPhiloxColumns];
      round_down(v + j, scale, words[0], block);
      std::copy_n(block, std::min(kPhiloxColumns, p.columns - j), values + j);
    }
  }
}

inline StochasticKernel quantize_rows_stochastic_kernel(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return &quantize_rows_stochastic<Half>;
    case ScalarType::BFloat16: return &quantize_rows_stochastic<BFloat16>;
    default: return &quantize_rows_stochastic<float>;
  }
}
