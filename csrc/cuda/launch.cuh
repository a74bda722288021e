// Launching a kernel: on the tensors' device, in its current stream, and checked.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <type_traits>

namespace bigkern {

// What one launch may pass by value, since CUDA 12.1 on Volta and later (4096 bytes before).
constexpr int kMaxParameterBytes = 32764;

template <class Integer>
__host__ __device__ constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// Arguments go to the driver from where they are: a table of 32 kB isn't copied on the way, as <<<>>> would.
template <class... Parameters>
void launch(int32_t device_index, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem_bytes,
            const std::decay_t<Parameters>&... arguments) {
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  STD_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, smem_bytes,
                                  static_cast<cudaStream_t>(stream)));
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
