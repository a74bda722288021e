// Products with a right operand that lies row by row in memory, for one instruction set; included by an op's kernels.
// Each row is read once, as it lies: for few rows of A, where packing B would cost more than the product.

// Rows that are read one after another, then those of `next`: at row r, the one 2 KiB further on is fetched, since the
// hardware alone doesn't cross the end of a page. (That reads memory at 1.15 of the speed; fetching a whole block of
// keys or values at once at 0.75.)
template <class T>
struct ReadAhead {
  Matrix<T> rows;
  int64_t num_rows, num_cols;
  Matrix<T> next;
  int64_t num_next, num_next_cols;
  int64_t distance = ceil_div(int64_t{2048 / sizeof(T)}, std::max<int64_t>(num_cols, 1));

  __attribute__((always_inline)) void fetch(int64_t r) const {
    r += distance;
    if (r < num_rows) {
      prefetch(Matrix<T>{rows.at(r), rows.row, rows.col}, 1, num_cols);
    } else if (r - num_rows < num_next) {
      prefetch(Matrix<T>{next.at(r - num_rows), next.row, next.col}, 1, num_next_cols);
    }
  }
};

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
template <class V, bool kPairs, int M, class T, class U>
BK_TARGET void dot_rows(int64_t n, int64_t k, GemmA<typename V::Scalar> a, Matrix<T> b, const ReadAhead<U>& ahead,
                        typename V::Scalar* c, int64_t c_row) {
  int64_t j = 0;
  for (; j + kDotCols <= n; j += kDotCols) {
    for (int i = 0; i < kDotCols; ++i) ahead.fetch(j + i);
    dot_micro<V, kPairs, M, kDotCols>(k, a, Matrix<T>{b.at(j), b.row, b.col}, c + j, c_row);
  }
  for (; j < n; ++j) dot_micro<V, kPairs, M, 1>(k, a, Matrix<T>{b.at(j), b.row, b.col}, c + j, c_row);
}

// The same for so many rows, at most kGemmRows.
template <class V, bool kPairs, class T, class U>
BK_TARGET void dot_rows(int rows, int64_t n, int64_t k, GemmA<typename V::Scalar> a, Matrix<T> b,
                        const ReadAhead<U>& ahead, typename V::Scalar* c, int64_t c_row) {
  switch (rows) {
    case 1: return dot_rows<V, kPairs, 1>(n, k, a, b, ahead, c, c_row);
    case 2: return dot_rows<V, kPairs, 2>(n, k, a, b, ahead, c, c_row);
    case 3: return dot_rows<V, kPairs, 3>(n, k, a, b, ahead, c, c_row);
    case 4: return dot_rows<V, kPairs, 4>(n, k, a, b, ahead, c, c_row);
    case 5: return dot_rows<V, kPairs, 5>(n, k, a, b, ahead, c, c_row);
    default: return dot_rows<V, kPairs, 6>(n, k, a, b, ahead, c, c_row);
  }
}

// Registers of a row of C at once: with M rows as many accumulators as in gemm_kernels.h.
template <class V, int M>
constexpr int sum_regs() {
  const int most = kGemmRows * kGemmRegs<V> / M;
  return most >= 8 ? 8 : most >= 4 ? 4 : 2;
}

// C [M, N] = diag(c_factor) C + A [M, k] . B [k, N], N in registers.
template <class V, int M, int N, class T>
BK_TARGET void sum_micro(int64_t k, GemmA<typename V::Scalar> a, Matrix<T> b, const ReadAhead<T>* ahead,
                         typename V::Scalar* c, int64_t c_row, const typename V::Scalar* c_factor) {
  typename V::Reg sum[M][N];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[i][j] = V::set(0);
  }
  for (int64_t p = 0; p < k; ++p) {
    if (ahead != nullptr) ahead->fetch(p);
    typename V::Reg a_reg[M];
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) a_reg[i] = V::set(a.data[i * a.row + p]);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const typename V::Reg b_reg = V::load(b.at(p) + j * V::kWidth);
#pragma GCC unroll 6
      for (int i = 0; i < M; ++i) sum[i][j] = V::fma(a_reg[i], b_reg, sum[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
    const typename V::Reg factor = V::set(c_factor[i]);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      typename V::Scalar* out = c + i * c_row + j * V::kWidth;
      V::store(out, V::fma(V::load(out), factor, sum[i][j]));
    }
  }
}

// C [M, n] = diag(c_factor) C + A [M, k] . B [k, n]; n a multiple of the register's width.
template <class V, int M, class T>
BK_TARGET void sum_rows(int64_t n, int64_t k, GemmA<typename V::Scalar> a, Matrix<T> b, const ReadAhead<T>& ahead,
                        typename V::Scalar* c, int64_t c_row, const typename V::Scalar* c_factor) {
  constexpr int kRegs = sum_regs<V, M>();
  int64_t j = 0;
  for (; j + kRegs * V::kWidth <= n; j += kRegs * V::kWidth) {
    sum_micro<V, M, kRegs>(k, a, Matrix<T>{b.data + j, b.row, 1}, j == 0 ? &ahead : nullptr, c + j, c_row, c_factor);
  }
  for (; j < n; j += V::kWidth) {
    sum_micro<V, M, 1>(k, a, Matrix<T>{b.data + j, b.row, 1}, j == 0 ? &ahead : nullptr, c + j, c_row, c_factor);
  }
}

// The same for so many rows, at most kGemmRows.
template <class V, class T>
BK_TARGET void sum_rows(int rows, int64_t n, int64_t k, GemmA<typename V::Scalar> a, Matrix<T> b,
                        const ReadAhead<T>& ahead, typename V::Scalar* c, int64_t c_row,
                        const typename V::Scalar* c_factor) {
  switch (rows) {
    case 1: return sum_rows<V, 1>(n, k, a, b, ahead, c, c_row, c_factor);
    case 2: return sum_rows<V, 2>(n, k, a, b, ahead, c, c_row, c_factor);
    case 3: return sum_rows<V, 3>(n, k, a, b, ahead, c, c_row, c_factor);
    case 4: return sum_rows<V, 4>(n, k, a, b, ahead, c, c_row, c_factor);
    case 5: return sum_rows<V, 5>(n, k, a, b, ahead, c, c_row, c_factor);
    default: return sum_rows<V, 6>(n, k, a, b, ahead, c, c_row, c_factor);
  }
}
