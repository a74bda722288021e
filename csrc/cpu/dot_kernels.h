// Products with a right operand that lies row by row in memory, for one instruction set; included by an op's kernels.
// Each row is read once, as it lies: for few rows of A, where packing B would cost more than the product.

// Rows of B at once: with six rows of A, 24 accumulators as in gemm_kernels.h.
constexpr int kDotCols = 4;

// C [M, N] = A [M, k] . B [N, k]^T; k a multiple of the register's width.
template <class V, bool kPairs, int M, int N, class T>
BK_TARGET void dot_micro(int64_t k, GemmA<typename V::Scalar> a, Matrix<T> b, typename V::Scalar* c, int64_t c_row) {
  typename V::Reg sum[M][N];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[i][j] = V::set(0);
  }
  for (int64_t p = 0; p < k; p += V::kWidth) {
    typename V::Reg b_reg[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) b_reg[j] = V::load(b.at(j) + p);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      const typename V::Reg a_reg = V::load(a.data + i * a.row + p);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[i][j] = multiply_add<V, kPairs>(a_reg, b_reg[j], sum[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) c[i * c_row + j] = V::sum(sum[i][j]);
  }
}

// C [M, n] = A [M, k] . B [n, k]^T
template <class V, bool kPairs, int M, class T>
BK_TARGET void dot_rows(int64_t n, int64_t k, GemmA<typename V::Scalar> a, Matrix<T> b, typename V::Scalar* c,
                        int64_t c_row) {
  int64_t j = 0;
  for (; j + kDotCols <= n; j += kDotCols) {
    dot_micro<V, kPairs, M, kDotCols>(k, a, Matrix<T>{b.at(j), b.row, b.col}, c + j, c_row);
  }
  for (; j < n; ++j) dot_micro<V, kPairs, M, 1>(k, a, Matrix<T>{b.at(j), b.row, b.col}, c + j, c_row);
}

// The same for so many rows, at most kGemmRows.
template <class V, bool kPairs, class T>
BK_TARGET void dot_rows(int rows, int64_t n, int64_t k, GemmA<typename V::Scalar> a, Matrix<T> b, typename V::Scalar* c,
                        int64_t c_row) {
  switch (rows) {
    case 1: return dot_rows<V, kPairs, 1>(n, k, a, b, c, c_row);
    case 2: return dot_rows<V, kPairs, 2>(n, k, a, b, c, c_row);
    case 3: return dot_rows<V, kPairs, 3>(n, k, a, b, c, c_row);
    case 4: return dot_rows<V, kPairs, 4>(n, k, a, b, c, c_row);
    case 5: return dot_rows<V, kPairs, 5>(n, k, a, b, c, c_row);
    default: return dot_rows<V, kPairs, 6>(n, k, a, b, c, c_row);
  }
}
