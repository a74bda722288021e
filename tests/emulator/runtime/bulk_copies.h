// cp.async.bulk and cp.async.bulk.tensor. Addresses in shared memory are of 32 bits, `barrier` an mbarrier's.
#pragma once

#include "emulator.h"

#pragma GCC visibility push(hidden)
namespace emulator {

// Into one block; or, where bits of `multicast` name blocks, to the same offsets in each of them.
void bulk_load(Site& site, uint32_t to, uint64_t from, uint32_t bytes, uint32_t barrier, int multicast);
constexpr int kNoMulticast = -1;
void bulk_store(Site& site, uint64_t to, uint32_t from, uint32_t bytes);
void bulk_send(Site& site, uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier);  // to another block

struct Coordinates {
  int at[5];
};
void tensor_load(Site& site, uint32_t to, uint64_t map, int rank, Coordinates coordinates, uint32_t barrier,
                 int multicast);
void tensor_store(Site& site, uint64_t map, int rank, Coordinates coordinates, uint32_t from);

void commit_bulk_group();
void wait_for_bulk_groups(uint32_t pending);

}  // namespace emulator
#pragma GCC visibility pop
