// Launching a kernel: on the tensors' device, in its current stream, and checked.
#pragma once

#include <cuda_runtime.h>
#include <cxxabi.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace bigkern {

// What one launch may pass by value, since CUDA 12.1 on Volta and later (4096 bytes before).
constexpr int kMaxParameterBytes = 32764;

template <class Integer>
__host__ __device__ constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// A grid of one dimension, as far as one goes.
inline dim3 grid_of(int64_t blocks) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  if (blocks > kMost) throw std::invalid_argument("sizes must fit 2^31 - 1 blocks, got " + std::to_string(blocks));
  return dim3(static_cast<unsigned>(blocks));
}

// Its name and template arguments, as in the source; "a kernel" where the driver can't load it.
inline std::string kernel_name(const void* kernel) {
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) != cudaSuccess) return "a kernel";
  char* demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
  std::string name = demangled ? demangled : mangled;
  std::free(demangled);
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);
  const std::string unnamed = "(anonymous namespace)::";
  for (size_t at; (at = name.find(unnamed)) != std::string::npos;) name.erase(at, unnamed.size());
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) return name.substr(0, i);  // the parameters
  }
  return name;
}

inline std::ostream& operator<<(std::ostream& out, dim3 d) {
  return out << "[" << d.x << ", " << d.y << ", " << d.z << "]";
}

// The device is the current one.
inline void check_launch(cudaError_t error, const void* kernel, dim3 grid, dim3 block, size_t smem_bytes) {
  if (error == cudaSuccess) return;
  // These stay as they are where the device doesn't answer, after an earlier kernel's error.
  int device = 0, major = 8, minor = 0, most_smem = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&most_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  std::ostringstream message;
  message << kernel_name(kernel);
  if (major < 8) {
    message << " needs a GPU of compute capability 8.0 or later, and device " << device << " has " << major << "."
            << minor << ": use torch's own functions on it";
  } else {
    message << " wasn't launched with grid " << grid << ", block " << block << " and " << smem_bytes
            << " bytes of dynamic shared memory (a block has at most " << most_smem << ")";
  }
  try {
    STD_CUDA_CHECK(error);  // torch's words, which also tell errors of earlier kernels
  } catch (const std::runtime_error& cause) {
    throw std::runtime_error(message.str() + "\n" + cause.what());
  }
}

// Has to be asked for where it is more than 48 kB, static shared memory included: once for each kernel and device.
inline cudaError_t allow_dynamic_smem(int32_t device_index, const void* kernel, size_t smem_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int32_t, const void*>, size_t> allowed;
  if (smem_bytes == 0) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{device_index, kernel}];
  if (smem_bytes <= most) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
  if (error == cudaSuccess) most = smem_bytes;
  return error;
}

// Arguments go to the driver from where they are: a table of 32 kB isn't copied on the way, as <<<>>> would. An error
// is an exception that names the kernel and the shape of the launch.
template <class... Parameters>
void launch(int32_t device_index, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem_bytes,
            const std::decay_t<Parameters>&... arguments) {
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const auto* handle = reinterpret_cast<const void*>(kernel);
  cudaError_t error = allow_dynamic_smem(device_index, handle, smem_bytes);
  if (error == cudaSuccess) {
    error = cudaLaunchKernel(handle, grid, block, pointers, smem_bytes, static_cast<cudaStream_t>(stream));
  }
  check_launch(error, handle, grid, block, smem_bytes);
}

}  // namespace bigkern

// Runs a lambda with a run-time condition as the compile-time constant NAME.
#define BOOL_SWITCH(CONDITION, NAME, ...)          \
  [&] {                                            \
    if (CONDITION) {                               \
      [[maybe_unused]] constexpr bool NAME = true; \
      return (__VA_ARGS__)();                      \
    }                                              \
    [[maybe_unused]] constexpr bool NAME = false;  \
    return (__VA_ARGS__)();                        \
  }()

// Runs a lambda with the C++ type of a dtype as the type NAME.
#define FLOAT_SWITCH(DTYPE, NAME, ...)                \
  [&] {                                               \
    switch (DTYPE) {                                  \
      case torch::headeronly::ScalarType::Double: {   \
        using NAME = double;                          \
        return (__VA_ARGS__)();                       \
      }                                               \
      case torch::headeronly::ScalarType::Half: {     \
        using NAME = torch::headeronly::Half;         \
        return (__VA_ARGS__)();                       \
      }                                               \
      case torch::headeronly::ScalarType::BFloat16: { \
        using NAME = torch::headeronly::BFloat16;     \
        return (__VA_ARGS__)();                       \
      }                                               \
      default: {                                      \
        using NAME = float;                           \
        return (__VA_ARGS__)();                       \
      }                                               \
    }                                                 \
  }()
