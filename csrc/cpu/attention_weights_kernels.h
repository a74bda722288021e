// The weights of attention themselves, for one instruction set; included by each_isa.h.
#include "attention_tile.h"

// P = exp(S - row_max) / row_sum, of one head or the mean over heads; `weights` is zeroed.
template <class V, class T>
BK_TARGET void attention_weights(const AttentionProblem& problem, const AnyStrided& weights,
                                 const AttentionWeightsUnit& unit) {
  using Scalar = typename V::Scalar;
  Workspace& workspace = Workspace::of_this_thread();
  const int64_t depth = problem.head_dim;
  Scalar* q = workspace.take<Scalar>(round_up(unit.num_rows * depth, V::kWidth) + V::kWidth);  // [num_rows, depth]
  Scalar* k = workspace.take<Scalar>(kBlockKV * depth);              // [panels, depth, kPanel]
  Scalar* s = workspace.take<Scalar>(unit.num_rows * kScoresRow);    // [num_rows, kScoresRow]
  Scalar* sum = workspace.take<Scalar>(unit.num_rows * kScoresRow);  // of s over the heads

  for (int64_t j = 0; j < problem.sequence(unit.b).k_len; j += kBlockKV) {
    std::fill_n(sum, unit.num_rows * kScoresRow, Scalar(0));
    for (int64_t h = unit.h_begin; h < unit.h_begin + unit.num_heads; ++h) {
      AttentionTile<V, T> tile(problem, unit.b, h, 1, unit.i_begin, unit.num_rows);
      if (!tile.move_to(j)) continue;
      // S = Q @ K^T  [num_rows, kBlockKV]
      for (int64_t r = 0; r < unit.num_rows; ++r) {
        pack_row<V>(tile.template row_of<const T>(problem.query, r), problem.query.col, depth, q + r * depth);
      }
      pack_transposed<V>(tile.keys(j), tile.num_cols, depth, k);
      for (int64_t r = 0; r < unit.num_rows; ++r) {
        if (r % kGemmRows == 0) {
          const int64_t n = std::min<int64_t>(kGemmRows, unit.num_rows - r);
          tile.template product<false>(r, n, GemmA<Scalar>{q + r * depth, depth, 1}, depth, k, s + r * kScoresRow);
        }
        const Scalar row_sum = *tile.template row_of<Scalar>(problem.row_sum, r);
        if (row_sum == 0) continue;
        const ColumnRange regs = tile.regs_of(r);
        const bool is_plain = tile.is_plain(r);
        if (!is_plain) tile.finish_scores(r, s + r * kScoresRow);
        if (problem.dropout_threshold > 0) tile.make_keep(r);
        const SoftmaxExp<V> exp(is_plain, problem.scale, *tile.template row_of<Scalar>(problem.row_max, r));
        const typename V::Reg factor = V::set(Scalar(problem.keep_scale) / (row_sum * unit.num_heads));
        for (int64_t c = regs.begin; c < regs.end; c += V::kWidth) {
          typename V::Reg p = V::mul(exp(V::load(s + r * kScoresRow + c)), factor);
          if (problem.dropout_threshold > 0) p = V::mul(p, V::load(tile.keep + c));
          V::store(sum + r * kScoresRow + c, V::add(V::load(sum + r * kScoresRow + c), p));
        }
      }
    }
    const int64_t num_cols = std::min(kBlockKV, problem.sequence(unit.b).k_len - j);
    for (int64_t r = 0; r < unit.num_rows; ++r) {
      store_row<V>(sum + r * kScoresRow, num_cols, weights.as<T>().at(unit.b, unit.h_begin, unit.i_begin + r, j));
    }
  }
}

inline AttentionWeightsKernel attention_weights_kernel(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return &attention_weights<Double, double>;
    case ScalarType::Half: return &attention_weights<Float, Half>;
    case ScalarType::BFloat16: return &attention_weights<Float, BFloat16>;
    default: return &attention_weights<Float, float>;
  }
}
