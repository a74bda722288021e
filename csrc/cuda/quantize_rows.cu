// quantize_rows and quantize_rows_stochastic on a GPU. A row is read twice, the second time from a cache mostly: by a
// warp where it is short, else by a block.
#include "../int8_mm_call.h"
#include "launch.cuh"
#include "philox.cuh"
#include "quantize.cuh"

namespace bigkern {

namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr int64_t kWarpCols = 1024;  // the longest row of a warp: 32 elements a lane

struct Problem {
  FloatRows x;
  bool is_aligned;  // to 16 bytes, each row
  int8_t* values;
  int64_t values_row;
  float* scale;
  // Of the stochastic one alone:
  const float* factor = nullptr;    // [cols], or nullptr
  const int64_t* philox = nullptr;  // seed, offset
};

// The largest of a row's threads, for all of them.
template <int kRowThreads>
__device__ uint32_t row_max(uint32_t x) {
  x = __reduce_max_sync(~0u, x);
  if constexpr (kRowThreads > kWarp) {
    __shared__ uint32_t warp_max[kThreads / kWarp];
    if (threadIdx.x % kWarp == 0) warp_max[threadIdx.x / kWarp] = x;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kThreads / kWarp; ++warp) x = max(x, warp_max[warp]);
  }
  return x;
}

template <class T>
__device__ void store_run(int8_t* values, int64_t j, int64_t end, const int8_t (&q)[kRun<T>], bool is_aligned) {
  using Bits = std::conditional_t<kRun<T> == 8, uint64_t, uint32_t>;
  if (is_aligned && j + kRun<T> <= end) {
    Bits bits = 0;
#pragma unroll
    for (int n = 0; n < kRun<T>; ++n) bits |= static_cast<Bits>(static_cast<uint8_t>(q[n])) << (8 * n);
    *reinterpret_cast<Bits*>(values + j) = bits;
    return;
  }
#pragma unroll
  for (int n = 0; n < kRun<T>; ++n) {
    if (j + n < end) values[j + n] = q[n];
  }
}

// Four columns that share a counter, 16 apart: values = floor(x / scale + u).
template <class T>
__device__ void round_randomly(const Problem& p, const T* x, int64_t i, int64_t j, float scale, int8_t* values) {
  const uint4 words = philox(
      {static_cast<uint32_t>(j / 64 * 16 + j % 16), static_cast<uint32_t>(i), 0, static_cast<uint32_t>(p.philox[1])},
      static_cast<uint64_t>(p.philox[0]));
  const uint32_t word[] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int64_t column = j + 16 * n;
    if (column >= p.x.cols) return;
    const float v = static_cast<float>(x[column]) * (p.factor != nullptr ? p.factor[column] : 1.0f);
    const float u = static_cast<float>(word[n] >> 8) * 0x1p-24f;
    const float steps = scale > 0.0f ? floorf(v / scale + u) : 0.0f;
    values[column] = static_cast<int8_t>(fminf(fmaxf(steps, -127.0f), 127.0f));
  }
}

template <class T, int kRowThreads, bool kStochastic>
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(const __grid_constant__ Problem p) {
  const int64_t i = int64_t{blockIdx.x} * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
  if (i >= p.x.rows) return;
  const int thread = threadIdx.x % kRowThreads;
  const T* const x = static_cast<const T*>(p.x.data) + i * p.x.row;
  int8_t* const values = p.values + i * p.values_row;

  // s = max|x| / 127
  uint32_t largest = 0;
  for (int64_t j = thread * kRun<T>; j < p.x.cols; j += kRowThreads * kRun<T>) {
    float v[kRun<T>];
    load_run(v, x, j, p.x.cols, p.is_aligned);
#pragma unroll
    for (int n = 0; n < kRun<T>; ++n) {
      if (kStochastic && p.factor != nullptr && j + n < p.x.cols) v[n] *= p.factor[j + n];
      largest = max(largest, magnitude(v[n]));
    }
  }
  const float* const fixed = p.x.static_scale;
  const float scale = to_scale(row_max<kRowThreads>(largest), fixed ? fixed + i * p.x.static_scale_stride : nullptr);
  if (thread == 0) p.scale[i] = scale;

  // q = x / s, rounded
  if constexpr (kStochastic) {
    for (int64_t n = thread; n < ceil_div<int64_t>(p.x.cols, 64) * 16; n += kRowThreads) {
      round_randomly(p, x, i, n / 16 * 64 + n % 16, scale, values);
    }
  } else {
    const bool is_aligned = p.values_row % kRun<T> == 0;
    for (int64_t j = thread * kRun<T>; j < p.values_row; j += kRowThreads * kRun<T>) {
      float v[kRun<T>];
      int8_t q[kRun<T>];
      load_run(v, x, j, p.x.cols, p.is_aligned);
#pragma unroll
      for (int n = 0; n < kRun<T>; ++n) q[n] = to_int8(v[n], scale);
      store_run<T>(values, j, p.values_row, q, is_aligned);
    }
  }
}

