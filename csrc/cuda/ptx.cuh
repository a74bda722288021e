// The only inline assembly: instructions of sm_80 that CUDA C++ has no name for. A warp runs them together.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace bigkern {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

__device__ inline uint32_t shared_address(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

// ---- Asynchronous copies, from global to shared memory ----

// kBytes (4, 8 or 16, both sides aligned to them), or as many zeros. The address must be valid all the same.
template <int kBytes = 16>
__device__ void copy_async(void* smem, const void* global, bool is_there = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const int bytes = is_there ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past the L1 cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(smem)), "l"(global), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
  }
}

// This thread's copies since the last commit become a group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last kPending groups have arrived. Other threads see them after a barrier.
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Matrices, spread over a warp ----

// Four matrices of 8 rows of 16 bytes: lane l gives the address of row l % 8 of matrix l / 8, and gets the four bytes
// l % 4 of row l / 4 of each.
__device__ inline void load_matrices(uint32_t (&m)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(smem_row))
               : "memory");
}

// The same of their transposes, of 16-bit elements: a lane gets rows 2 (l % 4) and the next of column l / 4.
__device__ inline void load_matrices_transposed(uint32_t (&m)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(smem_row))
               : "memory");
}

// d [16, 8] += a [16, K] @ b [K, 8], with K of 32 bytes: 16 of a 16-bit T, 8 float32 read as TF32, 32 int8. Lane l
// holds of d: rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next; of a: the bytes 4 (l % 4) of rows l / 4 and
// l / 4 + 8, then the same 16 bytes on; of b: those of column l / 4.
template <class T, class Sum>
__device__ void multiply_add(Sum (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define BK_MMA(INSTRUCTION, CONSTRAINT)                                                                 \
  asm volatile(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
               : "+" CONSTRAINT(d[0]), "+" CONSTRAINT(d[1]), "+" CONSTRAINT(d[2]), "+" CONSTRAINT(d[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, Half>) {
    BK_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "f");
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    BK_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "f");
  } else if constexpr (std::is_same_v<T, float>) {
    BK_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "f");
  } else {
    static_assert(std::is_same_v<T, int8_t>);
    BK_MMA("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "r");
  }
#undef BK_MMA
}

// ---- Arithmetic ----

// x, of which the compiler knows nothing more: what is made of it isn't made ahead of a loop, to stay in registers.
__device__ inline int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Rounded to TF32, which has 10 bits after the first.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// 2^x within 2 units in the last place; denormal results are 0.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace bigkern
