// Attention's forward for one instruction set; included by each_isa.h.
#include "attention_tile.h"
#include "dot_kernels.h"

// O = softmax(Q K^T) V for a tile of queries, over the keys [j_begin, j_end), by the online softmax: Dao et al. 2022,
// algorithm 1, with the loops exchanged as in Dao 2023, algorithm 1.
// With pairs, both products are of pairs of bfloat16: P is rounded to it.
template <class V, class T, bool kPairs>
class AttentionForward {
  using Scalar = typename V::Scalar;
  using Reg = typename V::Reg;

 public:
  BK_TARGET static void run(const AttentionProblem& problem, const AttentionForwardUnit& unit) {
    AttentionForward(problem, unit).run();
  }

 private:
  AttentionForward(const AttentionProblem& problem, const AttentionForwardUnit& unit)
      : problem_(problem),
        unit_(unit),
        tile_(problem, unit.b, unit.h_begin, unit.num_heads, unit.i_begin, unit.num_rows),
        depth_(kPairs ? problem.head_dim / 2 : problem.head_dim),
        value_row_(round_up(problem.value_dim, V::kWidth)) {
    Workspace& workspace = Workspace::of_this_thread();
    q_ = workspace.take<Scalar>(tile_.num_rows * depth_ + V::kWidth);
    k_ = workspace.take<Scalar>(kBlockKV * depth_);
    v_ = workspace.take<Scalar>(kBlockKV * value_row_);
    s_ = workspace.take<Scalar>(kGemmRows * kScoresRow);
    o_ = workspace.take<Scalar>(tile_.num_rows * value_row_);
    const int64_t rows = std::min<int64_t>(kGemmRows, tile_.num_rows);
    std::fill_n(s_, rows * kScoresRow, Scalar(0));  // beyond the last key no score is computed, only read
  }

  BK_TARGET void run() {
    // Q  [num_rows, depth]
    for (int64_t r = 0; r < tile_.num_rows; ++r) {
      const Matrix<T> row{tile_.template row_of<const T>(problem_.query, r), 0, problem_.query.col};
      pack<V>(operand<kPairs>(row), 1, depth_, q_ + r * depth_, 0);
    }
    std::fill_n(o_, tile_.num_rows * value_row_, Scalar(0));
    std::fill_n(row_max_, tile_.num_rows + kGroup, -std::numeric_limits<Scalar>::infinity());
    std::fill_n(row_sum_, tile_.num_rows + kGroup, Scalar(0));

    const ColumnRange met = tile_.all_keys();
    const int64_t end = std::min(unit_.j_end, met.end);
    for (int64_t j = std::max(unit_.j_begin, met.begin / kBlockKV * kBlockKV); j < end; j += kBlockKV) {
      if (!tile_.move_to(j)) continue;
      // K^T  [panels, depth, kPanel],  V  [num_cols, value_dim]; few queries read them where they lie
      const auto keys = operand<kPairs>(tile_.keys(j));
      const bool reads_keys = tile_.num_rows <= kGemmRows && keys.col == 1 && depth_ % V::kWidth == 0;
      const bool reads_values = tile_.num_rows <= kGemmRows && lies_in_registers(tile_.values(j));
      if (!reads_keys) pack_transposed<V>(keys, tile_.num_cols, depth_, k_);
      const GemmB<Scalar> values = reads_values ? GemmB<Scalar>{} : pack_values(tile_.values(j));
      for (int64_t r = 0; r < tile_.num_rows; r += kGemmRows) {
        const int64_t n = std::min<int64_t>(kGemmRows, tile_.num_rows - r);
        ColumnRange cols = tile_.cols_of(r, n);
        if (cols.begin == cols.end) continue;
        // S = Q @ K^T  [n, kBlockKV]
        const GemmA<Scalar> queries{q_ + r * depth_, depth_, 1};
        if (reads_keys) {
          const ReadAhead<T> ahead{tile_.keys(j),   tile_.num_cols, problem_.head_dim,
                                   tile_.values(j), tile_.num_cols, problem_.value_dim};
          dot_rows<V, kPairs>(n, tile_.num_cols, depth_, queries, keys, ahead, s_, kScoresRow);
        } else {
          tile_.template product<kPairs>(r, n, queries, depth_, k_, s_);
        }
        // P = exp(S - row_max)
        softmax(r, n, cols);
        // O = diag(factor) O + P @ V  [n, value_dim]
        if (reads_values) {
          sum_values(n, j, cols, end);
          continue;
        }
        if (kPairs) cols = {cols.begin / 2, ceil_div(cols.end, 2)};
        gemm_rows<V, true, kPairs>(n, value_row_, cols.end - cols.begin, GemmA<Scalar>{s_ + cols.begin, kScoresRow, 1},
                                   values.data + cols.begin * values.row, values.row, o_ + r * value_row_, value_row_,
                                   factor_);
      }
    }
    finish();
  }

