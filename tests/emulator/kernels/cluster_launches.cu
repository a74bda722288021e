// An op that launches clusters as the CUDA runtime's users do, and returns its error.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

namespace {

using torch::stable::Tensor;

// out = the sizes of clusters that blocks see.
__device__ void write_size(int* out) {
  int x, y, z;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(x));
  asm volatile("mov.u32 %0, %%cluster_nctaid.y;" : "=r"(y));
  asm volatile("mov.u32 %0, %%cluster_nctaid.z;" : "=r"(z));
  out[0] = x, out[1] = y, out[2] = z;
}
__global__ void of_any_size(int* out) { write_size(out); }
__global__ void __cluster_dims__(2, 1, 1) of_two(int* out) { write_size(out); }
__global__ void __cluster_dims__() of_launch(int* out) { write_size(out); }
__global__ void __launch_bounds__(32, 1, 4) of_at_most_four(int* out) { write_size(out); }

using Kernel = void (*)(int*);
constexpr Kernel kKernels[] = {of_any_size, of_two, of_launch, of_at_most_four};

// cluster: the attribute of the launch, where not 0; width: the kernel's, likewise.
int64_t launch(Tensor out, int64_t kernel, int64_t grid, int64_t cluster_x, int64_t cluster_y, int64_t width,
               int64_t allows_large) {
  const Kernel f = kKernels[kernel];
  cudaFuncSetAttribute(f, cudaFuncAttributeNonPortableClusterSizeAllowed, static_cast<int>(allows_large));
  cudaError_t error = cudaSuccess;
  for (const auto attribute : {cudaFuncAttributeRequiredClusterWidth, cudaFuncAttributeRequiredClusterHeight,
                               cudaFuncAttributeRequiredClusterDepth}) {
    const int value = width == 0 ? 0 : attribute == cudaFuncAttributeRequiredClusterWidth ? static_cast<int>(width) : 1;
    if (kernel != 1 || width) error = cudaFuncSetAttribute(f, attribute, value);
    if (error != cudaSuccess) return cudaGetLastError();
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster_x);
  attribute.val.clusterDim.y = static_cast<unsigned>(cluster_y);
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid), 2, 1);
  config.blockDim = dim3(32, 1, 1);
  config.attrs = &attribute;
  config.numAttrs = cluster_x ? 1 : 0;
  error = cudaLaunchKernelEx(&config, f, static_cast<int*>(out.data_ptr()));
  if (error != cudaGetLastError()) return -1;
  return error;
}

}  // namespace

STABLE_TORCH_LIBRARY(bigkern_cluster_launches, m) {
  m.def(
      "launch(Tensor(a!) out, int kernel, int grid, int cluster_x, int cluster_y, int width, int allows_large) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(bigkern_cluster_launches, CPU, m) { m.impl("launch", TORCH_BOX(&launch)); }
