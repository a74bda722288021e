// The door of the int8 ops: checks their arguments.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "int8_mm.h"
#include "tensors.h"

namespace bigkern {

using OptionalTensor = std::optional<Tensor>;

inline void check_int8(const char* name, const Tensor& t) {
  BK_CHECK(t.scalar_type() == ScalarType::Char, name, " must be torch.int8, got ", bigkern::name(t.scalar_type()));
}

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_float(const char* name, ScalarType dtype) {
  BK_CHECK(is_float(dtype), name, " must be float32, bfloat16 or float16, got ", bigkern::name(dtype));
}

inline void check_same_device(const char* name, const Tensor& t, const char* other, const Tensor& like) {
  BK_CHECK(device_of(t) == device_of(like), name, " must be on the device of ", other, ", ",
           bigkern::name(device_of(like)), ", got ", bigkern::name(device_of(t)));
}

inline int64_t numel(const Tensor& t) {
  int64_t n = 1;
  for (int64_t d = 0; d < t.dim(); ++d) n *= t.size(d);
  return n;
}

// x [..., K] as rows; copied where they aren't apart by one stride or their elements not adjacent.
inline FloatRows float_rows(const char* name, const Tensor& x, TensorList& keep) {
  check_float(name, x.scalar_type());
  BK_CHECK(x.dim() > 0, name, " must have shape [..., K], got []");
  const int64_t cols = x.size(x.dim() - 1);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  const bool is_rows = x.dim() == 2 && (cols < 2 || x.stride(1) == 1);
  keep.push_back(is_rows ? x : torch::stable::contiguous(x));
  return {keep.back().data_ptr(), x.scalar_type(), rows, cols, is_rows ? x.stride(0) : cols};
}

// One scale for all rows, or one for each.
inline void read_static_scale(const char* name, const OptionalTensor& scale, const Tensor& x, FloatRows& rows,
                              TensorList& keep) {
  if (!scale) return;
  const int64_t n = numel(*scale);
  bool fits = scale->dim() == x.dim() - 1;
  for (int64_t d = 0; fits && d < scale->dim(); ++d) fits = scale->size(d) == x.size(d);
  BK_CHECK(n == 1 || fits, name, " must have one element, or one for each row of x ", shape(x), ", got shape ",
           shape(*scale));
  BK_CHECK(scale->scalar_type() == ScalarType::Float, name, " must be torch.float32, got ",
           bigkern::name(scale->scalar_type()));
  check_same_device(name, *scale, "x", x);
  keep.push_back(torch::stable::contiguous(*scale));
  rows.static_scale = static_cast<const float*>(keep.back().data_ptr());
  rows.static_scale_stride = n == 1 ? 0 : 1;
}

// Of a tensor in the host's memory.
inline void check_scale_values(const char* name, const OptionalTensor& scale, const FloatRows& rows) {
  for (int64_t i = 0; scale && i < numel(*scale); ++i) {
    const float value = rows.static_scale[i];
    BK_CHECK(value >= 0 && std::isfinite(value), name, " must be finite and not negative, got ", value);
  }
}

inline const float* read_weight_scale(const Tensor& scale, const Tensor& x, TensorList& keep) {
  BK_CHECK(scale.scalar_type() == ScalarType::Float, "weight_scale must be torch.float32, got ",
           bigkern::name(scale.scalar_type()));
  check_same_device("weight_scale", scale, "x", x);
  keep.push_back(torch::stable::contiguous(scale));
  return static_cast<const float*>(keep.back().data_ptr());
}

inline void check_bias(const OptionalTensor& bias, const Tensor& x, int64_t N) {
  if (!bias) return;
  check_float("bias", bias->scalar_type());
  BK_CHECK(bias->dim() == 1 && bias->size(0) == N, "bias must have shape [", N, "], got ", shape(*bias));
  check_same_device("bias", *bias, "x", x);
}

// [N] in float32; nullptr: none.
inline const float* read_bias(const OptionalTensor& bias, const Tensor& x, int64_t N, TensorList& keep) {
  check_bias(bias, x, N);
  if (!bias) return nullptr;
  const Tensor wide = bias->scalar_type() == ScalarType::Float ? *bias : torch::stable::to(*bias, ScalarType::Float);
  keep.push_back(torch::stable::contiguous(wide));
  return static_cast<const float*>(keep.back().data_ptr());
}

inline Activation read_activation(const std::optional<std::string>& activation) {
  if (!activation) return Activation::kNone;
  if (*activation == "relu") return Activation::kRelu;
  if (*activation == "gelu") return Activation::kGelu;
  if (*activation == "gelu_tanh") return Activation::kGeluTanh;
  if (*activation == "silu") return Activation::kSilu;
  raise_value_error("activation must be relu, gelu, gelu_tanh, silu or None, got ", *activation);
}

// So many products of a quantised x, from -127 to 127, with a weight, from -128 on, fit int32.
constexpr int64_t kMostTerms = std::numeric_limits<int32_t>::max() / (127 * 128);

inline void check_terms(const char* what, int64_t terms) {
  BK_CHECK(terms <= kMostTerms, what, " must be at most ", kMostTerms, ", or sums might not fit int32, got ", terms);
}

// The weight [N, K] of a layer: plain, where this says true, or packed.
inline bool check_weight(const Tensor& weight_q, const Tensor& x, int64_t N, int64_t K) {
  check_int8("weight_q", weight_q);
  check_same_device("weight_q", weight_q, "x", x);
  check_terms("K", K);
  if (weight_q.dim() == 1) return false;
  BK_CHECK(weight_q.dim() == 2, "weight_q must have shape [N, K] or be packed, got ", shape(weight_q));
  BK_CHECK(weight_q.size(1) == K, "x must have the K of weight_q ", shape(weight_q), " as its last size, got ",
           shape(x));
  BK_CHECK(weight_q.size(0) == N, "weight_scale must have shape [", weight_q.size(0), "], got [", N, "]");
  return true;
}

// What int8_linear takes besides its tensors' contents.
struct LinearCall {
  FloatRows rows;
  int64_t N;
  ScalarType out_dtype;
  Activation activation;
  bool is_plain;  // the weight
};

inline LinearCall check_linear(const Tensor& x, const Tensor& weight_q, const Tensor& weight_scale,
                               const OptionalTensor& x_scale, const std::optional<std::string>& activation,
                               std::optional<ScalarType> out_dtype, TensorList& keep) {
  LinearCall call;
  call.rows = float_rows("x", x, keep);
  BK_CHECK(weight_scale.dim() == 1, "weight_scale must have shape [N], got ", shape(weight_scale));
  call.N = weight_scale.size(0);
  call.is_plain = check_weight(weight_q, x, call.N, call.rows.cols);
  read_static_scale("x_scale", x_scale, x, call.rows, keep);
  call.out_dtype = out_dtype.value_or(x.scalar_type());
  check_float("out_dtype", call.out_dtype);
  call.activation = read_activation(activation);
  return call;
}

// x's shape with another last size.
inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  sizes.push_back(last);
  return sizes;
}

