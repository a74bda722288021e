// dK, dV and, by atomics, dQ: a block owns a tile of keys and goes over the queries that meet them.
//
// Scores are transposed: a warp holds 16 row_tiles keys by SUB_Q queries, so that P^T and dS^T are in registers as left
// operands. dS goes through shared memory on its way to dQ.
#pragma once

#include "attention_bwd_tile.cuh"

namespace bigkern {

// By the bytes of a row of kDim elements. feature_warps warps hold the same keys, and of the sums a part of the
// features each, which would be too many for one. At most 99 kB of shared memory.
struct KeyTiles {
  int row_tiles, key_warps, feature_warps, block_q, sub_q;
  bool value_in_registers;

  constexpr int warps() const { return key_warps * feature_warps; }
  constexpr int block_kv() const { return 16 * row_tiles * key_warps; }

  // dQ [block_q, dim] is a grid of the warps' parts, of two row tiles where there are as many.
  constexpr int query_rows() const { return block_q < 32 ? block_q : 32; }
  constexpr int query_row_groups() const { return block_q / query_rows(); }
  constexpr int query_cols(int dim) const { return dim * query_row_groups() / warps(); }
};
template <class T, int kDim, bool kPlain>
constexpr KeyTiles key_tiles() {
  if (sizeof(T) == 2) {
    switch (kDim) {
      case 64: return kPlain ? KeyTiles{2, 4, 1, 64, 32, false} : KeyTiles{1, 4, 1, 64, 16, false};
      case 128: return kPlain ? KeyTiles{1, 8, 1, 64, 32, true} : KeyTiles{1, 4, 1, 32, 16, false};
      default: return {1, 4, 2, 16, 16, false};
    }
  }
  switch (kDim) {
    case 64: return {1, 4, 1, 32, 16, false};
    case 128: return {1, 4, 2, 16, 16, false};
    default: return {1, 1, 4, 16, 16, false};
  }
}

constexpr int kQueryStages = 2;

// A tile of dS^T has as many queries as fill the 128 bytes of a row.
template <class T>
constexpr int kScoreCols = 128 / sizeof(T);

// QueryStats of the queries of a tile, in shared memory.
template <int kQueries>
struct QueryColumns {
  float shift[kQueries], inverse[kQueries], delta[kQueries];
  int key_begin[kQueries], key_end[kQueries];

  __device__ void put(int i, const QueryStats& stats) {
    shift[i] = stats.shift;
    inverse[i] = stats.inverse;
    delta[i] = stats.delta;
    key_begin[i] = stats.key_begin;
    key_end[i] = stats.key_end;
  }
  __device__ QueryStats at(int i) const {
    QueryStats stats;
    stats.shift = shift[i];
    stats.inverse = inverse[i];
    stats.delta = delta[i];
    stats.key_begin = key_begin[i];
    stats.key_end = key_end[i];
    return stats;
  }
};

template <class T, int kDim, bool kPlain>
constexpr size_t key_smem_bytes() {
  constexpr KeyTiles kTiles = key_tiles<T, kDim, kPlain>();
  const int key_tensors = kTiles.value_in_registers ? 1 : 2;
  const size_t rows = key_tensors * kTiles.block_kv() + (kQueryStages + 1) * kTiles.block_q;
  return (rows * kDim + kTiles.block_kv() * kScoreCols<T>)*sizeof(T) + sizeof(QueryColumns<kTiles.block_q>);
}

// The random bits of a warp's 16 keys, from a multiple of 16 on, and 8 queries from i on, for a lane's of them. Lanes
// of neighbouring keys draw for one query each and exchange.
struct DropoutColumns {
  uint32_t words[2][2];  // of the queries i + 2 (lane % 4) and the next, the keys lane / 4 and 8 on

  DropoutColumns() = default;
  __device__ DropoutColumns(const AttentionProblem& p, int bh, int i, int j) {
    const int lane = threadIdx.x % 32, mine = lane / 4 % 2;
    const uint4 drawn =
        philox({static_cast<uint32_t>(j / 32 * 4 + lane / 8), static_cast<uint32_t>(i + lane % 4 * 2 + mine),
                static_cast<uint32_t>(bh), p.philox_offset()},
               p.philox_seed());
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t first = half == 0 ? drawn.x : drawn.y, last = half == 0 ? drawn.z : drawn.w;
      const uint32_t own = j % 32 == 0 ? first : last, other = __shfl_xor_sync(~0u, own, 4);
      words[0][half] = mine == 0 ? own : other;
      words[1][half] = mine == 0 ? other : own;
    }
  }
  // Whether the weight of query `second` and key lane / 4 + 8 half isn't dropped.
  __device__ bool keeps(int second, int half, uint32_t threshold) const {
    const uint32_t word = words[second][half];
    return (threadIdx.x / 4 % 2 ? word >> 16 : word & 0xffff) >= threshold;
  }
};

