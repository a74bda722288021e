// A tiled product as real kernels do it: cp.async into two buffers, ldmatrix, mma.sync.
#include "../../../csrc/cuda/ptx.cuh"

using namespace bigkern;

constexpr int kTile = 64, kDepth = 32;   // of C and of K; each of 4 warps has a quarter of the rows
constexpr int kStride = kDepth + 8;      // rows of 80 bytes: ldmatrix has no bank conflicts
constexpr int kThreads = 128, kPer = 8;  // elements of a copy

struct Buffer {
  Half a[kTile * kStride], b[kTile * kStride];
};

__device__ void fill(Half* smem, const Half* global, int rows, int ld) {
  for (int i = threadIdx.x; i < kTile * kDepth / kPer; i += kThreads) {
    const int row = i / (kDepth / kPer), column = i % (kDepth / kPer) * kPer;
    copy_async(smem + row * kStride + column, row < rows ? global + row * ld + column : global, row < rows);
  }
}

// c [m, n] = a [m, k] @ b [n, k]^T; k is a multiple of 32.
extern "C" __global__ void __launch_bounds__(kThreads)
    gemm(const Half* a, const Half* b, float* c, int m, int n, int k) {
  __shared__ __align__(128) Buffer buffers[2];
  const int row = blockIdx.y * kTile, column = blockIdx.x * kTile, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto fetch = [&](int tile) {
    if (tile < k / kDepth) {
      fill(buffers[tile % 2].a, a + row * k + tile * kDepth, m - row, k);
      fill(buffers[tile % 2].b, b + column * k + tile * kDepth, n - column, k);
    }
    commit_copies();
  };
  float sums[kTile / 8][4] = {};
  fetch(0);
  for (int tile = 0; tile < k / kDepth; ++tile) {
    fetch(tile + 1);
    wait_for_copies<1>();
    __syncthreads();
    const Buffer& buffer = buffers[tile % 2];
#pragma unroll
    for (int depth = 0; depth < kDepth; depth += 16) {
      uint32_t a_reg[4], b_reg[4];
      load_matrices(a_reg, buffer.a + (warp * 16 + lane % 16) * kStride + depth + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < kTile; j += 16) {
        load_matrices(b_reg, buffer.b + (j + lane % 8 + lane / 16 * 8) * kStride + depth + lane / 8 % 2 * 8);
        multiply_add<Half>(sums[j / 8], a_reg, b_reg[0], b_reg[1]);
        multiply_add<Half>(sums[j / 8 + 1], a_reg, b_reg[2], b_reg[3]);
      }
    }
    __syncthreads();
  }
  for (int j = 0; j < kTile / 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int r = row + warp * 16 + lane / 4 + i / 2 * 8, col = column + j * 8 + lane % 4 * 2 + i % 2;
      if (r < m && col < n) c[r * n + col] = sums[j][i];
    }
  }
}
