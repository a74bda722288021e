// Attention's backward for one instruction set; included by each_isa.h.
#include "attention_tile.h"

// What the backward does with one tile: the weights anew, from the scores and the softmax's statistics, and their
// gradient. Dao et al. 2022, algorithm 4:
//   P = exp(S - row_max) / row_sum     dP = dO V^T     dS = P * (dP - D + dlse),   D = rowsum(dO * O)
// With pairs, S and dP are products of pairs of bfloat16, which are exact.
template <class V, class T, bool kPairs>
class AttentionBackwardTile {
  using Scalar = typename V::Scalar;
  using Reg = typename V::Reg;

 public:
  AttentionBackwardTile(const AttentionProblem& problem, Workspace& workspace)
      : q_row(round_up(problem.head_dim, V::kWidth)),
        v_row(round_up(problem.value_dim, V::kWidth)),
        q_depth(kPairs ? problem.head_dim / 2 : problem.head_dim),
        v_depth(kPairs ? problem.value_dim / 2 : problem.value_dim),
        k_t(workspace.take<Scalar>(kBlockKV * q_depth)),
        v_t(workspace.take<Scalar>(kBlockKV * v_depth)),
        p(workspace.take<Scalar>(kBackwardBlockQ * kScoresRow)),
        ds(workspace.take<Scalar>(kBackwardBlockQ * kScoresRow)),
        slope_(workspace.take<Scalar>(kBlockKV)) {}

  // K^T, V^T  [panels, depth, kPanel] of the tile's keys.
  BK_TARGET void pack_keys(const AttentionTile<V, T>& tile) {
    pack_transposed<V>(operand<kPairs>(tile.keys(tile.j_begin)), tile.num_cols, q_depth, k_t);
    pack_transposed<V>(operand<kPairs>(tile.values(tile.j_begin)), tile.num_cols, v_depth, v_t);
  }

  // Q, dO  [num_rows, depth in whole registers], where `q` and `grad_out` point to.
  BK_TARGET void pack_queries(const AttentionTile<V, T>& tile, const AnyStrided& grad_out_rows) {
    const AttentionProblem& problem = tile.problem;
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      pack_row<V>(tile.template row_of<const T>(problem.query, r), problem.query.col, problem.head_dim, q + r * q_row);
      pack_row<V>(tile.template row_of<const T>(grad_out_rows, r), grad_out_rows.col, problem.value_dim,
                  grad_out + r * v_row);
    }
  }

  // P as it met the values, and dS: for the mask before the derivative of the cap, which is that of the products after.
  template <bool kOfMask>
  BK_TARGET void run(AttentionTile<V, T>& tile, const AttentionBackwardProblem& backward) {
    const AttentionProblem& problem = tile.problem;
    const GemmA<Scalar> q_rows = left(tile, problem.query, q, q_row);
    const GemmA<Scalar> grad_out_rows = left(tile, backward.grad_out, grad_out, v_row);
    const bool has_dropout = problem.dropout_threshold > 0;
    const Reg keep_scale = V::set(Scalar(problem.keep_scale));
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      if (r % kGemmRows == 0) {
        // S = Q @ K^T,  dP = dO @ V^T  [six rows, kScoresRow]
        const int64_t n = std::min<int64_t>(kGemmRows, tile.num_rows - r);
        tile.prefetch_mask(r, n);
        tile.template product<kPairs>(r, n, q_rows.from(r), q_depth, k_t, p + r * kScoresRow);
        tile.template product<kPairs>(r, n, grad_out_rows.from(r), v_depth, v_t, ds + r * kScoresRow);
      }
      Scalar *p_row = p + r * kScoresRow, *ds_row = ds + r * kScoresRow;
      const ColumnRange regs = tile.regs_of(r);
      const int64_t end = round_up(tile.num_cols, V::kWidth);
      for (Scalar* row : {p_row, ds_row}) {
        std::fill(row, row + regs.begin, Scalar(0));
        std::fill(row + regs.end, row + end, Scalar(0));
      }
      if (regs.begin == regs.end) continue;

      const Scalar row_sum = *tile.template row_of<Scalar>(problem.row_sum, r);
      if (row_sum == 0) {  // the row met no key at all
        for (Scalar* row : {p_row, ds_row}) std::fill(row + regs.begin, row + regs.end, Scalar(0));
        continue;
      }
      const Scalar row_max = *tile.template row_of<Scalar>(problem.row_max, r);
      const Reg inverse = V::set(1 / row_sum), delta = V::set(*tile.template row_of<Scalar>(backward.delta, r));
      const bool is_plain = tile.is_plain(r), has_slope = !kOfMask && problem.softcap > 0;
      if (!is_plain) tile.finish_scores(r, p_row, has_slope ? slope_ : nullptr);
      if (has_dropout) tile.make_keep(r);
      const SoftmaxExp<V> exp(is_plain, problem.scale, row_max);
      for (int64_t j = regs.begin; j < regs.end; j += V::kWidth) {
        const Reg weight = V::mul(exp(V::load(p_row + j)), inverse);
        Reg dp = V::load(ds_row + j), dropped = weight;
        if (has_dropout) {
          const Reg keep = V::mul(V::load(tile.keep + j), keep_scale);
          dp = V::mul(dp, keep);
          dropped = V::mul(weight, keep);
        }
        Reg d = V::mul(weight, V::sub(dp, delta));
        if (has_slope) d = V::mul(d, V::load(slope_ + j));
        V::store(p_row + j, dropped);
        V::store(ds_row + j, d);
      }
    }
  }

  const int64_t q_row, v_row;      // head_dim, value_dim in whole registers
  const int64_t q_depth, v_depth;  // in elements of a product
  Scalar *const k_t, *const v_t, *const p, *const ds;
  Scalar *q = nullptr, *grad_out = nullptr;

 private:
  // Rows of Q or dO as the left operand: packed, or where they lie.
  GemmA<Scalar> left(const AttentionTile<V, T>& tile, const AnyStrided& rows, const Scalar* packed, int64_t row) const {
    if (!kPairs) return {packed, row, 1};
    return {reinterpret_cast<const Scalar*>(tile.template row_of<const T>(rows, 0)), rows.row / 2, 1};
  }

  Scalar* const slope_;
};

