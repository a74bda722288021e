// How many blocks of a kernel an SM holds, by NVIDIA's own rules. For static_report.py.
#include <cuda_occupancy.h>

// -1: the card can't run it.
extern "C" int blocks_per_sm(int major, int minor, int threads_per_sm, int smem_per_sm, int smem_per_block,
                             int registers, int max_threads, int static_smem, int dynamic_smem, int threads) {
  cudaOccDeviceProp card{};
  card.computeMajor = major;
  card.computeMinor = minor;
  card.maxThreadsPerBlock = 1024;
  card.maxThreadsPerMultiprocessor = threads_per_sm;
  card.regsPerBlock = card.regsPerMultiprocessor = 64 << 10;
  card.warpSize = 32;
  card.sharedMemPerBlock = 48 << 10;
  card.sharedMemPerMultiprocessor = smem_per_sm;
  card.sharedMemPerBlockOptin = smem_per_block;
  card.reservedSharedMemPerBlock = 1 << 10;
  card.numSms = 1;

  cudaOccFuncAttributes kernel{};
  kernel.maxThreadsPerBlock = max_threads;
  kernel.numRegs = registers;
  kernel.sharedSizeBytes = static_smem;
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = dynamic_smem;
  kernel.numBlockBarriers = 1;

  const cudaOccDeviceState state;
  cudaOccResult result{};
  const cudaOccError error =
      cudaOccMaxActiveBlocksPerMultiprocessor(&result, &card, &kernel, &state, threads, dynamic_smem);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1;
}
