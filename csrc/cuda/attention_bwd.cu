// attention on a GPU: the backward, of Dao 2023 (FlashAttention-2, algorithm 2).
#include "../attention_ops.h"
#include "attention_bwd_keys.cuh"
#include "attention_bwd_mask.cuh"
#include "attention_bwd_queries.cuh"
#include "attention_launch.cuh"
#include "scratch.cuh"

namespace bigkern {

namespace {

// delta = rowsum(dO * O) - dlse: a warp a query.
template <class T>
__global__ void __launch_bounds__(32 * kQueryWarps)
    delta_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ AttentionBackwardProblem g,
                 bool vectorized /* grad_out and out */) {
  const int lane = threadIdx.x % 32;
  const WarpQuery at(p);
  if (!at.is_there) return;
  const AttentionHead<T> head(p, at.b, at.h);

  const T *x = head.query_row(g.grad_out, at.h, at.query), *y = head.query_row(p.out, at.h, at.query);
  // For a query with one key dP - delta cancels, but for the rounding errors of both.
  using Sum = std::conditional_t<std::is_same_v<T, float>, double, float>;
  Sum sum = 0;
  if (vectorized) {
    for (int col = lane * 4; col < p.value_dim; col += 32 * 4) {
      const auto xs = load<4>(x + col), ys = load<4>(y + col);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum = fma(static_cast<Sum>(xs.at[e]), static_cast<Sum>(ys.at[e]), sum);
    }
  } else {
    for (int col = lane; col < p.value_dim; col += 32) {
      sum = fma(static_cast<Sum>(x[col * g.grad_out.col]), static_cast<Sum>(y[col * p.out.col]), sum);
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (lane > 0) return;
  if (g.grad_lse.data != nullptr) sum -= head.stat(g.grad_lse, at.h, at.query);
  head.stat(g.delta, at.h, at.query) = static_cast<float>(sum);
}

// ---- Host ----

constexpr size_t kMostSmem = 99 << 10;  // that a block may have on every card from sm_80 on

// A grid may not be empty.
template <class Kernel, class... Arguments>
void launch_blocks(const AttentionProblem& p, Kernel kernel, int64_t num_blocks, int threads, size_t smem,
                   const Arguments&... arguments) {
  if (num_blocks > 0) launch(p.device_index, kernel, grid_of(num_blocks), threads, smem, p, arguments...);
}

template <class T, int kDim, bool kPlain>
void launch_backward(const AttentionProblem& p, const AttentionBackwardProblem& g, BackwardLaunch options) {
  BackwardLaunch& l = options;
  const int64_t num_rows = p.batch * p.heads * p.max_q_len, blocks_of_rows = ceil_div<int64_t>(num_rows, kQueryWarps);
  const bool reads_vectors = is_vectorized(p, g.grad_out, p.value_dim) && is_vectorized(p, p.out, p.value_dim);
  launch_blocks(p, delta_kernel<T>, blocks_of_rows, 32 * kQueryWarps, 0, g, reads_vectors);

  constexpr KeyTiles kKeyTiles = key_tiles<T, kDim, kPlain>();
  static_assert(key_smem_bytes<T, kDim, kPlain>() <= kMostSmem && query_smem_bytes<T, kDim>() <= kMostSmem);
  Tensor sums;
  if (!g.deterministic) {
    l.block_q = kKeyTiles.block_q;
    l.query_rows = kKeyTiles.query_rows();
    l.query_cols = kKeyTiles.query_cols(kDim);
    l.query_tile_size = l.block_q * kDim;
    l.query_tiles_of_entry = ceil_div<int64_t>(p.max_q_len, l.block_q);
    // Packed, each entry begins a tile of its own.
    l.num_query_tiles = p.cu_seqlens_q != nullptr ? p.q_rows / l.block_q + p.batch : p.batch * l.query_tiles_of_entry;
    sums = new_scratch(p.heads * l.num_query_tiles * l.query_tile_size, ScalarType::Float, device_of(p));
    torch::stable::zero_(sums);
    l.query_sums = static_cast<float*>(sums.data_ptr());
  }
  l.num_tiles = ceil_div<int64_t>(p.max_k_len, kKeyTiles.block_kv());
  launch_blocks(p, attention_keys_kernel<T, kDim, kPlain>, l.num_tiles * p.batch * p.kv_heads, 32 * kKeyTiles.warps(),
                key_smem_bytes<T, kDim, kPlain>(), g, l);

  if (l.query_sums != nullptr) {
    launch_blocks(p, convert_query_kernel<T>, blocks_of_rows, 32 * kQueryWarps, 0, g, l);
    return;
  }
  constexpr QueryTiles kQueryTiles = query_tiles(kDim * sizeof(T));
  l.num_tiles = ceil_div<int64_t>(p.max_q_len, kQueryTiles.block_q());
  launch_blocks(p, attention_queries_kernel<T, kDim, kPlain>, l.num_tiles * p.batch * p.heads, 32 * kQueryTiles.warps(),
                query_smem_bytes<T, kDim>(), g, l);
}

BackwardLaunch launch_of(const AttentionBackwardProblem& backward) {
  const AttentionProblem& p = *backward.forward;
  BackwardLaunch l{};
  l.vectorized = is_vectorized(p, p.query, p.head_dim) && is_vectorized(p, p.key, p.head_dim) &&
                 is_vectorized(p, p.value, p.value_dim) && is_vectorized(p, backward.grad_out, p.value_dim);
  return l;
}

void attention_backward(const AttentionBackwardProblem& backward) {
  const AttentionProblem& p = *backward.forward;
  check_supported(p);
  ATTENTION_SWITCH(p, T, kDim, [&] {
    // Beside the products of float32, the tests of features that a problem hasn't take no time.
    constexpr bool kMayBePlain = sizeof(T) == 2;
    BOOL_SWITCH(is_plain(p) && kMayBePlain, kPlain,
                [&] { launch_backward<T, kDim, kPlain && kMayBePlain>(p, backward, launch_of(backward)); });
  });
}

void attention_mask_grad(const AttentionBackwardProblem& backward) {
  const AttentionProblem& p = *backward.forward;
  if (p.batch * p.heads == 0) return;
  const auto tiles = [](int64_t mask_size, int64_t size, int64_t block) {
    return mask_size == 1 ? 1 : ceil_div(size, block);
  };
  BackwardLaunch l = launch_of(backward);
  l.num_tiles = tiles(p.mask_cols, p.k_rows, MaskTiles::block_kv);
  const int64_t num_blocks =
      p.mask_batch * p.mask_heads * tiles(p.mask_rows, p.q_rows, MaskTiles::block_q) * l.num_tiles;
  ATTENTION_DTYPE_SWITCH(p, T, [&] {
    launch_blocks(p, attention_mask_kernel<T>, num_blocks, 32 * MaskTiles::warps, mask_smem_bytes<T>(), backward, l);
  });
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CUDA, m) {
  using namespace bigkern;
  m.impl("attention_backward",
         TORCH_BOX((&attention_backward_op<Memory::kDevice, attention_backward, attention_mask_grad>)));
}