// dQ of the queries and dK, dV of the keys of a unit, whichever it owns.
template <class V, class T, bool kPairs>
class AttentionBackward {
  using Scalar = typename V::Scalar;
  using Tile = AttentionTile<V, T>;

 public:
  BK_TARGET static void run(const AttentionBackwardProblem& backward, const AttentionBackwardUnit& unit) {
    AttentionBackward(backward, unit, Workspace::of_this_thread()).run();
  }

 private:
  static constexpr int64_t kMostPackedOnce = 256 << 10;  // elements

  AttentionBackward(const AttentionBackwardProblem& backward, const AttentionBackwardUnit& unit, Workspace& workspace)
      : backward_(backward),
        problem_(*backward.forward),
        unit_(unit),
        num_queries_(unit.i_end - unit.i_begin),
        tile_(problem_, workspace) {
    const int64_t all_rows = unit.num_heads * num_queries_;
    const bool has_blocks = unit.j_end - unit.j_begin > kBlockKV;
    packs_once_ = has_blocks && all_rows * (tile_.q_row + tile_.v_row) <= kMostPackedOnce;
    const int64_t num_rows = packs_once_ ? all_rows : kBackwardBlockQ;
    q_ = workspace.take<Scalar>(num_rows * tile_.q_row);
    grad_out_ = workspace.take<Scalar>(num_rows * tile_.v_row);
    k_ = workspace.take<Scalar>(kBlockKV * tile_.q_row);
    if (!unit.owns_keys) return;
    grad_k_ = workspace.take<Scalar>(kBlockKV * tile_.q_row);
    grad_v_ = workspace.take<Scalar>(kBlockKV * tile_.v_row);
  }

