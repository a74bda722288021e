#include "scheduler.h"

#include <cxxabi.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>

#include "async.h"
#include "clusters.h"
#include "races.h"

namespace emulator {

Block block;
Cluster cluster;
Thread* current = nullptr;
Settings settings;
Statistics statistics;
std::vector<Fiber> fibers;
uint32_t num_live;
std::vector<uint32_t> live_in;

namespace {
uint64_t random_state;
}

uint64_t draw() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545f4914f6cdd1dull;
}

namespace {

// Lanes that can run, and the lane whose turn it is.
struct Queue {
  uint32_t ready, turn;
};
std::vector<Queue> queues;  // of each warp
uint32_t running_warp;
uint32_t idle_turns;  // how often threads have given way since one of them went on
void* launcher;       // its stack pointer, while a block runs
std::string failure;  // why the block was abandoned; empty if it wasn't

// Saves the callee-saved registers and the stack pointer, and continues where `to` was left.
__attribute__((naked, noinline)) void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}

Dim split(uint64_t number, Dim size) {
  return {static_cast<uint32_t>(number % size.x), static_cast<uint32_t>(number / size.x % size.y),
          static_cast<uint32_t>(number / size.x / size.y)};
}

void enter_block(uint32_t rank) {
  block.rank = rank;
  block.smem = cluster.smem + static_cast<size_t>(rank) * cluster.smem_stride;
  block.index = block_index(cluster.index, rank);
}

void switch_to(Fiber* next) {
  void** from = &self().stack_pointer;
  current = next;
  if (next && next->rank != block.rank) enter_block(next->rank);
  switch_stacks(from, next ? next->stack_pointer : launcher);
}

// Far more than a schedule needs to come to every thread.
constexpr uint32_t kMaxIdleTurns = 1 << 20;

void make_ready(const Fiber& f) { queues[f.warp].ready |= 1u << f.lane; }

// All are ready: the first of the order begins.
void begin_turn() {
  const bool is_descending = settings.order == Order::descending;
  for (Queue& queue : queues) queue.turn = is_descending ? kWarp - 1 : 0;
  running_warp = is_descending ? queues.size() - 1 : 0;
}

// A warp runs as long as it can: its threads' stacks stay in the cache. At random, it is at times interrupted.
uint32_t next_warp() {
  const auto n = static_cast<uint32_t>(queues.size());
  const bool is_interrupted = settings.order == Order::random && draw() % 16 == 0;
  if (queues[running_warp].ready && !is_interrupted) return running_warp;
  uint32_t warp = settings.order == Order::random ? draw() % n : running_warp;
  for (uint32_t i = 0; i < n && !queues[warp].ready; ++i) {
    warp = settings.order == Order::descending ? (warp + n - 1) % n : (warp + 1) % n;
  }
  return warp;
}

uint32_t rotate_left(uint32_t x, uint32_t n) { return x << (n & 31) | x >> (-n & 31); }

Fiber* next_ready() {
  running_warp = next_warp();
  Queue& queue = queues[running_warp];
  if (!queue.ready) return nullptr;
  const bool is_descending = settings.order == Order::descending;
  const uint32_t turn = settings.order == Order::random ? draw() % kWarp : queue.turn;
  const uint32_t lane = is_descending ? (turn + kWarp - __builtin_clz(rotate_left(queue.ready, 31 - turn))) % kWarp
                                      : (turn + __builtin_ctz(rotate_left(queue.ready, 32 - turn))) % kWarp;
  queue.ready &= ~(1u << lane);
  queue.turn = is_descending ? (lane + kWarp - 1) % kWarp : (lane + 1) % kWarp;
  return &fibers[running_warp * kWarp + lane];
}

