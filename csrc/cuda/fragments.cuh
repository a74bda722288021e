// Products of a warp by tensor cores: float16 and bfloat16 as they are, float32 by four products of TF32. Without the
// last, of 2^-22 of the largest, short sums would be less accurate than float32's. Sums are float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "shared_tile.cuh"

namespace bigkern {

// Columns that one multiply_add sums over: 32 bytes.
template <class T>
constexpr int kStep = 32 / sizeof(T);

// What a lane holds of an operand.
template <class T, int kRegisters>
struct Fragment {
  uint32_t raw[kRegisters];
};

// x = big + small, in TF32 each.
template <int kRegisters>
struct Fragment<float, kRegisters> {
  uint32_t big[kRegisters], small[kRegisters];
};

template <class T, int kRegisters>
__device__ Fragment<T, kRegisters> to_fragment(const uint32_t (&raw)[kRegisters]) {
  Fragment<T, kRegisters> fragment;
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      const float x = __uint_as_float(raw[i]);
      fragment.big[i] = to_tf32(x);
      fragment.small[i] = to_tf32(x - __uint_as_float(fragment.big[i]));
    } else {
      fragment.raw[i] = raw[i];
    }
  }
  return fragment;
}

// sum [16, 8] += a [16, kStep] @ b [kStep, 8]; b is in the registers `first` and the next.
template <class T>
__device__ void multiply_add(float (&sum)[4], const Fragment<T, 4>& a, const Fragment<T, 4>& b, int first) {
  if constexpr (std::is_same_v<T, float>) {
    float step[4] = {};  // tensor cores cut off where float32 rounds: sums over many steps would drift towards 0
    multiply_add<T>(step, a.small, b.small[first], b.small[first + 1]);
    multiply_add<T>(step, a.small, b.big[first], b.big[first + 1]);
    multiply_add<T>(step, a.big, b.small[first], b.small[first + 1]);
    multiply_add<T>(step, a.big, b.big[first], b.big[first + 1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += step[i];
  } else {
    multiply_add<T>(sum, a.raw, b.raw[first], b.raw[first + 1]);
  }
}

// The left operand: rows [row, row + 16), columns of step k.
template <class T, int kCols>
__device__ void load_left(uint32_t (&raw)[4], SharedTile<T, kCols> tile, int row, int k) {
  const int lane = threadIdx.x % 32;
  load_matrices(raw, tile.chunk(row + lane % 16, 2 * k, lane / 16));
}

// The right operand, transposed in memory: rows [row, row + 16) are 16 columns of it, the last 8 from register 2 on.
template <class T, int kCols>
__device__ Fragment<T, 4> load_right_t(SharedTile<T, kCols> tile, int row, int k) {
  const int lane = threadIdx.x % 32;
  uint32_t raw[4];
  load_matrices(raw, tile.chunk(row + lane % 8 + lane / 16 * 8, 2 * k, lane / 8 % 2));
  return to_fragment<T>(raw);
}

// The right operand as it lies: rows [row, row + kStep), 16 columns from `col` on, the last 8 from register 2 on. For
// float32 the rows in the order 0, 2, 4, 6, 1, 3, 5, 7, which is that of the columns of to_left.
template <class T, int kCols>
__device__ Fragment<T, 4> load_right(SharedTile<T, kCols> tile, int row, int col) {
  const int lane = threadIdx.x % 32;
  uint32_t raw[4];
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      raw[i] = __float_as_uint(*tile.at(row + lane % 4 * 2 + i % 2, col + i / 2 * 8, lane / 4));
    }
  } else {
    load_matrices_transposed(raw, tile.chunk(row + lane % 16, col / tile.kChunk, lane / 16));
  }
  return to_fragment<T>(raw);
}

// The left operand out of its transpose in memory: columns are rows [row, row + kStep), rows are columns [col, col +
// 16). For float32 in the order of to_left.
template <class T, int kCols>
__device__ Fragment<T, 4> load_left_t(SharedTile<T, kCols> tile, int row, int col) {
  const int lane = threadIdx.x % 32;
  uint32_t raw[4];
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      raw[i] = __float_as_uint(*tile.at(row + lane % 4 * 2 + i / 2, col + i % 2 * 8, lane / 4));
    }
  } else {
    load_matrices_transposed(raw, tile.chunk(row + lane % 8 + lane / 16 * 8, col / tile.kChunk, lane / 8 % 2));
  }
  return to_fragment<T>(raw);
}

template <class T>
__device__ uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, Half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// Sums of multiply_add as the left operand of the next: columns of step k out of `sums` [16, kN * 8].
template <class T, int kN>
__device__ Fragment<T, 4> to_left(const float (&sums)[kN][4], int k) {
  uint32_t raw[4];
  if constexpr (std::is_same_v<T, float>) {
    const float (&s)[4] = sums[k];  // columns 2 t and 2 t + 1 of lane t become t and t + 4
    raw[0] = __float_as_uint(s[0]);
    raw[1] = __float_as_uint(s[2]);
    raw[2] = __float_as_uint(s[1]);
    raw[3] = __float_as_uint(s[3]);
  } else {
    raw[0] = pack_pair<T>(sums[2 * k][0], sums[2 * k][1]);
    raw[1] = pack_pair<T>(sums[2 * k][2], sums[2 * k][3]);
    raw[2] = pack_pair<T>(sums[2 * k + 1][0], sums[2 * k + 1][1]);
    raw[3] = pack_pair<T>(sums[2 * k + 1][2], sums[2 * k + 1][3]);
  }
  return to_fragment<T>(raw);
}

// The rows of a tile from `row` on as a left operand.
template <class T, int kCols>
struct LeftRows {
  SharedTile<T, kCols> tile;
  int row;

  __device__ Fragment<T, 4> operator()(int m, int k) const {
    uint32_t raw[4];
    load_left(raw, tile, row + m * 16, k);
    return to_fragment<T>(raw);
  }
};

// sums [16 kM, 8 kN] += left @ rows [row, row + 8 kN) of right, transposed: step k of the columns.
template <class T, int kCols, int kM, int kN, class Left>
__device__ void add_step_t(float (&sums)[kM][kN][4], const Left& left, SharedTile<T, kCols> right, int row, int k) {
  Fragment<T, 4> a[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) a[m] = left(m, k);
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    const Fragment<T, 4> b = load_right_t(right, row + n * 8, k);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      multiply_add<T>(sums[m][n], a[m], b, 0);
      multiply_add<T>(sums[m][n + 1], a[m], b, 2);
    }
  }
}

// sums [16 kM, 8 kD] += weights [16 kM, 8 kN] @ rows [row, row + 8 kN) of right, columns [col, col + 8 kD).
template <class T, int kCols, int kM, int kN, int kD>
__device__ void add_product(float (&sums)[kM][kD][4], const float (&weights)[kM][kN][4], SharedTile<T, kCols> right,
                            int row, int col) {
#pragma unroll
  for (int k = 0; k < kN * 8 / kStep<T>; ++k) {
    Fragment<T, 4> a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) a[m] = to_left<T>(weights[m], k);
#pragma unroll
    for (int d = 0; d < kD; d += 2) {
      const Fragment<T, 4> b = load_right(right, row + k * kStep<T>, col + d * 8);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_add<T>(sums[m][d], a[m], b, 0);
        multiply_add<T>(sums[m][d + 1], a[m], b, 2);
      }
    }
  }
}

}  // namespace bigkern
