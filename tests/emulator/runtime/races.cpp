// Races: accesses to the same bytes, one of which writes, that nothing orders. A vector clock for each thread says how
// much of the others' work is known to come before its own: barriers, __syncwarp and fences with atomics around them
// move it on, and nothing else does, so that a race is found under any schedule and in any order of the blocks. A
// ThreadSanitizer build would see less: it knows one address of shared memory for all blocks, takes each atomic for
// acquire and release, has four cells for a word, and can't name a CUDA thread.
//
// Fences order for everybody, whatever their scope. Several lanes that write the same bytes at once are a race.
#include "races.h"

#include <algorithm>
#include <unordered_map>

#include "scheduler.h"

namespace emulator {

namespace {

constexpr uint32_t kWordBytes = 4, kOnItsWay = ~0u;  // no thread's count gets there

struct Access {
  uint64_t block;
  uint32_t thread, count;
  uint8_t bytes;  // of the word, a bit each
  bool writes, is_atomic;
  Proxy proxy;
  const Site* site;
};
// Those that a later access may still race with.
using Word = std::vector<Access>;

struct ThreadClock {
  Clock now;
  uint32_t* counts;         // of `now`, for its own block
  Clock released, pending;  // at its last fence; what it has seen since
};

uint64_t block_number;
uint32_t copy_unit;  // the thread after the last
std::vector<ThreadClock> clocks;
std::vector<Word> shared_words;
std::unordered_map<uint64_t, Word> global_words;
// By an address that atomics touch.
std::unordered_map<uint64_t, Clock> published_in_shared, published_in_global;

bool is_in(const Access& a, const std::map<uint64_t, std::vector<uint32_t>>& counts) {
  const auto it = counts.find(a.block);
  return it != counts.end() && a.count <= it->second[a.thread];
}

bool is_before_now(const Access& a, const ThreadClock& me) {
  return a.block == block_number ? a.count <= me.counts[a.thread] : is_in(a, me.now.done);
}

[[noreturn]] void fail_raced(const Site& site, bool writes, const Access& other, bool is_shared, uint64_t address) {
  const std::string there = format("%s at %s", other.site->what, other.site->source);
  if (other.count == kOnItsWay) {
    fail("race: %s at %s, but the bytes of %s are on their way", site.what, site.source, there.c_str());
  }
  const Dim s = block.size;
  const std::string thread =
      format("thread (%u, %u, %u)", other.thread % s.x, other.thread / s.x % s.y, other.thread / s.x / s.y);
  const std::string which = other.thread == copy_unit ? "" : " of " + thread;
  const std::string where = other.block == block_number ? "" : format(" of block %lu", other.block);
  fail("race: %s at %s %s %s memory at 0x%lx, which %s%s%s %s: nothing orders them", site.what, site.source,
       writes ? "writes" : "reads", is_shared ? "shared" : "global", address, there.c_str(), which.c_str(),
       where.c_str(), other.writes ? "has written" : "has read");
}

template <class F>
void for_each_word(bool is_shared, uint64_t address, uint32_t bytes, const F& f) {
  for (uint64_t word = address / kWordBytes; word * kWordBytes < address + bytes; ++word) {
    uint8_t mask = 0;
    for (uint32_t i = 0; i < kWordBytes; ++i) {
      const uint64_t byte = word * kWordBytes + i;
      if (byte >= address && byte < address + bytes) mask |= 1 << i;
    }
    f(is_shared ? shared_words[word] : global_words[word], mask);
  }
}

// `access` has all but the bytes.
void add_access(const Access& access, bool is_shared, uint64_t address, uint32_t bytes) {
  const ThreadClock& me = clocks[current->number];
  for_each_word(is_shared, address, bytes, [&](Word& word, uint8_t mask) {
    for (const Access& a : word) {
      const bool conflicts = (a.bytes & mask) && (access.writes || a.writes) && !(access.is_atomic && a.is_atomic);
      if (!conflicts) continue;
      if (!is_before_now(a, me)) fail_raced(*access.site, access.writes, a, is_shared, address);
      if (a.writes && a.proxy == Proxy::generic && access.proxy == Proxy::async && !is_in(a, me.now.fenced)) {
        fail("%s at %s: no fence.proxy.async since %s at %s wrote %s memory at 0x%lx", access.site->what,
             access.site->source, a.site->what, a.site->source, is_shared ? "shared" : "global", address);
      }
    }
    // Whoever comes after this access, and so doesn't race with it, doesn't race with what comes before it either.
    const auto is_covered = [&](const Access& a) {
      return (a.bytes & ~mask) == 0 && (access.writes || !a.writes) && (a.is_atomic || !access.is_atomic) &&
             is_before_now(a, me);
    };
    word.erase(std::remove_if(word.begin(), word.end(), is_covered), word.end());
    word.push_back(access);
    word.back().bytes = mask;
  });
}

}  // namespace

namespace {
void join_counts(std::map<uint64_t, std::vector<uint32_t>>& to, const std::map<uint64_t, std::vector<uint32_t>>& from) {
  for (const auto& [number, counts] : from) {
    auto& mine = to[number];
    mine.resize(counts.size());
    for (size_t i = 0; i < counts.size(); ++i) mine[i] = std::max(mine[i], counts[i]);
  }
}
}  // namespace

void Clock::join(const Clock& other) {
  join_counts(done, other.done);
  join_counts(fenced, other.fenced);
}

void begin_race_launch() {
  global_words.clear();
  published_in_global.clear();
}

void begin_race_block(uint64_t number, uint32_t threads) {
  block_number = number;
  published_in_shared.clear();
  shared_words.assign((block.smem_bytes + kWordBytes - 1) / kWordBytes, {});
  copy_unit = threads;
  clocks.assign(threads + 1, {});
  for (uint32_t i = 0; i <= threads; ++i) {
    auto& counts = clocks[i].now.done[number];
    counts.resize(threads + 1);
    counts[i] = 1;
    clocks[i].counts = counts.data();
  }
}

void release(uint32_t thread, Clock& to) {
  to.join(clocks[thread].now);
  ++clocks[thread].counts[thread];
}

void acquire(uint32_t thread, const Clock& from) { clocks[thread].now.join(from); }

void synchronise(const std::vector<uint32_t>& threads) {
  Clock all;
  for (const uint32_t thread : threads) release(thread, all);
  for (const uint32_t thread : threads) acquire(thread, all);
}

void fence_threads() {
  ThreadClock& me = clocks[current->number];
  me.now.join(me.pending);
  me.pending = {};
  me.released = me.now;
  ++me.counts[current->number];
}

namespace {

void check_access(const Site& site, bool is_shared, uint64_t address, uint32_t bytes, bool writes, bool is_atomic) {
  ThreadClock& me = clocks[current->number];
  const uint32_t thread = current->number;
  add_access({block_number, thread, me.counts[thread], 0, writes, is_atomic, Proxy::generic, &site}, is_shared, address,
             bytes);
  if (!is_atomic) return;
  // A fence before a write releases, one after a read acquires.
  Clock& here = (is_shared ? published_in_shared : published_in_global)[address];
  me.pending.join(here);
  if (writes) here.join(me.released);
}

}  // namespace

void watch_access(Site& site, bool is_shared, uint64_t address, uint32_t bytes, bool reads, bool writes,
                  bool is_atomic) {
  record_access(site, is_shared, address, bytes, reads, writes);
  if (settings.watches & kRaces) check_access(site, is_shared, address, bytes, writes, is_atomic);
}

void fence_proxy() {
  Clock& now = clocks[current->number].now;
  join_counts(now.fenced, now.done);
  ++clocks[current->number].counts[current->number];
}

void begin_transfer(const Site& site, Proxy proxy, uint32_t offset, uint32_t bytes, bool writes) {
  const uint32_t thread = proxy == Proxy::generic ? current->number : copy_unit;
  add_access({block_number, thread, kOnItsWay, 0, writes, false, proxy, &site}, true, offset, bytes);
}

void end_transfer(Proxy proxy, uint32_t offset, uint32_t bytes, Clock* to) {
  const uint32_t thread = proxy == Proxy::generic ? current->number : copy_unit;
  const uint32_t owner = to ? thread : current->number, count = clocks[owner].counts[owner];
  for_each_word(true, offset, bytes, [&](Word& word, uint8_t) {
    for (Access& a : word) {
      if (a.thread != thread || a.count != kOnItsWay) continue;
      a.thread = owner;
      a.count = count;
    }
  });
  if (!to) return;
  auto& counts = to->done[block_number];
  counts.resize(clocks.size());
  counts[owner] = count;
  ++clocks[owner].counts[owner];
}

}  // namespace emulator
