// Blocks of a cluster: whose shared memory an address means, and the barrier of all.
//
// An address of shared memory is the offset in the running block's own, or has a block's rank above the offset. A place
// is an offset in what the cluster's blocks have together.
#pragma once

#include "emulator.h"

#pragma GCC visibility push(hidden)
namespace emulator {

constexpr int kRankBit = 24;
constexpr uint32_t kFirstOfRanks = 1u << kRankBit, kOffsetMask = kFirstOfRanks - 1;

inline uint32_t shared_address(uint32_t rank, uint32_t offset) { return (rank + 1) << kRankBit | offset; }
inline uint32_t rank_of(uint32_t address) { return address < kFirstOfRanks ? block.rank : (address >> kRankBit) - 1; }
inline uint32_t place_of(uint32_t own_offset) { return block.rank * cluster.smem_stride + own_offset; }

inline bool is_in_cluster(uint64_t generic) {
  return generic - reinterpret_cast<uint64_t>(cluster.smem) < cluster.smem_bytes;
}
inline bool is_in_block(uint64_t generic) {
  return generic - reinterpret_cast<uint64_t>(block.smem) < cluster.smem_stride;
}
inline uint32_t to_shared(uint64_t generic) {
  if (is_in_block(generic) || !is_in_cluster(generic)) return generic - reinterpret_cast<uint64_t>(block.smem);
  const uint64_t place = generic - reinterpret_cast<uint64_t>(cluster.smem);
  return shared_address(place / cluster.smem_stride, place % cluster.smem_stride);
}
inline uint64_t to_generic(uint32_t address) {
  const uint64_t place = static_cast<uint64_t>(rank_of(address)) * cluster.smem_stride + (address & kOffsetMask);
  return reinterpret_cast<uint64_t>(cluster.smem) + place;
}

Dim place_in_cluster();  // of the running block
// The address of the same variable of another block.
uint32_t map_shared(const Site& site, uint32_t address, uint32_t rank);
uint32_t check_own(const Site& site, uint32_t address);  // of what may not be another block's
// The place of so many bytes, or a failure where the block has none there, or has exited.
uint32_t find_place(const Site& site, uint32_t address, uint64_t bytes);
void check_is_live(const Site& site, uint32_t place);

std::string describe_block(uint32_t rank);
std::string describe_place(uint32_t place);  // an offset, and whose it is if not the running block's

void cluster_arrive(const Site& site, bool is_relaxed, bool is_aligned);
void cluster_wait(const Site& site);

}  // namespace emulator
#pragma GCC visibility pop
