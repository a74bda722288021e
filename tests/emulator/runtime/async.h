// What goes on beside the threads of the block: bulk copies.
#pragma once

#include <functional>

#include "emulator.h"

#pragma GCC visibility push(hidden)
namespace emulator {

// Runs at once (descending order), at any time (random), or when no thread can go on (ascending).
void start_async(const Site& site, std::function<void()> work);
bool run_async();   // one that waits; false if none does
void stir_async();  // maybe: at random, between threads' turns
void reset_async();
void finish_async();  // of a block: fails where something is still to come

// A thread's bulk stores since its last commit become a group. `end`: when the thread has waited for it.
void start_in_group(const Site& site, std::function<void()> work, std::function<void()> end);
void commit_bulk_group();
void wait_for_bulk_groups(uint32_t pending);

}  // namespace emulator
#pragma GCC visibility pop