// Where a tile of dQ is summed up.
template <class T>
__device__ float* query_sums_of(const AttentionHead<T>& head, const BackwardLaunch& launch, int h, int i, int block_q) {
  const int first = head.p.cu_seqlens_q != nullptr ? static_cast<int>(head.sequence.q_begin) / block_q + head.b
                                                   : head.b * launch.query_tiles_of_entry;
  return launch.query_sums + (h * launch.num_query_tiles + first + i / block_q) * launch.query_tile_size;
}

// And an element of it: they lie in the order of the registers that hold them, 32 lanes side by side, so that each
// atomic of a warp takes 128 bytes.
__device__ inline int place_of_sum(const BackwardLaunch& launch, int row, int col) {
  const int warp = col / launch.query_cols * (launch.block_q / launch.query_rows) + row / launch.query_rows;
  const int m = row % launch.query_rows / 16, d = col % launch.query_cols / 8, c = row / 8 % 2 * 2 + col % 2;
  const int first = warp * launch.query_rows * launch.query_cols;
  return first + ((m * (launch.query_cols / 8) + d) * 4 + c) * 32 + row % 8 * 4 + col % 8 / 2;
}

// kPlain: as the forward's; scores are scaled products of keys that causality and window select; scale is positive.
template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(32 * key_tiles<T, kDim, kPlain>().warps(), 8 / key_tiles<T, kDim, kPlain>().warps())
    attention_keys_kernel(const __grid_constant__ AttentionProblem p,
                          const __grid_constant__ AttentionBackwardProblem g,
                          const __grid_constant__ BackwardLaunch launch) {
  constexpr KeyTiles kTiles = key_tiles<T, kDim, kPlain>();
  constexpr int kM = kTiles.row_tiles, kWarpKeys = 16 * kM, BLOCK_KV = kTiles.block_kv();
  constexpr int BLOCK_Q = kTiles.block_q, SUB_Q = kTiles.sub_q, kN = SUB_Q / 8;
  constexpr int kFeatures = kDim / kTiles.feature_warps, kD = kFeatures / 8, kDimSteps = kDim / kStep<T>;
  constexpr int kThreads = 32 * kTiles.warps();
  using Tile = SharedTile<T, kDim>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_key = warp / kTiles.feature_warps * kWarpKeys;  // of the warp, in the tile
  const int first_feature = warp % kTiles.feature_warps * kFeatures;

  const auto head_of = [&](int block) {
    const int b = block / launch.num_tiles / p.kv_heads, kv_head = block / launch.num_tiles % p.kv_heads;
    return AttentionHead<T>(p, b, kv_head * p.group());
  };
  AttentionHead<T> head = head_of(blockIdx.x);
  const int j = blockIdx.x % launch.num_tiles * BLOCK_KV;
  const AttentionSequence& sequence = head.sequence;
  if (j >= sequence.k_len) return;

  // All tiles of queries that meet the keys, for each of the heads that share them.
  const ColumnRange queries = p.queries_of(sequence, j, min(j + BLOCK_KV, static_cast<int>(sequence.k_len)));
  const int i_begin = static_cast<int>(queries.begin) / BLOCK_Q * BLOCK_Q, i_end = queries.end;
  const int h_end = queries.begin < queries.end ? head.h + static_cast<int>(p.group()) : head.h;
  struct QueryTile {
    int h, i;
  };
  const auto next_of = [&](QueryTile t) {
    return t.i + BLOCK_Q < i_end ? QueryTile{t.h, t.i + BLOCK_Q} : QueryTile{t.h + 1, i_begin};
  };

  extern __shared__ __align__(128) unsigned char smem[];
  const Tile k_smem{reinterpret_cast<T*>(smem)};  // [BLOCK_KV, kDim]
  T* place = k_smem.data + BLOCK_KV * kDim;
  const Tile v_smem{place};  // [BLOCK_KV, kDim]
  if (!kTiles.value_in_registers) place += BLOCK_KV * kDim;
  const auto q_smem = [&](int stage) { return Tile{place + stage * BLOCK_Q * kDim}; };  // [BLOCK_Q, kDim] each
  const Tile grad_out_smem = q_smem(kQueryStages);                                      // [BLOCK_Q, kDim]
  const SharedTile<T, kScoreCols<T>> ds_smem{q_smem(kQueryStages + 1).data};            // dS^T [BLOCK_KV, BLOCK_Q]
  auto& columns = *reinterpret_cast<QueryColumns<BLOCK_Q>*>(ds_smem.data + BLOCK_KV * kScoreCols<T>);

  const auto copy_tile = [&](Tile tile, const AnyStrided& tensor, int cols, QueryTile t) {
    if (t.h >= h_end) return;
    copy_strided_rows<BLOCK_Q>(tile, head.query_row(tensor, t.h, t.i), tensor.row, sequence.q_len - t.i, cols,
                               tensor.col, launch.vectorized, kThreads);
  };
  const auto load_stats = [&](QueryTile t) {
    if (t.h >= h_end || threadIdx.x >= BLOCK_Q) return QueryStats();
    return QueryStats::load<kPlain>(head, g.delta, t.h, t.i + threadIdx.x);
  };
  static_assert(kThreads >= BLOCK_Q);

  copy_keys(k_smem, BLOCK_KV, head, p.key, p.head_dim, j, launch.vectorized);
  copy_keys(v_smem, BLOCK_KV, head, p.value, p.value_dim, j, launch.vectorized);
  uint32_t v_reg[kM][kTiles.value_in_registers ? kDimSteps : 1][4];
  if constexpr (kTiles.value_in_registers) {
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int k = 0; k < kDimSteps; ++k) load_left(v_reg[m][k], v_smem, first_key + m * 16, k);
    }
    __syncthreads();
  }
  QueryTile tile{head.h, i_begin};
  copy_tile(q_smem(0), p.query, p.head_dim, tile);
  copy_tile(grad_out_smem, g.grad_out, p.value_dim, tile);
  commit_copies();
  if (threadIdx.x < BLOCK_Q) columns.put(threadIdx.x, load_stats(tile));

  const ScoreGradient<kPlain, false> differentiate(p);
  float grad_k[kM][kD][4] = {}, grad_v[kM][kD][4] = {};

  for (int stage = 0; tile.h < h_end; stage ^= 1, tile = next_of(tile)) {
    // The tiles have come, and all warps are done with those before.
    wait_for_copies<0>();
    __syncthreads();
    head.b = opaque(head.b);
    copy_tile(q_smem(stage ^ 1), p.query, p.head_dim, next_of(tile));
    commit_copies();
    const Tile queries_smem = q_smem(stage);
    AttentionRow row;
    if (!kPlain && p.alibi_slopes.data != nullptr) row.slope = *p.alibi_slopes.at(head.b, tile.h);

#pragma unroll 1
    for (int q = 0; q < BLOCK_Q; q += SUB_Q) {
      // S^T = K @ Q^T,  dP^T = V @ dO^T  [kWarpKeys, SUB_Q]
      float s[kM][kN][4] = {}, ds[kM][kN][4] = {};
      const LeftRows<T, kDim> keys{k_smem, first_key};
      if constexpr (kTiles.value_in_registers) {
        const auto values = [&](int m, int k) { return to_fragment<T>(v_reg[m][k]); };
        add_scores(s, keys, queries_smem, ds, values, grad_out_smem, q);
      } else {
        add_scores(s, keys, queries_smem, ds, LeftRows<T, kDim>{v_smem, first_key}, grad_out_smem, q);
      }

      // P^T = exp(S^T - row_max) / row_sum,  dS^T = P^T * (dP^T - delta)
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int key = opaque(j + first_key + lane / 4);
        [[maybe_unused]] DropoutColumns dropout;
        static_assert(kPlain || kM == 1);
        const bool has_dropout = !kPlain && p.dropout_threshold > 0;
        if (has_dropout) dropout = {p, static_cast<int>(head.b * p.heads + tile.h), tile.i + q + 8 * n, j + first_key};
#pragma unroll
        for (int second = 0; second < 2; ++second) {
          const int col = q + 8 * n + lane % 4 * 2 + second;
          const QueryStats stats = columns.at(col);
          if constexpr (!kPlain) {
            row.key_begin = stats.key_begin;
            row.key_end = stats.key_end;
            row.diagonal = tile.i + col + sequence.k_len - sequence.q_len;
            row.mask_offset = head.b * p.mask.batch + tile.h * p.mask.head + (tile.i + col) * p.mask.row;
          }
#pragma unroll
          for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const bool keeps = !has_dropout || dropout.keeps(second, half, p.dropout_threshold);
              const int c = 2 * half + second;
              differentiate(stats, row, key + m * 16 + half * 8, keeps, s[m][n][c], ds[m][n][c]);
            }
          }
        }
      }
      // Whether some query doesn't meet some of the keys: they are in order.
      const int begin = j + first_key;
      if (kPlain && (columns.key_begin[q + SUB_Q - 1] > begin || columns.key_end[q] < begin + kWarpKeys)) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int col = q + 8 * n + lane % 4 * 2 + c % 2;
