// int8_scaled_mm on the CPU.
#include "../int8_mm_call.h"
#include "int8_epilogue.h"

namespace bigkern {

namespace {

Tensor int8_scaled_mm_op(Tensor a, Tensor b, Tensor row_scale, std::optional<ScalarType> out_dtype) {
  const ScalarType dtype = check_scaled_mm(a, b, row_scale, out_dtype);
  const int64_t N = b.size(1);
  Tensor out = torch::stable::new_empty(a, {a.size(0), N}, dtype);
  const Tensor scale = torch::stable::contiguous(row_scale);
  const std::vector<float> ones(N, 1.0f);
  const LinearProblem problem{
      static_cast<const float*>(scale.data_ptr()), ones.data(), nullptr, Activation::kNone, out.data_ptr(), N};
  Int8Gemm gemm;
  gemm.rows = a.size(0);
  gemm.depth = a.size(1);
  gemm.cols = N;
  gemm.out = out.data_ptr();
  gemm.out_bytes = dtype == ScalarType::Float ? 4 : 2;
  const Int8Matrix left{static_cast<const int8_t*>(a.data_ptr()), a.stride(0), a.stride(1)};
  const Int8Matrix right{static_cast<const int8_t*>(b.data_ptr()), b.stride(0), b.stride(1)};
  gemm.row_of = [&](int64_t, int64_t i, int8_t*) { return Int8Row{left.at(i, 0), left.col}; };
  gemm.plain = [&](int64_t) { return right; };
  const FinishUnit finish = finish_unit_kernel(dtype, Activation::kNone);
  gemm.finish = [&](const Int8Unit& unit, const int32_t* tile) { finish(problem, unit, tile); };
  int8_gemm(gemm);
  return out;
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) { m.impl("int8_scaled_mm", TORCH_BOX(&bigkern::int8_scaled_mm_op)); }