  // Rows of scores become weights relative to each row's largest score so far. What was summed up relative to the
  // previous one is to be multiplied by factor_.
  BK_TARGET void softmax(int64_t r, int64_t n, ColumnRange group) {
    constexpr Scalar kLowest = std::numeric_limits<Scalar>::lowest();
    Scalar largest[kGroup];
    std::fill_n(largest, kGroup, -std::numeric_limits<Scalar>::infinity());  // changes nothing for the rows after these
    for (int64_t i = 0; i < n; ++i) {
      Scalar* s = s_ + i * kScoresRow;
      const ColumnRange regs = tile_.regs_of(r + i);
      largest[i] = tile_.is_plain(r + i) ? max_of<V>(s, regs) * Scalar(problem_.scale) : tile_.finish_scores(r + i, s);
    }
    for (int64_t i = 0; i < n; i += V::kWidth) {
      const Reg previous = V::load(row_max_ + r + i), row_max = V::max(V::load(largest + i), previous);
      V::store(row_max_ + r + i, row_max);
      // Finite where no key was met so far, and 1 where none is met at all.
      const Reg lowest = V::set(kLowest), change = V::sub(V::max(previous, lowest), V::max(row_max, lowest));
      const Reg factor = exp2<V>(V::mul(change, V::set(Scalar(kLog2E))));
      V::store(factor_ + i, factor);
      V::store(row_sum_ + r + i, V::mul(V::load(row_sum_ + r + i), factor));
    }
    for (int64_t i = 0; i < n; ++i) weights_of(r + i, s_ + i * kScoresRow, group);
  }

  BK_TARGET void weights_of(int64_t r, Scalar* s, ColumnRange group) {
    tile_.prefetch_mask(r + kGemmRows, std::min<int64_t>(1, tile_.num_rows - r - kGemmRows));
    const ColumnRange regs = tile_.regs_of(r);
    Scalar row_max = row_max_[r];
    if (row_max == -std::numeric_limits<Scalar>::infinity()) row_max = 0;  // no key was met so far

    Reg sum = V::set(Scalar(0));
    const SoftmaxExp<V> exp(tile_.is_plain(r), problem_.scale, row_max);
    const bool has_dropout = problem_.dropout_threshold > 0;
    if (has_dropout) tile_.make_keep(r);
    for (int64_t j = regs.begin; j < regs.end; j += V::kWidth) {
      Reg p = exp(V::load(s + j));
      sum = V::add(sum, p);
      if (has_dropout) p = V::mul(p, V::load(tile_.keep + j));
      if constexpr (kPairs) {
        V::store_as_pairs(reinterpret_cast<BFloat16*>(s) + j, p);  // behind what is still to be read
      } else {
        V::store(s + j, p);
      }
    }
    row_sum_[r] += V::sum(sum);
    if (regs.begin > group.begin || regs.end < group.end) zero_outside(s, group, regs);
  }

  // Zeros where only other rows of the six have weights.
  BK_TARGET void zero_outside(Scalar* s, ColumnRange group, ColumnRange regs) {
    using Weight = std::conditional_t<kPairs, BFloat16, Scalar>;
    group = {group.begin / 2 * 2, round_up(group.end, 2)};
    Weight* p = reinterpret_cast<Weight*>(s);
    std::fill(p + group.begin, p + std::clamp(regs.begin, group.begin, group.end), Weight(0));
    std::fill(p + std::clamp(regs.end, group.begin, group.end), p + group.end, Weight(0));
  }

  // Whether the rows of V can be read in whole registers.
  bool lies_in_registers(Matrix<T> values) const {
    return !kPairs && values.col == 1 && value_row_ == problem_.value_dim;
  }

  // O = diag(factor) O + P @ V  [n, value_dim] for few rows; keys are read next, up to `end`.
  BK_TARGET void sum_values(int64_t n, int64_t j, ColumnRange cols, int64_t end) {
    if constexpr (!kPairs) {
      const Matrix<T> values = tile_.values(j + cols.begin);
      const int64_t num_cols = cols.end - cols.begin, next = j + kBlockKV;
      const ReadAhead<T> ahead{values, num_cols, problem_.value_dim, tile_.keys(next), end - next, problem_.head_dim};
      sum_rows<V>(n, value_row_, num_cols, GemmA<Scalar>{s_ + cols.begin, kScoresRow, 1}, values, ahead, o_, value_row_,
                  factor_);
    }
  }

