// The door of int8_conv2d: checks its arguments.
#pragma once

#include <array>
#include <vector>

#include "int8_mm_call.h"

namespace bigkern {

// Of heights and widths.
struct Extent {
  int64_t height, width;
};

struct Conv2dShape {
  int64_t batch, channels, outputs, groups;
  Extent input, padded, kernel, stride, dilation, output;
  int64_t top, left;  // padding

  int64_t group_channels() const { return channels / groups; }
  int64_t group_outputs() const { return outputs / groups; }
  int64_t depth() const { return kernel.height * kernel.width * group_channels(); }  // of a group's products
  int64_t input_pixels() const { return input.height * input.width; }
  int64_t padded_pixels() const { return padded.height * padded.width; }
  int64_t output_pixels() const { return output.height * output.width; }
};

inline Extent read_pair(const char* name, const std::vector<int64_t>& values) {
  BK_CHECK(values.size() == 2 && values[0] > 0 && values[1] > 0, name, " must be two positive integers");
  return {values[0], values[1]};
}

inline int64_t conv2d_output(const char* name, int64_t padded, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t reach = dilation * (kernel - 1) + 1;
  BK_CHECK(padded >= reach, "kernel_size must fit the padded x: its ", name, " is ", reach, " with dilation, x's ",
           padded);
  return (padded - reach) / stride + 1;
}

inline Conv2dShape read_conv2d_shape(const Tensor& x, int64_t outputs, const std::vector<int64_t>& kernel_size,
                                     const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                     const std::vector<int64_t>& dilation, int64_t groups) {
  check_float("x", x.scalar_type());
  BK_CHECK(x.dim() == 4, "x must have shape [N, C, H, W], got ", shape(x));
  BK_CHECK(groups > 0 && x.size(1) % groups == 0 && outputs % groups == 0,
           "groups must divide the channels of x and of the output, ", x.size(1), " and ", outputs, ", got ", groups);
  BK_CHECK(padding.size() == 4, "padding must be of four sides, got ", padding.size());
  for (const int64_t side : padding) BK_CHECK(side >= 0, "padding must not be negative, got ", side);
  Conv2dShape s{};
  s.batch = x.size(0);
  s.channels = x.size(1);
  s.outputs = outputs;
  s.groups = groups;
  s.input = {x.size(2), x.size(3)};
  s.top = padding[0];
  s.left = padding[2];
  s.padded = {s.input.height + padding[0] + padding[1], s.input.width + padding[2] + padding[3]};
  s.kernel = read_pair("kernel_size", kernel_size);
  s.stride = read_pair("stride", stride);
  s.dilation = read_pair("dilation", dilation);
  s.output = {conv2d_output("height", s.padded.height, s.kernel.height, s.stride.height, s.dilation.height),
              conv2d_output("width", s.padded.width, s.kernel.width, s.stride.width, s.dilation.width)};
  return s;
}

// One scale for all images, or one for each.
inline void read_image_scale(const Tensor& x_scale, const Tensor& x, FloatRows& rows, TensorList& keep) {
  const bool is_one = numel(x_scale) == 1;
  BK_CHECK(is_one || (x_scale.dim() == 1 && x_scale.size(0) == x.size(0)),
           "x_scale must have one element, or one for each of the ", x.size(0), " images, got shape ", shape(x_scale));
  read_static_scale("x_scale", x_scale, torch::stable::new_empty(x, {x.size(0), 0}), rows, keep);
}

// x's elements in the order [N, C, H, W], or [N, H, W, C] if channels_last.
inline const void* read_images(const Tensor& x, bool channels_last, TensorList& keep) {
  if (!channels_last) {
    keep.push_back(torch::stable::contiguous(x));
    return keep.back().data_ptr();
  }
  const int64_t strides[] = {x.size(1) * x.size(2) * x.size(3), 1, x.size(1) * x.size(3), x.size(1)};
  for (int64_t d = 0; d < 4; ++d) {
    BK_CHECK(x.size(d) < 2 || x.stride(d) == strides[d], "x must be channels last in memory");
  }
  return x.data_ptr();
}

// The weight [O, C / groups, kH, kW], or packed: the panels of each group, its rows in the order [kH, kW, C / groups].
class Conv2dWeight {
 public:
  // Small groups may be packed as one, with zeros where they don't meet: then s is of such groups.
  Conv2dWeight(const Tensor& weight_q, const Tensor& x, Conv2dShape& s) : shape_{s.depth(), s.group_outputs()} {
    check_int8("weight_q", weight_q);
    check_same_device("weight_q", weight_q, "x", x);
    check_terms("C / groups * kH * kW", s.depth());
    BK_CHECK(weight_q.dim() == 1 || weight_q.dim() == 4,
             "weight_q must have shape [O, C / groups, kH, kW] or be packed, got ", shape(weight_q));
    if (weight_q.dim() == 1) {
      read_packed(weight_q, s);
    } else {
      reorder(weight_q, s);
    }
  }

