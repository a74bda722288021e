// bar.sync, bar.arrive, bar.red: sixteen barriers of each block.
#include <array>
#include <cstring>

#include "races.h"
#include "scheduler.h"

namespace emulator {

namespace {

constexpr uint32_t kBarriers = 16;

struct Barrier {
  uint32_t arrived, expected;
  bool is_for_all;  // __syncthreads, rather than a number of threads
  Reduction reduction;
  int value;
  const Site* site;  // of the first that came
  Clock clock;       // of those that came
};
std::vector<std::array<Barrier, kBarriers>> barriers;  // of each block

void complete(Barrier& b) {
  b.arrived = 0;
  ++statistics.barriers;
  if (settings.watches & kRaces) {
    const uint32_t first = first_of(block.rank);
    for (uint32_t i = first; i < first + block.size.count(); ++i) {
      if (fibers[i].waits_for == &b) acquire(i, b.clock);
    }
  }
  wake(&b, b.value);
}

// Threads that take different ways to __syncthreads, or don't come at all, are undefined behaviour on a card even where
// the barrier would be completed.
void check_uniform(const Barrier& b, const Site& site) {
  if (b.arrived > 0 && b.site != &site && strcmp(b.site->source, site.source) != 0) {
    fail("divergent barrier: some threads wait at %s at %s, this one at %s at %s", b.site->what, b.site->source,
         site.what, site.source);
  }
  const auto exited = static_cast<uint32_t>(block.size.count() - live_in[block.rank]);
  if (exited) fail("divergent barrier: %s at %s, but %u threads have exited", site.what, site.source, exited);
}

Barrier& arrive(const Site& site, uint32_t number, uint32_t count, Reduction reduction, int value) {
  if (number >= kBarriers) fail("%s at %s: there is no barrier %u", site.what, site.source, number);
  if (count % kWarp != 0) fail("%s at %s: %u threads aren't whole warps", site.what, site.source, count);
  Barrier& b = barriers[block.rank][number];
  const bool is_for_all = count == 0;
  const auto expected = is_for_all ? static_cast<uint32_t>(block.size.count()) : count;
  if (is_for_all) check_uniform(b, site);
  if (b.arrived == 0) {
    b = {0, expected, is_for_all, reduction, reduction == Reduction::all, &site, {}};
  } else if (b.expected != expected || b.reduction != reduction) {
    fail("%s at %s: barrier %u is awaited by %u threads here, by %u at %s", site.what, site.source, number, expected,
         b.expected, b.site->source);
  }
  switch (reduction) {
    case Reduction::all: b.value &= value != 0; break;
    case Reduction::any: b.value |= value != 0; break;
    default: b.value += value != 0;
  }
  ++b.arrived;
  if (settings.watches & kRaces) release(current->number, b.clock);
  return b;
}

}  // namespace

int barrier(const Site& site, uint32_t number, uint32_t count, Reduction reduction, int value) {
  Barrier& b = arrive(site, number, count, reduction, value);
  Fiber& me = self();
  if (b.arrived == b.expected) {
    me.waits_for = &b;  // the last one queues like the others
    complete(b);
    give_way_to_woken();
  } else {
    wait_for(&b, site);
  }
  return me.result;
}

void barrier_arrive(const Site& site, uint32_t number, uint32_t count) {
  Barrier& b = arrive(site, number, count, Reduction::none, 0);
  if (b.arrived == b.expected) complete(b);
}

void reset_barriers() {
  barriers.resize(cluster.blocks());
  for (auto& of_block : barriers) {
    for (Barrier& b : of_block) b.arrived = 0;  // the first to come sets the rest
  }
}

void leave_barriers() {
  for (const Barrier& b : barriers[block.rank]) {
    if (b.arrived > 0 && b.is_for_all) {
      fail("divergent barrier: %u threads wait at %s at %s, and this one has exited", b.arrived, b.site->what,
           b.site->source);
    }
  }
}

}  // namespace emulator
