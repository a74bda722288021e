// int8_linear on the CPU.
#include "../int8_mm_call.h"
#include "int8_epilogue.h"
#include "int8_packed.h"
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
  const LinearCall call = check_linear(x, weight_q, weight_scale, x_scale, activation, out_dtype, keep);
  check_scale_values("x_scale", x_scale, call.rows);
  const FloatRows& rows = call.rows;
  const int64_t N = call.N;
  Int8Matrix plain;  // the weight as B [K, N]
  const char* panels = nullptr;
  if (call.is_plain) {
    plain = {static_cast<const int8_t*>(weight_q.data_ptr()), weight_q.stride(1), weight_q.stride(0)};
  } else {
    panels = read_panels(weight_q, x, N, rows.cols);
  }
  Tensor out = torch::stable::new_empty(x, with_last(x, N), call.out_dtype);
  std::vector<float> scales(rows.rows);
  const LinearProblem problem{scales.data(),
                              read_weight_scale(weight_scale, x, keep),
                              read_bias(bias, x, N, keep),
                              call.activation,
                              out.data_ptr(),
                              N};

  Int8Gemm gemm;
  gemm.rows = rows.rows;
  gemm.depth = rows.cols;
  gemm.cols = N;
  gemm.panels = panels;
  gemm.out = problem.out;
  gemm.out_bytes = call.out_dtype == ScalarType::Float ? 4 : 2;
  gemm.plain = [&](int64_t) { return plain; };
  gemm.row_of = [&, quantize_row = quantize_row_kernel(rows.dtype)](int64_t, int64_t i, int8_t* scratch) {
    scales[i] = quantize_row(rows, i, scratch);
    return Int8Row{scratch, 1};
  };
  const FinishUnit finish = finish_unit_kernel(call.out_dtype, call.activation);
  gemm.finish = [&](const Int8Unit& unit, const int32_t* tile) { finish(problem, unit, tile); };
  int8_gemm(gemm);
  return out;
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) { m.impl("int8_linear", TORCH_BOX(&bigkern::int8_linear_op)); }