  // nullptr: it is plain.
  const char* panels(int64_t group) const {
    return packed_ == nullptr ? nullptr : packed_ + group * stride() + sizeof(PackedHeader);
  }
  // As B [K, outputs of the group].
  Int8Matrix plain(int64_t group) const {
    return {plain_.data() + group * shape_.cols * shape_.depth, 1, shape_.depth};
  }

 private:
  int64_t stride() const { return sizeof(PackedHeader) + shape_.bytes(); }

  void read_packed(const Tensor& weight_q, Conv2dShape& s) {
    PackedHeader first{}, header{};
    const char* const data = static_cast<const char*>(weight_q.data_ptr());
    if (weight_q.size(0) >= static_cast<int64_t>(sizeof(first))) std::memcpy(&first, data, sizeof(first));
    const int64_t merged = std::max<int64_t>(1, first.cols / std::max<int64_t>(1, s.group_outputs()));
    Conv2dShape dense = s;
    dense.groups = std::max<int64_t>(1, s.groups / merged);
    shape_ = {dense.depth(), dense.group_outputs()};
    bool fits = s.groups % merged == 0 && weight_q.stride(0) == 1 && weight_q.size(0) == dense.groups * stride();
    for (int64_t g = 0; fits && g < dense.groups; ++g) {
      std::memcpy(&header, data + g * stride(), sizeof(header));
      fits = header.magic == PackedHeader::kMagic && header.depth == shape_.depth && header.cols == shape_.cols;
    }
    BK_CHECK(fits, "weight_q of one dimension must come from pack_conv2d_weight, of shape [", s.outputs, ", ",
             s.group_channels(), ", ", s.kernel.height, ", ", s.kernel.width, "] and groups ", s.groups);
    s = dense;
    packed_ = data;
  }

  void reorder(const Tensor& weight_q, const Conv2dShape& s) {
    const int64_t sizes[] = {s.outputs, s.group_channels(), s.kernel.height, s.kernel.width};
    for (int64_t d = 0; d < 4; ++d) {
      BK_CHECK(weight_q.size(d) == sizes[d], "weight_q must have shape [", sizes[0], ", ", sizes[1], ", ", sizes[2],
               ", ", sizes[3], "] for this x, weight_scale and groups, got ", shape(weight_q));
    }
    plain_.resize(s.outputs * s.depth());
    const int8_t* from = static_cast<const int8_t*>(weight_q.data_ptr());
    int8_t* to = plain_.data();
    for (int64_t o = 0; o < sizes[0]; ++o) {
      for (int64_t i = 0; i < sizes[2]; ++i) {
        for (int64_t j = 0; j < sizes[3]; ++j) {
          for (int64_t c = 0; c < sizes[1]; ++c) {
            *to++ =
                from[o * weight_q.stride(0) + c * weight_q.stride(1) + i * weight_q.stride(2) + j * weight_q.stride(3)];
          }
        }
      }
    }
  }

  PackedShape shape_;
  const char* packed_ = nullptr;
  std::vector<int8_t> plain_;
};

}  // namespace bigkern
