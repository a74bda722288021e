// What `bigkern info` asks of this library.
#include <torch/csrc/stable/library.h>

#include <string>

namespace bigkern {

namespace {

std::string cuda_toolkit() { return std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__); }

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CompositeExplicitAutograd, m) {
  m.impl("cuda_toolkit", TORCH_BOX(&bigkern::cuda_toolkit));
}
