// int8_scaled_mm on the CPU.
#include "../int8_mm_call.h"
#include "int8_epilogue.h"

namespace bigkern {

namespace {

Tensor int8_scaled_mm_op(Tensor a, Tensor b, Tensor row_scale, std::optional<ScalarType> out_dtype) {
  check_int8("a", a);
  check_int8("b", b);
  check_same_device("b", b, "a", a);
  BK_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "a and b must have shapes [M, K] and [K, N], got ",
           shape(a), " and ", shape(b));
  BK_CHECK(row_scale.scalar_type() == ScalarType::Float && row_scale.dim() == 1 && row_scale.size(0) == a.size(0),
           "row_scale must be torch.float32 of shape [", a.size(0), "], got ", name(row_scale.scalar_type()),
           " of shape ", shape(row_scale));
  check_same_device("row_scale", row_scale, "a", a);
  const ScalarType dtype = out_dtype.value_or(ScalarType::Float);
  check_float("out_dtype", dtype);

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