// ---- Host ----

template <class T, bool kStochastic>
void launch_rows(Problem p, Device device) {
  if (p.x.rows == 0) return;
  const auto address = reinterpret_cast<uintptr_t>(p.x.data);
  p.is_aligned = address % 16 == 0 && (p.x.rows < 2 || p.x.row * sizeof(T) % 16 == 0);
  const int64_t rows_of_block = p.x.cols > kWarpCols ? 1 : kThreads / kWarp;
  const dim3 grid = grid_of(ceil_div(p.x.rows, rows_of_block));
  BOOL_SWITCH(rows_of_block == 1, kByBlock, [&] {
    launch(device.index, quantize_rows_kernel < T, kByBlock ? kThreads : kWarp, kStochastic >, grid, kThreads, 0, p);
  });
}

template <bool kStochastic>
void launch_rows(const Problem& p, Device device) {
  switch (p.x.dtype) {
    case ScalarType::Half: return launch_rows<Half, kStochastic>(p, device);
    case ScalarType::BFloat16: return launch_rows<BFloat16, kStochastic>(p, device);
    default: return launch_rows<float, kStochastic>(p, device);
  }
}

std::tuple<Tensor, Tensor> quantize_rows_cuda(Tensor x, OptionalTensor static_scale) {
  TensorList keep;
  FloatRows rows = float_rows("x", x, keep);
  read_static_scale("static_scale", static_scale, x, rows, keep);
  std::vector<int64_t> sizes = with_last(x, rows.cols);
  const Tensor values = torch::stable::new_empty(x, sizes, ScalarType::Char);
  sizes.pop_back();
  const Tensor scale = torch::stable::new_empty(x, sizes, ScalarType::Float);
  quantize_rows(rows, static_cast<int8_t*>(values.data_ptr()), rows.cols, static_cast<float*>(scale.data_ptr()),
                device_of(x));
  return {values, scale};
}

std::tuple<Tensor, Tensor> quantize_rows_stochastic_cuda(Tensor x, Tensor philox, OptionalTensor factor) {
  check_stochastic(x, philox, factor);
  TensorList keep;
  Problem p{float_rows("x", x, keep)};
  const Tensor values = torch::stable::new_empty(x, {p.x.rows, p.x.cols}, ScalarType::Char);
  const Tensor scale = torch::stable::new_empty(x, {p.x.rows}, ScalarType::Float);
  p.values = static_cast<int8_t*>(values.data_ptr());
  p.values_row = p.x.cols;
  p.scale = static_cast<float*>(scale.data_ptr());
  const auto contiguous = [&keep](const Tensor& t) {
    keep.push_back(torch::stable::contiguous(t));
    return keep.back().data_ptr();
  };
  if (factor) p.factor = static_cast<const float*>(contiguous(*factor));
  p.philox = static_cast<const int64_t*>(contiguous(philox));
  launch_rows<true>(p, device_of(x));
  return {values, scale};
}

}  // namespace

void quantize_rows(const FloatRows& x, int8_t* values, int64_t values_row, float* scale, Device device) {
  Problem p{x};
  p.values = values;
  p.values_row = values_row;
  p.scale = scale;
  launch_rows<false>(p, device);
}

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&bigkern::quantize_rows_cuda));
  m.impl("quantize_rows_stochastic", TORCH_BOX(&bigkern::quantize_rows_stochastic_cuda));
}
