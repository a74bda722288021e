#include "clusters.h"

#include <cstring>

#include "races.h"
#include "scheduler.h"

namespace emulator {

namespace {

struct State {
  const Site* site;  // where it arrived and hasn't waited since; null: nowhere
  uint64_t phase;    // in which it did
};
std::vector<State> states;             // of each thread
std::vector<const Site*> warps_sites;  // where a warp's first arrived in this phase
bool is_used;                          // since the cluster began; else the rest is of another one
uint32_t num_arrived;                  // of those that haven't exited
uint64_t phase;
Clock now, over;  // of this phase's arrivals; of those before

void begin() {
  is_used = true;
  states.assign(num_numbers(), {});
  warps_sites.assign((num_numbers() + kWarp - 1) / kWarp, nullptr);
  num_arrived = 0;
  phase = 0;
  now = over = {};
}

void end_phase_if_complete() {
  if (num_arrived != num_live || num_live == 0) return;
  ++phase;
  num_arrived = 0;
  warps_sites.assign(warps_sites.size(), nullptr);
  over.join(now);
  ++statistics.barriers;
  wake(&phase);
}

}  // namespace

void reset_cluster_barrier() { is_used = false; }

void cluster_arrive(const Site& site, bool is_relaxed, bool is_aligned) {
  if (!is_used) begin();
  State& me = states[current->number];
  if (me.site) {
    fail("%s at %s: the thread hasn't waited since it arrived at %s at %s", site.what, site.source, me.site->what,
         me.site->source);
  }
  const Site*& first = warps_sites[current->warp];
  if (!first) first = &site;
  if (is_aligned && strcmp(first->source, site.source) != 0) {
    fail("divergent warp: lane %u is at %s at %s, others were at %s at %s", current->lane, site.what, site.source,
         first->what, first->source);
  }
  me = {&site, phase};
  if (settings.watches & kRaces) {
    if (is_relaxed) {
      release_relaxed(now);
    } else {
      release(current->number, now);
    }
  }
  ++num_arrived;
  end_phase_if_complete();
}

void cluster_wait(const Site& site) {
  if (!is_used) begin();
  State& me = states[current->number];
  if (!me.site) fail("%s at %s: no barrier.cluster.arrive before it", site.what, site.source);
  if (me.phase == phase) wait_for(&phase, site);
  me.site = nullptr;
  if (settings.watches & kRaces) acquire(current->number, over);
}

// A thread that has exited isn't waited for.
void leave_cluster() {
  if (is_used) {
    const State& me = states[current->number];
    if (me.site && me.phase == phase) --num_arrived;
    end_phase_if_complete();
  }
  const bool is_shared = cluster.blocks() > 1;
  if (is_shared && live_in[block.rank] == 0 && (settings.watches & kRaces)) end_race_block();
}

std::string describe_cluster_barrier() {
  if (!is_used || num_arrived == 0) return "";
  return format("\n  the cluster's barrier: %u of %u threads have arrived", num_arrived, num_live);
}

std::string describe_block(uint32_t rank) {
  const Dim b = block_index(cluster.index, rank);
  return format("block (%u, %u, %u)", b.x, b.y, b.z);
}

std::string describe_place(uint32_t place) {
  const uint32_t rank = place / cluster.smem_stride;
  const std::string offset = format("offset %u", place % cluster.smem_stride);
  return rank == block.rank ? offset : offset + " of " + describe_block(rank);
}

Dim place_in_cluster() {
  const Dim first = block_index(cluster.index, 0);
  return {block.index.x - first.x, block.index.y - first.y, block.index.z - first.z};
}

uint32_t map_shared(const Site& site, uint32_t address, uint32_t rank) {
  if (rank >= cluster.blocks()) {
    fail("%s at %s: rank %u in a cluster of %u blocks", site.what, site.source, rank, cluster.blocks());
  }
  return shared_address(rank, address & kOffsetMask);
}

uint32_t check_own(const Site& site, uint32_t address) {
  if (rank_of(address) != block.rank) {
    fail("%s at %s: address 0x%x is in another block's shared memory", site.what, site.source, address);
  }
  return address;
}

uint32_t find_place(const Site& site, uint32_t address, uint64_t bytes) {
  const uint32_t rank = rank_of(address), offset = address & kOffsetMask;
  if (rank >= cluster.blocks()) {
    fail("%s at %s: address 0x%x is in no block of the cluster", site.what, site.source, address);
  }
  if (offset + bytes > block.smem_bytes) {
    fail("%s at %s: %lu bytes at offset %u are outside the block's %zu bytes of shared memory%s", site.what,
         site.source, bytes, offset, block.smem_bytes,
         rank == block.rank ? "" : (", that is, those of " + describe_block(rank)).c_str());
  }
  const uint32_t place = rank * cluster.smem_stride + offset;
  check_is_live(site, place);
  return place;
}

void check_is_live(const Site& site, uint32_t place) {
  const uint32_t rank = place / cluster.smem_stride;
  if (live_in[rank] > 0) return;
  fail("%s at %s: %s has exited, whose shared memory it uses", site.what, site.source, describe_block(rank).c_str());
}

}  // namespace emulator