  BK_TARGET void run() {
    Scalar* grad_q = static_cast<Scalar*>(unit_.grad_query);  // [num_heads, num_queries_, q_row]
    if (unit_.owns_queries) std::fill_n(grad_q, unit_.num_heads * num_queries_ * tile_.q_row, Scalar(0));
    if (packs_once_) pack_all_queries();
    for (int64_t j = unit_.j_begin; j < unit_.j_end; j += kBlockKV) {
      if (unit_.owns_keys) {
        std::fill_n(grad_k_, kBlockKV * tile_.q_row, Scalar(0));
        std::fill_n(grad_v_, kBlockKV * tile_.v_row, Scalar(0));
      }
      bool is_packed = false;
      for (int64_t h = 0; h < unit_.num_heads; ++h) {
        for (int64_t i = unit_.i_begin; i < unit_.i_end; i += kBackwardBlockQ) {
          Tile tile = tile_of(h, i);
          if (!tile.move_to(j)) continue;
          if (!is_packed) {
            tile_.pack_keys(tile);
            if (unit_.owns_queries) pack<V>(tile.keys(j), tile.num_cols, problem_.head_dim, k_, tile_.q_row);
            is_packed = true;
          }
          point_to(h, i);
          if (!packs_once_) tile_.pack_queries(tile, backward_.grad_out);
          tile_.template run<false>(tile, backward_);
          if (unit_.owns_keys) add_to_keys(tile);
          if (unit_.owns_queries) add_to_queries(tile, grad_q + row_of(h, i) * tile_.q_row);
        }
      }
      if (unit_.owns_keys) store_keys(j);
    }
    if (unit_.owns_queries) store_queries(grad_q);
  }

  // Those of the unit, where several blocks of keys meet them and a cache holds them: rows far apart are read slowly.
  BK_TARGET void pack_all_queries() {
    for (int64_t h = 0; h < unit_.num_heads; ++h) {
      for (int64_t i = unit_.i_begin; i < unit_.i_end; i += kBackwardBlockQ) {
        point_to(h, i);
        tile_.pack_queries(tile_of(h, i), backward_.grad_out);
      }
    }
  }

  Tile tile_of(int64_t h, int64_t i) const {
    return Tile(problem_, unit_.b, unit_.h_begin + h, 1, i, std::min(kBackwardBlockQ, unit_.i_end - i));
  }

  int64_t row_of(int64_t h, int64_t i) const { return h * num_queries_ + i - unit_.i_begin; }

  void point_to(int64_t h, int64_t i) {
    const int64_t row = packs_once_ ? row_of(h, i) : 0;
    tile_.q = q_ + row * tile_.q_row;
    tile_.grad_out = grad_out_ + row * tile_.v_row;
  }

  // dV += P^T @ dO  [num_cols, value_dim],  dK += dS^T @ Q  [num_cols, head_dim]
  BK_TARGET void add_to_keys(const Tile& tile) {
    for (int64_t j = 0; j < tile.num_cols; j += kGemmRows) {
      const int rows = std::min<int64_t>(kGemmRows, tile.num_cols - j);
      const ColumnRange queries = tile.rows_of(j, rows);
      const int64_t first = queries.begin * kScoresRow + j, depth = queries.end - queries.begin;
      gemm_rows<V, true>(rows, tile_.v_row, depth, GemmA<Scalar>{tile_.p + first, 1, kScoresRow},
                         tile_.grad_out + queries.begin * tile_.v_row, tile_.v_row, grad_v_ + j * tile_.v_row,
                         tile_.v_row);
      gemm_rows<V, true>(rows, tile_.q_row, depth, GemmA<Scalar>{tile_.ds + first, 1, kScoresRow},
                         tile_.q + queries.begin * tile_.q_row, tile_.q_row, grad_k_ + j * tile_.q_row, tile_.q_row);
    }
  }

  // dQ += dS @ K  [num_rows, head_dim]
  BK_TARGET void add_to_queries(const Tile& tile, Scalar* grad_q) {
    for (int64_t r = 0; r < tile.num_rows; r += kGemmRows) {
      const ColumnRange cols = tile.cols_of(r, kGemmRows);
      gemm_rows<V, true>(std::min<int64_t>(kGemmRows, tile.num_rows - r), tile_.q_row, cols.end - cols.begin,
                         GemmA<Scalar>{tile_.ds + r * kScoresRow + cols.begin, kScoresRow, 1},
                         k_ + cols.begin * tile_.q_row, tile_.q_row, grad_q + r * tile_.q_row, tile_.q_row);
    }
  }

