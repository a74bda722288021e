// An op whose launcher is right, and with `bug` touches device memory itself.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../../../csrc/cuda/launch.cuh"

namespace {

using torch::stable::Tensor;

__global__ void double_kernel(const float* in, float* out, int64_t n) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = 2 * in[i];
}

// Bug 1: reads on the host; 2: writes; 3: reads with memcpy; 4: what cudaMalloc gave.
void twice(Tensor in, Tensor out, int64_t bug) {
  const auto* x = static_cast<const float*>(in.const_data_ptr());
  auto* y = static_cast<float*>(out.mutable_data_ptr());
  const int64_t n = in.numel();
  if (bug == 1 && x[n - 1] == 0) return;
  if (bug == 2) y[0] = 0;
  if (bug == 3) {
    float first;
    memcpy(&first, x, sizeof first);
    if (first == 0) return;
  }
  float* scratch;
  STD_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&scratch), n * sizeof(float)));
  if (bug == 4) scratch[0] = 0;
  bigkern::launch(0, double_kernel, bigkern::ceil_div<int64_t>(n, 128), 128, 0, x, scratch, n);
  STD_CUDA_CHECK(cudaMemcpy(y, scratch, n * sizeof(float), cudaMemcpyDeviceToDevice));
  STD_CUDA_CHECK(cudaFree(scratch));
}

}  // namespace

STABLE_TORCH_LIBRARY(bigkern_host_access, m) { m.def("twice(Tensor x, Tensor(a!) out, int bug) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(bigkern_host_access, CPU, m) { m.impl("twice", TORCH_BOX(&twice)); }
