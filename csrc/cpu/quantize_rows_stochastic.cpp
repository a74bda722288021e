// quantize_rows_stochastic on the CPU.
#include "../int8_mm_call.h"
#include "../philox.h"
#include "rounding.h"
#include "workspace.h"

namespace bigkern {

struct StochasticRows {
  const void* x;        // [rows, columns]
  const float* factor;  // [columns], or nullptr
  int8_t* values;       // [rows, columns]
  float* scale;         // [rows]
  int64_t columns;
  uint64_t seed;
  uint32_t offset;
};

using StochasticKernel = void (*)(const StochasticRows&, int64_t begin, int64_t end);

}  // namespace bigkern

#define BK_KERNELS "quantize_rows_stochastic_kernels.h"
#include "each_isa.h"

namespace bigkern {

namespace {

constexpr int64_t kElementsPerThread = 1 << 14;

std::tuple<Tensor, Tensor> quantize_rows_stochastic(Tensor x, Tensor philox, std::optional<Tensor> factor) {
  check_stochastic(x, philox, factor);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor values = torch::stable::new_empty(x, {rows, columns}, ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, {rows}, ScalarType::Float);

  Staging staging;
  const int64_t* key = static_cast<const int64_t*>(staging.read(philox));
  const StochasticRows problem{staging.read(x),
                               factor ? static_cast<const float*>(staging.read(*factor)) : nullptr,
                               static_cast<int8_t*>(values.data_ptr()),
                               static_cast<float*>(scale.data_ptr()),
                               columns,
                               static_cast<uint64_t>(key[0]),
                               static_cast<uint32_t>(key[1])};
  const StochasticKernel kernel = select(scalar::quantize_rows_stochastic_kernel, avx2::quantize_rows_stochastic_kernel,
                                         avx512::quantize_rows_stochastic_kernel)(x.scalar_type());
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
  return {values, scale};
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) {
  m.impl("quantize_rows_stochastic", TORCH_BOX(&bigkern::quantize_rows_stochastic));
}
