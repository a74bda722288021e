// Tiles of a product that the blocks of a cluster load for one another.
#include "clusters.cuh"

constexpr int kRows = 32, kDepth = 32, kStages = 2;
constexpr int kTileBytes = kRows * kDepth * 4;

// c [32 blocks, 32] = a [32 blocks, depth] @ b [32, depth]^T. Each block loads its tile of A, and its share of the tile
// of B for the two of them. Bug 1: a mask with one block alone; 2: with a block too many; 3: the other block's buffer
// may still be in use; 4: barriers aren't known to be there; 5: a block exits while the other's copies come; 6: the
// first tile isn't waited for.
extern "C" __global__ void product(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                                   float* c, int depth, int bug) {
  __shared__ __align__(128) float a_smem[kStages][kRows][kDepth], b_smem[kStages][kRows][kDepth];
  __shared__ uint64_t full[kStages], empty[kStages];
  const int rank = cluster_rank(), blocks = cluster_blocks(), row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) init_barrier(&full[i], 1), init_barrier(&empty[i], blockDim.x * blocks);
    if (bug != 4) fence_barrier_init();
  }
  __syncthreads();
  cluster_arrive_relaxed();
  cluster_wait();
  const int share = kRows / blocks;
  const int all = (1 << blocks) - 1, mask = bug == 1 ? 1 << rank : bug == 2 ? 2 * all + 1 : all;
  float sums[8] = {};
  for (int tile = 0; tile < depth / kDepth; ++tile) {
    const int stage = tile % kStages, phase = tile / kStages % 2;
    if (threadIdx.x == 0) {
      if (bug != 3) wait_cluster(&empty[stage], phase ^ 1);
      arrive_and_expect(&full[stage], 2 * kTileBytes);
      load_box_multicast(a_smem[stage], &a, tile * kDepth, blockIdx.x * kRows, &full[stage], 1 << rank);
      load_box_multicast(b_smem[stage][rank * share], &b, tile * kDepth, rank * share, &full[stage], mask);
    }
    if (bug == 5 && rank == 1 && tile == depth / kDepth - 1) return;
    if (!(bug == 6 && tile == 0)) wait_cluster(&full[stage], phase);
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < 8; ++j) sums[j] += a_smem[stage][row][k] * b_smem[stage][column + j][k];
    }
    for (int other = 0; other < blocks; ++other) arrive_remote(map_address(&empty[stage], other));
  }
  for (int j = 0; j < 8; ++j) c[(blockIdx.x * kRows + row) * kRows + column + j] = sums[j];
  cluster_sync();
}

// out [blocks, n] = in, which one block reads for all. Bug 1: it fills a barrier that doesn't count on bytes; 2: its
// mask is empty; 3: others' barriers aren't known to be there.
extern "C" __global__ void broadcast(const float* in, float* out, int n, int bug) {
  extern __shared__ __align__(128) float smem[];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    init_barrier(&full, 1);
    if (bug == 1 && cluster_rank() == 1) {
      arrive(&full);
    } else {
      arrive_and_expect(&full, n * 4);
    }
    if (bug != 3) fence_barrier_init();
  }
  __syncthreads();
  cluster_arrive_relaxed();
  cluster_wait();
  if (cluster_rank() == 2 && threadIdx.x == 0) {
    load_bulk_multicast(smem, in, n * 4, &full, bug == 2 ? 0 : (1 << cluster_blocks()) - 1);
  }
  wait_cluster(&full, 0);
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[blockIdx.x * n + i] = smem[i];
  cluster_sync();
}
