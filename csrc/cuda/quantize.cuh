// Quantisation to int8 on a GPU: its steps, and that of rows as other ops call it.
#pragma once

#include "../int8_mm.h"
#include "../tensors.h"
#include "ptx.cuh"

namespace bigkern {

// Rows to int8 `values`, values_row bytes apart, with zeros in between, and to their scales [rows]. A static scale that
// is negative or not finite makes its rows NaN: the host can't look at it without waiting for the GPU.
void quantize_rows(const FloatRows& x, int8_t* values, int64_t values_row, float* scale, Device device);

// |x| as an integer of the same order; kInfinity and what is larger are infinities and NaN.
constexpr uint32_t kInfinity = 0x7f800000;
__device__ inline uint32_t magnitude(float x) { return __float_as_uint(fabsf(x)); }

// max|x| / 127, or a static scale; NaN where an element isn't finite.
__device__ inline float to_scale(uint32_t largest, const float* static_scale) {
  if (largest >= kInfinity) return __uint_as_float(0x7fffffff);
  if (static_scale == nullptr) return __uint_as_float(largest) / 127.0f;
  return *static_scale >= 0.0f && magnitude(*static_scale) < kInfinity ? *static_scale : __uint_as_float(0x7fffffff);
}

// round(x / scale), half to even; 0 where the scale is 0 or NaN.
__device__ inline int8_t to_int8(float x, float scale) {
  const float steps = scale > 0.0f ? rintf(x / scale) : 0.0f;
  return static_cast<int8_t>(fminf(fmaxf(steps, -127.0f), 127.0f));
}

// Element i of an array of a dtype.
__device__ inline float load_float(const void* x, ScalarType dtype, int64_t i) {
  switch (dtype) {
    case ScalarType::Half: return static_cast<const Half*>(x)[i];
    case ScalarType::BFloat16: return static_cast<const BFloat16*>(x)[i];
    default: return static_cast<const float*>(x)[i];
  }
}

// So many neighbours make 16 bytes.
template <class T>
constexpr int kRun = 16 / sizeof(T);

// Elements j, ... of a row of `cols`, 0 beyond.
template <class T>
__device__ void load_run(float (&v)[kRun<T>], const T* row, int64_t j, int64_t cols, bool is_aligned) {
  if (is_aligned && j + kRun<T> <= cols) {
    const int4 bits = *reinterpret_cast<const int4*>(row + j);
    const T* const run = reinterpret_cast<const T*>(&bits);
#pragma unroll
    for (int n = 0; n < kRun<T>; ++n) v[n] = static_cast<float>(run[n]);
    return;
  }
#pragma unroll
  for (int n = 0; n < kRun<T>; ++n) v[n] = j + n < cols ? static_cast<float>(row[j + n]) : 0.0f;
}

}  // namespace bigkern
