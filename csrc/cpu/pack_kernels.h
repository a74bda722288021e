// Copies of tiles into the order and type that the products read, for one instruction set; included by an op's kernels.

template <class T>
struct Matrix {
  const T* data;
  int64_t row, col;  // strides
  const T* at(int64_t i) const { return data + i * row; }
};

// Fetches rows that are to be read soon: by itself the hardware stops at the end of a page. (Not inlined, functions
// without any effect but prefetches are optimized away.)
template <class T>
__attribute__((always_inline)) inline void prefetch(Matrix<T> rows, int64_t num_rows, int64_t num_cols) {
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t j = 0; j < num_cols; j += 64 / sizeof(T)) __builtin_prefetch(rows.at(i) + j * rows.col);
  }
}

// A matrix as an operand of the products: as it is, or by pairs of columns.
template <bool kPairs, class T>
auto operand(const Matrix<T>& matrix) {
  if constexpr (kPairs) {
    return Matrix<BFloat16Pair>{reinterpret_cast<const BFloat16Pair*>(matrix.data), matrix.row / 2, 1};
  } else {
    return matrix;
  }
}

// to [n]: one row, followed by zeros up to a multiple of the register's width.
template <class V, class T>
BK_TARGET void pack_row(const T* from, int64_t col, int64_t n, typename V::Scalar* to) {
  using Scalar = typename V::Scalar;
  int64_t j = 0;
  if (col == 1) {
    for (; j + V::kWidth <= n; j += V::kWidth) V::store(to + j, V::load(from + j));
  }
  for (; j < n; ++j) to[j] = static_cast<Scalar>(from[j * col]);
  for (; j % V::kWidth != 0; ++j) to[j] = 0;
}

// to [rows, to_row]: rows of `cols` elements.
template <class V, class T>
BK_TARGET void pack(Matrix<T> from, int64_t rows, int64_t cols, typename V::Scalar* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i) pack_row<V>(from.at(i), from.col, cols, to + i * to_row);
}

// to [ceil(rows / 2), to_row]: pairs of rows, lane by lane; zeros for a row or columns that aren't there.
template <class V>
BK_TARGET void pack_row_pairs(Matrix<BFloat16> from, int64_t rows, int64_t cols, float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i += 2, to += to_row) {
    const BFloat16 *first = from.at(i), *second = from.at(i + 1);
    const bool has_second = i + 1 < rows;
    int64_t j = 0;
    for (; j + V::kWidth <= cols; j += V::kWidth) {
      V::store(to + j, V::pair_up(V::load(first + j), has_second ? V::load(second + j) : V::set(0)));
    }
    for (; j < to_row; ++j) {
      const BFloat16Pair pair{uint16_t(j < cols ? first[j].x : 0), uint16_t(has_second && j < cols ? second[j].x : 0)};
      to[j] = static_cast<float>(pair);
    }
  }
}

// The reverse of pack_row, to adjacent elements.
template <class V, class T>
BK_TARGET void store_row(const typename V::Scalar* from, int64_t n, T* to) {
  int64_t j = 0;
  for (; j + V::kWidth <= n; j += V::kWidth) V::store(to + j, V::load(from + j));
  for (; j < n; ++j) to[j] = static_cast<T>(from[j]);
}

// x [n] *= factor, n a multiple of the register's width.
template <class V>
BK_TARGET void scale_row(typename V::Scalar* x, int64_t n, typename V::Scalar factor) {
  const typename V::Reg f = V::set(factor);
  for (int64_t j = 0; j < n; j += V::kWidth) V::store(x + j, V::mul(V::load(x + j), f));
}

// Exchanges rows and columns of a square of registers, by log2(width) rounds of exchanges between rows at a distance.
template <class V>
BK_TARGET __attribute__((always_inline)) inline void transpose(typename V::Reg (&rows)[V::kWidth]) {
  constexpr int W = V::kWidth;
  if constexpr (W > 1) {
    using Scalar = typename V::Scalar;
    using Lane = std::conditional_t<sizeof(Scalar) == 4, int32_t, int64_t>;
    typedef Lane Lanes __attribute__((vector_size(W * sizeof(Lane))));
    typedef Scalar Vector __attribute__((vector_size(W * sizeof(Scalar))));
#pragma GCC unroll 4
    for (int distance = 1; distance < W; distance *= 2) {
      Lanes first, second;
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) {
        first[l] = l & distance ? W + l - distance : l;
        second[l] = l & distance ? W + l : l + distance;
      }
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (i & distance) continue;
        const Vector a = (Vector)rows[i], b = (Vector)rows[i + distance];
        rows[i] = (typename V::Reg)__builtin_shuffle(a, b, first);
        rows[i + distance] = (typename V::Reg)__builtin_shuffle(a, b, second);
      }
    }
  }
}

// to [panels, cols, kPanel]: the transpose in panels of kPanel rows of `from`, rows beyond the last being 0.
template <class V, class T>
BK_TARGET void pack_transposed(Matrix<T> from, int64_t rows, int64_t cols, typename V::Scalar* to) {
  using Scalar = typename V::Scalar;
  constexpr int W = V::kWidth;
  for (int64_t i = 0; i < rows; i += W) {
    Scalar* panel = to + i / kPanel<V> * kPanel<V> * cols + i % kPanel<V>;
    int64_t j = 0;
    if (from.col == 1 && i + W <= rows) {
      for (; j + W <= cols; j += W) {
        typename V::Reg square[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) {
          square[r] = V::load(from.at(i + r) + j);
          __builtin_prefetch(from.at(i + r + W) + j);  // the hardware doesn't look ahead by so many rows at once
        }
        transpose<V>(square);
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) V::store(panel + (j + r) * kPanel<V>, square[r]);
      }
    }
    for (; j < cols; ++j) {
      for (int r = 0; r < W; ++r) {
        panel[j * kPanel<V> + r] = i + r < rows ? static_cast<Scalar>(from.at(i + r)[j * from.col]) : Scalar(0);
      }
    }
  }
  for (int64_t i = round_up(rows, W); i % kPanel<V> != 0; i += W) {
    Scalar* panel = to + i / kPanel<V> * kPanel<V> * cols + i % kPanel<V>;
    for (int64_t j = 0; j < cols; ++j) V::store(panel + j * kPanel<V>, V::set(0));
  }
}
