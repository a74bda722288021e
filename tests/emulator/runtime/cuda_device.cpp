// Which card is there, and what it says of itself.
#include <cstring>
#include <map>

#include "cuda.h"

namespace emulator {

namespace {

const DeviceModel kModels[] = {
    {"t4", "Tesla T4 (emulated)", 7, 5, 40, 64 << 10, 64 << 10, 4 << 20, 16ull << 30, 1024, 16},
    {"a100", "NVIDIA A100-SXM4-80GB (emulated)", 8, 0, 108, 164 << 10, 163 << 10, 40 << 20, 80ull << 30, 2048, 32},
    {"rtx4090", "NVIDIA GeForce RTX 4090 (emulated)", 8, 9, 128, 100 << 10, 99 << 10, 72 << 20, 24ull << 30, 1536, 24},
    {"h100", "NVIDIA H100 80GB HBM3 (emulated)", 9, 0, 132, 228 << 10, 227 << 10, 50 << 20, 80ull << 30, 2048, 32},
    {"one_sm", "one SM of an A100 (emulated)", 8, 0, 1, 164 << 10, 163 << 10, 1 << 20, 1ull << 30, 2048, 32},
};
const DeviceModel* model = &kModels[3];

}  // namespace

const DeviceModel& device_model() { return *model; }

void set_device_model(const std::string& key) {
  std::string keys;
  for (const DeviceModel& m : kModels) {
    if (key == m.key) {
      model = &m;
      return;
    }
    keys += std::string(keys.empty() ? "" : ", ") + m.key;
  }
  throw std::invalid_argument("the device model must be one of " + keys + ", got " + key);
}

const char* error_text(cudaError_t error) {
  static const std::map<cudaError_t, const char*> texts = {
      {cudaSuccess, "no error"},
      {cudaErrorInvalidValue, "invalid argument"},
      {cudaErrorMemoryAllocation, "out of memory"},
      {cudaErrorInvalidConfiguration, "invalid configuration argument"},
      {cudaErrorInvalidSymbol, "invalid device symbol"},
      {cudaErrorMissingConfiguration, "__global__ function call is not configured"},
      {cudaErrorInvalidDevice, "invalid device ordinal"},
      {cudaErrorNotPermitted, "operation not permitted"},
      {cudaErrorInvalidClusterSize, "a kernel launch error has occurred due to cluster misconfiguration"},
      {cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"},
      {cudaErrorInvalidDeviceFunction, "invalid device function"}};
  const auto it = texts.find(error);
  return it == texts.end() ? "unrecognized error code" : it->second;
}

}  // namespace emulator

using namespace emulator;

extern "C" {
cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return remember(cudaErrorInvalidDevice);
  const DeviceModel& m = device_model();
  const std::map<int, int> values = {
      {cudaDevAttrComputeCapabilityMajor, m.major},
      {cudaDevAttrComputeCapabilityMinor, m.minor},
      {cudaDevAttrMultiProcessorCount, m.num_sms},
      {cudaDevAttrWarpSize, kWarp},
      {cudaDevAttrMaxThreadsPerBlock, kMaxThreads},
      {cudaDevAttrMaxThreadsPerMultiProcessor, m.threads_per_sm},
      {cudaDevAttrMaxBlocksPerMultiprocessor, m.blocks_per_sm},
      {cudaDevAttrMaxRegistersPerMultiprocessor, kRegisters},
      {cudaDevAttrMaxSharedMemoryPerBlock, kDefaultSmem},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(m.smem_per_block_optin)},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, static_cast<int>(m.smem_per_sm)},
      {cudaDevAttrClusterLaunch, m.major >= 9},
      {cudaDevAttrReservedSharedMemoryPerBlock, kReservedSmem},
      {cudaDevAttrL2CacheSize, static_cast<int>(m.l2_bytes)}};
  const auto it = values.find(attribute);
  if (it == values.end()) not_emulated("the device attribute " + std::to_string(attribute));
  *value = it->second;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device != 0) return remember(cudaErrorInvalidDevice);
  const DeviceModel& m = device_model();
  memset(p, 0, sizeof *p);
  strncpy(p->name, m.name, sizeof p->name - 1);
  p->major = m.major;
  p->minor = m.minor;
  p->multiProcessorCount = m.num_sms;
  p->warpSize = kWarp;
  p->totalGlobalMem = m.memory_bytes;
  p->l2CacheSize = static_cast<int>(m.l2_bytes);
  p->sharedMemPerBlock = kDefaultSmem;
  p->sharedMemPerBlockOptin = m.smem_per_block_optin;
  p->sharedMemPerMultiprocessor = m.smem_per_sm;
  p->reservedSharedMemPerBlock = kReservedSmem;
  p->clusterLaunch = m.major >= 9;
  p->regsPerBlock = p->regsPerMultiprocessor = kRegisters;
  p->maxThreadsPerBlock = kMaxThreads;
  p->maxThreadsPerMultiProcessor = m.threads_per_sm;
  p->maxBlocksPerMultiProcessor = m.blocks_per_sm;
  return cudaSuccess;
}

// ---- Streams: everything has happened already ----

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = reinterpret_cast<cudaStream_t>(new char);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<char*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
}
