// Threads of a cluster as fibers, of which one runs until it has to wait.
#pragma once

#include <vector>

#include "emulator.h"

#pragma GCC visibility push(hidden)
namespace emulator {

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  uint32_t bytes, bytes_from, group;
};

struct Fiber : Thread {
  void* stack_pointer;
  bool has_exited;
  const Site* waits_at;          // where it waits, or did last
  const void* waits_for;         // null: it doesn't
  int result;                    // what it waited for hands over
  std::vector<uint32_t> visits;  // of each site, for the profile
  std::vector<Copy> copies;      // on their way
  uint32_t num_groups;           // of copies, committed so far
};

extern std::vector<Fiber> fibers;      // by number: the running cluster's, and maybe more
extern uint32_t num_live;              // of them, those that haven't exited
extern std::vector<uint32_t> live_in;  // of each block

// From the first thread of the cluster to the last, with those between blocks that aren't there.
inline uint32_t num_numbers() { return cluster.thread_stride * (cluster.blocks() - 1) + block.size.count(); }
inline uint32_t first_of(uint32_t rank) { return rank * cluster.thread_stride; }
Dim thread_index(uint32_t number_in_block);
Dim cluster_index(uint64_t number);
Dim block_index(Dim cluster, uint32_t rank);

// Until the next launch: each takes two of the memory mappings that a process can have.
void release_stacks();

inline Fiber& self() { return *static_cast<Fiber*>(current); }

// Runs others until wake() is called for `event`, or wake_lanes() for this lane, where there is no event.
void wait_for(const void* event, const Site& site);
void wake(const void* event, int result = 0);
void wake_lanes(uint32_t warp, uint32_t lanes);
// The one that woke others, itself among them, waits for its turn.
void give_way_to_woken();

uint64_t draw();  // at random, by the schedule's seed

void reset_barriers();
void reset_cluster_barrier();
void reset_mbarriers();
void reset_warpgroups();
void reset_warps();
// What a thread's end means for the others.
void leave_barriers();
void leave_cluster();
void leave_warp();
void leave_warpgroup();
std::string describe_warps();  // which lanes are awaited
std::string describe_mbarriers();
std::string describe_cluster_barrier();

void record_access(Site& site, bool is_shared, uint64_t address, uint32_t bytes, bool reads, bool writes);
void finish_profile();

}  // namespace emulator
#pragma GCC visibility pop
