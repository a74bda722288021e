// int8_mm, int8_scaled_mm, int8_linear and the packing of its weight, on a GPU.
#include "../int8_mm_call.h"
#include "int8_operand.cuh"
#include "quantize.cuh"

namespace bigkern {

namespace {

const int8_t* int8_data(const Tensor& t) { return static_cast<const int8_t*>(t.data_ptr()); }

// a [M, K] or [batch, M, K], b [K, N] or [batch, K, N].
Int8Gemm gemm_of(const Tensor& a, const Tensor& b, TensorList& keep) {
  const int64_t dim = a.dim(), batch = dim == 3 ? a.size(0) : 1;
  const int64_t M = a.size(dim - 2), K = a.size(dim - 1), N = b.size(dim - 1);
  const auto entry_stride = [&](const Tensor& t) { return dim == 3 ? t.stride(0) : 0; };
  Int8Gemm gemm;
  gemm.batch = batch;
  gemm.rows = M;
  gemm.cols = N;
  gemm.depth = whole_chunks(K);
  gemm.a = chunked_rows({int8_data(a), batch, M, K, entry_stride(a), a.stride(dim - 2), a.stride(dim - 1)}, a, keep);
  set_b({int8_data(b), batch, N, K, entry_stride(b), b.stride(dim - 1), b.stride(dim - 2)}, a, gemm, keep);
  return gemm;
}

void set_output(Int8Gemm& gemm, const Tensor& out) {
  gemm.epilogue.out = out.data_ptr();
  gemm.epilogue.dtype = out.scalar_type();
  gemm.epilogue.image_rows = std::max<int64_t>(gemm.rows, 1);
  gemm.epilogue.row = gemm.cols;
  gemm.epilogue.batch = gemm.rows * gemm.cols;
}

Tensor int8_mm_cuda(Tensor a, Tensor b) {
  check_mm(a, b);
  TensorList keep;
  Int8Gemm gemm = gemm_of(a, b, keep);
  const Tensor out = torch::stable::new_empty(a, with_last(a, gemm.cols), ScalarType::Int);
  set_output(gemm, out);
  int8_gemm(gemm, device_of(a));
  return out;
}

Tensor int8_scaled_mm_cuda(Tensor a, Tensor b, Tensor row_scale, std::optional<ScalarType> out_dtype) {
  const ScalarType dtype = check_scaled_mm(a, b, row_scale, out_dtype);
  TensorList keep;
  Int8Gemm gemm = gemm_of(a, b, keep);
  const Tensor out = torch::stable::new_empty(a, {gemm.rows, gemm.cols}, dtype);
  set_output(gemm, out);
  keep.push_back(torch::stable::contiguous(row_scale));
  gemm.epilogue.row_scale = static_cast<const float*>(keep.back().data_ptr());
  int8_gemm(gemm, device_of(a));
  return out;
}

// The input is quantised by a pass of its own, which moves 4 bytes an element of bfloat16 where the product needs
// 2 N operations of each: in the product, every block would do it again.
Tensor int8_linear_cuda(Tensor x, Tensor weight_q, Tensor weight_scale, OptionalTensor bias, OptionalTensor x_scale,
                        std::optional<std::string> activation, std::optional<ScalarType> out_dtype) {
  TensorList keep;
  const LinearCall call = check_linear(x, weight_q, weight_scale, x_scale, activation, out_dtype, keep);
  check_bias(bias, x, call.N);
  const Device device = device_of(x);
  const int64_t M = call.rows.rows, N = call.N, K = call.rows.cols, depth = whole_chunks(K);
  Int8Gemm gemm;
  gemm.rows = M;
  gemm.cols = N;
  gemm.depth = depth;
  if (call.is_plain) {
    set_b({int8_data(weight_q), 1, N, K, 0, weight_q.stride(0), weight_q.stride(1)}, weight_q, gemm, keep);
  } else {
    BK_CHECK(is_packed(weight_q, packed_bytes(N, K)),
             "weight_q of one dimension must come from pack_weight on this device, of shape [", N, ", ", K, "], got ",
             weight_q.size(0), " other bytes");
    gemm.b = {int8_data(weight_q), depth, 0};
  }
  const Tensor out = torch::stable::new_empty(x, with_last(x, N), call.out_dtype);
  set_output(gemm, out);
  gemm.epilogue.activation = call.activation;
  gemm.epilogue.col_scale = read_weight_scale(weight_scale, x, keep);
  if (bias) {
    keep.push_back(torch::stable::contiguous(*bias));
    gemm.epilogue.bias = keep.back().data_ptr();
    gemm.epilogue.bias_dtype = bias->scalar_type();
  }
  const Tensor values = torch::stable::new_empty(x, {M, depth}, ScalarType::Char);
  const Tensor scale = torch::stable::new_empty(x, {M}, ScalarType::Float);
  auto* const row_scale = static_cast<float*>(scale.data_ptr());
  quantize_rows(call.rows, static_cast<int8_t*>(values.data_ptr()), depth, row_scale, device);
  gemm.epilogue.row_scale = row_scale;
  gemm.a = {int8_data(values), depth, 0};
  int8_gemm(gemm, device);
  return out;
}

Tensor pack_weight_cuda(Tensor weight_q) {
  check_pack(weight_q);
  const int64_t N = weight_q.size(0), K = weight_q.size(1);
  const Tensor out = torch::stable::new_zeros(weight_q, {packed_bytes(N, K)});
  copy_rows({int8_data(weight_q), 1, N, K, 0, weight_q.stride(0), weight_q.stride(1)},
            static_cast<int8_t*>(out.data_ptr()), device_of(weight_q));
  return out;
}

Tensor unpack_weight_cuda(Tensor packed, int64_t N, int64_t K) {
  check_unpack(packed);
  BK_CHECK(is_packed(packed, packed_bytes(N, K)), "packed must come from pack_weight on this device, of shape [", N,
           ", ", K, "], got ", packed.size(0), " other bytes");
  const int64_t depth = whole_chunks(K);
  Tensor rows = torch::stable::narrow(packed, 0, 0, N * depth);
  rows = torch::stable::view(rows, {N, depth});
  Tensor out = torch::stable::new_empty(packed, {N, K});
  torch::stable::copy_(out, torch::stable::narrow(rows, 1, 0, K));
  return out;
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CUDA, m) {
  m.impl("int8_mm", TORCH_BOX(&bigkern::int8_mm_cuda));
  m.impl("int8_scaled_mm", TORCH_BOX(&bigkern::int8_scaled_mm_cuda));
  m.impl("int8_linear", TORCH_BOX(&bigkern::int8_linear_cuda));
  m.impl("pack_weight", TORCH_BOX(&bigkern::pack_weight_cuda));
  m.impl("unpack_weight", TORCH_BOX(&bigkern::unpack_weight_cuda));
}
