// When the products of a warpgroup are done: they are queued until all its threads have asked for them, and then run at
// once (descending order) or as late as they are waited for (ascending); at random, either.
#include "warpgroups.h"

#include <deque>

#include "clusters.h"
#include "races.h"
#include "scheduler.h"
#include "tensor_maps.h"

namespace emulator {

namespace {

constexpr int kThreads = 128;

struct Queued {
  const Site* site;
  ProductWork work;
  int n;
  Product products[kThreads];
  int asked = 0;
  bool is_done = false;
  Clock clock;
};
struct Warpgroup {
  std::deque<Queued> queue;  // of the block, from its first on
};
std::deque<Warpgroup> warpgroups;

// Registers of D that products write, and what they hold truly.
struct Sums {
  uint32_t* const* registers;
  std::vector<uint32_t> values;
  size_t end;  // of the products that write them
};
struct State {
  size_t asked = 0, waited = 0;  // numbers of products
  std::vector<size_t> commits;   // how many products had been asked for
  bool is_fenced = false;
  std::deque<Sums> sums;
};
std::vector<State> states;  // of each thread

int num_registers(const Product& p) { return p.n / 2; }

Sums& find_sums(uint32_t thread, const Product& p) {
  for (Sums& sums : states[thread].sums) {
    if (sums.registers[0] == p.d[0]) return sums;
  }
  Sums sums{p.d, {}, 0};
  for (int i = 0; i < num_registers(p); ++i) sums.values.push_back(*p.d[i]);
  states[thread].sums.push_back(sums);
  return states[thread].sums.back();
}

// Calls f(offset) for each 16 bytes in shared memory that a warp multiplies.
template <class F>
void for_each_chunk(const Site& site, const Product& p, uint32_t warp, const F& f) {
  const auto visit = [&](uint64_t matrix, bool is_transposed, int begin, int rows) {
    for (int row = begin; row < begin + rows; row += is_transposed ? 8 : 1) {
      for (int k = 0; k < (is_transposed ? 16 : 2); ++k) {
        f(is_transposed ? matrix_offset(site, matrix, true, row, k, 2)
                        : matrix_offset(site, matrix, false, row, 16 * k, 1));
      }
    }
  };
  if (!p.a) visit(p.a_matrix, p.a_transposed, warp % 4 * 16, 16);
  visit(p.b_matrix, p.b_transposed, 0, p.n);
}

void run(uint32_t group, Queued& q) {
  if (q.is_done) return;
  q.is_done = true;
  ++statistics.warp_operations;
  uint32_t* sums[kThreads];
  for (int t = 0; t < kThreads; ++t) sums[t] = find_sums(group * kThreads + t, q.products[t]).values.data();
  q.work(*q.site, q.products, sums);
  if (!(settings.watches & kRaces)) return;
  for (int warp = 0; warp < 4; ++warp) {
    for_each_chunk(*q.site, q.products[warp * kWarp], warp,
                   [&](uint32_t offset) { end_transfer(By::async_proxy, place_of(offset), 16, &q.clock); });
  }
}

void run_until(uint32_t group, size_t end) {
  auto& queue = warpgroups[group].queue;
  for (size_t i = 0; i < end; ++i) run(group, queue[i]);
}

}  // namespace

void start_product(const Site& site, ProductWork work, const Product& product) {
  const uint32_t thread = current->number, group = thread / kThreads, end = (group + 1) * kThreads;
  if (first_of(block.rank) + block.size.count() < end) fail("%s at %s: not a whole warpgroup", site.what, site.source);
  State& state = states[thread];
  auto& queue = warpgroups[group].queue;
  if (!state.is_fenced) fail("%s at %s: no wgmma.fence before it", site.what, site.source);
  if (state.asked == queue.size()) queue.emplace_back(Queued{&site, work, product.n, {}, 0, false, {}});
  Queued& q = queue[state.asked++];
  if (q.work != work || q.n != product.n) {
    fail("divergent warpgroup: %s at %s, others are at %s at %s", site.what, site.source, q.site->what, q.site->source);
  }
  q.products[thread % kThreads] = product;
  Sums& sums = find_sums(thread, product);
  sums.end = state.asked;
  for (int i = 0; i < num_registers(product); ++i) *product.d[i] = ~0u;
  if ((settings.watches & kRaces) && current->lane == 0) {
    for_each_chunk(site, product, current->warp,
                   [&](uint32_t offset) { begin_transfer(site, By::async_proxy, place_of(offset), 16, false); });
  }
  if (++q.asked < kThreads) return;
  const bool is_early = settings.order == Order::descending || (settings.order == Order::random && draw() % 2 == 0);
  if (is_early) run_until(group, state.asked);
  wake(&q);
}

void fence_products() { states[current->number].is_fenced = true; }

void commit_products() {
  State& state = states[current->number];
  state.commits.push_back(state.asked);
}

void wait_for_products(const Site& site, uint32_t pending_groups) {
  State& state = states[current->number];
  state.is_fenced = false;
  if (state.commits.size() <= pending_groups) return;
  const uint32_t group = current->number / kThreads;
  const size_t end = state.commits[state.commits.size() - 1 - pending_groups];
  auto& queue = warpgroups[group].queue;
  for (; state.waited < end; ++state.waited) {
    Queued& q = queue[state.waited];
    while (q.asked < kThreads) wait_for(&q, site);
    run(group, q);
    if (settings.watches & kRaces) acquire(current->number, q.clock);
  }
  for (size_t i = 0; i < state.sums.size();) {
    const Sums& sums = state.sums[i];
    if (sums.end > end) {
      ++i;
      continue;
    }
    for (size_t r = 0; r < sums.values.size(); ++r) *sums.registers[r] = sums.values[r];
    state.sums.erase(state.sums.begin() + i);
  }
}

void reset_warpgroups() {
  warpgroups.assign((num_numbers() + kThreads - 1) / kThreads, {});
  states.assign(num_numbers(), {});
}

void leave_warpgroup() {
  const State& state = states[current->number];
  if (state.waited < state.asked) {
    const Queued& q = warpgroups[current->number / kThreads].queue[state.waited];
    fail("%s at %s: the thread has exited without waiting for it", q.site->what, q.site->source);
  }
}

uint32_t matrix_offset(const Site& site, uint64_t descriptor, bool is_transposed, int row, int k, int element_bytes) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  constexpr uint32_t kSpans[] = {0, 128, 64, 32};
  const uint32_t span = kSpans[descriptor >> 62], byte = k * element_bytes;
  if (descriptor >> 49 & 7) fail("%s at %s: a base offset isn't emulated", site.what, site.source);
  uint32_t offset;
  if (!is_transposed && span) {
    offset = row % 8 * span + row / 8 * stride + byte;
  } else if (!is_transposed) {
    offset = row % 8 * 16 + row / 8 * stride + byte / 16 * leading + byte % 16;
  } else if (span) {
    const int per_row = span / element_bytes;
    offset = row % per_row * element_bytes + row / per_row * leading + k % 8 * span + k / 8 * stride;
  } else {
    const int per_row = 16 / element_bytes;
    offset = row % per_row * element_bytes + row / per_row * stride + k % 8 * 16 + k / 8 * leading;
  }
  const uint32_t place = swizzled(start + offset, span);
  if (place + element_bytes > block.smem_bytes) {
    fail("%s at %s: the descriptor %016lx leads to offset %u, outside the block's %zu bytes of shared memory",
         site.what, site.source, descriptor, place, block.smem_bytes);
  }
  return place;
}

}  // namespace emulator
