// Blocks of a cluster that read, write and fill one another's shared memory: each kernel is right, and with `bug` wrong
// in one way.
#include <cooperative_groups.h>

#include "clusters.cuh"

namespace groups = cooperative_groups;

constexpr int kBins = 64, kThreads = 96;

// out [clusters, bins] = how often each number is in the cluster's part of in: a block has some of the bins. Bug 1:
// others' bins are counted in before they are 0; 2: and read before all are counted; 3: blocks exit while others count
// in theirs, or before they have read their own.
extern "C" __global__ void histogram(const int* in, int* out, int per_cluster, int bug) {
  __shared__ int bins[kBins];
  const auto cluster = groups::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank(), per_block = (kBins + blocks - 1) / blocks;
  const int number = __clusterIdx().x + __clusterGridDimInClusters().x * __clusterIdx().y;
  for (int i = threadIdx.x; i < per_block; i += blockDim.x) bins[i] = 0;
  if (bug == 1) {
    __syncthreads();
  } else {
    cluster.sync();
  }
  for (int i = cluster.thread_rank(); i < per_cluster; i += cluster.num_threads()) {
    const int bin = in[number * per_cluster + i];
    atomicAdd(cluster.map_shared_rank(&bins[bin % per_block], bin / per_block), 1);
  }
  if (bug == 3) return;
  if (bug == 2) {
    __syncthreads();
  } else {
    cluster.sync();
  }
  for (int i = threadIdx.x; i < per_block && rank * per_block + i < kBins; i += blockDim.x) {
    out[number * kBins + rank * per_block + i] = bins[i];
  }
}

// out = the sums over the blocks of a cluster, which each of them reads from all. Bug 1: no barrier before; 2: none
// after, so that a block may be gone; 3: a rank too many; 4: an element too many; 5: an arrival that orders nothing; 6:
// a thread waits without having come; 7: it waits elsewhere.
extern "C" __global__ void sums(const float* in, float* out, int bug) {
  __shared__ float smem[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x, blocks = cluster_blocks();
  smem[threadIdx.x] = in[i];
  if (bug == 5) {
    cluster_arrive_relaxed();
  } else if (bug != 1 && !(bug >= 6 && i == 40)) {
    asm volatile("barrier.cluster.arrive;" ::: "memory");
  }
  if (bug == 7 && i == 40) asm volatile("bar.sync 1;");
  if (bug != 1) asm volatile("barrier.cluster.wait;" ::: "memory");
  float sum = 0;
  for (int rank = 0; rank < blocks + (bug == 3); ++rank) {
    float x;
    asm volatile("ld.shared::cluster.f32 %0, [%1];"
                 : "=f"(x)
                 : "r"(map_address(smem, rank) + 4 * (threadIdx.x + (bug == 4)))
                 : "memory");
    sum += x;
  }
  out[i] = sum;
  if (bug != 2) cluster_sync();
}

// out [blocks, 4 threads] = in, moved on by one block of the cluster in each of `steps`: by st.async, or as a bulk
// copy. Bug 1: more bytes are announced to the neighbour than it gets; 2: its buffer may still be in use; 3: barriers
// aren't known to be there; 4: the bytes aren't waited for; 5: its barrier, but not its buffer, is a neighbour's; 6: no
// proxy fence before a bulk copy.
template <bool is_bulk>
__device__ void pass_on(const float4* in, float4* out, int steps, int bug) {
  __shared__ __align__(128) float4 buffers[2][kThreads], own[kThreads];
  __shared__ uint64_t full[2], empty[2];
  const uint32_t thread = threadIdx.x, rank = cluster_rank(), blocks = cluster_blocks();
  const uint32_t next = (rank + 1) % blocks, previous = (rank + blocks - 1) % blocks;
  if (thread == 0) {
    for (int i = 0; i < 2; ++i) init_barrier(&full[i], 1), init_barrier(&empty[i], kThreads);
    if (bug != 3) fence_barrier_init();
  }
  __syncthreads();
  cluster_arrive_relaxed();
  cluster_wait();
  float4 x = in[blockIdx.x * kThreads + thread];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % 2, phase = step / 2 % 2;
    const uint32_t to = map_address(buffers[stage], next), barrier = map_address(&full[stage], next);
    if (bug != 2) wait_cluster(&empty[stage], phase ^ 1);
    if (thread == 0) expect_remote(barrier, sizeof buffers[0] + (bug == 1 ? 16 : 0));
    if (is_bulk) {
      own[thread] = x;
      if (bug != 6) fence_proxy();
      __syncthreads();
      if (thread == 0) send_bulk(to, own, sizeof own, barrier);
    } else {
      store_async(to + thread * sizeof x, x, bug == 5 ? map_address(&full[stage], rank) : barrier);
    }
    if (bug != 4) wait_cluster(&full[stage], phase);
    x = buffers[stage][thread];
    arrive_remote(map_address(&empty[stage], previous));
    if (is_bulk) cluster_sync();  // `own` has been read
  }
  out[blockIdx.x * kThreads + thread] = x;
  cluster_sync();
}
extern "C" __global__ void ring(const float4* in, float4* out, int steps, int bug) {
  pass_on<false>(in, out, steps, bug);
}
extern "C" __global__ void bulk_ring(const float4* in, float4* out, int steps, int bug) {
  pass_on<true>(in, out, steps, bug);
}

