// An op whose launches are of any shape, by the package's launch().
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../../../csrc/cuda/launch.cuh"

namespace {

using torch::stable::Tensor;

// out = the number of threads, counted in the last word of shared memory.
enum class Step { one = 1 };

struct LastWord {
  int at;
};

template <Step kStep>
__global__ void __launch_bounds__(256) count_kernel(int* out, LastWord last) {
  extern __shared__ int words[];
  if (threadIdx.x == 0) words[last.at] = 0;
  __syncthreads();
  atomicAdd(&words[last.at], static_cast<int>(kStep));
  __syncthreads();
  if (threadIdx.x == 0) *out = words[last.at];
}

void count(Tensor out, int64_t blocks, int64_t threads, int64_t smem_bytes) {
  bigkern::launch(0, count_kernel<Step::one>, blocks, threads, smem_bytes, static_cast<int*>(out.data_ptr()),
                  LastWord{static_cast<int>(smem_bytes / sizeof(int)) - 1});
}

}  // namespace

STABLE_TORCH_LIBRARY(bigkern_launches, m) {
  m.def("count(Tensor(a!) out, int blocks, int threads, int smem_bytes) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(bigkern_launches, CPU, m) { m.impl("count", TORCH_BOX(&count)); }
