// What the attention kernels share: queries and keys of a tile, and the way from products to the softmax's argument.
//
// A warp holds 16 queries by BLOCK_KV keys as sums of multiply_add, [BLOCK_KV / 8][4] a lane: element (n, c) is query
// lane / 4 + c / 2 * 8, key 8 n + 2 (lane % 4) + c % 2 of the tile.
#pragma once

#include "../attention.h"
#include "fragments.cuh"
#include "philox.cuh"

namespace bigkern {

constexpr float kLog2E = 1.44269504088896340736f;

// Threads of a warp that hold the same rows.
template <class Op>
__device__ float reduce_row(float x, const Op& op) {
  x = op(x, __shfl_xor_sync(~0u, x, 1));
  return op(x, __shfl_xor_sync(~0u, x, 2));
}

// One entry of the batch with one head of keys, and its tensors.
template <class T>
struct AttentionHead {
  const AttentionProblem& p;
  AttentionSequence sequence;
  int b, h;  // the first head of queries

  __device__ AttentionHead(const AttentionProblem& p, int b, int h) : p(p), sequence(p.sequence(b)), b(b), h(h) {}

  __device__ T* query_row(const AnyStrided& tensor, int64_t head, int64_t i) const {
    return tensor.as<T>().at(b, head, sequence.q_begin + i);
  }
  __device__ T* key_row(const AnyStrided& tensor, int64_t j) const {
    return tensor.as<T>().at(b, h / p.group(), sequence.k_begin + j);
  }
  // Of row_max and the like.
  __device__ float& stat(const AnyStrided& tensor, int64_t head, int64_t i) const {
    return *tensor.as<float>().at(b, head, sequence.q_begin + i);
  }
};

// Where a warp has one query: which it is, among [batch, heads, max_q_len].
constexpr int kQueryWarps = 4;  // of a block
struct WarpQuery {
  int64_t row;
  int b, h, query;
  bool is_there;

  __device__ explicit WarpQuery(const AttentionProblem& p)
      : row(static_cast<int64_t>(blockIdx.x) * kQueryWarps + threadIdx.x / 32),
        b(row / p.max_q_len / p.heads),
        h(row / p.max_q_len % p.heads),
        query(row % p.max_q_len),
        is_there(b < p.batch && query < p.sequence(b).q_len) {}
};

// A row of `cols` elements in global memory, which a lane writes by pairs: of one access where the row allows it.
template <class T>
struct RowOfPairs {
  T* row;
  int64_t stride;
  int cols;
  bool is_dense;

  __device__ RowOfPairs(T* row, int64_t stride, int cols)
      : row(row), stride(stride), cols(cols), is_dense(stride == 1 && is_aligned<2>(row)) {}

  // Columns col, which is even, and col + 1.
  __device__ void put(int col, float first, float second) const {
    if (is_dense && col + 1 < cols) {
      if constexpr (std::is_same_v<T, float>) {
        store(row + col, Vector<float, 2>{first, second});
      } else {
        *reinterpret_cast<uint32_t*>(row + col) = pack_pair<T>(first, second);
      }
      return;
    }
    if (col < cols) row[col * stride] = static_cast<T>(first);
    if (col + 1 < cols) row[(col + 1) * stride] = static_cast<T>(second);
  }
};

// Queries [i, i + num_rows) of the head, zeros from the sequence's end on.
template <class T, int kCols>
__device__ void copy_queries(SharedTile<T, kCols> tile, int num_rows, const AttentionHead<T>& head,
                             const AnyStrided& tensor, int64_t cols, int i, bool vectorized) {
  const T* const first = head.query_row(tensor, head.h, 0);
  const int num_queries = head.sequence.q_len - i;
  const auto row_at = [&](int r) { return r < num_queries ? first + (i + r) * tensor.row : nullptr; };
  copy_rows(tile, num_rows, row_at, cols, tensor.col, vectorized, first);
}

// Keys [j, j + num_rows), zeros from the sequence's end on.
template <class T, int kCols>
__device__ void copy_keys(SharedTile<T, kCols> tile, int num_rows, const AttentionHead<T>& head,
                          const AnyStrided& tensor, int64_t cols, int j, bool vectorized) {
  const T* const first = head.key_row(tensor, 0);
  const int num_keys = head.sequence.k_len - j;
  const auto row_at = [&](int r) { return r < num_keys ? first + (j + r) * tensor.row : nullptr; };
  copy_rows(tile, num_rows, row_at, cols, tensor.col, vectorized, first);
}

// One query of a lane: which it is, and what its scores get besides their products.
struct AttentionRow {
  int head = 0, query = -1;        // -1: none
  int key_begin = 0, key_end = 0;  // the keys that it meets
  int diagonal = 0;                // its position among the keys
  float slope = 0.f;               // of ALiBi
  int64_t mask_offset = 0;         // of the mask's row

