// quantize_rows on the CPU.
#include "../int8_mm_call.h"
#include "int8_vec.h"
#include "quantize.h"

#define BK_KERNELS "quantize_kernels.h"
#include "each_isa.h"

namespace bigkern {

QuantizeRow quantize_row_kernel(ScalarType dtype) {
  return select(scalar::quantize_row_of, avx2::quantize_row_of, avx512::quantize_row_of)(dtype);
}

namespace {

std::tuple<Tensor, Tensor> quantize_rows_op(Tensor x, OptionalTensor static_scale) {
  TensorList keep;
  FloatRows rows = float_rows("x", x, keep);
  read_static_scale("static_scale", static_scale, x, rows, keep);
  check_scale_values("static_scale", static_scale, rows);
  std::vector<int64_t> sizes = with_last(x, rows.cols);
  Tensor values = torch::stable::new_empty(x, sizes, ScalarType::Char);
  sizes.pop_back();
  Tensor scale = torch::stable::new_empty(x, sizes, ScalarType::Float);
  int8_t* const q = static_cast<int8_t*>(values.data_ptr());
  float* const s = static_cast<float*>(scale.data_ptr());
  const QuantizeRow quantize_row = quantize_row_kernel(rows.dtype);
  constexpr int64_t kElementsPerThread = 1 << 14;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(rows.cols, 1));
  torch::stable::parallel_for(0, rows.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) s[i] = quantize_row(rows, i, q + i * rows.cols);
  });
  return {values, scale};
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) { m.impl("quantize_rows", TORCH_BOX(&bigkern::quantize_rows_op)); }
