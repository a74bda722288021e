#include "mbarriers.h"

#include <map>

#include "races.h"
#include "scheduler.h"

namespace emulator {

namespace {

constexpr uint32_t kMaxCount = (1 << 20) - 1, kMaxBytes = (1 << 20) - 1;

struct Barrier {
  uint32_t count;   // of arrivals in a phase
  int64_t pending;  // arrivals to come in this one
  int64_t bytes;    // announced, but not copied yet; less than 0: the other way round
  uint64_t phase;   // how many are over
  Clock now, over;  // of this phase's arrivals; of those before
};
std::map<uint32_t, Barrier> barriers;

Barrier& find(const Site& site, uint32_t at) {
  const auto it = barriers.find(at);
  if (it == barriers.end()) fail("%s at %s: there is no mbarrier at offset %u", site.what, site.source, at);
  return it->second;
}

void end_phase_if_complete(Barrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.count;
  b.over.join(b.now);
  ++statistics.barriers;
  wake(&b);
}

bool is_over(const Barrier& b, uint64_t phase) {
  if (b.phase == phase) return false;
  if (settings.watches & kRaces) acquire(current->number, b.over);
  return true;
}

// The latest phase of this parity, be it over or not.
uint64_t phase_of_parity(const Site& site, const Barrier& b, uint32_t parity) {
  if (parity > 1) fail("%s at %s: the parity must be 0 or 1, got %u", site.what, site.source, parity);
  return b.phase % 2 == parity ? b.phase : b.phase - 1;
}

// At random, it comes back too early now and then, as a card does after a while.
bool try_phase(const Site& site, Barrier& b, uint64_t phase) {
  if (is_over(b, phase)) return true;
  if (settings.order == Order::random && draw() % 4 == 0) {
    give_way(site);
  } else {
    wait_for(&b, site);
  }
  return is_over(b, phase);
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
  if (barriers.count(at)) fail("%s at %s: there is an mbarrier at offset %u already", site.what, site.source, at);
  barriers[at] = {count, count, 0, 0, {}, {}};
}

void mbarrier_inval(const Site& site, uint32_t at) {
  find(site, at);
  barriers.erase(at);
}

uint64_t mbarrier_arrive(const Site& site, uint32_t at, uint32_t count, uint32_t bytes_to_come) {
  Barrier& b = find(site, at);
  if (count > b.pending) {
    fail("%s at %s: more arrivals than the %u of the mbarrier at offset %u", site.what, site.source, b.count, at);
  }
  const uint64_t phase = b.phase;
  if (settings.watches & kRaces) release(current->number, b.now);
  add_bytes(site, b, bytes_to_come);
  b.pending -= count;
  end_phase_if_complete(b);
  return phase;
}

void mbarrier_check(const Site& site, uint32_t at) { find(site, at); }

Clock* mbarrier_clock(const Site& site, uint32_t at) { return &find(site, at).now; }

void mbarrier_expect(const Site& site, uint32_t at, uint32_t bytes) { add_bytes(site, find(site, at), bytes); }

void mbarrier_complete(const Site& site, uint32_t at, uint32_t bytes) {
  Barrier& b = find(site, at);
  add_bytes(site, b, -static_cast<int64_t>(bytes));
  end_phase_if_complete(b);
}

bool mbarrier_test(const Site& site, uint32_t at, uint64_t phase) {
  const bool result = is_over(find(site, at), phase);
  if (!result) give_way(site);
  return result;
}

bool mbarrier_test_parity(const Site& site, uint32_t at, uint32_t parity) {
  return mbarrier_test(site, at, phase_of_parity(site, find(site, at), parity));
}

bool mbarrier_try(const Site& site, uint32_t at, uint64_t phase) { return try_phase(site, find(site, at), phase); }

bool mbarrier_try_parity(const Site& site, uint32_t at, uint32_t parity) {
  Barrier& b = find(site, at);
  return try_phase(site, b, phase_of_parity(site, b, parity));
}

void reset_mbarriers() { barriers.clear(); }

std::string describe_mbarriers() {
  std::string text;
  for (const auto& [at, b] : barriers) {
    text += format("\n  mbarrier at offset %u: %ld of %u arrivals and %ld bytes to come in phase %lu", at, b.pending,
                   b.count, b.bytes, b.phase);
    if (text.size() > 1000) break;
  }
  return text;
}

}  // namespace emulator
