// Races: accesses to the same bytes, one of which writes, that nothing orders. A vector clock for each thread says how
// much of the others' work is known to come before its own: barriers, __syncwarp and fences with atomics around them
// move it on, and nothing else does, so that a race is found under any schedule and in any order of the blocks. A
// ThreadSanitizer build would see less: it knows one address of shared memory for all blocks, takes each atomic for
// acquire and release, has four cells for a word, and can't name a CUDA thread.
//
// Fences order for everybody, whatever their scope. Several threads that write the same bytes are a race, unless equal
// writes are allowed: then those of one instruction, which change nothing, are none.
#include "races.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <unordered_map>
#include <utility>

#include "clusters.h"
#include "scheduler.h"

namespace emulator {

namespace {

constexpr uint32_t kWordBytes = 4, kOnItsWay = ~0u;  // no thread's count gets there

struct Access {
  uint64_t cluster;
  uint32_t thread, count;
  uint8_t bytes;  // of the word, a bit each
  bool writes, is_atomic;
  By by;
  const Site* site;
};
// Those that a later access may still race with.
using Word = std::vector<Access>;

struct ThreadClock {
  Clock now;
  uint32_t* counts;         // of `now`, for its own cluster
  Clock released, pending;  // at its last fence; what it has seen since
};

uint64_t cluster_number;
uint32_t copy_unit;  // the thread after the last
std::vector<ThreadClock> clocks;
std::vector<Word> shared_words;
std::unordered_map<uint64_t, Word> global_words;
// A write that is no race if it changes nothing, which shows when the next access comes.
struct EqualWrite {
  const unsigned char* at;
  std::vector<unsigned char> bytes;
  Access own, other;
  bool is_shared;
  uint64_t address;
};
std::optional<EqualWrite> equal_write;
// By an address that atomics touch.
std::unordered_map<uint64_t, Clock> published_in_shared, published_in_global;

bool is_in(const Access& a, const std::map<uint64_t, std::vector<uint32_t>>& counts) {
  const auto it = counts.find(a.cluster);
  return it != counts.end() && a.count <= it->second[a.thread];
}

bool is_before_now(const Access& a, const ThreadClock& me) {
  return a.cluster == cluster_number ? a.count <= me.counts[a.thread] : is_in(a, me.now.done);
}

bool is_of_unit(const Access& a) { return a.thread == copy_unit; }
uint32_t rank_of(const Access& a) { return a.thread / cluster.thread_stride; }

// What it was, and whose.
std::string describe(const Access& a) {
  std::string text = format("%s at %s", a.site->what, a.site->source);
  if (is_of_unit(a)) return text;
  const Dim t = thread_index(a.thread % cluster.thread_stride);
  text += format(" of thread (%u, %u, %u)", t.x, t.y, t.z);
  if (a.cluster == cluster_number && rank_of(a) == block.rank) return text;
  const Dim b = block_index(cluster_index(a.cluster), rank_of(a));
  return text + format(" of block (%u, %u, %u)", b.x, b.y, b.z);
}

std::string describe_memory(bool is_shared, uint64_t address) {
  return is_shared ? "shared memory at " + describe_place(address) : format("global memory at 0x%lx", address);
}

[[noreturn]] void fail_raced(const Site& site, bool writes, const Access& other, bool is_shared, uint64_t address) {
  if (other.count == kOnItsWay) {
    fail("race: %s at %s, but the bytes of %s at %s are on their way", site.what, site.source, other.site->what,
         other.site->source);
  }
  fail("race: %s at %s %s %s, which %s %s: nothing orders them", site.what, site.source, writes ? "writes" : "reads",
       describe_memory(is_shared, address).c_str(), describe(other).c_str(), other.writes ? "has written" : "has read");
}

void settle_equal_write() {
  if (!equal_write) return;
  const EqualWrite write = *std::exchange(equal_write, {});
  if (memcmp(write.at, write.bytes.data(), write.bytes.size()) == 0) return;
  fail_raced(*write.own.site, write.own.writes, write.other, write.is_shared, write.address);
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
  settle_equal_write();
  const ThreadClock& me = clocks[current->number];
  const auto begin_equal_write = [&](const Access& other) {
    const bool can_be = settings.allows_equal_writes && access.site == other.site && access.writes &&
                        access.count != kOnItsWay && other.count != kOnItsWay;
    if (!can_be) return false;
    const unsigned char* at = is_shared ? cluster.smem + address : reinterpret_cast<unsigned char*>(address);
    equal_write = {at, {at, at + bytes}, access, other, is_shared, address};
    return true;
  };
  for_each_word(is_shared, address, bytes, [&](Word& word, uint8_t mask) {
    for (const Access& a : word) {
      const bool conflicts = (a.bytes & mask) && (access.writes || a.writes) && !(access.is_atomic && a.is_atomic);
      if (!conflicts) continue;
      if (!is_before_now(a, me)) {
        if (begin_equal_write(a)) continue;
        fail_raced(*access.site, access.writes, a, is_shared, address);
      }
      const bool changes_proxy = a.by != By::async_proxy && access.by == By::async_proxy;
      if (a.writes && changes_proxy && !is_in(a, me.now.fenced)) {
        fail("%s at %s: no fence.proxy.async since %s at %s wrote %s", access.site->what, access.site->source,
             a.site->what, a.site->source, describe_memory(is_shared, address).c_str());
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
  equal_write.reset();  // of a launch that failed
  global_words.clear();
  published_in_global.clear();
}

void begin_race_cluster(uint64_t number, uint32_t threads) {
  cluster_number = number;
  published_in_shared.clear();
  shared_words.assign(cluster.smem_bytes / kWordBytes, {});
  copy_unit = threads;
  clocks.assign(threads + 1, {});
  for (uint32_t i = 0; i <= threads; ++i) {
    auto& counts = clocks[i].now.done[number];
    counts.resize(threads + 1);
    counts[i] = 1;
    clocks[i].counts = counts.data();
  }
}

void end_race_cluster() { settle_equal_write(); }

// A block's shared memory is there for as long as it has threads.
void end_race_block() {
  Clock known;
  const uint32_t first = first_of(block.rank);
  for (uint32_t i = first; i < first + block.size.count(); ++i) known.join(clocks[i].now);
  const uint32_t begin = block.rank * cluster.smem_stride / kWordBytes;
  for (uint32_t i = begin; i < begin + cluster.smem_stride / kWordBytes; ++i) {
    for (const Access& a : shared_words[i]) {
      const bool is_own = !is_of_unit(a) && rank_of(a) == block.rank;
      if (is_own || (a.count != kOnItsWay && is_in(a, known.done))) continue;
      fail("race: the block exits, and nothing orders that after %s, which %s its shared memory at %s",
           describe(a).c_str(), a.writes ? "writes" : "reads", describe_place(i * kWordBytes).c_str());
    }
  }
}

void release(uint32_t thread, Clock& to) {
  to.join(clocks[thread].now);
  ++clocks[thread].counts[thread];
}

void acquire(uint32_t thread, const Clock& from) { clocks[thread].now.join(from); }

void release_relaxed(Clock& to) { to.join(clocks[current->number].released); }

void acquire_relaxed(const Clock& from) { clocks[current->number].pending.join(from); }

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
  add_access({cluster_number, thread, me.counts[thread], 0, writes, is_atomic, By::thread, &site}, is_shared, address,
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

void begin_transfer(const Site& site, By by, uint32_t place, uint32_t bytes, bool writes, bool is_atomic) {
  const uint32_t thread = by == By::thread ? current->number : copy_unit;
  add_access({cluster_number, thread, kOnItsWay, 0, writes, is_atomic, by, &site}, true, place, bytes);
}

void end_transfer(By by, uint32_t place, uint32_t bytes, Clock* to) {
  const uint32_t thread = by == By::thread ? current->number : copy_unit;
  const uint32_t owner = to ? thread : current->number, count = clocks[owner].counts[owner];
  for_each_word(true, place, bytes, [&](Word& word, uint8_t) {
    for (Access& a : word) {
      if (a.thread != thread || a.count != kOnItsWay) continue;
      a.thread = owner;
      a.count = count;
    }
  });
  if (!to) return;
  auto& counts = to->done[cluster_number];
  counts.resize(clocks.size());
  counts[owner] = count;
  ++clocks[owner].counts[owner];
}

}  // namespace emulator
