// mbarrier: a barrier in shared memory, whose phase ends when all threads have arrived and all bytes that were
// announced have been copied. `at`: its offset in shared memory.
#pragma once

#include "emulator.h"
#include "races.h"

#pragma GCC visibility push(hidden)
namespace emulator {

void mbarrier_init(const Site& site, uint32_t at, uint32_t count);
void mbarrier_inval(const Site& site, uint32_t at);
// Returns the phase that it arrives in.
uint64_t mbarrier_arrive(const Site& site, uint32_t at, uint32_t count, uint32_t bytes_to_come);
void mbarrier_check(const Site& site, uint32_t at);  // that there is one
Clock* mbarrier_clock(const Site& site, uint32_t at);
void mbarrier_expect(const Site& site, uint32_t at, uint32_t bytes);
void mbarrier_complete(const Site& site, uint32_t at, uint32_t bytes);
// Whether a phase is over: that of `phase`, or the one of this parity. try_wait waits for it, but may come back before.
bool mbarrier_test(const Site& site, uint32_t at, uint64_t phase);
bool mbarrier_test_parity(const Site& site, uint32_t at, uint32_t parity);
bool mbarrier_try(const Site& site, uint32_t at, uint64_t phase);
bool mbarrier_try_parity(const Site& site, uint32_t at, uint32_t parity);

}  // namespace emulator
#pragma GCC visibility pop