  BK_TARGET void store_keys(int64_t j) {
    const AttentionSequence sequence = problem_.sequence(unit_.b);
    const int64_t kv_head = unit_.h_begin / problem_.group();
    for (int64_t r = 0; r < std::min(kBlockKV, sequence.k_len - j); ++r) {
      const int64_t row = sequence.k_begin + j + r;
      scale_row<V>(grad_k_ + r * tile_.q_row, tile_.q_row, Scalar(problem_.scale));
      store_row<V>(grad_k_ + r * tile_.q_row, problem_.head_dim, backward_.grad_key.as<T>().at(unit_.b, kv_head, row));
      store_row<V>(grad_v_ + r * tile_.v_row, problem_.value_dim,
                   backward_.grad_value.as<T>().at(unit_.b, kv_head, row));
    }
  }

  BK_TARGET void store_queries(Scalar* grad_q) {
    for (int64_t h = 0; h < unit_.num_heads; ++h) {
      for (int64_t i = 0; i < num_queries_; ++i, grad_q += tile_.q_row) {
        const int64_t row = problem_.sequence(unit_.b).q_begin + unit_.i_begin + i;
        scale_row<V>(grad_q, tile_.q_row, Scalar(problem_.scale));
        store_row<V>(grad_q, problem_.head_dim, backward_.grad_query.as<T>().at(unit_.b, unit_.h_begin + h, row));
      }
    }
  }

  const AttentionBackwardProblem& backward_;
  const AttentionProblem& problem_;
  const AttentionBackwardUnit& unit_;
  const int64_t num_queries_;  // of a head
  bool packs_once_;
  AttentionBackwardTile<V, T, kPairs> tile_;
  Scalar *q_, *grad_out_;  // packed: of all of the unit's queries, or of a tile
  Scalar *k_, *grad_k_ = nullptr, *grad_v_ = nullptr;
};

// delta = rowsum(dO * O) - dlse, of one head's queries.
template <class V, class T>
BK_TARGET void attention_delta(const AttentionBackwardProblem& backward, int64_t b, int64_t h) {
  using Scalar = typename V::Scalar;
  const AttentionProblem& problem = *backward.forward;
  const Strided<const T> grad_out = backward.grad_out.as<const T>(), out = problem.out.as<const T>();
  const AttentionSequence sequence = problem.sequence(b);
  for (int64_t i = sequence.q_begin; i < sequence.q_begin + sequence.q_len; ++i) {
    const T *x = grad_out.at(b, h, i), *y = out.at(b, h, i);
    Scalar sum = 0;
    int64_t e = 0;
    if (grad_out.col == 1 && out.col == 1) {
      typename V::Reg sums = V::set(Scalar(0));
      for (; e + V::kWidth <= problem.value_dim; e += V::kWidth) sums = V::fma(V::load(x + e), V::load(y + e), sums);
      sum = V::sum(sums);
    }
    for (; e < problem.value_dim; ++e) {
      sum += static_cast<Scalar>(x[e * grad_out.col]) * static_cast<Scalar>(y[e * out.col]);
    }
    if (backward.grad_lse.data != nullptr) sum -= *backward.grad_lse.as<const Scalar>().at(b, h, i);
    *backward.delta.as<Scalar>().at(b, h, i) = sum;
  }
}

// The gradient of a block of the additive mask, summed over all that the mask is broadcast to.
template <class V, class T, bool kPairs>
class AttentionMaskGrad {
  using Scalar = typename V::Scalar;

 public:
  BK_TARGET static void run(const AttentionBackwardProblem& backward, const AttentionMaskUnit& unit) {
    AttentionMaskGrad(backward, unit, Workspace::of_this_thread()).run();
  }