  // V as the right operand: packed, or where it lies.
  BK_TARGET GemmB<Scalar> pack_values(Matrix<T> values) {
    if constexpr (kPairs) {
      pack_row_pairs<V>(values, tile_.num_cols, problem_.value_dim, v_, value_row_);
      return {v_, value_row_};
    }
    if constexpr (std::is_same_v<T, Scalar>) {
      // Rows far apart would meet in few sets of the L1 cache.
      if (lies_in_registers(values) && values.row == value_row_) return {values.data, values.row};
    }
    pack<V>(values, tile_.num_cols, problem_.value_dim, v_, value_row_);
    return {v_, value_row_};
  }

  // out = O / row_sum; or, where the keys were split, the row as it is, to be combined.
  BK_TARGET void finish() {
    for (int64_t r = 0; r < tile_.num_rows; ++r) {
      Scalar* o = o_ + r * value_row_;
      if (unit_.partials != nullptr) {
        const AttentionPartials& partials = *unit_.partials;
        const int64_t b = partials.entry(unit_.split, unit_.b), h = tile_.head(r), i = tile_.query(r);
        std::copy_n(o, value_row_, partials.out.as<Scalar>().at(b, h, i));
        *partials.row_max.as<Scalar>().at(b, h, i) = row_max_[r];
        *partials.row_sum.as<Scalar>().at(b, h, i) = row_sum_[r];
        continue;
      }
      *tile_.template row_of<Scalar>(problem_.row_max, r) = row_max_[r];
      *tile_.template row_of<Scalar>(problem_.row_sum, r) = row_sum_[r];
      if (row_sum_[r] != 0) scale_row<V>(o, value_row_, Scalar(problem_.keep_scale) / row_sum_[r]);
      store_row<V>(o, problem_.value_dim, tile_.template row_of<T>(problem_.out, r));
    }
  }

  const AttentionProblem& problem_;
  const AttentionForwardUnit& unit_;
  AttentionTile<V, T> tile_;
  int64_t depth_, value_row_;  // head_dim in elements of a product, value_dim in whole registers
  Scalar *q_, *k_, *v_, *s_, *o_;
  static constexpr int64_t kGroup = round_up(kGemmRows, V::kWidth);
  Scalar row_max_[kMaxBlockQ + kGroup], row_sum_[kMaxBlockQ + kGroup], factor_[kGroup];
};

// One row of the output from the parts that the splits of the keys gave.
template <class V, class T>
BK_TARGET void combine_attention(const AttentionProblem& problem, const AttentionPartials& partials, int64_t b,
                                 int64_t h, int64_t i) {
  using Scalar = typename V::Scalar;
  Scalar row_max = -std::numeric_limits<Scalar>::infinity(), row_sum = 0;
  for (int64_t split = 0; split < partials.num_splits; ++split) {
    row_max = std::max(row_max, *partials.row_max.as<Scalar>().at(partials.entry(split, b), h, i));
  }
  Scalar* out = partials.out.as<Scalar>().at(partials.entry(0, b), h, i);  // receives the sum
  const int64_t n = round_up(problem.value_dim, V::kWidth);
  for (int64_t split = 0; split < partials.num_splits; ++split) {
    const int64_t entry = partials.entry(split, b);
    const Scalar sum = *partials.row_sum.as<Scalar>().at(entry, h, i);
    const Scalar factor =
        sum == 0 ? 0 : std::exp2((*partials.row_max.as<Scalar>().at(entry, h, i) - row_max) * Scalar(kLog2E));
    row_sum += sum * factor;
    const Scalar* part = partials.out.as<Scalar>().at(entry, h, i);
    const typename V::Reg f = V::set(factor);
    for (int64_t e = 0; e < n; e += V::kWidth) {
      const typename V::Reg scaled = V::mul(V::load(part + e), f);
      V::store(out + e, split == 0 ? scaled : V::add(V::load(out + e), scaled));
    }
  }
  const int64_t q_begin = problem.sequence(b).q_begin;
  *problem.row_max.as<Scalar>().at(b, h, q_begin + i) = row_max;
  *problem.row_sum.as<Scalar>().at(b, h, q_begin + i) = row_sum;
  if (row_sum != 0) scale_row<V>(out, n, Scalar(problem.keep_scale) / row_sum);
  store_row<V>(out, problem.value_dim, problem.out.as<T>().at(b, h, q_begin + i));
}

template <class V, class T, bool kPairs = false>
constexpr AttentionForwardKernels forward_kernels{&AttentionForward<V, T, kPairs>::run, &combine_attention<V, T>};

template <class V>
AttentionForwardKernels forward_kernels_of(const AttentionProblem& problem) {
  if constexpr (V::kHasPairs) {
    if (has_pairs(problem)) return forward_kernels<V, BFloat16, true>;
  }
  switch (problem.dtype) {
    case ScalarType::Double: return forward_kernels<Double, double>;
    case ScalarType::Half: return forward_kernels<V, Half>;
    case ScalarType::BFloat16: return forward_kernels<V, BFloat16>;
    default: return forward_kernels<V, float>;
  }
}
