// int8_linear on the CPU.
#include "../int8_mm_call.h"
#include "int8_epilogue.h"
#include "int8_vec.h"
#include "quantize.h"

namespace bigkern {

using FinishChoice = FinishUnit (*)(ScalarType, Activation);

}  // namespace bigkern

#define BK_KERNELS "int8_linear_kernels.h"
#include "each_isa.h"

namespace bigkern {

FinishUnit finish_unit_kernel(ScalarType dtype, Activation activation) {
  return select<FinishChoice>(scalar::finish_unit_of, avx2::finish_unit_of, avx512::finish_unit_of)(dtype, activation);
}

namespace {

Tensor int8_linear_op(Tensor x, Tensor weight_q, Tensor weight_scale, OptionalTensor bias, OptionalTensor x_scale,
                      std::optional<std::string> activation, std::optional<ScalarType> out_dtype) {
  TensorList keep;
  FloatRows rows = float_rows("x", x, keep);
  BK_CHECK(weight_scale.dim() == 1, "weight_scale must have shape [N], got ", shape(weight_scale));
  const int64_t N = weight_scale.size(0);
  const Int8Weight weight(weight_q, x, N, rows.cols);
  read_static_scale("x_scale", x_scale, x, rows, keep);
  const ScalarType dtype = out_dtype.value_or(x.scalar_type());
  check_float("out_dtype", dtype);
  Tensor out = torch::stable::new_empty(x, with_last(x, N), dtype);
  std::vector<float> scales(rows.rows);
  const LinearProblem problem{scales.data(),
                              read_weight_scale(weight_scale, x, keep),
                              read_bias(bias, x, N, keep),
                              read_activation(activation),
                              out.data_ptr(),
                              N};

  Int8Gemm gemm;
  gemm.rows = rows.rows;
  gemm.depth = rows.cols;
  gemm.cols = N;
  gemm.panels = weight.panels;
  gemm.out = problem.out;
  gemm.out_bytes = dtype == ScalarType::Float ? 4 : 2;
  gemm.plain = [&](int64_t) { return weight.plain; };
  gemm.row_of = [&, quantize_row = quantize_row_kernel(rows.dtype)](int64_t, int64_t i, int8_t* scratch) {
    scales[i] = quantize_row(rows, i, scratch);
    return Int8Row{scratch, 1};
  };
  const FinishUnit finish = finish_unit_kernel(dtype, problem.activation);
  gemm.finish = [&](const Int8Unit& unit, const int32_t* tile) { finish(problem, unit, tile); };
  int8_gemm(gemm);
  return out;
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) { m.impl("int8_linear", TORCH_BOX(&bigkern::int8_linear_op)); }
