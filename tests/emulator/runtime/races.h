// What orders accesses, for races.cpp. Each is called where `settings.watches & kRaces`.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "emulator.h"

#pragma GCC visibility push(hidden)
namespace emulator {

// How far something knows what each thread has done: of a cluster, a count for each of its threads, and one for the
// unit that makes its bulk copies. `fenced`: what of it the asynchronous proxy (bulk copies, wgmma) sees too.
struct Clock {
  std::map<uint64_t, std::vector<uint32_t>> done, fenced;
  void join(const Clock& other);
};

void begin_race_launch();
void begin_race_cluster(uint64_t number, uint32_t threads);
void end_race_cluster();
void end_race_block();  // by its last thread: what others do with its shared memory must be known to be over

void release(uint32_t thread, Clock& to);  // all that it has done so far
void acquire(uint32_t thread, const Clock& from);
// By the running thread without an order of its own: what its last fence released, what its next one acquires.
void release_relaxed(Clock& to);
void acquire_relaxed(const Clock& from);
void synchronise(const std::vector<uint32_t>& threads);
void fence_proxy();

// Shared memory that something reads or writes on its own, from when the running thread starts it: until it has ended,
// nobody may write it, or touch it. The thread's cp.async; the unit's st.async; what of the unit needs a proxy fence.
enum class By { thread, unit, async_proxy };
void begin_transfer(const Site& site, By by, uint32_t place, uint32_t bytes, bool writes, bool is_atomic = false);
// To be known by who acquires `to`; without it, by the running thread.
void end_transfer(By by, uint32_t place, uint32_t bytes, Clock* to = nullptr);

}  // namespace emulator
#pragma GCC visibility pop