#pragma unroll
            for (int m = 0; m < kM; ++m) {
              const int key = begin + m * 16 + c / 2 * 8 + lane / 4;
              if (key < columns.key_begin[col] || key >= columns.key_end[col]) s[m][n][c] = ds[m][n][c] = 0.f;
            }
          }
        }
      }

      // dV += P^T @ dO,  dK += dS^T @ Q  [kWarpKeys, kFeatures]
      add_product(grad_v, s, grad_out_smem, q, first_feature);
      add_product(grad_k, ds, queries_smem, q, first_feature);

      if (launch.query_sums != nullptr && first_feature == 0) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float low = ds[m][n][2 * half], high = ds[m][n][2 * half + 1];
              T* const to = ds_smem.at(first_key + m * 16 + half * 8 + lane / 4, q + 8 * n, lane % 4 * 2);
              if constexpr (std::is_same_v<T, float>) {
                // Two rows share their banks: while the even one stores its low number, the odd one does the high one.
                const int odd = lane / 4 % 2;
                to[odd] = odd ? high : low;
                to[1 - odd] = odd ? low : high;
              } else {
                *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(low, high);
              }
            }
          }
        }
      }
    }

    // dS is complete, and its queries have been used.
    __syncthreads();
    copy_tile(grad_out_smem, g.grad_out, p.value_dim, next_of(tile));
    commit_copies();
    const QueryStats stats = load_stats(next_of(tile));

    // dQ += dS @ K  [kRows, kCols]
    if (launch.query_sums != nullptr) {
      constexpr int kRows = kTiles.query_rows(), kCols = kTiles.query_cols(kDim), kQ = kRows / 16;
      const int first_row = warp % kTiles.query_row_groups() * kRows;
      const int first_col = warp / kTiles.query_row_groups() * kCols;
      float grad_q[kQ][kCols / 8][4] = {};
#pragma unroll 2
      for (int k = 0; k < BLOCK_KV; k += kStep<T>) {
        Fragment<T, 4> a[kQ];
#pragma unroll
        for (int m = 0; m < kQ; ++m) a[m] = load_left_t(ds_smem, k, first_row + m * 16);
#pragma unroll
        for (int d = 0; d < kCols / 8; d += 2) {
          const Fragment<T, 4> keys = load_right(k_smem, k, first_col + d * 8);
#pragma unroll
          for (int m = 0; m < kQ; ++m) {
            multiply_add<T>(grad_q[m][d], a[m], keys, 0);
            multiply_add<T>(grad_q[m][d + 1], a[m], keys, 2);
          }
        }
      }
      float* sums = query_sums_of(head, launch, tile.h, tile.i, BLOCK_Q) + warp * (kRows * kCols) + lane;
#pragma unroll
      for (int m = 0; m < kQ; ++m) {
#pragma unroll
        for (int d = 0; d < kCols / 8; ++d) {
#pragma unroll
          for (int c = 0; c < 4; ++c, sums += 32) atomicAdd(sums, grad_q[m][d][c]);
        }
      }
    }
    if (threadIdx.x < BLOCK_Q) columns.put(threadIdx.x, stats);
  }
  wait_for_copies<0>();  // of the keys, if there were no queries: none may come after this

  // Made anew, so that it needn't stay in registers.
  const AttentionHead<T> owner = head_of(opaque(blockIdx.x));

