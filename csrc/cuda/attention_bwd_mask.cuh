// The gradient of an additive mask: a block owns a tile of its elements and goes over all that they are broadcast to.
#pragma once

#include "attention_bwd_queries.cuh"

namespace bigkern {

// By the bytes of a row of kDim elements. A warp has 16 queries. At most 96 kB of shared memory.
struct MaskTiles {
  int warps, block_kv;
};
constexpr MaskTiles mask_tiles(int row_bytes) {
  switch (row_bytes) {
    case 128: return {4, 64};
    case 256: return {4, 64};
    case 512: return {4, 32};
    default: return {2, 16};
  }
}

template <class T, int kDim>
constexpr size_t mask_smem_bytes() {
  constexpr MaskTiles kTiles = mask_tiles(kDim * sizeof(T));
  return 2 * (16 * kTiles.warps + kTiles.block_kv) * kDim * sizeof(T);
}

// A long sum in float32, with what its roundings lost: Kahan 1965.
struct CompensatedSum {
  float sum = 0.f, excess = 0.f;

  __device__ void operator+=(float x) {
    const float y = x - excess, next = sum + y;
    excess = (next - sum) - y;
    sum = next;
  }
  __device__ double value() const { return static_cast<double>(sum) - excess; }
};

__device__ inline void store_mask_grad(const AttentionProblem& p, const AnyStrided& grad, int64_t offset, double x) {
  switch (p.mask_dtype) {
    case ScalarType::Half: static_cast<Half*>(grad.data)[offset] = static_cast<float>(x); break;
    case ScalarType::BFloat16: static_cast<BFloat16*>(grad.data)[offset] = static_cast<float>(x); break;
    default: static_cast<float*>(grad.data)[offset] = x;
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(32 * mask_tiles(kDim * sizeof(T)).warps)
    attention_mask_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ AttentionBackwardProblem g,
                          const __grid_constant__ BackwardLaunch launch) {
  constexpr MaskTiles kTiles = mask_tiles(kDim * sizeof(T));
  constexpr int BLOCK_Q = 16 * kTiles.warps, BLOCK_KV = kTiles.block_kv, kN = BLOCK_KV / 8;
  using Tile = SharedTile<T, kDim>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // What the tile's elements, from (mask_b, mask_h, mask_i, mask_j) on, are broadcast to.
  const bool shares_rows = p.mask_rows == 1, shares_cols = p.mask_cols == 1;
  int64_t block = blockIdx.x;
  const int mask_j = block % launch.num_tiles * BLOCK_KV;
  block /= launch.num_tiles;
  const int row_tiles = shares_rows ? 1 : ceil_div<int>(p.mask_rows, BLOCK_Q);
  const int mask_i = block % row_tiles * BLOCK_Q;
  block /= row_tiles;
  const int mask_h = block % p.mask_heads, mask_b = block / p.mask_heads;
  const int end_b = p.mask_batch == 1 ? p.batch : mask_b + 1, end_h = p.mask_heads == 1 ? p.heads : mask_h + 1;

  extern __shared__ __align__(128) unsigned char smem[];
  const Tile q_smem{reinterpret_cast<T*>(smem)}, grad_out_smem{q_smem.data + BLOCK_Q * kDim};        // [BLOCK_Q, kDim]
  const Tile k_smem{grad_out_smem.data + BLOCK_Q * kDim}, v_smem{k_smem.data + BLOCK_KV * kDim};     // [BLOCK_KV, kDim]
  CompensatedSum sums[kN][4];

  for (int bh = mask_b * static_cast<int>(p.heads) + mask_h;;) {
    const int b = bh / p.heads, h = bh % p.heads;
    const AttentionHead<T> head(p, b, h);
    const int q_len = head.sequence.q_len, k_len = head.sequence.k_len;
    const int end_i = shares_rows ? q_len : min(q_len, mask_i + BLOCK_Q);
    for (int i = mask_i; i < end_i; i += BLOCK_Q) {
      const int num_rows = min(BLOCK_Q, q_len - i);
      // The keys that some of the queries meet.
      const int first = p.keys_of(head.sequence, i).begin, last = p.keys_of(head.sequence, i + num_rows - 1).end;
      const int begin_j = shares_cols ? first / BLOCK_KV * BLOCK_KV : max(mask_j, first / BLOCK_KV * BLOCK_KV);
      const int end_j = min(last, shares_cols ? k_len : mask_j + BLOCK_KV);
      if (begin_j >= end_j) continue;

      const auto copy_rows_of = [&](Tile tile, const AnyStrided& tensor, int cols) {
        const auto row_at = [&](int r) { return r < num_rows ? head.query_row(tensor, h, i + r) : nullptr; };
        copy_rows(tile, BLOCK_Q, row_at, cols, tensor.col, launch.vectorized, static_cast<const T*>(p.query.data));
      };
      __syncthreads();  // all warps are done with the tiles before
      copy_rows_of(q_smem, p.query, p.head_dim);
      copy_rows_of(grad_out_smem, g.grad_out, p.value_dim);
      const QueryScores<false, true, T, kDim, kN> scores(head, g.delta, i + warp * 16);

      for (int j = begin_j; j < end_j; j += BLOCK_KV) {
        if (j > begin_j) __syncthreads();
        copy_keys(k_smem, BLOCK_KV, head, p.key, p.head_dim, j, launch.vectorized);
        copy_keys(v_smem, BLOCK_KV, head, p.value, p.value_dim, j, launch.vectorized);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();

        float s[1][kN][4], ds[1][kN][4];
        scores(s, ds, q_smem, grad_out_smem, warp * 16, k_smem, v_smem, j);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[n][c] += ds[0][n][c];
        }
      }
    }
    // The next head of the range, then the next entry.
    if (h + 1 < end_h) {
      ++bh;
    } else if (b + 1 < end_b) {
      bh = (b + 1) * static_cast<int>(p.heads) + mask_h;
    } else {
      break;
    }
  }

  // Sums over the rows and columns that share an element.
  auto* const total = reinterpret_cast<double*>(smem);  // [BLOCK_Q, BLOCK_KV]
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int r = warp * 16 + c / 2 * 8 + lane / 4;
      total[r * BLOCK_KV + 8 * n + lane % 4 * 2 + c % 2] = sums[n][c].value();
    }
  }
  __syncthreads();
  if (shares_rows) {
    for (int col = threadIdx.x; col < BLOCK_KV; col += blockDim.x) {
      for (int r = 1; r < BLOCK_Q; ++r) total[col] += total[r * BLOCK_KV + col];
    }
    __syncthreads();
  }
  const int num_rows = shares_rows ? 1 : min(BLOCK_Q, static_cast<int>(p.mask_rows) - mask_i);
  const int num_cols = shares_cols ? 1 : min(BLOCK_KV, static_cast<int>(p.mask_cols) - mask_j);
  for (int at = threadIdx.x; at < num_rows * num_cols; at += blockDim.x) {
    const int r = at / num_cols, col = at % num_cols;
    double x = total[r * BLOCK_KV + col];
    for (int other = 1; shares_cols && other < BLOCK_KV; ++other) x += total[r * BLOCK_KV + other];
    const int64_t offset = mask_b * g.grad_mask.batch + mask_h * g.grad_mask.head + (mask_i + r) * g.grad_mask.row +
                           (mask_j + col) * g.grad_mask.col;
    store_mask_grad(p, g.grad_mask, offset, x);
  }
}

}  // namespace bigkern
