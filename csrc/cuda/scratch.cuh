// What kernels of a call hand on to one another.
#pragma once

#include "../tensors.h"

namespace bigkern {

// From torch's allocator, which keeps it until the kernels launched so far are done with it, in a CUDA graph too.
inline Tensor new_scratch(int64_t size, torch::headeronly::ScalarType dtype, Device device) {
  const torch::stable::Device on(static_cast<torch::headeronly::DeviceType>(device.type), device.index);
  return torch::stable::empty({size}, dtype, std::nullopt, on);
}

}  // namespace bigkern
