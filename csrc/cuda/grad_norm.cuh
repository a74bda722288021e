// The L2 norm of many gradients in float64, in two stages without atomics: the same bits every time.
#pragma once

#include <vector>

#include "../adam.h"
#include "launch.cuh"
#include "multi_tensor.cuh"

namespace bigkern {

struct GradTable {
  static constexpr int kCapacity = kTableBytes / (8 + kChunkBytes);
  const void* grad[kCapacity];
  ChunkTable<kCapacity> chunks;
};

struct PartialSums {
  double* data;
  int64_t size;
};

// Each thread has 4 loads of 16 bytes in flight; an SM of an H100 needs about 18 kB of them (25 B/ns for 0.7 us).
constexpr int kVectorsPerSum = 8;
template <class T>
constexpr int kNormWidth = 16 / sizeof(T);
template <class T>
constexpr int kNormChunk = kThreads * kVectorsPerSum * kNormWidth<T>;

// The sum over the block's threads, in the same order always, for all of them. Once a kernel.
inline __device__ double block_sum(double x) {
  __shared__ double warp_sum[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0.0;
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += warp_sum[warp];
  return sum;
}

// partial_sum[chunk] = sum of squares, in float64, which holds the square of any float32.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_of_squares_kernel(const __grid_constant__ GradTable table, double* partial_sum) {
  constexpr int kWidth = kNormWidth<T>;
  const Chunk chunk = table.chunks.find(blockIdx.x, kNormChunk<T>);
  const T* grad = static_cast<const T*>(table.grad[chunk.tensor]) + chunk.begin;  // [chunk.size]

  // The j-th element of every vector adds to sum[j]: whichever way it is loaded, the sum is the same bit for bit.
  double sum[kWidth] = {};
  if (chunk.size == kNormChunk<T> && is_aligned<kWidth>(grad)) {
#pragma unroll 4
    for (int k = 0; k < kVectorsPerSum; ++k) {
      const auto vector = load<kWidth>(grad + (k * kThreads + threadIdx.x) * kWidth);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const double x = static_cast<double>(vector.at[j]);
        sum[j] = fma(x, x, sum[j]);
      }
    }
  } else {
    for (int begin = threadIdx.x * kWidth; begin < chunk.size; begin += kThreads * kWidth) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const double x = begin + j < chunk.size ? static_cast<double>(grad[begin + j]) : 0.0;
        sum[j] = fma(x, x, sum[j]);
      }
    }
  }
#pragma unroll
  for (int j = 1; j < kWidth; ++j) sum[0] += sum[j];
  const double total = block_sum(sum[0]);
  if (threadIdx.x == 0) partial_sum[blockIdx.x] = total;
}

// sqrt(sum of partial sums) / grad_scale, by a whole block, for all its threads.
inline __device__ double norm_of(const PartialSums& sums, ScalarRef grad_scale) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < sums.size; i += kThreads) sum += sums.data[i];
  const double norm = sqrt(block_sum(sum));
  return grad_scale ? norm / grad_scale.get() : norm;
}

// ---- Host ----

inline int64_t num_partial_sums(const std::vector<Gradient>& grads) {
  int64_t total = 0;
  for (const Gradient& grad : grads) {
    total += FLOAT_SWITCH(grad.dtype, T, [&] { return ceil_div<int64_t>(grad.numel, kNormChunk<T>); });
  }
  return total;
}

// Fills `partial_sum`, which has num_partial_sums(grads) elements. One launch for each dtype and table.
inline void launch_partial_sums(const std::vector<Gradient>& grads, double* partial_sum, int32_t device_index) {
  const auto dtype = [](const Gradient& grad) { return grad.dtype; };
  for_each_run(grads, dtype, [&](const Gradient* grad, const Gradient* end) {
    FLOAT_SWITCH(grad->dtype, T, [&] {
      while (grad != end) {
        GradTable table;
        for (; grad != end && table.chunks.num_tensors < GradTable::kCapacity; ++grad) {
          table.grad[table.chunks.num_tensors] = grad->data;
          table.chunks.add(grad->numel, kNormChunk<T>);
        }
        const int32_t num_chunks = table.chunks.num_chunks;
        if (num_chunks > 0) {
          launch(device_index, sum_of_squares_kernel<T>, num_chunks, kThreads, 0, table, partial_sum);
        }
        partial_sum += num_chunks;
      }
    });
  });
}

}  // namespace bigkern
