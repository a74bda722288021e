// What the forward, the backward and the weights share: a tile of scores, from the products to the softmax's argument;
// for one instruction set, included by attention's kernels.
#include "gemm_kernels.h"
#include "math_kernels.h"
#include "pack_kernels.h"
#include "philox_kernels.h"

constexpr double kLog2E = 1.4426950408889634074;

// Rows of queries of one batch entry, of one head or of several with the same keys, against one block of keys.
template <class V, class T>
struct AttentionTile {
  using Scalar = typename V::Scalar;

  const AttentionProblem& problem;
  const AttentionSequence sequence;
  int64_t b, h_begin, i_begin, rows_per_head, num_rows;  // row r is query i_begin + r % rows_per_head
  int64_t j_begin = 0, num_cols = 0;                     // columns, beyond j_begin
  bool is_whole = false;                                 // every row meets every column, in whole registers
  ColumnRange cols[kMaxBlockQ];                          // that each row meets, relative to j_begin
  Scalar bias[kBlockKV], keep[kBlockKV];                 // of a row

  AttentionTile(const AttentionProblem& p, int64_t b, int64_t h_begin, int64_t num_heads, int64_t i_begin,
                int64_t rows_per_head)
      : problem(p),
        sequence(p.sequence(b)),
        b(b),
        h_begin(h_begin),
        i_begin(i_begin),
        rows_per_head(rows_per_head),
        num_rows(num_heads * rows_per_head) {}

  int64_t head(int64_t r) const { return h_begin + r / rows_per_head; }
  int64_t query(int64_t r) const { return i_begin + r % rows_per_head; }

  template <class U>
  U* row_of(const AnyStrided& tensor, int64_t r) const {
    return tensor.as<U>().at(b, head(r), sequence.q_begin + query(r));
  }
  Matrix<T> keys(int64_t j) const { return kv(problem.key, j); }
  Matrix<T> values(int64_t j) const { return kv(problem.value, j); }
  Matrix<T> kv(const AnyStrided& tensor, int64_t j) const {
    const Strided<const T> t = tensor.as<const T>();
    return {t.at(b, h_begin / problem.group(), sequence.k_begin + j), t.row, t.col};
  }

  // All keys that a row of the tile meets.
  ColumnRange all_keys() const {
    const ColumnRange first = problem.keys_of(sequence, i_begin);
    const ColumnRange last = problem.keys_of(sequence, i_begin + rows_per_head - 1);
    return {std::min(first.begin, last.begin), std::max(first.end, last.end)};
  }

  // Moves to the keys from j on. False if no row meets one of them.
  BK_TARGET bool move_to(int64_t j) {
    const bool was_whole = is_whole && num_cols == kBlockKV;
    j_begin = j;
    num_cols = std::min(kBlockKV, sequence.k_len - j);
    const ColumnRange first = problem.keys_of(sequence, i_begin);
    const ColumnRange last = problem.keys_of(sequence, i_begin + rows_per_head - 1);
    is_whole = std::max(first.begin, last.begin) <= j && std::min(first.end, last.end) >= j + num_cols &&
               num_cols % V::kWidth == 0;
    if (is_whole && !(was_whole && num_cols == kBlockKV)) std::fill_n(cols, num_rows, ColumnRange{0, num_cols});
    if (is_whole) return problem.mask.data == nullptr || mask_lets_any_pass();
    bool any = false;
    for (int64_t r = 0; r < num_rows; ++r) {
      const ColumnRange keys = problem.keys_of(sequence, query(r));
      cols[r].begin = std::clamp<int64_t>(keys.begin - j, 0, num_cols);
      cols[r].end = std::clamp<int64_t>(keys.end - j, cols[r].begin, num_cols);
      any |= cols[r].begin < cols[r].end;
    }
    return any && (problem.mask.data == nullptr || mask_lets_any_pass());
  }

  BK_TARGET bool mask_lets_any_pass() const { BK_MASK_SWITCH(problem.mask_dtype, return mask_lets_any_pass, ()); }

  template <class M>
  BK_TARGET bool mask_lets_any_pass() const {
    const Strided<const M> mask = problem.mask.as<const M>();
    for (int64_t r = 0; r < num_rows; ++r) {
      if (r > 0 && mask.row == 0 && mask.head == 0 && cols[r].begin >= cols[0].begin && cols[r].end <= cols[0].end) {
        continue;
      }
      for (int64_t j = cols[r].begin; j < cols[r].end; ++j) {
        const M value = *mask.at(b, head(r), query(r), j_begin + j);
        if constexpr (std::is_same_v<M, bool>) {
          if (value) return true;
        } else {
          if (!(static_cast<Scalar>(value) == -std::numeric_limits<Scalar>::infinity())) return true;
        }
      }
    }
    return false;
  }

  // The columns that rows [r, r + n) meet.
  ColumnRange cols_of(int64_t r, int64_t n) const {
    if (is_whole) return {0, num_cols};
    ColumnRange all{num_cols, 0};
    for (int64_t i = r; i < std::min(r + n, num_rows); ++i) {
      if (cols[i].begin == cols[i].end) continue;
      all = {std::min(all.begin, cols[i].begin), std::max(all.end, cols[i].end)};
    }
    return all.begin < all.end ? all : ColumnRange{0, 0};
  }

