#include "mbarriers.h"

#include <map>

#include "clusters.h"
#include "ptx.h"
#include "races.h"
#include "scheduler.h"

namespace emulator {

namespace {

constexpr uint32_t kMaxCount = (1 << 20) - 1, kMaxBytes = (1 << 20) - 1, kBarrierBytes = 8;

struct Barrier {
  uint32_t count;   // of arrivals in a phase
  int64_t pending;  // arrivals to come in this one
  int64_t bytes;    // announced, but not copied yet; less than 0: the other way round
  uint64_t phase;   // how many are over
  Clock now, over;  // of this phase's arrivals; of those before
};
std::map<uint32_t, Barrier> barriers;

[[noreturn]] __attribute__((noinline, cold)) void fail_at(const Site& site, const char* what, uint32_t at) {
  fail("%s at %s: %s at %s", site.what, site.source, what, describe_place(at).c_str());
}

inline Barrier& find(const Site& site, uint32_t at) {
  const auto it = barriers.find(at);
  if (it == barriers.end()) fail_at(site, "there is no mbarrier", at);
  return it->second;
}

inline Barrier& find_own(const Site& site, uint32_t at) {
  if (at - place_of(0) >= cluster.smem_stride) fail_at(site, "another block's mbarrier", at);
  return find(site, at);
}

void end_phase_if_complete(Barrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.count;
  b.over.join(b.now);
  ++statistics.barriers;
  wake(&b);
}

bool is_over(const Barrier& b, uint64_t phase, bool is_relaxed) {
  if (b.phase == phase) return false;
  if (settings.watches & kRaces) {
    if (is_relaxed) {
      acquire_relaxed(b.over);
    } else {
      acquire(current->number, b.over);
    }
  }
  return true;
}

// The latest phase of this parity, be it over or not.
uint64_t phase_of_parity(const Site& site, const Barrier& b, uint32_t parity) {
  if (parity > 1) fail("%s at %s: the parity must be 0 or 1, got %u", site.what, site.source, parity);
  return b.phase % 2 == parity ? b.phase : b.phase - 1;
}

// At random, it comes back too early now and then, as a card does after a while.
bool try_phase(const Site& site, Barrier& b, uint64_t phase, bool is_relaxed) {
  if (is_over(b, phase, is_relaxed)) return true;
  if (settings.order == Order::random && draw() % 4 == 0) {
    give_way(site);
  } else {
    wait_for(&b, site);
  }
  return is_over(b, phase, is_relaxed);
}

void add_bytes(const Site& site, Barrier& b, int64_t bytes) {
  b.bytes += bytes;
  if (b.bytes > kMaxBytes || b.bytes < -static_cast<int64_t>(kMaxBytes)) {
    fail("%s at %s: %ld bytes to come, an mbarrier counts to %u", site.what, site.source, b.bytes, kMaxBytes);
  }
}

}  // namespace

void mbarrier_init(const Site& site, uint32_t at, uint32_t count) {
  if (count == 0 || count > kMaxCount) fail("%s at %s: a count of %u", site.what, site.source, count);
  if (barriers.count(at)) fail_at(site, "there already is an mbarrier", at);
  barriers[at] = {count, count, 0, 0, {}, {}};
}

void mbarrier_inval(const Site& site, uint32_t at) {
  find_own(site, at);
  barriers.erase(at);
}

uint64_t mbarrier_arrive(const Site& site, uint32_t at, uint32_t count, uint32_t bytes_to_come, bool is_relaxed) {
  Barrier& b = find(site, at);
  if (count > b.pending) {
    fail("%s at %s: more arrivals than the %u of the mbarrier at %s", site.what, site.source, b.count,
         describe_place(at).c_str());
  }
  const uint64_t phase = b.phase;
  if (settings.watches & kRaces) {
    if (is_relaxed) {
      release_relaxed(b.now);
    } else {
      release(current->number, b.now);
    }
  }
  add_bytes(site, b, bytes_to_come);
  b.pending -= count;
  end_phase_if_complete(b);
  return phase;
}

void mbarrier_check(Site& site, uint32_t at) {
  find(site, at);
  if (settings.watches & kRaces) watch_access(site, true, at, kBarrierBytes, true, true, true);
}

Clock* mbarrier_clock(const Site& site, uint32_t at) { return &find(site, at).now; }

void mbarrier_expect(const Site& site, uint32_t at, uint32_t bytes) { add_bytes(site, find(site, at), bytes); }

void mbarrier_complete(const Site& site, uint32_t at, uint32_t bytes) {
  Barrier& b = find(site, at);
  add_bytes(site, b, -static_cast<int64_t>(bytes));
  end_phase_if_complete(b);
}

Target find_target(Site& site, uint32_t to, uint32_t bytes, uint32_t alignment, uint32_t barrier) {
  check_alignment(site, to, alignment);
  check_alignment(site, barrier, kBarrierBytes);
  const Target t = {find_place(site, to, bytes), find_place(site, barrier, kBarrierBytes)};
  if (rank_of(to) != rank_of(barrier)) {
    fail("%s at %s: the mbarrier at %s isn't in the block of the bytes at %s", site.what, site.source,
         describe_place(t.barrier).c_str(), describe_place(t.place).c_str());
  }
  mbarrier_check(site, t.barrier);
  return t;
}

void arrive(const Site& site, By by, const Target& target, uint32_t bytes) {
  if (settings.watches & kRaces) end_transfer(by, target.place, bytes, mbarrier_clock(site, target.barrier));
  mbarrier_complete(site, target.barrier, bytes);
}

bool mbarrier_test(const Site& site, uint32_t at, uint64_t phase, bool is_relaxed) {
  const bool result = is_over(find_own(site, at), phase, is_relaxed);
  if (!result) give_way(site);
  return result;
}

bool mbarrier_test_parity(const Site& site, uint32_t at, uint32_t parity, bool is_relaxed) {
  return mbarrier_test(site, at, phase_of_parity(site, find_own(site, at), parity), is_relaxed);
}

bool mbarrier_try(const Site& site, uint32_t at, uint64_t phase, bool is_relaxed) {
  return try_phase(site, find_own(site, at), phase, is_relaxed);
}

bool mbarrier_try_parity(const Site& site, uint32_t at, uint32_t parity, bool is_relaxed) {
  Barrier& b = find_own(site, at);
  return try_phase(site, b, phase_of_parity(site, b, parity), is_relaxed);
}

void reset_mbarriers() { barriers.clear(); }

std::string describe_mbarriers() {
  std::string text;
  for (const auto& [at, b] : barriers) {
    text += format("\n  mbarrier at %s: %ld of %u arrivals and %ld bytes to come in phase %lu",
                   describe_place(at).c_str(), b.pending, b.count, b.bytes, b.phase);
    if (text.size() > 1000) break;
  }
  return text;
}

}  // namespace emulator
