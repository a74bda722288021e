// Products of a warpgroup, of matrices that the host has laid out.
#pragma once

#include "hopper.cuh"

constexpr int kThreads = 128, kPlaceOfB = 8 << 10;

extern __shared__ __align__(1024) uint8_t smem[];

__device__ inline void fill(int place, const uint8_t* global, int bytes) {
  for (int i = threadIdx.x; i < bytes; i += kThreads) smem[place + i] = global[i];
}

// A descriptor whose matrix begins so many bytes into the place.
__device__ inline uint64_t descriptor_at(uint64_t descriptor, int place) {
  return descriptor + (shared_address(smem + place) >> 4);
}

__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