#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = j + first_key + m * 16 + half * 8 + lane / 4;
      if (key >= owner.sequence.k_len) continue;
      const int first_col = first_feature + lane % 4 * 2;
      const RowOfPairs<T> k_row(owner.key_row(g.grad_key, key), g.grad_key.col, p.head_dim);
#pragma unroll
      for (int d = 0; d < kD; ++d) {
        const float* k = grad_k[m][d] + 2 * half;
        k_row.put(first_col + 8 * d, k[0] * differentiate.score.scale, k[1] * differentiate.score.scale);
      }
      const RowOfPairs<T> v_row(owner.key_row(g.grad_value, key), g.grad_value.col, p.value_dim);
#pragma unroll
      for (int d = 0; d < kD; ++d) {
        const float* v = grad_v[m][d] + 2 * half;
        v_row.put(first_col + 8 * d, v[0] * differentiate.keep_scale, v[1] * differentiate.keep_scale);
      }
    }
  }
}

// dQ out of its sums: a warp a query.
template <class T>
__global__ void __launch_bounds__(32 * kQueryWarps)
    convert_query_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ AttentionBackwardProblem g,
                         const __grid_constant__ BackwardLaunch launch) {
  const WarpQuery at(p);
  if (!at.is_there) return;
  const AttentionHead<T> head(p, at.b, at.h);
  const float* sums = query_sums_of(head, launch, at.h, at.query, launch.block_q);
  const auto scale = static_cast<float>(p.scale);
  T* row = head.query_row(g.grad_query, at.h, at.query);
  for (int col = threadIdx.x % 32; col < p.head_dim; col += 32) {
    row[col * g.grad_query.col] = static_cast<T>(sums[place_of_sum(launch, at.query % launch.block_q, col)] * scale);
  }
}

}  // namespace bigkern
