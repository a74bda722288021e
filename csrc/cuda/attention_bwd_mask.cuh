// The gradient of an additive mask: a block owns a tile of its elements and goes over all that they are broadcast to.
#pragma once

#include "attention_bwd_queries.cuh"

namespace bigkern {

// A warp has 16 queries. Products are summed up over so many features at a time.
struct MaskTiles {
  static constexpr int warps = 4, block_q = 16 * warps, block_kv = 32, features = 64;
};

template <class T>
constexpr size_t mask_smem_bytes() {
  constexpr size_t kRows = MaskTiles::block_q + MaskTiles::block_kv;
  return std::max(kRows * MaskTiles::features * sizeof(T), MaskTiles::block_q * MaskTiles::block_kv * sizeof(double));
}

// The columns from `col` on.
template <class T>
__device__ AnyStrided columns_from(const AnyStrided& tensor, int col) {
  return {static_cast<T*>(tensor.data) + col * tensor.col, tensor.batch, tensor.head, tensor.row, tensor.col};
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

template <class T>
__global__ void __launch_bounds__(32 * MaskTiles::warps)
    attention_mask_kernel(const __grid_constant__ AttentionProblem p,
                          const __grid_constant__ AttentionBackwardProblem g,
                          const __grid_constant__ BackwardLaunch launch) {
  constexpr int BLOCK_Q = MaskTiles::block_q, BLOCK_KV = MaskTiles::block_kv, kN = BLOCK_KV / 8;
  constexpr int kFeatures = MaskTiles::features;
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
  const SharedTile<T, kFeatures> left_smem{reinterpret_cast<T*>(smem)};             // [BLOCK_Q, kFeatures]
  const SharedTile<T, kFeatures> right_smem{left_smem.data + BLOCK_Q * kFeatures};  // [BLOCK_KV, kFeatures]
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

      // products [16, BLOCK_KV] += rows of queries from i on @ rows of keys from j on, transposed
      const auto add_products = [&](float (&products)[1][kN][4], const AnyStrided& left, const AnyStrided& right,
                                    int cols, int j) {
        for (int col = 0; col < cols; col += kFeatures) {
          const AnyStrided rows = columns_from<T>(left, col);
          const auto row_at = [&](int r) { return r < num_rows ? head.query_row(rows, h, i + r) : nullptr; };
          __syncthreads();  // all warps are done with the tiles before
          copy_rows(left_smem, BLOCK_Q, row_at, cols - col, left.col, launch.vectorized, row_at(0));
          copy_keys(right_smem, BLOCK_KV, head, columns_from<T>(right, col), cols - col, j, launch.vectorized);
          commit_copies();
          wait_for_copies<0>();
          __syncthreads();
#pragma unroll 4
          for (int k = 0; k < kFeatures / kStep<T>; ++k) {
            add_step_t(products, LeftRows<T, kFeatures>{left_smem, warp * 16}, right_smem, 0, k);
          }
        }
      };
      const QueryScores<false, true, T> differentiate(head, g.delta, i + warp * 16);
      for (int j = begin_j; j < end_j; j += BLOCK_KV) {
        // S = Q @ K^T,  dP = dO @ V^T  [16, BLOCK_KV]
        float s[1][kN][4] = {}, ds[1][kN][4] = {};
        add_products(s, p.query, p.key, p.head_dim, j);
        add_products(ds, g.grad_out, p.value, p.value_dim, j);
        differentiate(s, ds, j);
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