inline void check_mm(const Tensor& a, const Tensor& b) {
  check_int8("a", a);
  check_int8("b", b);
  check_same_device("b", b, "a", a);
  const int64_t dim = a.dim();
  BK_CHECK((dim == 2 || dim == 3) && b.dim() == dim, "a and b must both have 2 dimensions, or 3, got shapes ", shape(a),
           " and ", shape(b));
  BK_CHECK(dim == 2 || a.size(0) == b.size(0), "b must have the batch size of a, ", a.size(0), ", got shape ",
           shape(b));
  BK_CHECK(a.size(dim - 1) == b.size(dim - 2), "b must have as many rows as a has columns, ", a.size(dim - 1),
           ", got shape ", shape(b));
}

// Returns the dtype of the result.
inline ScalarType check_scaled_mm(const Tensor& a, const Tensor& b, const Tensor& row_scale,
                                  std::optional<ScalarType> out_dtype) {
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
  return dtype;
}

inline void check_pack(const Tensor& weight_q) {
  check_int8("weight_q", weight_q);
  BK_CHECK(weight_q.dim() == 2, "weight_q must have shape [N, K], got ", shape(weight_q));
}

inline void check_unpack(const Tensor& packed) {
  check_int8("packed", packed);
  BK_CHECK(packed.dim() == 1, "packed must have one dimension, got shape ", shape(packed));
}

struct WeightOnlyCall {
  int64_t rows, N, K;
  int64_t group_size, num_groups;  // without groups, one of all K
};

inline WeightOnlyCall check_weight_only(const Tensor& x, const Tensor& weight_q, const Tensor& weight_scale,
                                        int64_t group_size) {
  check_float("x", x.scalar_type());
  check_int8("weight_q", weight_q);
  BK_CHECK(x.dim() > 0, "x must have shape [..., K], got []");
  BK_CHECK(weight_q.dim() == 2 && weight_q.size(1) == x.size(x.dim() - 1),
           "weight_q must have shape [N, K] with the last size of x ", shape(x), " as K, got ", shape(weight_q));
  check_same_device("weight_q", weight_q, "x", x);
  const int64_t N = weight_q.size(0), K = weight_q.size(1);
  BK_CHECK(group_size >= 0, "group_size must be 0 (whole rows) or positive, got ", group_size);
  const int64_t num_groups = group_size == 0 ? 1 : (K + group_size - 1) / group_size;
  if (group_size == 0) {
    BK_CHECK(weight_scale.dim() == 1 && weight_scale.size(0) == N, "weight_scale must have shape [", N, "], got ",
             shape(weight_scale));
  } else {
    BK_CHECK(weight_scale.dim() == 2 && weight_scale.size(0) == N && weight_scale.size(1) == num_groups,
             "weight_scale must have shape [", N, ", ", num_groups, "] for group_size ", group_size, ", got ",
             shape(weight_scale));
  }
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return {rows, N, K, group_size == 0 ? K : group_size, num_groups};
}

inline void check_stochastic(const Tensor& x, const Tensor& philox, const OptionalTensor& factor) {
  const ScalarType dtype = x.scalar_type();
  BK_CHECK(is_float(dtype), "x must be torch.float32, torch.bfloat16 or torch.float16, got ", name(dtype));
  BK_CHECK(x.dim() == 2, "x must have 2 dimensions, got shape ", shape(x));
  BK_CHECK(philox.scalar_type() == ScalarType::Long && philox.dim() == 1 && philox.size(0) == 2,
           "philox must be torch.int64 of shape [2], got ", name(philox.scalar_type()), " of shape ", shape(philox));
  if (factor) {
    BK_CHECK(factor->scalar_type() == ScalarType::Float && factor->dim() == 1 && factor->size(0) == x.size(1),
             "factor must be torch.float32 of shape [", x.size(1), "], got ", name(factor->scalar_type()), " of shape ",
             shape(*factor));
  }
  for (const Tensor* t : {&philox, factor ? &*factor : &philox}) {
    BK_CHECK(device_of(*t) == device_of(x), "philox and factor must be on ", name(device_of(x)), ", got ",
             name(device_of(*t)));
  }
}

}  // namespace bigkern
