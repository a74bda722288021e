// cp.async.bulk and cp.async.bulk.tensor. Offsets are those in shared memory, `barrier` of an mbarrier.
#pragma once

#include "emulator.h"

#pragma GCC visibility push(hidden)
namespace emulator {

void bulk_load(Site& site, uint32_t to, uint64_t from, uint32_t bytes, uint32_t barrier);
void bulk_store(Site& site, uint64_t to, uint32_t from, uint32_t bytes);

struct Coordinates {
  int at[5];
};
void tensor_load(Site& site, uint32_t to, uint64_t map, int rank, Coordinates coordinates, uint32_t barrier);
void tensor_store(Site& site, uint64_t map, int rank, Coordinates coordinates, uint32_t from);

void commit_bulk_group();
void wait_for_bulk_groups(uint32_t pending);

}  // namespace emulator
#pragma GCC visibility pop