  // The rows that meet a column of [j, j + n).
  ColumnRange rows_of(int64_t j, int64_t n) const {
    ColumnRange all{num_rows, 0};
    for (int64_t r = 0; r < num_rows; ++r) {
      if (cols[r].begin < j + n && cols[r].end > j) all = {std::min(all.begin, r), r + 1};
    }
    return all.begin < all.end ? all : ColumnRange{0, 0};
  }

  // products [n, kScoresRow] = rows [n, depth] . packed [panels, depth, kPanel] for the rows [r, r + n), at most
  // kGemmRows, where one of them meets a column of the panel.
  template <bool kPairs>
  BK_TARGET void product(int64_t r, int64_t n, GemmA<Scalar> rows, int64_t depth, const Scalar* packed,
                         Scalar* products) const {
    // Long sums are cut, or their rounding errors would exceed those of libraries that sum up in several lanes; as
    // those do most where there are few rows.
    const int64_t chunk = problem.max_q_len * problem.group() <= kGemmRows ? 16 : 64;
    const ColumnRange range = cols_of(r, n);
    for (int64_t panel = range.begin / kPanel<V> * kPanel<V>; panel < range.end; panel += kPanel<V>) {
      const Scalar* b = packed + panel * depth;
      gemm_rows<V, false, kPairs>(n, kPanel<V>, std::min(chunk, depth), rows, b, kPanel<V>, products + panel,
                                  kScoresRow);
      for (int64_t d = chunk; d < depth; d += chunk) {
        gemm_rows<V, true, kPairs>(n, kPanel<V>, std::min(chunk, depth - d),
                                   GemmA<Scalar>{rows.data + d * rows.col, rows.row, rows.col}, b + d * kPanel<V>,
                                   kPanel<V>, products + panel, kScoresRow);
      }
    }
  }

  // Rows of a large mask lie pages apart, where the hardware doesn't look ahead.
  __attribute__((always_inline)) void prefetch_mask(int64_t r, int64_t n) const {
    if (problem.mask.data == nullptr || problem.mask.row == 0 || n <= 0) return;
    BK_MASK_SWITCH(problem.mask_dtype, return prefetch_mask, (r, n));
  }

  template <class M>
  __attribute__((always_inline)) void prefetch_mask(int64_t r, int64_t n) const {
    const Strided<const M> mask = problem.mask.as<const M>();
    for (int64_t i = r; i < r + n; ++i) {
      const M* row = mask.at(b, head(i), query(i), j_begin + cols[i].begin);
      prefetch(Matrix<M>{row, 0, mask.col}, 1, cols[i].end - cols[i].begin);
    }
  }

  // Whether a register holds columns that the row meets and others.
  bool is_cut(int64_t r) const { return cols[r].begin % V::kWidth != 0 || cols[r].end % V::kWidth != 0; }

  bool has_bias(int64_t r) const {
    return problem.mask.data != nullptr || problem.alibi_slopes.data != nullptr || is_cut(r);
  }

  // Whether the softmax's argument is the product times a positive scale, and no more.
  bool is_plain(int64_t r) const { return problem.scale > 0 && problem.softcap <= 0 && !has_bias(r); }

  // The registers of a row that hold a column which it meets.
  ColumnRange regs_of(int64_t r) const {
    if (cols[r].begin == cols[r].end) return {0, 0};
    return {cols[r].begin / V::kWidth * V::kWidth, round_up(cols[r].end, V::kWidth)};
  }

  // bias = mask - slope * distance, -inf in columns that the row doesn't meet.
  BK_TARGET void make_bias(int64_t r) {
    if (problem.mask.data == nullptr) {
      std::fill_n(bias, kBlockKV, Scalar(0));
    } else {
      BK_MASK_SWITCH(problem.mask_dtype, mask_bias, (r));
    }
    if (problem.alibi_slopes.data != nullptr) {
      const Scalar slope = *problem.alibi_slopes.at(b, head(r));
      const int64_t diagonal = query(r) + sequence.k_len - sequence.q_len - j_begin;
      for (int64_t j = cols[r].begin; j < cols[r].end; ++j) bias[j] -= slope * std::abs<int64_t>(diagonal - j);
    }
    const ColumnRange regs = regs_of(r);
    std::fill(bias + regs.begin, bias + cols[r].begin, -std::numeric_limits<Scalar>::infinity());
    std::fill(bias + cols[r].end, bias + regs.end, -std::numeric_limits<Scalar>::infinity());
  }

