// mbarrier: a barrier in shared memory, whose phase ends when all threads have arrived and all bytes that were
// announced have been copied. `at`: its place in the cluster's shared memory; some are for a block's own alone.
#pragma once

#include "emulator.h"
#include "races.h"

#pragma GCC visibility push(hidden)
namespace emulator {

void mbarrier_init(const Site& site, uint32_t at, uint32_t count);
void mbarrier_inval(const Site& site, uint32_t at);
// Returns the phase that it arrives in. What is relaxed orders nothing without fences.
uint64_t mbarrier_arrive(const Site& site, uint32_t at, uint32_t count, uint32_t bytes_to_come, bool is_relaxed);
void mbarrier_check(Site& site, uint32_t at);  // that there is one, and that the running thread may know
Clock* mbarrier_clock(const Site& site, uint32_t at);
void mbarrier_expect(const Site& site, uint32_t at, uint32_t bytes);
void mbarrier_complete(const Site& site, uint32_t at, uint32_t bytes);
// Where bytes are copied to, and the mbarrier in the same block's shared memory that counts them when they `arrive`.
struct Target {
  uint32_t place, barrier;
};
Target find_target(Site& site, uint32_t to, uint32_t bytes, uint32_t alignment, uint32_t barrier);
void arrive(const Site& site, By by, const Target& target, uint32_t bytes);
// Whether a phase is over: that of `phase`, or the one of this parity. try_wait waits for it, but may come back before.
bool mbarrier_test(const Site& site, uint32_t at, uint64_t phase, bool is_relaxed);
bool mbarrier_test_parity(const Site& site, uint32_t at, uint32_t parity, bool is_relaxed);
bool mbarrier_try(const Site& site, uint32_t at, uint64_t phase, bool is_relaxed);
bool mbarrier_try_parity(const Site& site, uint32_t at, uint32_t parity, bool is_relaxed);

}  // namespace emulator
#pragma GCC visibility pop
