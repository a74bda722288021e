// What the lanes of a warp do together. Several groups of lanes may be on their way at once.
#include <algorithm>
#include <cstring>

#include "races.h"
#include "scheduler.h"

namespace emulator {

namespace {

struct Group {
  uint32_t mask, arrived;
  const Site* site;
  LaneWork work;
  void* arguments[kWarp];
};

struct Warp {
  Group groups[kWarp];
  uint32_t used;  // groups for which lanes wait
  uint32_t live;
};

std::vector<Warp> warps;

Group& find_group(Warp& warp, const Site& site, uint32_t mask) {
  for (uint32_t rest = warp.used; rest; rest &= rest - 1) {
    Group& g = warp.groups[__builtin_ctz(rest)];
    if (!(g.mask & mask)) continue;
    if (g.mask != mask) {
      fail("%s at %s: mask %08x overlaps %08x, which %s at %s waits for", site.what, site.source, mask, g.mask,
           g.site->what, g.site->source);
    }
    if (g.site != &site && strcmp(g.site->what, site.what) != 0) {
      fail("divergent warp: lane %u is at %s at %s, others are at %s at %s", current->lane, site.what, site.source,
           g.site->what, g.site->source);
    }
    return g;
  }
  Group& unused = warp.groups[__builtin_ctz(~warp.used)];  // groups are disjoint: there are as many as lanes
  warp.used |= warp.used + 1;
  unused.mask = mask;
  unused.arrived = 0;
  return unused;
}

bool is_complete(const Warp& warp, const Group& g) { return (g.mask & warp.live & ~g.arrived) == 0; }

void complete(Warp& warp, Group& g) {
  const uint32_t lanes = g.arrived;
  warp.used &= ~(1u << (&g - warp.groups));
  g.work(*g.site, g.arguments, lanes);
  ++statistics.warp_operations;
  wake_lanes(&warp - warps.data(), lanes);
}

}  // namespace

void meet(const Site& site, uint32_t mask, void* argument, LaneWork work) {
  Fiber& me = self();
  Warp& warp = warps[me.warp];
  const uint32_t bit = 1u << me.lane;
  if (!(mask & bit)) fail("%s at %s: lane %u isn't in its mask %08x", site.what, site.source, me.lane, mask);
  Group& g = find_group(warp, site, mask);
  if (g.arrived == 0) {
    g.site = &site;
    g.work = work;
  }
  g.arrived |= bit;
  g.arguments[me.lane] = argument;
  if (is_complete(warp, g)) {
    complete(warp, g);
    give_way_to_woken();
  } else {
    wait_for(nullptr, site);
  }
}

void warp_barrier(const Site& site, uint32_t mask) {
  meet(site, mask, nullptr, [](const Site&, void**, uint32_t lanes) {
    if (!(settings.watches & kRaces)) return;
    std::vector<uint32_t> threads;
    for (; lanes; lanes &= lanes - 1) threads.push_back(current->warp * kWarp + __builtin_ctz(lanes));
    synchronise(threads);
  });
}

Ballot ballot(const Site& site, uint32_t mask, bool value) {
  struct Lane {
    bool value;
    Ballot result;
  } mine{value, {}};
  meet(site, mask, &mine, [](const Site&, void** arguments, uint32_t lanes) {
    Ballot result{0, lanes};
    for (int i = 0; i < kWarp; ++i) {
      if (lanes >> i & 1 && static_cast<Lane*>(arguments[i])->value) result.yes |= 1u << i;
    }
    for (int i = 0; i < kWarp; ++i) {
      if (lanes >> i & 1) static_cast<Lane*>(arguments[i])->result = result;
    }
  });
  return mine.result;
}

Match match(const Site& site, uint32_t mask, uint64_t value) {
  struct Lane {
    uint64_t value;
    Match result;
  } mine{value, {}};
  meet(site, mask, &mine, [](const Site&, void** arguments, uint32_t lanes) {
    const auto at = [&](int i) { return static_cast<Lane*>(arguments[i]); };
    for (int i = 0; i < kWarp; ++i) {
      if (!(lanes >> i & 1)) continue;
      at(i)->result = {0, lanes};
      for (int j = 0; j < kWarp; ++j) {
        if (lanes >> j & 1 && at(j)->value == at(i)->value) at(i)->result.equal |= 1u << j;
      }
    }
  });
  return mine.result;
}

void reset_warps() {
  const uint32_t n = block.size.count();
  warps.resize((num_numbers() + kWarp - 1) / kWarp);
  for (uint32_t i = 0; i < warps.size(); ++i) {
    const uint32_t first = i * kWarp % cluster.thread_stride;
    const uint32_t lanes = first < n ? std::min<uint32_t>(n - first, kWarp) : 0;
    warps[i].used = 0;
    warps[i].live = lanes == kWarp ? ~0u : (1u << lanes) - 1;
  }
}

void leave_warp() {
  Warp& warp = warps[current->warp];
  warp.live &= ~(1u << current->lane);
  for (uint32_t rest = warp.used; rest; rest &= rest - 1) {
    Group& g = warp.groups[__builtin_ctz(rest)];
    if (is_complete(warp, g)) complete(warp, g);
  }
}

std::string describe_warps() {
  std::string text;
  for (size_t i = 0; i < warps.size() && text.size() < 1000; ++i) {
    for (uint32_t rest = warps[i].used; rest; rest &= rest - 1) {
      const Group& g = warps[i].groups[__builtin_ctz(rest)];
      text +=
          format("\n  warp %zu: %s at %s has lanes %08x of %08x", i, g.site->what, g.site->source, g.arrived, g.mask);
    }
  }
  return text;
}

}  // namespace emulator