 private:
  AttentionMaskGrad(const AttentionBackwardProblem& backward, const AttentionMaskUnit& unit, Workspace& workspace)
      : backward_(backward), problem_(*backward.forward), unit_(unit), tile_(problem_, workspace) {
    tile_.q = workspace.take<Scalar>(kBackwardBlockQ * tile_.q_row);
    tile_.grad_out = workspace.take<Scalar>(kBackwardBlockQ * tile_.v_row);
    sum_ = workspace.take<double>(kBackwardBlockQ * kBlockKV);
  }

  BK_TARGET void run() {
    std::fill_n(sum_, kBackwardBlockQ * kBlockKV, 0.0);
    for (int64_t b = unit_.b.begin; b < unit_.b.end; ++b) {
      for (int64_t h = unit_.h.begin; h < unit_.h.end; ++h) {
        for (int64_t i = unit_.i.begin; i < unit_.i.end; i += kBackwardBlockQ) {
          const int64_t rows = std::min({kBackwardBlockQ, unit_.i.end - i, problem_.sequence(b).q_len - i});
          if (rows <= 0) continue;
          AttentionTile<V, T> tile(problem_, b, h, 1, i, rows);
          bool is_packed = false;
          for (int64_t j = unit_.j.begin; j < std::min(unit_.j.end, problem_.sequence(b).k_len); j += kBlockKV) {
            if (!tile.move_to(j)) continue;
            if (!is_packed) tile_.pack_queries(tile, backward_.grad_out);
            is_packed = true;
            tile_.pack_keys(tile);
            tile_.template run<true>(tile, backward_);
            add(tile);
          }
        }
      }
    }
    store();
  }

  // Sums over the columns or rows that share an element of the mask.
  BK_TARGET void add(const AttentionTile<V, T>& tile) {
    const bool shares_row = problem_.mask_rows == 1, shares_col = problem_.mask_cols == 1;
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      double* sum = sum_ + (shares_row ? 0 : r * kBlockKV);
      const Scalar* ds = tile_.ds + r * kScoresRow;
      for (int64_t j = 0; j < tile.num_cols; ++j) sum[shares_col ? 0 : j] += ds[j];
    }
  }

  BK_TARGET void store() {
    switch (problem_.mask_dtype) {
      case ScalarType::Double: return store(backward_.grad_mask.as<double>());
      case ScalarType::Half: return store(backward_.grad_mask.as<Half>());
      case ScalarType::BFloat16: return store(backward_.grad_mask.as<BFloat16>());
      default: return store(backward_.grad_mask.as<float>());
    }
  }

  template <class M>
  BK_TARGET void store(const Strided<M>& grad) {
    const int64_t rows = problem_.mask_rows == 1 ? 1 : unit_.i.end - unit_.i.begin;
    const int64_t cols = problem_.mask_cols == 1 ? 1 : unit_.j.end - unit_.j.begin;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < cols; ++j) {
        *grad.at(unit_.b.begin, unit_.h.begin, unit_.i.begin + r, unit_.j.begin + j) =
            static_cast<M>(sum_[r * kBlockKV + j]);
      }
    }
  }

  const AttentionBackwardProblem& backward_;
  const AttentionProblem& problem_;
  const AttentionMaskUnit& unit_;
  AttentionBackwardTile<V, T, kPairs> tile_;
  double* sum_;  // [kBackwardBlockQ, kBlockKV]
};

template <class V, class T, bool kPairs = false>
constexpr AttentionBackwardKernels backward_kernels{&AttentionBackward<V, T, kPairs>::run, &attention_delta<V, T>,
                                                    &AttentionMaskGrad<V, T, kPairs>::run};

template <class V>
AttentionBackwardKernels backward_kernels_of(const AttentionBackwardProblem& backward) {
  const AttentionProblem& problem = *backward.forward;
  if constexpr (V::kHasPairs) {
    if (has_pairs(problem) && backward.grad_out.row % 2 == 0) return backward_kernels<V, BFloat16, true>;
  }
  switch (problem.dtype) {
    case ScalarType::Double: return backward_kernels<Double, double>;
    case ScalarType::Half: return backward_kernels<V, Half>;
    case ScalarType::BFloat16: return backward_kernels<V, BFloat16>;
    default: return backward_kernels<V, float>;
  }
}
