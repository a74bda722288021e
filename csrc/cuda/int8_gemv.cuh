// An int8 product of few rows: as fast as B is read, by vectors, once.
#pragma once

#include "int8_gemm_call.cuh"
#include "launch.cuh"

namespace bigkern {

constexpr int kGemvThreads = 128, kGemvMostRows = 8;

__device__ inline int32_t dot(const int4& a, const int4& b, int32_t sum) {
  return __dp4a(a.w, b.w, __dp4a(a.z, b.z, __dp4a(a.y, b.y, __dp4a(a.x, b.x, sum))));
}

// Four columns of up to kRows rows: blockIdx.x is [batch, columns]. Four columns share what is read of A, which comes
// from the L1 cache; their 64 bytes a thread are in flight together.
template <int kRows>
__global__ void __launch_bounds__(kGemvThreads)
    int8_gemv_kernel(const __grid_constant__ Int8Gemm p, uint32_t blocks_of_entry) {
  __shared__ int32_t warp_sums[kGemvThreads / 32][kRows][kColumns];
  const int64_t batch = blockIdx.x / blocks_of_entry, j = int64_t{blockIdx.x % blocks_of_entry} * kColumns;
  const int8_t *a[kRows], *b[kColumns];  // beyond the last one, the last
#pragma unroll
  for (int i = 0; i < kRows; ++i) a[i] = p.a.data + batch * p.a.batch + min(int64_t{i}, p.rows - 1) * p.a.row;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) b[c] = p.b.data + batch * p.b.batch + min(j + c, p.cols - 1) * p.b.row;

  // S = A @ B  [kRows, kColumns]: each thread its chunks of K, then their sum over the block
  int32_t sums[kRows][kColumns] = {};
#pragma unroll 2
  for (int64_t k = threadIdx.x * kChunkBytes; k < p.depth; k += kGemvThreads * kChunkBytes) {
    int4 b_reg[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) b_reg[c] = __ldcs(reinterpret_cast<const int4*>(b[c] + k));
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int4 a_reg = *reinterpret_cast<const int4*>(a[i] + k);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[i][c] = dot(a_reg, b_reg[c], sums[i][c]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int32_t sum = __reduce_add_sync(~0u, sums[i][c]);
      if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32][i][c] = sum;
    }
  }
  __syncthreads();

  // Y = epilogue(S)
  const int i = threadIdx.x;
  if (i >= kRows || i >= p.rows) return;
  int32_t total[kColumns] = {};
#pragma unroll
  for (int warp = 0; warp < kGemvThreads / 32; ++warp) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) total[c] += warp_sums[warp][i][c];
  }
  const Int8Epilogue& out = p.epilogue;
  const OutputRow place = OutputRows(out, i)(out, 0);
  finish(out, batch * out.batch + place.offset + j * out.col, p.cols - j, place.scale,
         load_factors(out, batch * p.cols + j, p.cols - j), total);
}

}  // namespace bigkern
