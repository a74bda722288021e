// What attention computes, as the kernels see it: checked, and independent of the layout, padded or packed.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace bigkern {

using torch::headeronly::ScalarType;

// A tensor over (batch entry, head, row, column); strides in elements, 0 where it has no such dimension.
template <class T>
struct Strided {
  T* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, col = 0;

  T* at(int64_t b, int64_t h, int64_t i = 0, int64_t j = 0) const {
    return data + b * batch + h * head + i * row + j * col;
  }
};

// A tensor of a dtype known at run time only.
struct AnyStrided {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, col = 0;

  template <class T>
  Strided<T> as() const {
    return {static_cast<T*>(data), batch, head, row, col};
  }
};

// One entry of the batch. Packed, its rows begin somewhere in the common tensor.
struct AttentionSequence {
  int64_t q_begin = 0, q_len = 0, k_begin = 0, k_len = 0;
};

struct ColumnRange {
  int64_t begin, end;
};

struct AttentionProblem {
  ScalarType dtype = ScalarType::Float;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  std::vector<AttentionSequence> sequences;  // [batch]
  int64_t max_q_len = 0, max_k_len = 0;
  AnyStrided query, key, value, out;
  AnyStrided row_max, row_sum;  // of the accumulation's type, float or double
  AnyStrided mask;              // no data: none
  ScalarType mask_dtype = ScalarType::Bool;
  int64_t mask_batch = 1, mask_heads = 1, mask_rows = 1, mask_cols = 1;  // its sizes
  Strided<const float> alibi_slopes;                                     // no data: none
  double scale = 1.0, softcap = 0.0;
  bool is_causal = false;
  int64_t window_left = -1, window_right = -1;
  // Dropout: 16 random bits below the threshold drop a weight; the others are multiplied by keep_scale.
  uint32_t dropout_threshold = 0;
  double keep_scale = 1.0;
  uint64_t philox_seed = 0;
  uint32_t philox_offset = 0;

  int64_t group() const { return kv_heads == 0 ? 1 : heads / kv_heads; }  // query heads that share their keys

  // The keys that query i may meet, by causality and window.
  ColumnRange keys_of(const AttentionSequence& s, int64_t i) const {
    const int64_t diagonal = i + s.k_len - s.q_len;
    int64_t begin = window_left >= 0 ? std::max<int64_t>(0, diagonal - window_left) : 0;
    int64_t end = s.k_len;
    if (is_causal) end = std::min(end, i + 1);
    if (window_right >= 0) end = std::min(end, diagonal + window_right + 1);
    end = std::max<int64_t>(end, 0);
    return {std::min(begin, end), end};
  }
};

}  // namespace bigkern
