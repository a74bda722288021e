// What orders accesses, for races.cpp. Each is called where `settings.watches & kRaces`.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "emulator.h"

#pragma GCC visibility push(hidden)
namespace emulator {

// How far something knows what each thread has done: of a block, a count for each of its threads.
struct Clock {
  std::map<uint64_t, std::vector<uint32_t>> of_block;
  void join(const Clock& other);
};

void begin_race_launch();
void begin_race_block(uint64_t number, uint32_t threads);

void release(uint32_t thread, Clock& to);  // all that it has done so far
void acquire(uint32_t thread, const Clock& from);
void synchronise(const std::vector<uint32_t>& threads);

// Shared memory that cp.async will fill: until it has, nobody may touch it.
void begin_copy(const Site& site, uint32_t offset, uint32_t bytes);
void end_copy(uint32_t offset, uint32_t bytes);

}  // namespace emulator
#pragma GCC visibility pop
