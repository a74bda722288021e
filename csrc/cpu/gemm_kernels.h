// The products of a tile, for one instruction set; included by an op's kernels. All are C = A . B or C += A . B, or
// with factors of C's rows C = diag(c_factor) . C + A . B, with A [m, k] of any strides, read element by element, B [k,
// n] and C [m, n] in registers of V, n a multiple of its width. What is added to C was summed up apart, so that
// rounding errors grow with the length of one product, not of all. With pairs, an element of A and of B is two bfloat16
// that are adjacent in k.

// Rows and registers of C that a micro-kernel keeps: 24 accumulators of 32 registers on AVX-512, 12 of 16 on AVX2.
constexpr int kGemmRows = 6;
template <class V>
constexpr int kGemmRegs = V::kWidth * sizeof(typename V::Scalar) == 64 ? 4 : 2;
template <class V>
constexpr int kPanel = kGemmRegs<V> * V::kWidth;  // columns of C

template <class T>
struct GemmA {
  const T* data;
  int64_t row, col;  // strides
  GemmA from(int64_t i) const { return {data + i * row, row, col}; }
};

template <class T>
struct GemmB {
  const T* data;
  int64_t row;
};

// c + a . b, lane by lane.
template <class V, bool kPairs>
BK_TARGET __attribute__((always_inline)) inline typename V::Reg multiply_add(typename V::Reg a, typename V::Reg b,
                                                                             typename V::Reg c) {
  if constexpr (kPairs) {
    return V::dot_pairs(a, b, c);
  } else {
    return V::fma(a, b, c);
  }
}

template <class V, bool kAccumulate, bool kPairs, int M, int N>
BK_TARGET void gemm_micro(int64_t k, GemmA<typename V::Scalar> a, const typename V::Scalar* b, int64_t b_row,
                          typename V::Scalar* c, int64_t c_row, const typename V::Scalar* c_factor) {
  typename V::Reg sum[M][N];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[i][j] = V::set(0);
  }
  const typename V::Scalar* a_col = a.data;
  for (int64_t p = 0; p < k; ++p, a_col += a.col, b += b_row) {
    typename V::Reg b_reg[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) b_reg[j] = V::load(b + j * V::kWidth);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      const typename V::Reg a_reg = V::set(a_col[i * a.row]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[i][j] = multiply_add<V, kPairs>(a_reg, b_reg[j], sum[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
    const typename V::Reg factor = V::set(c_factor == nullptr ? 1 : c_factor[i]);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      typename V::Scalar* out = c + i * c_row + j * V::kWidth;
      V::store(out, kAccumulate ? V::fma(V::load(out), factor, sum[i][j]) : sum[i][j]);
    }
  }
}

template <class V>
using GemmMicro = void (*)(int64_t, GemmA<typename V::Scalar>, const typename V::Scalar*, int64_t, typename V::Scalar*,
                           int64_t, const typename V::Scalar*);

template <class V, bool kAccumulate, bool kPairs, int M>
GemmMicro<V> gemm_micro_of(int regs) {
  if constexpr (kGemmRegs<V> == 4) {
    if (regs == 4) return &gemm_micro<V, kAccumulate, kPairs, M, 4>;
    if (regs == 3) return &gemm_micro<V, kAccumulate, kPairs, M, 3>;
  }
  return regs == 2 ? &gemm_micro<V, kAccumulate, kPairs, M, 2> : &gemm_micro<V, kAccumulate, kPairs, M, 1>;
}

// The micro-kernel for so many rows and registers of C.
template <class V, bool kAccumulate, bool kPairs>
GemmMicro<V> gemm_micro_of(int rows, int regs) {
  switch (rows) {
    case 1: return gemm_micro_of<V, kAccumulate, kPairs, 1>(regs);
    case 2: return gemm_micro_of<V, kAccumulate, kPairs, 2>(regs);
    case 3: return gemm_micro_of<V, kAccumulate, kPairs, 3>(regs);
    case 4: return gemm_micro_of<V, kAccumulate, kPairs, 4>(regs);
    case 5: return gemm_micro_of<V, kAccumulate, kPairs, 5>(regs);
    default: return gemm_micro_of<V, kAccumulate, kPairs, 6>(regs);
  }
}

// Rows of C, at most kGemmRows, by n columns.
template <class V, bool kAccumulate, bool kPairs = false>
BK_TARGET void gemm_rows(int rows, int64_t n, int64_t k, GemmA<typename V::Scalar> a, const typename V::Scalar* b,
                         int64_t b_row, typename V::Scalar* c, int64_t c_row,
                         const typename V::Scalar* c_factor = nullptr) {
  for (int64_t j = 0; j < n; j += kPanel<V>) {
    const int regs = std::min<int64_t>(kPanel<V>, n - j) / V::kWidth;
    gemm_micro_of<V, kAccumulate, kPairs>(rows, regs)(k, a, b + j, b_row, c + j, c_row, c_factor);
  }
}