// out [blocks] = the sums of all that the cluster's threads have, in block 0, by red.async. Bug: it is read before all
// has come.
extern "C" __global__ void async_sum(const unsigned* in, unsigned* out, int bug) {
  __shared__ unsigned sum;
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    sum = 0;
    init_barrier(&full, 1);
    arrive_and_expect(&full, 4 * (bug ? 1 : kThreads * cluster_blocks()));
  }
  cluster_sync();
  asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%0], %1, [%2];" ::"r"(
                   map_address(&sum, 0)),
               "r"(in[blockIdx.x * kThreads + threadIdx.x]), "r"(map_address(&full, 0))
               : "memory");
  if (cluster_rank() == 0) {
    wait_cluster(&full, 0);
    if (threadIdx.x == 0) out[blockIdx.x / cluster_blocks()] = sum;
  }
  cluster_sync();
}

// What the special registers say, [blocks, 16]; and of addresses.
extern "C" __global__ void registers(int* out) {
  __shared__ int smem[32];
  const auto cluster = groups::this_cluster();
  const dim3 index = cluster.block_index(), size = cluster.dim_blocks(), number = __clusterIdx();
  const dim3 clusters = __clusterGridDimInClusters();
  const int rank = cluster.block_rank(), blocks = cluster.num_blocks();
  if (threadIdx.x == 0) smem[5] = 100 + rank;
  cluster.sync();
  int* other = cluster.map_shared_rank(&smem[5], blocks - 1 - rank);
  const uint32_t address = shared_address(other);
  uint32_t its_rank, value;
  asm volatile("getctarank.shared::cluster.u32 %0, %1;" : "=r"(its_rank) : "r"(address));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  const bool is_own = blocks - 1 - rank == rank;
  const bool are_right = __isClusterShared(other) && __isShared(other) == is_own && __isClusterShared(smem) &&
                         !__isClusterShared(out) && cluster.query_shared_rank(other) == its_rank && value == *other;
  const dim3 sizes[] = {number, clusters, index, size};
  const int others[] = {rank, blocks, static_cast<int>(value), are_right + 2 * (__clusterDimIsSpecified() != 0)};
  if (threadIdx.x == 0) {
    out += 16 * (blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
    for (int i = 0; i < 4; ++i) {
      out[3 * i] = sizes[i].x, out[3 * i + 1] = sizes[i].y, out[3 * i + 2] = sizes[i].z;
      out[12 + i] = others[i];
    }
  }
  cluster.sync();
}

// out = what block 1 has, which block 0 reads. Bug: block 1 only sleeps meanwhile.
extern "C" __global__ void late_exit(int* out, int bug) {
  __shared__ int smem[32];
  smem[threadIdx.x] = threadIdx.x;
  cluster_sync();
  if (cluster_rank() == 0) {
    asm volatile("ld.shared::cluster.u32 %0, [%1];"
                 : "=r"(out[threadIdx.x])
                 : "r"(map_address(&smem[threadIdx.x], 1))
                 : "memory");
  }
  if (!bug) {
    cluster_sync();
  } else if (cluster_rank() == 1) {
    for (int i = 0; i < 1000; ++i) __nanosleep(1000);
  }
}

// A block leaves, while the others meet again without it.
extern "C" __global__ void early_exit(int* out) {
  cluster_sync();
  if (cluster_rank() == 1) return;
  cluster_sync();
  if (threadIdx.x == 0) out[blockIdx.x] = 1;
}
