// Registration of what nvcc compiled, and launches.
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "cuda.h"

namespace emulator {

std::vector<Launch> launches;

namespace {

struct Registry {
  std::map<const void*, Function> functions;
  std::map<const void*, std::map<const Module*, const Variable*>> variables;
};
// Made at the first use: objects register before this file's variables are.
Registry& registry() {
  static auto* it = new Registry;
  return *it;
}

thread_local cudaError_t last_error = cudaSuccess;

// Of the modules that run on the device, a card takes that of the highest rank.
constexpr int kRunsNot = -1;
int rank_here(const Module& module) {
  const DeviceModel& device = device_model();
  const int here = device.major * 10 + device.minor;
  const bool runs = module.is_specific ? module.architecture == here : module.architecture <= here;
  return runs ? 2 * module.architecture + module.is_specific : kRunsNot;
}

void choose_image(Function& f) {
  for (const Image& image : f.images) {
    if (rank_here(*image.module) > rank_here(*f.module)) static_cast<Image&>(f) = image;
  }
}

cudaError_t check_image(const Function& f) {
  return rank_here(*f.module) == kRunsNot ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}

cudaError_t check_launch(const Function& f, Dim grid, Dim block, size_t dynamic_smem) {
  if (const cudaError_t error = check_image(f)) return error;
  const DeviceModel& device = device_model();
  const uint64_t threads = block.count();
  if (grid.count() == 0 || threads == 0 || threads > kMaxThreads || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (threads > static_cast<uint64_t>(f.kernel->max_threads)) return cudaErrorInvalidValue;
  if (dynamic_smem > f.max_dynamic_smem) return cudaErrorInvalidValue;
  // It may have been allowed on another model.
  if (dynamic_smem + f.kernel->static_smem > device.smem_per_block_optin) return cudaErrorInvalidValue;
  return cudaSuccess;
}

constexpr uint32_t kPortableBlocks = 8, kMaxBlocks = 16;

bool are_equal(Dim a, Dim b) { return a.x == b.x && a.y == b.y && a.z == b.z; }

// What the declaration, the kernel's attributes and the launch say of it, of which the last may be `cluster`.
cudaError_t find_cluster(const Function& f, Dim grid, Dim& cluster) {
  const ClusterBounds& declared = f.kernel->cluster;
  for (const Dim& other : {declared.size, f.cluster}) {
    if (are_equal(other, kNoCluster)) continue;
    if (!are_equal(cluster, kNoCluster) && !are_equal(cluster, other)) return cudaErrorInvalidClusterSize;
    cluster = other;
  }
  if (are_equal(cluster, kNoCluster)) return declared.is_required ? cudaErrorInvalidClusterSize : cudaSuccess;
  const uint32_t most = f.allows_large_clusters ? kMaxBlocks : kPortableBlocks;
  const bool is_too_large = cluster.count() > (declared.max_blocks ? std::min(most, declared.max_blocks) : most);
  if (device_model().major < 9 || cluster.count() == 0 || is_too_large) return cudaErrorInvalidClusterSize;
  const bool divides = grid.x % cluster.x == 0 && grid.y % cluster.y == 0 && grid.z % cluster.z == 0;
  return divides ? cudaSuccess : cudaErrorInvalidClusterSize;
}

}  // namespace

namespace {
template <class Fits>
Function* find_if(const Fits& fits) {
  for (auto& [host, function] : registry().functions) {
    if (!fits(host, function)) continue;
    choose_image(function);
    return &function;
  }
  return nullptr;
}
}  // namespace

Function* find_function(const void* handle) {
  return find_if([&](const void* host, const Function& f) { return host == handle || &f == handle; });
}

Function* find_function(const std::string& name) {
  return find_if([&](const void*, const Function& f) { return name == f.kernel->name; });
}

const Variable* find_variable(const void* shadow) {
  const auto it = registry().variables.find(shadow);
  if (it == registry().variables.end()) return nullptr;
  const auto is_lower = [](const auto& a, const auto& b) { return rank_here(*a.first) < rank_here(*b.first); };
  return std::max_element(it->second.begin(), it->second.end(), is_lower)->second;
}

cudaError_t allow_dynamic_smem(Function* function, size_t bytes) {
  if (bytes + function->kernel->static_smem > device_model().smem_per_block_optin) {
    return remember(cudaErrorInvalidValue);
  }
  function->max_dynamic_smem = bytes;
  return cudaSuccess;
}

cudaError_t launch(Function* function, Dim grid, Dim block, void** arguments, size_t dynamic_smem, Dim cluster) {
  if (!function) return remember(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t error = check_launch(*function, grid, block, dynamic_smem)) return remember(error);
  if (const cudaError_t error = find_cluster(*function, grid, cluster)) return remember(error);
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const Kernel& kernel = *function->kernel;
  alignas(128) static unsigned char parameters[32 << 10];
  for (int i = 0; i < kernel.num_parameters; ++i) {
    memcpy(parameters + kernel.parameters[i].offset, arguments[i], kernel.parameters[i].size);
  }
  statistics = {};
  run(kernel, grid, block, cluster, dynamic_smem, parameters);
  launches.push_back({&kernel, grid, block, cluster, dynamic_smem, statistics});
  return cudaSuccess;
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

void not_emulated(const std::string& what) { throw Error(what + " isn't emulated"); }

}  // namespace emulator

using namespace emulator;

namespace {
struct Configuration {
  dim3 grid, block;
  size_t smem;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;  // from <<<>>> to the kernel's stub

Dim dim(dim3 d) { return {d.x, d.y, d.z}; }

// What a translation's registration returns: up to a null.
const Module* const* modules_of(void** handle) { return reinterpret_cast<Module**>(handle); }
}  // namespace

// ---- What nvcc's host code calls. Its __cudaRegisterFatBinary is the translation's (build.py) ----

extern "C" {
void __cudaRegisterFatBinaryEnd(void** handle) {
  for (const Module* const* m = modules_of(handle); *m; ++m) {
    for (int i = 0; i < (*m)->num_variables; ++i) {
      const Variable& v = (*m)->variables[i];
      add_buffer(v.storage, v.size, v.name);
    }
  }
}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  std::vector<Image> images;
  for (const Module* const* m = modules_of(handle); *m; ++m) {
    for (int i = 0; i < (*m)->num_kernels; ++i) {
      const Kernel& kernel = (*m)->kernels[i];
      if (strcmp(kernel.name, name) == 0) images.push_back({&kernel, *m});
    }
  }
  if (images.empty()) throw Error(std::string("no translation of the kernel ") + name);
  registry().functions[host] = {images[0], kDefaultSmem - images[0].kernel->static_smem, images};
}

void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t, int, int) {
  for (const Module* const* m = modules_of(handle); *m; ++m) {
    for (int i = 0; i < (*m)->num_variables; ++i) {  // those without a use aren't there
      const Variable& v = (*m)->variables[i];
      if (strcmp(v.name, name) == 0) registry().variables[host][*m] = &v;
    }
  }
}
}

void emulator::register_module(void** handle) {
  __cudaRegisterFatBinaryEnd(handle);
  for (const Module* const* m = modules_of(handle); *m; ++m) {
    for (int i = 0; i < (*m)->num_kernels; ++i) {
      const char* name = (*m)->kernels[i].name;
      __cudaRegisterFunction(handle, name, nullptr, name, 0, nullptr, nullptr, nullptr, nullptr, nullptr);
    }
  }
}

extern "C" {
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t smem, CUstream_st* stream) {
  configurations.push_back({grid, block, smem, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* smem, void* stream) {
  if (configurations.empty()) return remember(cudaErrorMissingConfiguration);
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid;
  *block = c.block;
  *smem = c.smem;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}

cudaError_t cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(find_function(host));
  return remember(*kernel ? cudaSuccess : cudaErrorInvalidDeviceFunction);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) { return cudaGetKernel(kernel, host); }

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t smem,
                               cudaStream_t) {
  return launch(find_function(static_cast<const void*>(kernel)), dim(grid), dim(block), arguments, smem);
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t smem, cudaStream_t) {
  return launch(find_function(host), dim(grid), dim(block), arguments, smem);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** arguments) {
  Dim cluster = kNoCluster;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    const auto& size = a.val.clusterDim;
    if (a.id == cudaLaunchAttributeClusterDimension) cluster = {size.x, size.y, size.z};
    if (a.id == cudaLaunchAttributePreferredClusterDimension) not_emulated("a preferred size of clusters");
    if (a.id == cudaLaunchAttributeCooperative && a.val.cooperative) not_emulated("a cooperative launch");
  }
  return launch(find_function(host), dim(config->gridDim), dim(config->blockDim), arguments, config->dynamicSmemBytes,
                cluster);
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  Function* f = find_function(host);
  if (!f) return remember(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t error = check_image(*f)) return remember(error);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;  // for speed alone
  if (value < 0) return remember(cudaErrorInvalidValue);
  const auto require = [&](uint32_t& size) {
    if (!are_equal(f->kernel->cluster.size, kNoCluster)) return remember(cudaErrorNotPermitted);
    size = value;
    return cudaSuccess;
  };
  switch (attribute) {
    case cudaFuncAttributeClusterSchedulingPolicyPreference: return cudaSuccess;  // likewise
    case cudaFuncAttributeMaxDynamicSharedMemorySize: return allow_dynamic_smem(f, value);
    case cudaFuncAttributeNonPortableClusterSizeAllowed: f->allows_large_clusters = value; return cudaSuccess;
    case cudaFuncAttributeRequiredClusterWidth: return require(f->cluster.x);
    case cudaFuncAttributeRequiredClusterHeight: return require(f->cluster.y);
    case cudaFuncAttributeRequiredClusterDepth: return require(f->cluster.z);
    default: not_emulated("this attribute of a kernel");
  }
}

cudaError_t cudaFuncGetName(const char** name, const void* host) {
  const Function* f = find_function(host);
  if (!f) return remember(cudaErrorInvalidDeviceFunction);
  *name = f->kernel->name;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) { return error_text(error); }
}
