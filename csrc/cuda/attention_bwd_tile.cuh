// What the backward does with a tile of scores: the weights anew, from the scores and the softmax's statistics, and
// their gradient. Dao et al. 2022, algorithm 4:
//   P = exp(S - row_max) / row_sum     dP = dO V^T     dS = P * (dP - delta),   delta = rowsum(dO * O) - dlse
#pragma once

#include <climits>

#include "attention_tile.cuh"
#include "launch.cuh"

namespace bigkern {

// What the launch adds to the problem.
struct BackwardLaunch {
  int num_tiles;
  bool vectorized;  // query, key, value and grad_out, as copy_rows says
  // Sums for dQ, if they are made by atomics: [heads, num_query_tiles, query_tile_size]. The batch's entries have
  // query_tiles_of_entry tiles each, unless packed. A tile of block_q queries is in parts of query_rows by query_cols.
  float* query_sums;
  int64_t num_query_tiles;
  int query_tiles_of_entry, query_tile_size, block_q, query_rows, query_cols;
};

// S and dP, or their transposes, of all columns. Side by side: a sum waits some 33 cycles for the one before. Unrolled
// further, the loads ahead would spill registers.
template <class T, int kCols, int kM, int kN, class Left, class OtherLeft>
__device__ void add_scores(float (&s)[kM][kN][4], const Left& left, SharedTile<T, kCols> right, float (&dp)[kM][kN][4],
                           const OtherLeft& other_left, SharedTile<T, kCols> other_right, int row) {
#pragma unroll(kStep<T> / 2)
  for (int k = 0; k < kCols / kStep<T>; ++k) {
    add_step_t(s, left, right, row, k);
    add_step_t(dp, other_left, other_right, row, k);
  }
}

// What a query's weights and their gradients need; of one that isn't there, or meets no key, they come out as 0.
struct QueryStats {
  float shift = INFINITY, inverse = 0.f, delta = 0.f;  // row_max, in base 2 if kPlain, 1 / row_sum
  int key_begin = INT_MAX, key_end = 0;                // the keys that it meets

  QueryStats() = default;
  template <bool kPlain, class T>
  static __device__ QueryStats load(const AttentionHead<T>& head, const AnyStrided& deltas, int h, int64_t i) {
    QueryStats stats;
    if (i >= head.sequence.q_len) return stats;
    const ColumnRange keys = head.p.keys_of(head.sequence, i);
    stats.key_begin = keys.begin;
    stats.key_end = keys.end;
    const float sum = head.stat(head.p.row_sum, h, i);
    if (sum == 0.f) return stats;
    stats.shift = head.stat(head.p.row_max, h, i) * (kPlain ? kLog2E : 1.f);
    stats.inverse = 1.f / sum;
    stats.delta = head.stat(deltas, h, i);
    return stats;
  }
};

// From the products of a query and a key, and of their gradients, to the weight as it met the value, but for the
// factor of dropout, and the score's gradient: before the derivative of the cap if kOfMask, which is added after it.
template <bool kPlain, bool kOfMask>
struct ScoreGradient {
  AttentionScores score;
  float scale_log2, keep_scale;

  __device__ explicit ScoreGradient(const AttentionProblem& p)
      : score(p), scale_log2(score.scale * kLog2E), keep_scale(static_cast<float>(p.keep_scale)) {}

  // kPlain: as if they met.
  __device__ void operator()(const QueryStats& stats, const AttentionRow& row, int key, bool keeps, float& s,
                             float& dp) const {
    if constexpr (kPlain) {
      s = exp2_approx(fmaf(s, scale_log2, -stats.shift)) * stats.inverse;
      dp = s * (dp - stats.delta);
    } else {
      float cap_slope;
      const float weight = exp2_approx((score(row, key, s, cap_slope) - stats.shift) * kLog2E) * stats.inverse;
      const float gradient = weight * ((keeps ? dp * keep_scale : 0.f) - stats.delta);
      s = keeps ? weight : 0.f;
      dp = kOfMask ? gradient : gradient * cap_slope;
    }
  }
};

}  // namespace bigkern
