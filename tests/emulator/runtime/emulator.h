// What translated kernels, the scheduler of their threads and the stand-in for the CUDA runtime share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#pragma GCC visibility push(hidden)  // of declarations too: variables are reached without a table
namespace emulator {

// A mistake in a kernel, or something that isn't emulated. It leaves the launch; the block is abandoned.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Dim {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return static_cast<uint64_t>(x) * y * z; }
};

// ---- What translate.py writes of a source ----

struct Parameter {
  uint32_t offset, size;
};

// What a kernel's declaration says of clusters: their size, 0 where it is the launch's, and the largest; 0: any.
struct ClusterBounds {
  bool is_required;
  Dim size;
  uint32_t max_blocks;
};

struct Kernel {
  const char* name;  // mangled
  void (*body)();    // one thread
  const Parameter* parameters;
  int num_parameters;
  size_t parameter_bytes, static_smem;
  int max_threads;  // __launch_bounds__
  ClusterBounds cluster;
};

struct Variable {
  const char* name;
  void* storage;
  size_t size;
};

struct Module {
  const Kernel* kernels;
  int num_kernels;
  const Variable* variables;
  int num_variables;
  int architecture;
  bool is_specific;  // sm_90a and the like run on nothing else
};

// A table of modules, which host code hasn't registered.
void register_module(void** handle);

// A place in a kernel that accesses memory or meets other threads. It remembers the buffer that it found last.
struct Site {
  const char *what, *source;
  uint64_t epoch = 0;
  uintptr_t begin = 0, size = 0;
  int number = 0;  // for the profile; from 1
};

// ---- The running block ----

constexpr int kWarp = 32;

// Numbers are those in the cluster.
struct Thread {
  Dim index;
  uint32_t number, warp, lane, rank /* of the block */;
  unsigned char* stack;
};

struct Block {
  const Kernel* kernel;
  Dim grid, size, index;
  unsigned char* smem;
  size_t smem_bytes, dynamic_smem;
  const unsigned char* parameters;  // in fact of the grid
  uint64_t instructions;            // of threads, of the launch so far
  uint32_t rank;                    // in its cluster
};

// The blocks that run at once; one, where a launch says nothing of clusters. Threads and bytes of shared memory are
// numbered through: from a block's first to the next one's there is a stride.
struct Cluster {
  Dim size, grid /* of clusters */, index;
  bool is_explicit;
  uint32_t thread_stride, smem_stride;
  unsigned char* smem;
  size_t smem_bytes;

  uint32_t blocks() const { return size.count(); }
};

extern Block block;
extern Cluster cluster;
extern Thread* current;  // null while the host runs

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
// Adds kernel, block and thread to the message, where one is running.
[[noreturn]] void fail(const char* text, ...) __attribute__((format(printf, 1, 2)));

// ---- Launches ----

enum class Order { ascending, descending, random };

// What is looked at, at each access of memory: it takes time.
enum Watch : uint8_t { kConflicts = 1, kSectors = 2, kRaces = 4 };

struct Settings {
  Order order = Order::ascending;
  uint64_t seed = 0;
  uint8_t watches = 0;
  bool allows_equal_writes = false;
};

extern Settings settings;

struct Statistics {
  uint64_t instructions = 0;                         // of threads
  uint64_t warp_operations = 0;                      // shuffles, votes and the like, once a warp
  uint64_t barriers = 0;                             // completed, by a block
  uint64_t global_read = 0, global_written = 0;      // bytes that threads asked for
  uint64_t shared_accesses = 0, bank_conflicts = 0;  // of warps; extra cycles: where conflicts are counted
  uint64_t sectors_read = 0, sectors_written = 0;    // of 32 bytes, of global memory, by warps: where they are counted
};

extern Statistics statistics;

// `cluster_size`: 0 blocks where there are no clusters.
void run(const Kernel& kernel, Dim grid, Dim size, Dim cluster_size, size_t dynamic_smem,
         const unsigned char* parameters);

