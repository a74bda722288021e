// The weight of int8_conv2d in the host's memory, which is read at the door.
#pragma once

#include <cstring>
#include <vector>

#include "../int8_conv2d_call.h"

namespace bigkern {

// The weight [O, C / groups, kH, kW], or packed: the panels of each group, its rows in the order [kH, kW, C / groups].
class Conv2dWeight {
 public:
  // Small groups may be packed as one, with zeros where they don't meet: then s is of such groups.
  Conv2dWeight(const Tensor& weight_q, const Tensor& x, Conv2dShape& s) : shape_{s.depth(), s.group_outputs()} {
    check_conv2d_weight(weight_q, x, s) ? reorder(weight_q, s) : read_packed(weight_q, s);
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
    check_packed_conv2d(fits, s);
    s = dense;
    packed_ = data;
  }

  void reorder(const Tensor& weight_q, const Conv2dShape& s) {
    const int64_t sizes[] = {s.outputs, s.group_channels(), s.kernel.height, s.kernel.width};
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