// Which threads wait where: one line for neighbours that wait at the same place.
[[noreturn]] void fail_deadlocked() {
  const uint32_t n = block.size.count();
  std::string text = format("deadlock: %u of %u threads wait for ever", num_live, n * cluster.blocks());
  int lines = 0;
  for (uint32_t rank = 0; rank < cluster.blocks(); ++rank) {
    const Fiber* threads = &fibers[first_of(rank)];
    const std::string where = cluster.blocks() > 1 ? describe_block(rank) + ": " : "";
    for (uint32_t i = 0, end; i < n && lines < 16; i = end) {
      for (end = i + 1; end < n && threads[end].waits_at == threads[i].waits_at; ++end) {
      }
      if (const Site* site = threads[i].waits_at) {
        text += format("\n  %sthreads %u to %u wait at %s at %s", where.c_str(), i, end - 1, site->what, site->source);
        ++lines;
      }
    }
  }
  fail("%s%s%s%s", text.c_str(), describe_warps().c_str(), describe_mbarriers().c_str(),
       describe_cluster_barrier().c_str());
}

void run_others() {
  stir_async();
  Fiber* next = next_ready();
  while (!next && num_live > 0 && run_async()) next = next_ready();
  if (!next && num_live > 0) fail_deadlocked();
  if (next != current) switch_to(next);
}

void fiber_main() {
  block.kernel->body();
  leave_warpgroup();
  self().has_exited = true;
  self().waits_at = nullptr;
  --num_live;
  --live_in[block.rank];
  idle_turns = 0;
  leave_barriers();
  leave_warp();
  leave_cluster();
  run_others();
  abort();
}

void allocate_fibers(size_t n) {
  const size_t old = fibers.size();
  if (n <= old) return;
  fibers.resize(n);
  for (size_t i = old; i < n; ++i) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack, 4096, PROT_NONE);
    fibers[i].stack = static_cast<unsigned char*>(stack);
  }
}

void start_fiber(uint32_t rank, uint32_t thread) {
  const uint32_t i = first_of(rank) + thread;
  Fiber& f = fibers[i];
  f.index = thread_index(thread);
  f.number = i;
  f.warp = i / kWarp;
  f.lane = i % kWarp;
  f.rank = rank;
  f.has_exited = false;
  f.waits_at = nullptr;
  f.waits_for = nullptr;
  std::fill(f.visits.begin(), f.visits.end(), 0);
  f.copies.clear();
  f.num_groups = 0;
  // What switch_stacks pops: six registers and where to go. Staggered, else all stacks would share cache sets.
  auto** sp = reinterpret_cast<void**>(f.stack + kStackBytes - i * 9 % 64 * 64) - 2;
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(fiber_main);
  for (int k = 0; k < 6; ++k) *--sp = nullptr;
  f.stack_pointer = sp;
}

void run_cluster(uint64_t number) {
  const auto n = static_cast<uint32_t>(block.size.count());
  cluster.index = cluster_index(number);
  memset(cluster.smem, 0xff, cluster.smem_bytes);  // NaN, until it is written
  reset_barriers();
  reset_cluster_barrier();
  reset_warps();
  reset_mbarriers();
  reset_warpgroups();
  reset_async();
  num_live = n * cluster.blocks();
  live_in.assign(cluster.blocks(), n);
  idle_turns = 0;
  if (settings.watches & kRaces) begin_race_cluster(number, num_numbers());
  queues.assign((num_numbers() + kWarp - 1) / kWarp, {});
  for (uint32_t rank = 0; rank < cluster.blocks(); ++rank) {
    for (uint32_t i = 0; i < n; ++i) {
      start_fiber(rank, i);
      make_ready(fibers[first_of(rank) + i]);
    }
  }
  begin_turn();
  Fiber* first = next_ready();
  current = first;
  enter_block(first->rank);
  switch_stacks(&launcher, first->stack_pointer);
  finish_profile();
  if (!failure.empty()) throw Error(std::exchange(failure, {}));
  finish_async();
  if (settings.watches & kRaces) end_race_cluster();
}

std::vector<uint64_t> order_of_clusters(uint64_t n) {
  std::vector<uint64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (settings.order == Order::descending) std::reverse(order.begin(), order.end());
  if (settings.order == Order::random) {
    for (uint64_t i = n; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
  }
  return order;
}

}  // namespace

void release_stacks() {
  for (const Fiber& f : fibers) munmap(f.stack, kStackBytes);
  fibers.clear();
}

