// What the op library asks of torch that is different here: the linker (--wrap, build.py) turns these calls of it to
// __wrap_*. A tensor is known memory from when its data pointer is asked for until its handle is deleted.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "cuda.h"

namespace {

std::mutex mutex;
std::map<AtenTensorHandle, std::pair<const void*, size_t>> known;

// The bytes from the first to the last element.
size_t extent(AtenTensorHandle t, std::string* shape) {
  int64_t dim = 0, elements = 1, numel = 0;
  int32_t dtype = 0;
  aoti_torch_get_dim(t, &dim);
  aoti_torch_get_numel(t, &numel);
  aoti_torch_get_dtype(t, &dtype);
  for (int64_t d = 0; d < dim; ++d) {
    int64_t size = 0, stride = 0;
    aoti_torch_get_size(t, d, &size);
    aoti_torch_get_stride(t, d, &stride);
    elements += (size - 1) * stride;
    *shape += (d ? ", " : "") + std::to_string(size);
  }
  return numel ? elements * aoti_torch_dtype_element_size(dtype) : 0;
}

void forget(AtenTensorHandle t) {
  const auto it = known.find(t);
  if (it == known.end()) return;
  emulator::remove_buffer(it->second.first);
  known.erase(it);
}

void know(AtenTensorHandle t, const void* data) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::string shape;
  const size_t bytes = extent(t, &shape);
  const auto it = known.find(t);
  if (it != known.end() && it->second == std::make_pair(data, bytes)) return;
  forget(t);
  if (!data || bytes == 0) return;
  emulator::add_buffer(data, bytes, "a tensor of shape [" + shape + "]");
  known[t] = {data, bytes};
}

}  // namespace

extern "C" {
#define WRAP_DATA_POINTER(FUNCTION, POINTER)                                   \
  AOTITorchError __real_##FUNCTION(AtenTensorHandle t, POINTER* data);         \
  AOTITorchError __wrap_##FUNCTION(AtenTensorHandle t, POINTER* data) {        \
    if (const AOTITorchError error = __real_##FUNCTION(t, data)) return error; \
    know(t, *data);                                                            \
    *data = emulator::to_device(*data);                                        \
    return 0;                                                                  \
  }
WRAP_DATA_POINTER(aoti_torch_get_data_ptr, void*)
WRAP_DATA_POINTER(torch_get_mutable_data_ptr, void*)
WRAP_DATA_POINTER(torch_get_const_data_ptr, const void*)

AOTITorchError __real_aoti_torch_delete_tensor_object(AtenTensorHandle t);
AOTITorchError __wrap_aoti_torch_delete_tensor_object(AtenTensorHandle t) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    forget(t);
  }
  return __real_aoti_torch_delete_tensor_object(t);
}

AOTITorchError __wrap_aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

AOTITorchError __wrap_torch_c10_cuda_check_msg(int32_t error, const char* file, const char* function, uint32_t line,
                                               bool, char** message) {
  *message = nullptr;
  if (error == cudaSuccess) return 0;
  cudaGetLastError();
  *message = strdup(emulator::format("CUDA error (emulated): %s in %s at %s:%u",
                                     emulator::error_text(static_cast<cudaError_t>(error)), function, file, line)
                        .c_str());
  return 0;
}
void __wrap_torch_c10_cuda_free_error_msg(char* message) { free(message); }
}
