// What ops ask of tensors through the stable ABI, beyond torch::stable::Tensor.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace bigkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

struct Device {
  int32_t type = 0, index = 0;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

inline std::string name(Device device) {
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  if (device.type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(device.index);
  return "a device of type " + std::to_string(device.type);
}

inline Device device_of(const Tensor& t) {
  Device device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device.index));
  return device;
}

inline bool same_sizes(AtenTensorHandle a, AtenTensorHandle b) {
  int64_t dim, dim_b, *sizes, *sizes_b;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(a, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(b, &dim_b));
  if (dim != dim_b) return false;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(a, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(b, &sizes_b));
  return std::equal(sizes, sizes + dim, sizes_b);
}

// Strides agree wherever they matter, that is in dimensions of more than one element.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Whether the elements fill one range of memory without gaps or overlaps, in whatever order of dimensions.
inline bool is_dense(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> stride_and_size;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1) stride_and_size.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(stride_and_size.begin(), stride_and_size.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : stride_and_size) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Uninitialized and without gaps, on the device of `like`; `order` lists the dimensions from the innermost on. (The
// op of torch::stable::new_empty is looked up by its name, which takes 1.5 us more.)
inline Tensor empty_in_order(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int>& order,
                             ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (const int d : order) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  const Device device = device_of(like);
  const auto dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle t;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype_code, device.type, device.index, &t));
  return Tensor(t);
}

inline void* data_of(AtenTensorHandle t) {
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t, &data));
  return data;
}

// Contiguous copies, for the time of a call, of tensors that can't be walked in memory order side by side: a strided
// view, or a gradient in another layout than its parameter.
class Staging {
 public:
  void* read(const Tensor& t) {
    copies_.push_back(torch::stable::contiguous(t));
    return copies_.back().data_ptr();
  }
  void* write(const Tensor& t) {
    for (int64_t d = 0; d < t.dim(); ++d) {
      BK_CHECK(t.size(d) < 2 || t.stride(d) != 0, "can't write to an expanded tensor of shape ", shape(t));
    }
    void* data = read(t);
    if (data != t.data_ptr()) written_.emplace_back(t, copies_.back());
    return data;
  }
  void write_back() {
    for (auto& [original, copy] : written_) torch::stable::copy_(original, copy);
  }

 private:
  TensorList copies_;
  std::vector<std::pair<Tensor, Tensor>> written_;
};

}  // namespace bigkern
