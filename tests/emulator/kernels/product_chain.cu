// d [64, 8] = a [64, 64] @ b [64, 8] by four products, each of 16 of K; a thread's two pairs.
#include "products.cuh"

__device__ void multiply(float (&d)[4], uint64_t a, uint64_t b, bool accumulates) {
  asm volatile(
      "{.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulates)));
}

// Bug 1: it doesn't wait; 2: it waits for one group too few; 3: no proxy fence; 4: no wgmma.fence; 5: b is overwritten
// before it is read; 6: a warp takes no part; 7: b's descriptor is outside of shared memory; 8: threads exit without
// waiting.
extern "C" __global__ void chain(const uint8_t* a, const uint8_t* b, float* out /* [128, 4] */, uint64_t a_matrix,
                                 uint64_t b_matrix, int bug) {
  fill(0, a, 64 * 128);
  fill(kPlaceOfB, b, 8 * 128);
  if (bug != 3) fence_proxy();
  __syncthreads();
  float d[4] = {};
  if (bug == 6 && threadIdx.x >= 96) return;
  if (bug != 4) fence_products();
  const uint64_t a_begin = descriptor_at(a_matrix, 0),
                 b_begin = descriptor_at(b_matrix, bug == 7 ? 1 << 17 : kPlaceOfB);
  for (int k = 0; k < 4; ++k) {
    multiply(d, a_begin + 2 * k, b_begin + 2 * k, k > 0);
    commit_products();
  }
  if (bug == 5 && threadIdx.x == 0) *reinterpret_cast<uint32_t*>(smem + kPlaceOfB) = 0;
  if (bug == 2) wait_products<1>();
  if (bug != 1 && bug != 2 && bug != 8) wait_products<0>();
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
  if (bug != 8) wait_products<0>();
}