  AttentionRow() = default;
  __device__ AttentionRow(const AttentionProblem& p, const AttentionSequence& s, int b, int head, int query)
      : head(head), query(query), diagonal(query + s.k_len - s.q_len) {
    const ColumnRange keys = p.keys_of(s, query);
    key_begin = keys.begin;
    key_end = keys.end;
    if (p.alibi_slopes.data != nullptr) slope = *p.alibi_slopes.at(b, head);
    mask_offset = b * p.mask.batch + head * p.mask.head + query * p.mask.row;
  }
};

template <class M>
__device__ float mask_value(const AnyStrided& mask, int64_t offset) {
  const M value = static_cast<const M*>(mask.data)[offset];
  if constexpr (std::is_same_v<M, bool>) {
    return value ? 0.f : -INFINITY;
  } else {
    return static_cast<float>(value);
  }
}

// The mask's element, in whatever dtype.
__device__ inline float mask_value(const AttentionProblem& p, int64_t offset) {
  switch (p.mask_dtype) {
    case ScalarType::Bool: return mask_value<bool>(p.mask, offset);
    case ScalarType::Half: return mask_value<Half>(p.mask, offset);
    case ScalarType::BFloat16: return mask_value<BFloat16>(p.mask, offset);
    default: return mask_value<float>(p.mask, offset);
  }
}

// From products to the softmax's arguments.
struct AttentionScores {
  const AttentionProblem& p;
  float scale, softcap;

  __device__ explicit AttentionScores(const AttentionProblem& p)
      : p(p), scale(static_cast<float>(p.scale)), softcap(static_cast<float>(p.softcap)) {}

  // Of the product of a query and key j. `cap_slope` becomes the derivative of the cap.
  __device__ float operator()(const AttentionRow& row, int j, float product, float& cap_slope) const {
    float score = product * scale;
    cap_slope = 1.f;
    if (softcap > 0.f) {
      const float t = tanhf(score / softcap);
      score = t * softcap;
      cap_slope = 1.f - t * t;
    }
    if (j < row.key_begin || j >= row.key_end) return -INFINITY;
    if (p.mask.data != nullptr) score += mask_value(p, row.mask_offset + j * p.mask.col);
    return score - row.slope * abs(row.diagonal - j);
  }
  __device__ float operator()(const AttentionRow& row, int j, float product) const {
    float unused;
    return (*this)(row, j, product, unused);
  }
};

// The random bits of 32 keys, from a multiple of 32 on, for this lane's columns: word n has 16 each for the keys
// 8 n + 2 (lane % 4) and the next.
struct DropoutWords {
  uint4 words = {};

  DropoutWords() = default;  // keeps what a threshold of 0 lets pass: all
  __device__ DropoutWords(const AttentionProblem& p, int b, const AttentionRow& row, int j) {
    const auto bh = static_cast<uint32_t>(b * p.heads + row.head);
    words = philox(
        {static_cast<uint32_t>(j / 32 * 4 + threadIdx.x % 4), static_cast<uint32_t>(row.query), bh, p.philox_offset()},
        p.philox_seed());
  }
  // Whether the weight of key 8 n + 2 (lane % 4) + second isn't dropped.
  __device__ bool keeps(int n, int second, uint32_t threshold) const {
    const uint32_t word = n == 0 ? words.x : n == 1 ? words.y : n == 2 ? words.z : words.w;
    return (second ? word >> 16 : word & 0xffff) >= threshold;
  }
};

}  // namespace bigkern
