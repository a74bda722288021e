// Kernels without races, and with `bug` with one that no schedule shows: blocks run one after another here, and lanes
// that have just met are all there.
#include <cstdint>

// Bug: a shuffle in the place of __syncwarp() orders no memory.
extern "C" __global__ void neighbours(const int* in, int* out, int bug) {
  __shared__ int smem[32];
  smem[threadIdx.x] = in[threadIdx.x];
  const int sum = __shfl_xor_sync(~0u, static_cast<int>(threadIdx.x), 16) + threadIdx.x;
  if (!bug) __syncwarp();
  out[threadIdx.x] = smem[(sum + 1) % 32];
}

// Bytes of one word are different threads' own. Bug: some are others'.
extern "C" __global__ void bytes(const int8_t* in, int8_t* out, int bug) {
  __shared__ int8_t smem[64];
  smem[bug && threadIdx.x == 33 ? 32 : threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = smem[threadIdx.x];
}

// All threads write the same word, and no access follows.
extern "C" __global__ void same_word(const int* in, int* out) { *out = in[threadIdx.x]; }

// The barrier of each half of the block. Bug: one half reads what the other writes.
extern "C" __global__ void halves(const int* in, int* out, int bug) {
  __shared__ int smem[128];
  const int half = threadIdx.x / 64;
  smem[threadIdx.x] = in[threadIdx.x];
  asm volatile("bar.sync %0, 64;" ::"r"(half + 1) : "memory");
  out[threadIdx.x] = bug && threadIdx.x == 127 ? smem[0] : smem[half * 64 + (threadIdx.x + 1) % 64];
}

// out = the sum over the blocks. Bug: without an atomic.
extern "C" __global__ void sum_of_blocks(const int* in, int* out, int bug) {
  if (threadIdx.x != 0) return;
  if (bug) {
    *out += in[blockIdx.x];
  } else {
    atomicAdd(out, in[blockIdx.x]);
  }
}

// out = the sum over the blocks, by the last one. Bug 1: no fence before the others' tickets; 2: none after its own.
extern "C" __global__ void last_block(const int* in, int* partial, int* tickets, int* out, int bug) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = in[blockIdx.x];
  if (bug != 1) __threadfence();
  const bool is_last = atomicAdd(tickets, 1) == gridDim.x - 1;
  if (!is_last) return;
  if (bug != 2) __threadfence();
  int sum = 0;
  for (int i = 0; i < gridDim.x; ++i) sum += partial[i];
  *out = sum;
}

// The same by all threads of a block, which a barrier joins. Bug: the barrier is missing.
extern "C" __global__ void last_block_together(const int* in, int* partial, int* tickets, int* out, int bug) {
  __shared__ int is_last;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  partial[i] = in[i];
  if (!bug) __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(tickets, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last || threadIdx.x != 0) return;
  int sum = 0;
  for (int k = 0; k < gridDim.x * blockDim.x; ++k) sum += partial[k];
  *out = sum;
}

// out = 1 where some block has a negative number, and what each saw of it. Bug: read as if nobody else wrote it.
extern "C" __global__ void flag(const int* in, int* out, int* seen, int bug) {
  if (threadIdx.x != 0) return;
  if (in[blockIdx.x] < 0) atomicExch(out, 1);
  if (bug) {
    seen[blockIdx.x] = *out;
  } else {
    seen[blockIdx.x] = atomicAdd(out, 0);
  }
}
