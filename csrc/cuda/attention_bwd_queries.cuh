// dQ without atomics: a block owns a tile of queries and goes over the keys that they meet, as in the forward.
#pragma once

#include "attention_bwd_tile.cuh"

namespace bigkern {

// By the bytes of a row of kDim elements. feature_warps warps hold the same 16 queries, and of dQ a part of the
// features each, which would be too much for one. At most 96 kB of shared memory. A multiprocessor's registers suffice
// for so many blocks.
struct QueryTiles {
  int row_warps, feature_warps, block_kv, stages, blocks;

  constexpr int warps() const { return row_warps * feature_warps; }
  constexpr int block_q() const { return 16 * row_warps; }
};
constexpr QueryTiles query_tiles(int row_bytes) {
  switch (row_bytes) {
    case 128: return {4, 1, 32, 2, 4};
    case 256: return {4, 1, 32, 2, 2};
    case 512: return {4, 1, 16, 2, 2};
    default: return {2, 2, 16, 1, 2};
  }
}

template <class T, int kDim>
constexpr size_t query_smem_bytes() {
  constexpr QueryTiles kTiles = query_tiles(kDim * sizeof(T));
  return (2 * kTiles.block_q() + 2 * kTiles.stages * kTiles.block_kv) * kDim * sizeof(T);
}

// From products to gradients, for a warp's 16 queries.
template <bool kPlain, bool kOfMask, class T>
struct QueryScores {
  const AttentionHead<T>& head;
  ScoreGradient<kPlain, kOfMask> differentiate;
  AttentionRow row[2];
  QueryStats stats[2];

  // `first` is the warp's first query.
  __device__ QueryScores(const AttentionHead<T>& head, const AnyStrided& delta, int first)
      : head(head), differentiate(head.p) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first + half * 8 + threadIdx.x % 32 / 4;
      stats[half] = QueryStats::load<kPlain>(head, delta, head.h, i);
      if (i < head.sequence.q_len) row[half] = AttentionRow(head.p, head.sequence, head.b, head.h, i);
    }
  }

  // P = exp(S - row_max) / row_sum,  dS = P * (dP - delta), of the keys from j on: in place of S and dP.
  template <int kN>
  __device__ void operator()(float (&s)[1][kN][4], float (&ds)[1][kN][4], int j) const {
    const AttentionProblem& p = head.p;
    const bool has_dropout = !kPlain && p.dropout_threshold > 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      [[maybe_unused]] DropoutWords words;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if (has_dropout && n % 4 == 0) words = {p, head.b, row[half], j + 8 * n};
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; ++c) {
          const bool keeps = !has_dropout || words.keeps((j / 8 + n) % 4, c % 2, p.dropout_threshold);
          const int key = j + 8 * n + threadIdx.x % 4 * 2 + c % 2;
          differentiate(stats[half], row[half], key, keeps, s[0][n][c], ds[0][n][c]);
          if (kPlain && (key < stats[half].key_begin || key >= stats[half].key_end)) ds[0][n][c] = 0.f;
        }
      }
    }
  }
};

