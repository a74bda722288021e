// Threads that meet: each kernel is right, and test_emulator.py knows what it must compute.
#include <cstdio>

constexpr unsigned kAll = ~0u;

extern "C" __global__ void shuffles(const int* in, int* out /* [10, 32] */) {
  const int lane = threadIdx.x, x = in[lane];
  const int results[] = {__shfl_sync(kAll, x, 5),         __shfl_sync(kAll, x, lane * 7 % 32),
                         __shfl_up_sync(kAll, x, 3),      __shfl_down_sync(kAll, x, 30),
                         __shfl_xor_sync(kAll, x, 17),    __shfl_sync(kAll, x, 5, 8),
                         __shfl_up_sync(kAll, x, 3, 8),   __shfl_down_sync(kAll, x, 3, 16),
                         __shfl_xor_sync(kAll, x, 12, 8), __shfl_sync(kAll, x, -1, 4)};
  for (int i = 0; i < 10; ++i) out[i * 32 + lane] = results[i];
}

extern "C" __global__ void votes(const int* in, unsigned* out /* [8, n] */, int n) {
  const int i = threadIdx.x;
  const unsigned mask = __ballot_sync(kAll, i < n);
  if (i >= n) return;
  const unsigned results[] = {__ballot_sync(mask, in[i] > 0),
                              static_cast<unsigned>(__any_sync(mask, in[i] > 90)),
                              static_cast<unsigned>(__all_sync(mask, in[i] > -200)),
                              __match_any_sync(mask, in[i] % 4),
                              __reduce_add_sync(mask, static_cast<unsigned>(in[i])),
                              static_cast<unsigned>(__reduce_min_sync(mask, in[i])),
                              static_cast<unsigned>(__reduce_max_sync(mask, in[i])),
                              __reduce_xor_sync(mask, static_cast<unsigned>(in[i]))};
  for (int k = 0; k < 8; ++k) out[k * n + i] = results[k];
}

// out: how many are positive; whether all, whether any are.
extern "C" __global__ void barrier_reductions(const int* in, int* out) {
  const bool is_positive = in[threadIdx.x] > 0;
  const int results[] = {__syncthreads_count(is_positive), __syncthreads_and(is_positive),
                         __syncthreads_or(is_positive)};
  if (threadIdx.x == blockDim.x - 1) {
    for (int i = 0; i < 3; ++i) out[i] = results[i];
  }
}

// Reverses each block's part through shared memory.
extern "C" __global__ void reverse(const int* in, int* out) {
  extern __shared__ int smem[];
  const int begin = blockIdx.x * blockDim.x;
  smem[threadIdx.x] = in[begin + threadIdx.x];
  __syncthreads();
  out[begin + threadIdx.x] = smem[blockDim.x - 1 - threadIdx.x];
}

// The first warp hands rounds of numbers to the second, by a barrier for each direction.
extern "C" __global__ void hand_over(const int* in, int* out, int rounds) {
  __shared__ int smem[32];
  const int lane = threadIdx.x % 32;
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x < 32) {
      if (round > 0) asm volatile("bar.sync 2, 64;" ::: "memory");  // it is empty
      smem[lane] = in[round * 32 + lane];
      asm volatile("bar.arrive 1, 64;" ::: "memory");  // it is full
    } else {
      asm volatile("bar.sync 1, 64;" ::: "memory");
      out[round * 32 + lane] = 2 * smem[31 - lane];
      if (round + 1 < rounds) asm volatile("bar.arrive 2, 64;" ::: "memory");
    }
  }
}

template <class T>
__device__ void accumulate(const T* in, T* out /* add, min, max, the last of exch, cas */, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  atomicAdd(out, in[i]);
  atomicMin(out + 1, in[i]);
  atomicMax(out + 2, in[i]);
  atomicExch(out + 3, in[i]);
  for (T seen = out[4], expected; seen < in[i]; seen = expected) {  // a maximum, by compare and swap
    expected = atomicCAS(out + 4, seen, in[i]);
    if (expected == seen) break;
  }
}
extern "C" __global__ void atomics_s32(const int* in, int* out, int n) { accumulate(in, out, n); }
extern "C" __global__ void atomics_u64(const unsigned long long* in, unsigned long long* out, int n) {
  accumulate(in, out, n);
}
extern "C" __global__ void atomics_float(const float* in, float* out, double* wide_out, int n) {
  __shared__ float sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    atomicAdd(&sum, in[i]);
    atomicAdd(wide_out, static_cast<double>(in[i]));
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(out, sum);
}

// An array that registers can't hold, a function that isn't inlined, a table in constant memory, a variable.
__constant__ int kSquares[8] = {0, 1, 4, 9, 16, 25, 36, 49};
__device__ int calls = 7;
__device__ __noinline__ int weighted_sum(const int* x, int n, int start) {
  int sum = start;
  for (int i = 0; i < n; ++i) sum += (i + 1) * x[i];
  return sum;
}
extern "C" __global__ void local_memory(const int* in, int* out) {
  int x[32];
  for (int i = 0; i < 32; ++i) x[(i * in[0]) % 32] = in[i] + static_cast<int>(threadIdx.x);
  out[threadIdx.x] = weighted_sum(x, 32, kSquares[threadIdx.x % 8]);
  if (threadIdx.x == 0) out[blockDim.x] = atomicAdd(&calls, 1);
}

extern "C" __global__ void print(int x, float y) {
  if (threadIdx.x == 3) printf("x = %d, y = %.2f of %s, %lld%%\n", x, y, "thread", static_cast<long long>(x) << 33);
}

extern "C" __global__ void shared_stride(float* out, int stride) {
  __shared__ float smem[32 * 33];
  smem[threadIdx.x * stride] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = smem[threadIdx.x * stride];
}

// out [i * stride] = twice in [i * stride], for as many as there are threads.
extern "C" __global__ void global_stride(const float* in, float* out, int stride) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * stride;
  out[i] = 2 * in[i];
}