void wait_for(const void* event, const Site& site) {
  self().waits_for = event;
  self().waits_at = &site;
  run_others();
}

void wake(const void* event, int result) {
  idle_turns = 0;
  const uint32_t n = num_numbers();
  for (uint32_t i = 0; i < n; ++i) {
    Fiber& f = fibers[i];
    if (f.waits_for != event) continue;
    f.waits_for = nullptr;
    f.result = result;
    make_ready(f);
  }
  begin_turn();
}

void wake_lanes(uint32_t warp, uint32_t lanes) {
  idle_turns = 0;
  queues[warp].ready |= lanes;
}

void give_way_to_woken() { run_others(); }

void give_way(const Site& site) {
  if (++idle_turns > kMaxIdleTurns) {
    fail("deadlock: %s at %s comes back again and again, and nothing else happens", site.what, site.source);
  }
  self().waits_at = &site;
  make_ready(self());
  running_warp = (running_warp + 1) % queues.size();
  run_others();
}

std::string format(const char* text, ...) {
  va_list arguments, again;
  va_start(arguments, text);
  va_copy(again, arguments);
  std::string result(vsnprintf(nullptr, 0, text, arguments), '\0');
  vsnprintf(result.data(), result.size() + 1, text, again);
  va_end(again);
  va_end(arguments);
  return result;
}

void fail(const char* text, ...) {
  va_list arguments;
  va_start(arguments, text);
  char message[4096];
  vsnprintf(message, sizeof message, text, arguments);
  va_end(arguments);
  if (!current) throw Error(message);
  int status;
  char* name = abi::__cxa_demangle(block.kernel->name, nullptr, nullptr, &status);
  const Dim b = block.index, t = current->index;
  failure = format("%s\n  in kernel %s, block (%u, %u, %u), thread (%u, %u, %u)", message,
                   name ? name : block.kernel->name, b.x, b.y, b.z, t.x, t.y, t.z);
  free(name);
  switch_to(nullptr);  // for ever: run_cluster throws it
  abort();
}

Dim thread_index(uint32_t number_in_block) { return split(number_in_block, block.size); }

Dim cluster_index(uint64_t number) { return split(number, cluster.grid); }

Dim block_index(Dim c, uint32_t rank) {
  const Dim b = split(rank, cluster.size);
  return {c.x * cluster.size.x + b.x, c.y * cluster.size.y + b.y, c.z * cluster.size.z + b.z};
}

void run(const Kernel& kernel, Dim grid, Dim size, Dim cluster_size, size_t dynamic_smem,
         const unsigned char* parameters) {
  if (current) throw Error("a launch within a kernel isn't emulated");
  constexpr uint32_t kAlignment = 1024, kWarpgroup = 128;
  const auto round_up = [](size_t n, uint32_t unit) { return static_cast<uint32_t>((n + unit - 1) / unit * unit); };
  static std::vector<unsigned char> smem;
  block = {&kernel, grid, size, {}, nullptr, kernel.static_smem + dynamic_smem, dynamic_smem, parameters, 0, 0};
  const bool is_explicit = cluster_size.count() > 0;
  const Dim c = is_explicit ? cluster_size : Dim{};
  const uint32_t smem_stride = round_up(block.smem_bytes + 1, kAlignment);  // the end of one isn't the next one's begin
  smem.resize(smem_stride * c.count() + kAlignment);
  auto* aligned = smem.data() + -reinterpret_cast<uintptr_t>(smem.data()) % kAlignment;
  cluster = {c,
             {grid.x / c.x, grid.y / c.y, grid.z / c.z},
             {},
             is_explicit,
             round_up(size.count(), kWarpgroup),
             smem_stride,
             aligned,
             smem_stride * c.count()};
  allocate_fibers(num_numbers());
  for (Fiber& f : fibers) f.waits_for = nullptr;  // those between blocks, for ever
  random_state = (settings.seed + 1) * 0x9e3779b97f4a7c15ull | 1;
  if (settings.watches & kRaces) begin_race_launch();
  for (const uint64_t i : order_of_clusters(cluster.grid.count())) run_cluster(i);
  statistics.instructions += block.instructions;
}

}  // namespace emulator
