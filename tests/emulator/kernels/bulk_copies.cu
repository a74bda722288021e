// Barriers in shared memory and bulk copies: each kernel is right, and with `bug` wrong in one way.
#include "hopper.cuh"

constexpr int kThreads = 64, kTile = 256, kStages = 2;

// out [tiles, 256] = twice in. A warp fills a ring of buffers by bulk copies, the other empties it. Bug 1: more bytes
// are announced than come; 2: it doesn't wait until a buffer is full; 3: nor until it is empty; 4: it waits for the
// wrong phase; 5: the barriers aren't known to be there; 6: too many arrive.
extern "C" __global__ void ring(const float* in, float* out, int tiles, int bug) {
  __shared__ __align__(128) float smem[kStages][kTile];
  __shared__ uint64_t full[kStages], empty[kStages];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) init_barrier(&full[i], 1), init_barrier(&empty[i], bug == 6 ? 16 : 32);
  }
  if (bug == 5) {
    asm volatile("bar.sync %0, 32;" ::"r"(static_cast<int>(threadIdx.x) / 32 + 1) : "memory");
  } else {
    __syncthreads();
  }
  if (threadIdx.x >= 32 && bug == 5) __nanosleep(100);
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, phase = tile / kStages % 2;
    if (threadIdx.x == 0) {
      if (bug != 3) wait(&empty[stage], phase ^ 1);
      arrive_and_expect(&full[stage], kTile * 4 + (bug == 1 ? 16 : 0));
      load_bulk(smem[stage], in + tile * kTile, kTile * 4, &full[stage]);
    } else if (threadIdx.x >= 32) {
      if (bug != 2) wait(&full[stage], bug == 4 ? phase ^ 1 : phase);
      for (int i = threadIdx.x - 32; i < kTile; i += 32) out[tile * kTile + i] = 2 * smem[stage][i];
      arrive(&empty[stage]);
    }
  }
}

// out = 3 in, by a bulk copy from shared memory, which is written for each tile. Bug 1: without a proxy fence; 2:
// before the copy has read it; 3: it isn't waited for at the end.
extern "C" __global__ void stores(const float* in, float* out, int tiles, int bug) {
  __shared__ __align__(128) float smem[kTile];
  for (int tile = 0; tile < tiles; ++tile) {
    for (int i = threadIdx.x; i < kTile; i += kThreads) smem[i] = 3 * in[tile * kTile + i];
    if (bug != 1) fence_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
      store_bulk(out + tile * kTile, smem, kTile * 4);
      commit_bulk();
      if (bug != 2 && !(bug == 3 && tile == tiles - 1)) wait_bulk<0>();
    }
    __syncthreads();
  }
  if (bug == 2 && threadIdx.x == 0) wait_bulk<0>();
}

#define LOAD_BOX(RANK, COORDINATES)                                                                                 \
  asm volatile("cp.async.bulk.tensor." #RANK                                                                        \
               "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "                             \
               "{" COORDINATES "}], [%2];" ::"r"(shared_address(smem)),                                             \
               "l"(&map), "r"(shared_address(&barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]) \
               : "memory")
#define STORE_BOX(RANK, COORDINATES)                                                                   \
  asm volatile("cp.async.bulk.tensor." #RANK "d.global.shared::cta.tile.bulk_group [%1, {" COORDINATES \
               "}], [%0];" ::"r"(shared_address(smem)),                                                \
               "l"(&map), "r"(0), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])           \
               : "memory")

struct Position {
  int at[5];
};

// out = the bytes of a box, as they lie in shared memory.
extern "C" __global__ void load_box(const __grid_constant__ CUtensorMap map, Position position, uint8_t* out, int bytes,
                                    int rank) {
  extern __shared__ __align__(1024) uint8_t smem[];
  __shared__ uint64_t barrier;
  const int (&at)[5] = position.at;
  if (threadIdx.x == 0) {
    init_barrier(&barrier, 1);
    arrive_and_expect(&barrier, bytes);
    switch (rank) {
      case 1: LOAD_BOX(1, "%3"); break;
      case 2: LOAD_BOX(2, "%3, %4"); break;
      case 3: LOAD_BOX(3, "%3, %4, %5"); break;
      case 4: LOAD_BOX(4, "%3, %4, %5, %6"); break;
      default: LOAD_BOX(5, "%3, %4, %5, %6, %7");
    }
  }
  __syncthreads();
  wait(&barrier, 0);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = smem[i];
}

// The other way round.
extern "C" __global__ void store_box(const __grid_constant__ CUtensorMap map, Position position, const uint8_t* in,
                                     int bytes, int rank) {
  extern __shared__ __align__(1024) uint8_t smem[];
  const int (&at)[5] = position.at;
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) smem[i] = in[i];
  fence_proxy();
  __syncthreads();
  if (threadIdx.x != 0) return;
  switch (rank) {
    case 1: STORE_BOX(1, "%3"); break;
    case 2: STORE_BOX(2, "%3, %4"); break;
    case 3: STORE_BOX(3, "%3, %4, %5"); break;
    case 4: STORE_BOX(4, "%3, %4, %5, %6"); break;
    default: STORE_BOX(5, "%3, %4, %5, %6, %7");
  }
  commit_bulk();
  wait_bulk<0>();
}

// out: which lane was elected, and by which.
extern "C" __global__ void elections(int* out) {
  uint32_t leader, is_leader;
  const uint32_t mask = threadIdx.x < 5 ? 0x1fu : ~0x1fu;
  asm volatile("{.reg .pred p; elect.sync %0|p, %2; selp.u32 %1, 1, 0, p;}"
               : "=r"(leader), "=r"(is_leader)
               : "r"(mask));
  out[threadIdx.x] = leader;
  out[32 + threadIdx.x] = is_leader;
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
}
