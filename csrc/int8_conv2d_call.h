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

// The weight: plain, [O, C / groups, kH, kW], where this says true, or packed.
inline bool check_conv2d_weight(const Tensor& weight_q, const Tensor& x, const Conv2dShape& s) {
  check_int8("weight_q", weight_q);
  check_same_device("weight_q", weight_q, "x", x);
  check_terms("C / groups * kH * kW", s.depth());
  if (weight_q.dim() == 1) return false;
  BK_CHECK(weight_q.dim() == 4, "weight_q must have shape [O, C / groups, kH, kW] or be packed, got ", shape(weight_q));
  const int64_t sizes[] = {s.outputs, s.group_channels(), s.kernel.height, s.kernel.width};
  for (int64_t d = 0; d < 4; ++d) {
    BK_CHECK(weight_q.size(d) == sizes[d], "weight_q must have shape [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ",
             sizes[3], "] for this x, weight_scale and groups, got ", shape(weight_q));
  }
  return true;
}

inline void check_packed_conv2d(bool fits, const Conv2dShape& s) {
  BK_CHECK(fits, "weight_q of one dimension must come from pack_conv2d_weight, of shape [", s.outputs, ", ",
           s.group_channels(), ", ", s.kernel.height, ", ", s.kernel.width, "] and groups ", s.groups);
}

}  // namespace bigkern
