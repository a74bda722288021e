// What attention computes, as the kernels of every device see it: checked, and independent of the layout, padded or
// packed. The pointers are the device's.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

namespace bigkern {

using torch::headeronly::ScalarType;

// A tensor over (batch entry, head, row, column); strides in elements, 0 where it has no such dimension.
template <class T>
struct Strided {
  T* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, col = 0;

  C10_HOST_DEVICE T* at(int64_t b, int64_t h, int64_t i = 0, int64_t j = 0) const {
    return data + b * batch + h * head + i * row + j * col;
  }
};

// A tensor of a dtype known at run time only.
struct AnyStrided {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, col = 0;

  template <class T>
  C10_HOST_DEVICE Strided<T> as() const {
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
  int32_t device_type = 0, device_index = 0;
  ScalarType dtype = ScalarType::Float;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  // Packed: where each entry begins, [batch + 1], and rows in all. Else rows of every entry, of which the lengths
  // [batch], if given, count.
  const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr, *seqlens_q = nullptr, *seqlens_k = nullptr;
  int64_t q_rows = 0, k_rows = 0;
  int64_t max_q_len = 0, max_k_len = 0;  // no entry is longer
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
  const int64_t* philox = nullptr;  // seed and, philox_stride on, offset
  int64_t philox_stride = 1;

  C10_HOST_DEVICE uint64_t philox_seed() const { return static_cast<uint64_t>(philox[0]); }
  C10_HOST_DEVICE uint32_t philox_offset() const { return static_cast<uint32_t>(philox[philox_stride]); }

  // Query heads that share their keys.
  C10_HOST_DEVICE int64_t group() const { return kv_heads == 0 ? 1 : heads / kv_heads; }

  C10_HOST_DEVICE AttentionSequence sequence(int64_t b) const {
    if (cu_seqlens_q != nullptr) {
      return {cu_seqlens_q[b], cu_seqlens_q[b + 1] - cu_seqlens_q[b], cu_seqlens_k[b],
              cu_seqlens_k[b + 1] - cu_seqlens_k[b]};
    }
    return {0, seqlens_q == nullptr ? q_rows : seqlens_q[b], 0, seqlens_k == nullptr ? k_rows : seqlens_k[b]};
  }

  // The keys that query i may meet, by causality and window.
  C10_HOST_DEVICE ColumnRange keys_of(const AttentionSequence& s, int64_t i) const {
    const int64_t diagonal = i + s.k_len - s.q_len;
    int64_t begin = window_left >= 0 && diagonal > window_left ? diagonal - window_left : 0;
    int64_t end = s.k_len;
    if (is_causal && end > i + 1) end = i + 1;
    if (window_right >= 0 && end > diagonal + window_right + 1) end = diagonal + window_right + 1;
    if (end < 0) end = 0;
    return {begin < end ? begin : end, end};
  }

  // The queries that may meet a key of [j_begin, j_end), by causality and window.
  C10_HOST_DEVICE ColumnRange queries_of(const AttentionSequence& s, int64_t j_begin, int64_t j_end) const {
    const int64_t shift = s.k_len - s.q_len;  // query i is at i + shift among the keys
    int64_t begin = is_causal ? j_begin : 0, end = s.q_len;
    if (window_right >= 0 && window_right < j_begin - shift - begin) begin = j_begin - shift - window_right;
    if (window_left >= 0 && window_left < s.k_len && end > j_end - shift + window_left) {
      end = j_end - shift + window_left;
    }
    return {begin < end ? begin : end, end};
  }
};

// What the backward has beyond the forward's arguments and results.
struct AttentionBackwardProblem {
  const AttentionProblem* forward;
  AnyStrided grad_out, grad_lse;  // grad_lse without data: none
  AnyStrided delta;               // rowsum(dO * O) - dlse, of the accumulation's type
  AnyStrided grad_query, grad_key, grad_value, grad_mask;
  bool deterministic = false;
};

}  // namespace bigkern