template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(32 * query_tiles(kDim * sizeof(T)).warps(), query_tiles(kDim * sizeof(T)).blocks)
    attention_queries_kernel(const __grid_constant__ AttentionProblem p,
                             const __grid_constant__ AttentionBackwardProblem g,
                             const __grid_constant__ BackwardLaunch launch) {
  constexpr QueryTiles kTiles = query_tiles(kDim * sizeof(T));
  constexpr int BLOCK_Q = kTiles.block_q(), BLOCK_KV = kTiles.block_kv, kN = BLOCK_KV / 8;
  constexpr int kFeatures = kDim / kTiles.feature_warps, kD = kFeatures / 8;
  using Tile = SharedTile<T, kDim>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = warp / kTiles.feature_warps * 16;  // of the warp, in the tile
  const int first_feature = warp % kTiles.feature_warps * kFeatures;

  // From the last tile on, which has the most keys under a causal mask.
  const int block = blockIdx.x, i = (launch.num_tiles - 1 - block % launch.num_tiles) * BLOCK_Q;
  AttentionHead<T> head(p, block / launch.num_tiles / p.heads, block / launch.num_tiles % p.heads);
  const int num_rows = min(BLOCK_Q, static_cast<int>(head.sequence.q_len) - i);
  if (num_rows <= 0) return;
  const int begin = static_cast<int>(p.keys_of(head.sequence, i).begin) / BLOCK_KV * BLOCK_KV;
  const int end = p.keys_of(head.sequence, i + num_rows - 1).end;

  extern __shared__ __align__(128) unsigned char smem[];
  const Tile q_smem{reinterpret_cast<T*>(smem)}, grad_out_smem{q_smem.data + BLOCK_Q * kDim};  // [BLOCK_Q, kDim]
  const auto k_smem = [&](int stage) { return Tile{grad_out_smem.data + (BLOCK_Q + stage * BLOCK_KV) * kDim}; };
  const auto v_smem = [&](int stage) { return k_smem(kTiles.stages + stage); };  // [BLOCK_KV, kDim] each
  const auto copy_rows_of = [&](Tile tile, const AnyStrided& tensor, int cols) {
    const auto row_at = [&](int r) { return r < num_rows ? head.query_row(tensor, head.h, i + r) : nullptr; };
    copy_rows(tile, BLOCK_Q, row_at, cols, tensor.col, launch.vectorized, static_cast<const T*>(p.query.data));
  };
  const auto copy_tile = [&](int j, int stage) {
    if (j < end) {
      copy_keys(k_smem(stage), BLOCK_KV, head, p.key, p.head_dim, j, launch.vectorized);
      copy_keys(v_smem(stage), BLOCK_KV, head, p.value, p.value_dim, j, launch.vectorized);
    }
    commit_copies();
  };
  copy_rows_of(q_smem, p.query, p.head_dim);
  copy_rows_of(grad_out_smem, g.grad_out, p.value_dim);
  copy_tile(begin, 0);

  const QueryScores<kPlain, false, T> differentiate(head, g.delta, i + first_row);
  const float scale = static_cast<float>(p.scale);
  float grad_q[1][kD][4] = {};
  for (int j = begin, stage = 0; j < end; j += BLOCK_KV) {
    // The tile has come, and all warps are done with the one before.
    wait_for_copies<0>();
    __syncthreads();
    head.b = opaque(head.b);
    if (kTiles.stages == 2) copy_tile(j + BLOCK_KV, stage ^ 1);

    // S = Q @ K^T,  dP = dO @ V^T  [16, BLOCK_KV]
    float s[1][kN][4] = {}, ds[1][kN][4] = {};
    add_scores(s, LeftRows<T, kDim>{q_smem, first_row}, k_smem(stage), ds, LeftRows<T, kDim>{grad_out_smem, first_row},
               v_smem(stage), 0);
    differentiate(s, ds, j);

    // dQ += dS @ K  [16, kFeatures]
    add_product(grad_q, ds, k_smem(stage), 0, first_feature);

    if (kTiles.stages == 2) {
      stage ^= 1;
    } else {
      __syncthreads();
      copy_tile(j + BLOCK_KV, 0);
    }
  }
  wait_for_copies<0>();  // of the queries, if there were no keys: none may come after this

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = first_row + half * 8 + lane / 4;
    if (r >= num_rows) continue;
    const RowOfPairs<T> to(head.query_row(g.grad_query, head.h, i + r), g.grad_query.col, p.head_dim);
#pragma unroll
    for (int d = 0; d < kD; ++d) {
      const float* q = grad_q[0][d] + 2 * half;
      to.put(first_feature + 8 * d + lane % 4 * 2, q[0] * scale, q[1] * scale);
    }
  }
}

}  // namespace bigkern
