// Matrices and asynchronous copies: each kernel is right, and test_emulator_matrices.py knows what it must compute.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// A register of `row`, whose elements have the type T, from element k on.
template <class T>
__device__ uint32_t fragment(const T* row, int k) {
  return *reinterpret_cast<const uint32_t*>(row + k);
}

// out [16, 8] += a [16, K] @ b [8, K]^T, all of it by one instruction; K is 8 registers' elements.
#define PRODUCT(NAME, T, SUM, CONSTRAINT, INSTRUCTION)                                                                \
  extern "C" __global__ void NAME(const T* a, const T* b, SUM* out) {                                                 \
    constexpr int kPer = 4 / sizeof(T), K = 8 * kPer;                                                                 \
    const int row = threadIdx.x / 4, k = threadIdx.x % 4 * kPer;                                                      \
    SUM* d[] = {out + row * 8 + threadIdx.x % 4 * 2, out + (row + 8) * 8 + threadIdx.x % 4 * 2};                      \
    asm volatile(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                       \
                 : "+" CONSTRAINT(d[0][0]), "+" CONSTRAINT(d[0][1]), "+" CONSTRAINT(d[1][0]), "+" CONSTRAINT(d[1][1]) \
                 : "r"(fragment(a + row * K, k)), "r"(fragment(a + (row + 8) * K, k)),                                \
                   "r"(fragment(a + row * K, k + K / 2)), "r"(fragment(a + (row + 8) * K, k + K / 2)),                \
                   "r"(fragment(b + row * K, k)), "r"(fragment(b + row * K, k + K / 2)));                             \
  }

PRODUCT(product_f16, __half, float, "f", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
PRODUCT(product_bf16, __nv_bfloat16, float, "f", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
PRODUCT(product_tf32, float, float, "f", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
PRODUCT(product_s8, int8_t, int, "r", "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32")
PRODUCT(product_s8_clamped, int8_t, int, "r", "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32")

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// out [16, 8] = a [16, 16] @ b [16, 8]: fragments by ldmatrix, those of b transposed on the way. Rows are `stride`
// apart.
extern "C" __global__ void product_by_ldmatrix(const __half* a, const __half* b, float* out, int stride) {
  __shared__ __align__(16) __half a_smem[16 * 24], b_smem[16 * 24];
  for (int i = threadIdx.x; i < 256; i += 32) a_smem[i / 16 * stride + i % 16] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32) b_smem[i / 8 * stride + i % 8] = b[i];
  __syncwarp();
  const int row = threadIdx.x % 16, column = threadIdx.x / 16 * 8;
  uint32_t x[4], y[2];
  float d[4] = {};
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(a_smem + row * stride + column)));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(y[0]), "=r"(y[1])
               : "r"(shared_address(b_smem + row * stride)));
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  for (int i = 0; i < 4; ++i) out[(threadIdx.x / 4 + i / 2 * 8) * 8 + threadIdx.x % 4 * 2 + i % 2] = d[i];
}

// out [n] = twice in [n], through two buffers of 4 x 64 numbers, filled ahead by cp.async. bug 1: doesn't wait; 2:
// waits for one group too few; 3: no barrier after waiting; 4: none before the buffer is filled again; 5: reads past
// the end.
extern "C" __global__ void pipeline(const float* in, float* out, int n, int bug) {
  __shared__ __align__(16) float smem[2][256];
  const int tiles = (n + 255) / 256;
  const auto fill = [&](int tile) {
    const int i = tile * 256 + 4 * threadIdx.x;
    const int bytes = bug == 5 ? 16 : max(0, min(16, 4 * (n - i)));
    if (tile < tiles) {
      asm volatile(
          "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(&smem[tile % 2][4 * threadIdx.x])),
          "l"(in + (bytes > 0 ? i : 0)), "r"(bytes)
          : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  fill(0);
  for (int tile = 0; tile < tiles; ++tile) {
    fill(tile + 1);
    if (bug == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
    if (bug != 1 && bug != 2) asm volatile("cp.async.wait_group 1;" ::: "memory");
    if (bug != 3) __syncthreads();
    for (int j = 0; j < 4; ++j) {
      const int i = tile * 256 + j * 64 + threadIdx.x;
      if (i < n) out[i] = 2 * smem[tile % 2][j * 64 + threadIdx.x];
    }
    if (bug != 4) __syncthreads();
  }
}
