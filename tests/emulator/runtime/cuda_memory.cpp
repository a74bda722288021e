// Allocations, filled with NaN, and copies, checked against known memory.
#include <cstdlib>
#include <cstring>

#include "cuda.h"

using namespace emulator;

namespace {

bool reads_device(cudaMemcpyKind kind) { return kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice; }
bool writes_device(cudaMemcpyKind kind) { return kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice; }

}  // namespace

extern "C" {
cudaError_t cudaMalloc(void** p, size_t bytes) {
  static int count = 0;
  *p = nullptr;
  if (bytes == 0) return cudaSuccess;
  void* host;
  if (bytes > device_model().memory_bytes || posix_memalign(&host, 512, bytes)) {
    return remember(cudaErrorMemoryAllocation);
  }
  memset(host, 0xff, bytes);
  add_buffer(host, bytes, "the cudaMalloc number " + std::to_string(++count));
  *p = to_device(host);
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  p = to_host(p);
  if (p && !remove_buffer(p)) return remember(cudaErrorInvalidValue);
  free(p);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (writes_device(kind)) to = to_host(to);
  if (reads_device(kind)) from = to_host(from);
  if ((writes_device(kind) && !is_in_buffer(to, bytes)) || (reads_device(kind) && !is_in_buffer(from, bytes))) {
    return remember(cudaErrorInvalidValue);
  }
  memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  p = to_host(p);
  if (!is_in_buffer(p, bytes)) return remember(cudaErrorInvalidValue);
  memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { return cudaMemset(p, value, bytes); }

cudaError_t cudaGetSymbolAddress(void** p, const void* shadow) {
  const Variable* v = find_variable(shadow);
  *p = v ? to_device(v->storage) : nullptr;
  return remember(v ? cudaSuccess : cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbol(const void* shadow, const void* from, size_t bytes, size_t offset, cudaMemcpyKind) {
  const Variable* v = find_variable(shadow);
  if (!v) return remember(cudaErrorInvalidSymbol);
  if (offset + bytes > v->size) return remember(cudaErrorInvalidValue);
  memcpy(static_cast<char*>(v->storage) + offset, from, bytes);
  return cudaSuccess;
}
}
