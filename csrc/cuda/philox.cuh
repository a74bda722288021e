// Philox 4x32-10 on the device: four random words for a counter, the same bits as on the CPU.
#pragma once

#include "../philox.h"

namespace bigkern {

__device__ inline uint4 philox(uint4 counter, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1) {
    const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * counter.x;
    const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * counter.z;
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter.y ^ key0, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter.w ^ key1, static_cast<uint32_t>(product0)};
  }
  return counter;
}

}  // namespace bigkern
