// The stand-in for the CUDA runtime: device memory is the host's, and a call has done its work when it returns. What
// isn't modelled throws Error. It is compiled with hidden symbols, since torch brings the real runtime into the
// process.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "emulator.h"

namespace emulator {

struct DeviceModel {
  const char *key, *name;
  int major, minor, num_sms;
  size_t smem_per_sm, smem_per_block_optin, l2_bytes, memory_bytes;
  int threads_per_sm, blocks_per_sm;
};

const DeviceModel& device_model();
void set_device_model(const std::string& key);

constexpr int kMaxThreads = 1024, kDefaultSmem = 48 << 10, kReservedSmem = 1 << 10, kRegisters = 64 << 10;

// Of one architecture, the one that the device would take.
struct Image {
  const Kernel* kernel;
  const Module* module;
};

struct Function : Image {
  size_t max_dynamic_smem;
  std::vector<Image> images;
  Dim cluster = {0, 0, 0};  // what its attributes require
  bool allows_large_clusters = false;
};

// By the host's function, or the handle of cudaGetKernel.
Function* find_function(const void* handle);
Function* find_function(const std::string& name);  // mangled
const Variable* find_variable(const void* shadow);

struct Launch {
  const Kernel* kernel;
  Dim grid, block, cluster;
  size_t dynamic_smem;
  Statistics statistics;
};
extern std::vector<Launch> launches;  // since they were last asked for

cudaError_t allow_dynamic_smem(Function* function, size_t bytes);
// `cluster`: 0 blocks where the launch doesn't say.
constexpr Dim kNoCluster = {0, 0, 0};
cudaError_t launch(Function* function, Dim grid, Dim block, void** arguments, size_t dynamic_smem,
                   Dim cluster = kNoCluster);

cudaError_t remember(cudaError_t error);  // for cudaGetLastError
const char* error_text(cudaError_t error);
[[noreturn]] void not_emulated(const std::string& what);

}  // namespace emulator
