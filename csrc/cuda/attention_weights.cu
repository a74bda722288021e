// attention_weights on a GPU.
#include "../attention_ops.h"
#include "attention_launch.cuh"
#include "attention_tile.cuh"

namespace bigkern {

namespace {

constexpr int kWarps = 4, BLOCK_Q = 16 * kWarps, BLOCK_KV = 32;

// A block has a tile of queries and one of keys: of one head, or of all, whose mean it writes.
template <class T, int kDim>
__global__ void __launch_bounds__(32 * kWarps)
    weights_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ AnyStrided weights,
                   bool vectorized, int heads_at_once) {
  constexpr int kN = BLOCK_KV / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int block = blockIdx.x;
  const int num_key_tiles = ceil_div<int>(p.k_rows, BLOCK_KV), num_query_tiles = ceil_div<int>(p.q_rows, BLOCK_Q);
  const int j = block % num_key_tiles * BLOCK_KV;
  block /= num_key_tiles;
  const int i = block % num_query_tiles * BLOCK_Q;
  block /= num_query_tiles;
  const int num_groups = p.heads / heads_at_once, b = block / num_groups, h_begin = block % num_groups * heads_at_once;

  extern __shared__ __align__(128) unsigned char smem[];
  const SharedTile<T, kDim> q_smem{reinterpret_cast<T*>(smem)};    // [BLOCK_Q, kDim]
  const SharedTile<T, kDim> k_smem{q_smem.data + BLOCK_Q * kDim};  // [BLOCK_KV, kDim]
  const AttentionScores score(p);
  const float keep_scale = static_cast<float>(p.keep_scale) / heads_at_once;
  float mean[kN][4] = {};

  for (int h = h_begin; h < h_begin + heads_at_once; ++h) {
    const AttentionHead<T> head(p, b, h);
    if (i >= head.sequence.q_len || j >= head.sequence.k_len) return;  // zeros are there
    copy_queries(q_smem, BLOCK_Q, head, p.query, p.head_dim, i, vectorized);
    copy_keys(k_smem, BLOCK_KV, head, p.key, p.head_dim, j, vectorized);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();

    // S = Q @ K^T  [16, BLOCK_KV]
    float s[1][kN][4] = {};
#pragma unroll 4
    for (int k = 0; k < kDim / kStep<T>; ++k) add_step_t(s, LeftRows<T, kDim>{q_smem, warp * 16}, k_smem, 0, k);
    __syncthreads();

    // P = exp(S - row_max) / row_sum
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = i + warp * 16 + half * 8 + lane / 4;
      if (query >= head.sequence.q_len) continue;
      const AttentionRow row(p, head.sequence, b, h, query);
      const float sum = head.stat(p.row_sum, h, query), largest = head.stat(p.row_max, h, query);
      if (sum == 0.f) continue;
      const float factor = keep_scale / sum;
      const DropoutWords words = p.dropout_threshold > 0 ? DropoutWords(p, b, row, j) : DropoutWords();
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int second = 0; second < 2; ++second) {
          const float x = score(row, j + 8 * n + lane % 4 * 2 + second, s[0][n][2 * half + second]);
          const bool keeps = words.keeps(n, second, p.dropout_threshold);
          if (keeps) mean[n][2 * half + second] += exp2f((x - largest) * kLog2E) * factor;
        }
      }
    }
  }

#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int query = i + warp * 16 + c / 2 * 8 + lane / 4, key = j + 8 * n + lane % 4 * 2 + c % 2;
      if (query < p.q_rows && key < p.k_rows) {
        *weights.as<T>().at(b, h_begin, query, key) = static_cast<T>(mean[n][c]);
      }
    }
  }
}

// ---- Host ----

void attention_weights(const AttentionProblem& p, const AnyStrided& weights) {
  check_supported(p);
  const int heads_at_once = weights.head == 0 ? p.heads : 1;
  const int64_t num_tiles = ceil_div<int64_t>(p.q_rows, BLOCK_Q) * ceil_div<int64_t>(p.k_rows, BLOCK_KV);
  if (p.batch * p.heads * num_tiles == 0) return;
  const bool vectorized = is_vectorized(p, p.query, p.head_dim) && is_vectorized(p, p.key, p.head_dim);
  ATTENTION_SWITCH(p, T, kDim, [&] {
    const size_t smem = (BLOCK_Q + BLOCK_KV) * kDim * sizeof(T);
    launch(p.device_index, weights_kernel<T, kDim>, grid_of(p.batch * p.heads / heads_at_once * num_tiles), 32 * kWarps,
           smem, p, weights, vectorized, heads_at_once);
  });
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CUDA, m) {
  using namespace bigkern;
  m.impl("attention_weights", TORCH_BOX((&attention_weights_op<Memory::kDevice, attention_weights>)));
}
