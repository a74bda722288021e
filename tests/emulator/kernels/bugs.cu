// Kernels that are right, and with `bug` wrong in one way, which the emulator must find.
#include <cassert>

// out = the sum of the block's 256 numbers. Bug: a barrier is missing.
extern "C" __global__ void reduction(const float* in, float* out, int bug) {
  __shared__ float smem[256];
  smem[threadIdx.x] = in[threadIdx.x];
  for (int half = 128; half > 0; half /= 2) {
    if (!bug || half > 1) __syncthreads();
    if (threadIdx.x < half) smem[threadIdx.x] += smem[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *out = smem[0];
}

// The same, with the first barrier missing.
extern "C" __global__ void reduction_start(const float* in, float* out, int bug) {
  __shared__ float smem[256];
  smem[threadIdx.x] = in[threadIdx.x];
  for (int half = 128; half > 0; half /= 2) {
    if (!bug || half < 128) __syncthreads();
    if (threadIdx.x < half) smem[threadIdx.x] += smem[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *out = smem[0];
}

// The buffer is written again before all have read it.
extern "C" __global__ void reused_buffer(const float* in, float* out, int bug) {
  __shared__ float smem[64];
  float sum = 0;
  for (int round = 0; round < 4; ++round) {
    smem[threadIdx.x] = in[round * 64 + threadIdx.x];
    __syncthreads();
    sum += smem[63 - threadIdx.x];
    if (!bug) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

extern "C" __global__ void read_past_end(const float* in, float* out, int n, int bug) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n + bug) out[i < n ? i : 0] = in[i];
}

extern "C" __global__ void write_past_end(const float* in, float* out, int n, int bug) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n + bug) out[i] = i < n ? in[i] : 0.0f;
}

extern "C" __global__ void read_before_begin(const float* in, float* out, int n, int bug) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = in[i - bug];
}

extern "C" __global__ void shared_past_end(float* out, int bug) {
  extern __shared__ float smem[];
  smem[threadIdx.x + bug] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = smem[threadIdx.x];
}

// Bug: the last element of shared memory is never written.
extern "C" __global__ void uninitialised_shared(float* out, int bug) {
  __shared__ float smem[64];
  if (threadIdx.x < 64 - bug) smem[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = smem[threadIdx.x];
}

extern "C" __global__ void divergent_barrier(float* out, int bug) {
  __shared__ float smem[64];
  smem[threadIdx.x] = threadIdx.x;
  if (bug && threadIdx.x % 2) {
    __syncthreads();
    out[threadIdx.x] = 2 * smem[63 - threadIdx.x];
  } else {
    __syncthreads();
    out[threadIdx.x] = smem[63 - threadIdx.x];
  }
}

extern "C" __global__ void barrier_after_exit(float* out, int bug) {
  if (bug && threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

// Bug: two warps wait for each other at different barriers.
extern "C" __global__ void deadlock(float* out, int bug) {
  if (threadIdx.x < 32) {
    asm volatile("bar.sync 1, 64;" ::: "memory");
  } else if (bug) {
    asm volatile("bar.sync 2, 64;" ::: "memory");
  } else {
    asm volatile("bar.sync 1, 64;" ::: "memory");
  }
  out[threadIdx.x] = 1.0f;
}

// Bug: lanes are named that don't come.
extern "C" __global__ void warp_deadlock(int* out, int bug) {
  const unsigned mask = bug ? ~0u : 0xffffu;
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(mask, static_cast<int>(threadIdx.x), 1);
  __syncthreads();
}

extern "C" __global__ void absent_lane(int* out, int bug) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, static_cast<int>(threadIdx.x), bug ? 16 : 1);
}

extern "C" __global__ void failed_assert(int* out, int bug) {
  assert(threadIdx.x < 32 - bug);
  out[threadIdx.x] = 1;
}

extern "C" __global__ void trapped(int* out, int bug) {
  if (bug && threadIdx.x == 9) __trap();
  out[threadIdx.x] = 1;
}

extern "C" __global__ void misaligned(const float* in, float* out, int bug) {
  const float2 x = *reinterpret_cast<const float2*>(in + 2 * threadIdx.x + bug);
  out[threadIdx.x] = x.x + x.y;
}

extern "C" __global__ void zero_divisor(const int* in, int* out, int bug) {
  out[threadIdx.x] = in[threadIdx.x] / (static_cast<int>(threadIdx.x) + 1 - bug);
}

// out [rows, columns] = twice in, a tile of 16 x 16 a block. Bug: a row too many.
extern "C" __global__ void row_past_end(const float* in, float* out, int rows, int columns, int bug) {
  const int row = blockIdx.y * 16 + threadIdx.y, column = blockIdx.x * 16 + threadIdx.x;
  if (row < rows + bug && column < columns) out[row * columns + column] = 2 * in[row * columns + column];
}

// Bug: the flag that a thread waits for is never raised.
extern "C" __global__ void spin(int* flag, int bug) {
  if (threadIdx.x == 32 && !bug) atomicExch(flag, 1);
  if (threadIdx.x == 0) {
    while (*static_cast<volatile int*>(flag) == 0) __nanosleep(20);
  }
}
