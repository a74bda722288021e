// weight_only_linear on a GPU, as fast as the weight is read where x has few rows.
#include <limits>

#include "../int8_mm_call.h"
#include "launch.cuh"
#include "quantize.cuh"

namespace bigkern {

namespace {

constexpr int kThreads = 128, kCols = 4, kMostRows = 4;
constexpr int kWeights = 16;  // of one access

struct Problem {
  WeightOnlyCall call;
  const void* x;  // [rows, K]
  int64_t x_row;
  const int8_t* weight;  // [N, K]
  int64_t weight_row;
  bool x_is_aligned, weight_is_aligned, is_grouped;
  const float* weight_scale;  // [N, num_groups]
  const void* bias;           // [N] or nullptr
  ScalarType bias_dtype;
  void* out;  // [rows, N]
};

// Four int8 as floats: b + 128 becomes the last bits of 2^23 + 128 + b, in 2 instructions where a conversion would
// take a quarter of the rate of one.
__device__ inline void widen(uint32_t bytes, float* to) {
  bytes ^= 0x80808080;
#pragma unroll
  for (int n = 0; n < 4; ++n) to[n] = __uint_as_float(__byte_perm(bytes, 0x4b000000, 0x7650 | n)) - 8388736.0f;
}

__device__ inline void load_weights(float (&w)[kWeights], const int8_t* row, int64_t k, int64_t depth,
                                    bool is_aligned) {
  if (is_aligned && k + kWeights <= depth) {
    const int4 bytes = __ldcs(reinterpret_cast<const int4*>(row + k));
    widen(bytes.x, w), widen(bytes.y, w + 4), widen(bytes.z, w + 8), widen(bytes.w, w + 12);
    return;
  }
#pragma unroll
  for (int n = 0; n < kWeights; ++n) w[n] = k + n < depth ? static_cast<float>(row[k + n]) : 0.0f;
}

// Weights k, ... times the scales of their groups, of which the first is `group`.
__device__ inline void scale_groups(float (&w)[kWeights], const float* scale, int64_t k, int32_t group,
                                    const WeightOnlyCall& call) {
  int64_t end = (int64_t{group} + 1) * call.group_size;
  float s = scale[group];
  if (k + kWeights <= end) {
#pragma unroll
    for (int n = 0; n < kWeights; ++n) w[n] *= s;
    return;
  }
#pragma unroll
  for (int n = 0; n < kWeights; ++n) {
    if (k + n == end && end < call.K) s = scale[++group], end += call.group_size;
    w[n] *= s;
  }
}

// Y [kRows, kCols] of blockIdx.x, [column block, row block]: those of the same weights run together.
template <class T, int kRows>
__global__ void __launch_bounds__(kThreads) weight_only_kernel(const __grid_constant__ Problem p, uint32_t row_blocks) {
  __shared__ float warp_sums[kThreads / 32][kRows][kCols];
  const WeightOnlyCall& call = p.call;
  const int64_t i_begin = int64_t{blockIdx.x % row_blocks} * kRows, j_begin = int64_t{blockIdx.x / row_blocks} * kCols;
  const T* x[kRows];  // beyond the last one, the last
  int64_t column[kCols];
#pragma unroll
  for (int i = 0; i < kRows; ++i) x[i] = static_cast<const T*>(p.x) + min(i_begin + i, call.rows - 1) * p.x_row;
#pragma unroll
  for (int c = 0; c < kCols; ++c) column[c] = min(j_begin + c, call.N - 1);

  // S = X @ W^T  [kRows, kCols]: each thread its columns of both, then their sum over the block
  float sums[kRows][kCols] = {};
  for (int64_t k = threadIdx.x * kWeights; k < call.K; k += kThreads * kWeights) {
    float w[kCols][kWeights];
    const auto group = static_cast<int32_t>(p.is_grouped ? k / call.group_size : 0);
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      load_weights(w[c], p.weight + column[c] * p.weight_row, k, call.K, p.weight_is_aligned);
      if (p.is_grouped) scale_groups(w[c], p.weight_scale + column[c] * call.num_groups, k, group, call);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int run = 0; run < kWeights; run += kRun<T>) {
        float v[kRun<T>];
        load_run(v, x[i], k + run, call.K, p.x_is_aligned);
#pragma unroll
        for (int n = 0; n < kRun<T>; ++n) {
#pragma unroll
          for (int c = 0; c < kCols; ++c) sums[i][c] = fmaf(v[n], w[c][run + n], sums[i][c]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      float sum = sums[i][c];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32][i][c] = sum;
    }
  }
  __syncthreads();

  // Y = S * scale + bias
  const int i = threadIdx.x / kCols, c = threadIdx.x % kCols;
  if (i >= kRows || i_begin + i >= call.rows || j_begin + c >= call.N) return;
  float y = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) y += warp_sums[warp][i][c];
  const int64_t j = j_begin + c;
  if (!p.is_grouped) y *= p.weight_scale[j];
  if (p.bias != nullptr) y += load_float(p.bias, p.bias_dtype, j);
  static_cast<T*>(p.out)[(i_begin + i) * call.N + j] = static_cast<T>(y);
}

// ---- Host ----

template <class T>
void launch_weight_only(const Problem& p, Device device) {
  const auto run = [&](auto kernel, int64_t rows_of_block) {
    const int64_t row_blocks = ceil_div(p.call.rows, rows_of_block);
    const int64_t blocks = row_blocks * ceil_div<int64_t>(p.call.N, kCols);
    if (blocks == 0) return;
    launch(device.index, kernel, grid_of(blocks), kThreads, 0, p, static_cast<uint32_t>(row_blocks));
  };
  if (p.call.rows == 1) return run(weight_only_kernel<T, 1>, 1);
  run(weight_only_kernel<T, kMostRows>, kMostRows);
}

Tensor weight_only_linear_cuda(Tensor x, Tensor weight_q, Tensor weight_scale, OptionalTensor bias,
                               int64_t group_size) {
  const WeightOnlyCall call = check_weight_only(x, weight_q, weight_scale, group_size);
  check_bias(bias, x, call.N);
  BK_CHECK(call.num_groups <= std::numeric_limits<int32_t>::max(),
           "weight_scale must have less than 2^31 groups a row on a GPU, got ", call.num_groups);
  TensorList keep;
  const auto contiguous = [&keep](const Tensor& t) {
    keep.push_back(torch::stable::contiguous(t));
    return keep.back().data_ptr();
  };
  const FloatRows rows = float_rows("x", x, keep);
  const Tensor out = torch::stable::new_empty(x, with_last(x, call.N), x.scalar_type());
  Problem p{call, rows.data, rows.row, static_cast<const int8_t*>(contiguous(weight_q)), call.K};
  const auto is_aligned = [](const void* data, int64_t row_bytes) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
  };
  p.x_is_aligned = is_aligned(p.x, p.x_row * (x.scalar_type() == ScalarType::Float ? 4 : 2));
  p.weight_is_aligned = is_aligned(p.weight, p.weight_row);
  p.is_grouped = group_size > 0;
  p.weight_scale = read_weight_scale(weight_scale, x, keep);
  p.bias = bias ? contiguous(*bias) : nullptr;
  p.bias_dtype = bias ? bias->scalar_type() : ScalarType::Float;
  p.out = out.data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Half: launch_weight_only<Half>(p, device_of(x)); break;
    case ScalarType::BFloat16: launch_weight_only<BFloat16>(p, device_of(x)); break;
    default: launch_weight_only<float>(p, device_of(x));
  }
  return out;
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CUDA, m) {
  m.impl("weight_only_linear", TORCH_BOX(&bigkern::weight_only_linear_cuda));
}