// ---- Threads that meet ----

enum class Reduction { none, sum, all, any };
int barrier(const Site& site, uint32_t number, uint32_t count, Reduction reduction, int value);
void barrier_arrive(const Site& site, uint32_t number, uint32_t count);
void give_way(const Site& site);

void warp_barrier(const Site& site, uint32_t mask);
// What the lanes of a warp do together: `work` runs once, when all that are named have come. It gets each lane's
// argument and the lanes that are there: those named less those that have exited.
using LaneWork = void (*)(const Site& site, void** arguments, uint32_t lanes);
void meet(const Site& site, uint32_t mask, void* argument, LaneWork work);

struct Ballot {
  uint32_t yes, lanes;
};
Ballot ballot(const Site& site, uint32_t mask, bool value);

struct Match {
  uint32_t equal, lanes;
};
Match match(const Site& site, uint32_t mask, uint64_t value);

// ---- Operations of a warp that it does together ----
// Neighbours in the code are done at one meeting: a thread's registers stand in slots, inputs and results alike.

struct Operation {
  void (*work)(const Operation& o, uint32_t* const* slots /* of each lane */, uint32_t lanes);
  const Site* site;
  uint16_t inputs[10];
  uint16_t output;  // the first of its results
};

struct Program {
  const Operation* operations;
  int size;
};
void run_together(const Program& program, uint32_t mask, uint32_t* slots);

struct F16;
struct Bf16;
struct Tf32;
struct S8;
struct S8Saturating;
template <class Element, int num_b>
void multiply(const Operation& o, uint32_t* const* slots, uint32_t lanes);
template <int count, bool is_transposed>
void load_matrices(const Operation& o, uint32_t* const* slots, uint32_t lanes);
template <int count, bool is_transposed>
void store_matrices(const Operation& o, uint32_t* const* slots, uint32_t lanes);

enum class Shuffle { up, down, bfly, idx };
template <Shuffle mode>
void shuffle(const Operation& o, uint32_t* const* slots, uint32_t lanes);

// Results: a lane, and whether it is this one.
void elect(const Operation& o, uint32_t* const* slots, uint32_t lanes);

// ---- Asynchronous copies ----

// cp.async: the bytes arrive when this thread waits for their group, and are NaN until then.
void copy_async(const Site& site, unsigned char* to, const unsigned char* from, uint32_t bytes, uint32_t bytes_from);
void commit_copies();
void wait_for_copies(uint32_t pending_groups);

// ---- Memory ----

// Host code gets addresses of device memory with this bit, which no address in use has: if it reads there, that is a
// fault (faults.cpp).
constexpr uint64_t kDeviceBit = 1ull << 62;
inline uint64_t host_address(uint64_t address) { return address & ~kDeviceBit; }
inline void* to_device(const void* p) {
  return p ? reinterpret_cast<void*>(reinterpret_cast<uint64_t>(p) | kDeviceBit) : nullptr;
}
inline void* to_host(const void* p) { return reinterpret_cast<void*>(host_address(reinterpret_cast<uint64_t>(p))); }

void install_fault_handler();

// Known memory, by the host's addresses; a range may be added more than once.
void add_buffer(const void* begin, size_t bytes, const std::string& name);
bool remove_buffer(const void* begin);
extern uint64_t buffer_epoch;  // changes when what sites remember may be out of date
// Finds the buffer, for the site to remember, or fails with the nearest one.
void find_buffer(Site& site, uintptr_t address, size_t bytes);
bool is_in_buffer(const void* begin, size_t bytes);

constexpr size_t kStackBytes = 256 << 10;
// Whether a generic address is in the kernel's parameters or this thread's local memory.
bool is_private(uintptr_t address, size_t bytes);

void watch_access(Site& site, bool is_shared, uint64_t address, uint32_t bytes, bool reads, bool writes,
                  bool is_atomic);
void fence_threads();

}  // namespace emulator
#pragma GCC visibility pop