  template <class M>
  BK_TARGET void mask_bias(int64_t r) {
    const Strided<const M> mask = problem.mask.as<const M>();
    const M* row = mask.at(b, head(r), query(r), j_begin);
    int64_t j = cols[r].begin;
    if constexpr (std::is_same_v<M, bool>) {
      for (; j < cols[r].end; ++j) bias[j] = row[j * mask.col] ? 0 : -std::numeric_limits<Scalar>::infinity();
    } else {
      if constexpr (sizeof(M) <= sizeof(Scalar)) {
        if (mask.col == 1) {
          for (; j + V::kWidth <= cols[r].end; j += V::kWidth) V::store(bias + j, V::load(row + j));
        }
      }
      for (; j < cols[r].end; ++j) bias[j] = static_cast<Scalar>(row[j * mask.col]);
    }
  }

  // keep [kBlockKV]: 1 where dropout keeps the weight, else 0.
  BK_TARGET void make_keep(int64_t r) {
    const uint32_t bh = static_cast<uint32_t>(b * problem.heads + head(r));
    for (int64_t j = 0; j < num_cols; j += 8 * kPhiloxLanes) {
      uint32_t words[4][kPhiloxLanes];
      philox(static_cast<uint32_t>((j_begin + j) / 8), static_cast<uint32_t>(query(r)), bh, problem.philox_offset(),
             problem.philox_seed(), words);
      // Word n of counters 4 g .. 4 g + 3 has the 16 bits each of the keys 32 g + 8 n .. 32 g + 8 n + 7.
      for (int g = 0; g < kPhiloxLanes / 4; ++g) {
        for (int n = 0; n < 4; ++n) {
          for (int l = 0; l < 4; ++l) {
            const uint32_t word = words[n][4 * g + l];
            keep[j + 32 * g + 8 * n + 2 * l] = (word & 0xffff) >= problem.dropout_threshold;
            keep[j + 32 * g + 8 * n + 2 * l + 1] = (word >> 16) >= problem.dropout_threshold;
          }
        }
      }
    }
  }

  // scores -> scale * scores, capped, + bias, in the registers that the row meets. `slope`, if given, becomes the
  // derivative of the cap. Returns the largest.
  BK_TARGET Scalar finish_scores(int64_t r, Scalar* scores, Scalar* slope = nullptr) {
    using Reg = typename V::Reg;
    const ColumnRange regs = regs_of(r);
    if (regs.begin == regs.end) return -std::numeric_limits<Scalar>::infinity();
    const Scalar* added = bias;
    if (const Scalar* row = mask_row_as_it_is(r)) {
      added = row;
    } else {
      make_bias(r);
    }
    const Reg scale = V::set(Scalar(problem.softcap > 0 ? problem.scale / problem.softcap : problem.scale));
    const Reg cap = V::set(Scalar(problem.softcap)), one = V::set(Scalar(1));
    Reg largest = V::set(-std::numeric_limits<Scalar>::infinity());
    for (int64_t j = regs.begin; j < regs.end; j += V::kWidth) {
      const Reg b = V::load(added + j);
      Reg score;
      if (problem.softcap > 0) {
        const Reg t = tanh<V>(V::mul(V::load(scores + j), scale));
        if (slope != nullptr) V::store(slope + j, V::sub(one, V::mul(t, t)));
        score = V::fma(t, cap, b);
      } else {
        score = V::fma(V::load(scores + j), scale, b);
      }
      V::store(scores + j, score);
      largest = V::max(largest, score);
    }
    return V::reduce_max(largest);
  }

  // The mask's row where nothing else is to be added and no register is cut; else nullptr.
  const Scalar* mask_row_as_it_is(int64_t r) const {
    constexpr ScalarType kType = sizeof(Scalar) == 4 ? ScalarType::Float : ScalarType::Double;
    if (problem.mask.data == nullptr || problem.mask_dtype != kType || problem.mask.col != 1) return nullptr;
    if (problem.alibi_slopes.data != nullptr || is_cut(r)) return nullptr;
    return problem.mask.as<const Scalar>().at(b, head(r), query(r), j_begin);
  }
};

// exp(score - row_max) of what finish_scores left, or of plain products.
template <class V>
struct SoftmaxExp {
  using Reg = typename V::Reg;
  bool is_plain;
  Reg scale, offset;

  BK_TARGET SoftmaxExp(bool is_plain, double problem_scale, typename V::Scalar row_max) : is_plain(is_plain) {
    using Scalar = typename V::Scalar;
    scale = V::set(Scalar(is_plain ? problem_scale * kLog2E : kLog2E));
    offset = V::set(is_plain ? -row_max * Scalar(kLog2E) : -row_max);
  }
  // Only products are scaled and shifted in one step: with a mask of the lowest finite value the step would overflow.
  BK_TARGET __attribute__((always_inline)) Reg operator()(Reg s) const {
    return exp2<V>(is_plain ? V::fma(s, scale, offset) : V::mul(V::add(s, offset), scale));
  }
};

// The largest of the registers in `range`.
template <class V>
BK_TARGET typename V::Scalar max_of(const typename V::Scalar* x, ColumnRange range) {
  typename V::Reg largest = V::set(-std::numeric_limits<typename V::Scalar>::infinity());
  for (int64_t j = range.begin; j < range.end; j += V::kWidth) largest = V::max(largest, V::load(x + j));
  return V::reduce_max(largest);
}
