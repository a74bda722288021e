// The door of the int8 ops: checks their arguments.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
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

// One scale for all rows, or one for each, read where the CPU can.
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
  for (int64_t i = 0; i < n; ++i) {
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

// [N] in float32; nullptr: none.
inline const float* read_bias(const OptionalTensor& bias, const Tensor& x, int64_t N, TensorList& keep) {
  if (!bias) return nullptr;
  check_float("bias", bias->scalar_type());
  BK_CHECK(bias->dim() == 1 && bias->size(0) == N, "bias must have shape [", N, "], got ", shape(*bias));
  check_same_device("bias", *bias, "x", x);
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

inline PackedHeader read_packed_header(const Tensor& packed) {
  PackedHeader header{};
  const int64_t bytes = packed.size(0);
  if (bytes >= static_cast<int64_t>(sizeof(header))) std::memcpy(&header, packed.data_ptr(), sizeof(header));
  const bool holds = header.magic == PackedHeader::kMagic && packed.stride(0) == 1 &&
                     bytes == static_cast<int64_t>(sizeof(header)) + PackedShape{header.depth, header.cols}.bytes();
  BK_CHECK(holds, "weight_q of one dimension must come from pack_weight, got ", bytes, " other bytes");
  return header;
}

// So many products of a quantised x, from -127 to 127, with a weight, from -128 on, fit int32.
constexpr int64_t kMostTerms = std::numeric_limits<int32_t>::max() / (127 * 128);

inline void check_terms(const char* what, int64_t terms) {
  BK_CHECK(terms <= kMostTerms, what, " must be at most ", kMostTerms, ", or sums might not fit int32, got ", terms);
}

// The weight [N, K] of a layer, plain or packed.
struct Int8Weight {
  Int8Matrix plain;              // as B [K, N]
  const char* panels = nullptr;  // nullptr: it is plain

  Int8Weight(const Tensor& weight_q, const Tensor& x, int64_t N, int64_t K) {
    check_int8("weight_q", weight_q);
    check_same_device("weight_q", weight_q, "x", x);
    check_terms("K", K);
    BK_CHECK(weight_q.dim() == 1 || weight_q.dim() == 2, "weight_q must have shape [N, K] or be packed, got ",
             shape(weight_q));
    if (weight_q.dim() == 1) {
      const PackedHeader header = read_packed_header(weight_q);
      BK_CHECK(header.depth == K, "x must have the K of the packed weight_q [", header.cols, ", ", header.depth,
               "] as its last size, got ", shape(x));
      BK_CHECK(header.cols == N, "weight_scale must have shape [", header.cols, "], got [", N, "]");
      panels = static_cast<const char*>(weight_q.data_ptr()) + sizeof(header);
    } else {
      BK_CHECK(weight_q.size(1) == K, "x must have the K of weight_q ", shape(weight_q), " as its last size, got ",
               shape(x));
      BK_CHECK(weight_q.size(0) == N, "weight_scale must have shape [", weight_q.size(0), "], got [", N, "]");
      plain = {static_cast<const int8_t*>(weight_q.data_ptr()), weight_q.stride(1), weight_q.stride(0)};
    }
  }
};

// x's shape with another last size.
inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  sizes.push_back(last);
  return sizes;
}

}  // namespace bigkern
