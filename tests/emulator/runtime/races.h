// What orders accesses, for races.cpp. Each is called where `settings.watches & kRaces`.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "emulator.h"

#pragma GCC visibility push(hidden)
namespace emulator {

// How far something knows what each thread has done: of a block, a count for each of its threads, and one for the unit
// that makes its bulk copies. `fenced`: what of it the asynchronous proxy (bulk copies, wgmma) sees too.
struct Clock {
  std::map<uint64_t, std::vector<uint32_t>> done, fenced;
  void join(const Clock& other);
};

void begin_race_launch();
void begin_race_block(uint64_t number, uint32_t threads);

void release(uint32_t thread, Clock& to);  // all that it has done so far
void acquire(uint32_t thread, const Clock& from);
void synchronise(const std::vector<uint32_t>& threads);
void fence_proxy();

// Shared memory that something reads or writes on its own, from when the running thread starts it: until it has ended,
// nobody may write it, or touch it.
enum class Proxy { generic, async };  // cp.async; what needs a proxy fence
void begin_transfer(const Site& site, Proxy proxy, uint32_t offset, uint32_t bytes, bool writes);
// To be known by who acquires `to`; without it, by the running thread.
void end_transfer(Proxy proxy, uint32_t offset, uint32_t bytes, Clock* to = nullptr);

}  // namespace emulator
#pragma GCC visibility pop
