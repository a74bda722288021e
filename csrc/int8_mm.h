// What the int8 ops compute, as the kernels see it, and the format of a packed weight.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

namespace bigkern {

using torch::headeronly::ScalarType;

// An int8 matrix [rows, cols] of any strides.
struct Int8Matrix {
  const int8_t* data = nullptr;
  int64_t row = 0, col = 0;  // strides

  const int8_t* at(int64_t i, int64_t j) const { return data + i * row + j * col; }
};

// The right operand B [K, N] of a product as the kernels read it: panels of 16 columns, each of blocks of 512 rows of
// B, each of groups of 4 rows: [panel, block, group, column, 4], as b + 128 in uint8, 0 beyond the last row or column.
// Before a block come 16 int32, one for each column: minus the sum over its rows k = 0, 2, ... of (b[k] + 128) *
// (b[k + 1] + 128), for the kernels of kPairSums.
constexpr int64_t kPanelCols = 16, kBlockDepth = 512, kGroupDepth = 4;
constexpr int64_t kGroupBytes = kPanelCols * kGroupDepth, kBlockHeader = kPanelCols * sizeof(int32_t);

struct PackedShape {
  int64_t depth, cols;  // K, N

  int64_t num_panels() const { return (cols + kPanelCols - 1) / kPanelCols; }
  int64_t num_blocks() const { return (depth + kBlockDepth - 1) / kBlockDepth; }
  int64_t num_groups() const { return (depth + kGroupDepth - 1) / kGroupDepth; }
  int64_t panel_bytes() const { return num_blocks() * kBlockHeader + num_groups() * kGroupBytes; }
  int64_t bytes() const { return num_panels() * panel_bytes(); }

  // Where a block begins in its panel; all blocks but the last are full.
  static int64_t block_begin(int64_t block) { return block * (kBlockHeader + kBlockDepth / kGroupDepth * kGroupBytes); }
  int64_t block_depth(int64_t block) const { return std::min(kBlockDepth, depth - block * kBlockDepth); }
};

// What stands before the panels of a packed weight.
struct PackedHeader {
  static constexpr uint64_t kMagic = 0x31776b6769623869;  // "i8bigkw1"
  uint64_t magic;
  int64_t depth, cols;
  int64_t unused[5];
};
static_assert(sizeof(PackedHeader) == 64);

// Rows of floats to quantise.
struct FloatRows {
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t rows = 0, cols = 0, row = 0;  // stride of rows; those of columns are 1
  const float* static_scale = nullptr;  // nullptr: max|x| / 127
  int64_t static_scale_stride = 0;      // 0: one for all rows

  float scale_of(int64_t i) const { return static_scale[i * static_scale_stride]; }
};

enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu };

}  // namespace bigkern
