// adam_ and grad_norm on a GPU. The host reads nothing back and the shapes of launches depend on sizes alone, so that a
// step can be captured in a CUDA graph. In this order:
//
//   sum_of_squares_kernel   partial sums of the norm, where one is asked for: reads the gradients
//   prepare_step_kernel     the norm, found_inf, the steps, the coefficients of each tensor
//   adam_kernel             the update: reads and writes everything once; a launch for each pair of dtypes
#include "../adam_call.h"
#include "grad_norm.cuh"
#include "launch.cuh"
#include "multi_tensor.cuh"
#include "scratch.cuh"

namespace bigkern {

namespace {

struct StepTable {
  static constexpr int kCapacity = kTableBytes / sizeof(ScalarRef);
  ScalarRef step[kCapacity];
  int num_steps = 0;
};

// Once per tensor rather than once per block: two pow() in float64 take a few microseconds.
__global__ void __launch_bounds__(kThreads)
    prepare_step_kernel(const __grid_constant__ StepTable table, const __grid_constant__ AdamOptions options,
                        PartialSums sums, AdamCoefficients* coefficients /* [num_steps] */) {
  double grad_norm = 0.0;
  if (options.needs_norm()) grad_norm = options.grad_norm ? options.grad_norm.get() : norm_of(sums, options.grad_scale);

  // All blocks decide alike, whether they see what the first one writes or not.
  const bool is_first = blockIdx.x == 0 && threadIdx.x == 0;
  const bool has_inf = options.check_inf && !isfinite(grad_norm);
  const bool skips = has_inf || (options.found_inf && options.found_inf.get() != 0.0);
  if (is_first && has_inf) options.found_inf.set(1.0);
  if (is_first && options.grad_norm_out) options.grad_norm_out.set(grad_norm);

  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (skips || i >= table.num_steps) return;
  const double step = table.step[i].get() + 1.0;
  table.step[i].set(step);
  coefficients[i] = adam_coefficients(options, step, gradient_factor(options, grad_norm));
}

template <bool kAmsgrad, bool kMaster>
struct AdamTable {
  static constexpr int kCapacity = kTableBytes / (8 * (4 + kAmsgrad + kMaster) + kChunkBytes);
  void* param[kCapacity];
  const void* grad[kCapacity];
  void* exp_avg[kCapacity];
  void* exp_avg_sq[kCapacity];
  void* max_exp_avg_sq[kAmsgrad ? kCapacity : 1];
  void* master_param[kMaster ? kCapacity : 1];
  ChunkTable<kCapacity> chunks;
};

// The largest element decides how many make 16 bytes, so that neighbouring threads access neighbouring vectors of every
// stream. Each thread has 40 to 96 bytes of loads in flight, an SM of an H100 50 to 100 kB of the 18 kB that it needs.
constexpr int kVectorsPerThread = 4;
template <class P, class S, bool kMaster>
constexpr int kAdamWidth = 16 / std::max({sizeof(P), sizeof(S), kMaster ? sizeof(float) : 1});
template <class P, class S, bool kMaster>
constexpr int kAdamChunk = kThreads * kVectorsPerThread * kAdamWidth<P, S, kMaster>;

// AdamCoefficients in the type T of the computation.
template <class T>
struct AdamScalars {
  T grad_factor, l2, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias_correction2, eps;
};

template <class T>
__device__ AdamScalars<T> to_scalars(const AdamCoefficients& c) {
  return {T(c.grad_factor), T(c.l2),          T(c.decay),
          T(c.beta1),       T(1.0 - c.beta1), T(c.beta2),
          T(1.0 - c.beta2), T(-c.step_size),  T(c.inv_sqrt_bias_correction2),
          T(c.eps)};
}

// N elements of the step, at offset i.
template <int N, bool kAmsgrad, bool kMaster, class T, class P, class S>
__device__ void adam_update(const AdamStreams<P, S>& t, const AdamScalars<T>& c, int i) {
  Vector<P, N> param;
  Vector<float, N> master_param;
  Vector<S, N> max_exp_avg_sq;
  const Vector<P, N> grad = load<N>(t.grad + i);
  Vector<S, N> exp_avg = load<N>(t.exp_avg + i);
  Vector<S, N> exp_avg_sq = load<N>(t.exp_avg_sq + i);
  if constexpr (kAmsgrad) max_exp_avg_sq = load<N>(t.max_exp_avg_sq + i);
  if constexpr (kMaster) {
    master_param = load<N>(t.master_param + i);
  } else {
    param = load<N>(t.param + i);
  }

#pragma unroll
  for (int j = 0; j < N; ++j) {
    T p;
    if constexpr (kMaster) {
      p = static_cast<T>(master_param.at[j]);
    } else {
      p = static_cast<T>(param.at[j]);
    }
    // g = grad * factor + l2 * param
    T g = static_cast<T>(grad.at[j]) * c.grad_factor;
    if (c.l2 != T(0)) g = fma(c.l2, p, g);  // not always: 0 * inf would be NaN
    // m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
    const T m = fma(c.beta1, static_cast<T>(exp_avg.at[j]), c.one_minus_beta1 * g);
    T v = fma(c.beta2, static_cast<T>(exp_avg_sq.at[j]), c.one_minus_beta2 * (g * g));
    exp_avg.at[j] = static_cast<S>(m);
    exp_avg_sq.at[j] = static_cast<S>(v);
    if constexpr (kAmsgrad) {
      const T max_v = static_cast<T>(max_exp_avg_sq.at[j]);
      v = max_v > v ? max_v : v;  // v where either is NaN
      max_exp_avg_sq.at[j] = static_cast<S>(v);
    }
    // param = decay * param - step_size * m / (sqrt(v) / sqrt(bias_correction2) + eps)
    const T denominator = fma(sqrt(v), c.inv_sqrt_bias_correction2, c.eps);
    p = fma(c.step_size, m / denominator, p * c.decay);
    if constexpr (kMaster) master_param.at[j] = p;
    param.at[j] = static_cast<P>(p);
  }

  store(t.exp_avg + i, exp_avg);
  store(t.exp_avg_sq + i, exp_avg_sq);
  if constexpr (kAmsgrad) store(t.max_exp_avg_sq + i, max_exp_avg_sq);
  if constexpr (kMaster) store(t.master_param + i, master_param);
  store(t.param + i, param);
}

template <class P, class S, bool kAmsgrad, bool kMaster>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const __grid_constant__ AdamTable<kAmsgrad, kMaster> table,
                const AdamCoefficients* coefficients /* [num_tensors] */, ScalarRef found_inf) {
  if (found_inf && found_inf.get() != 0.0) return;
  using T = std::conditional_t<std::is_same_v<P, double>, double, float>;
  constexpr int kWidth = kAdamWidth<P, S, kMaster>;

  const Chunk chunk = table.chunks.find(blockIdx.x, kAdamChunk<P, S, kMaster>);
  AdamStreams<P, S> t{};  // each [chunk.size]
  t.param = static_cast<P*>(table.param[chunk.tensor]) + chunk.begin;
  t.grad = static_cast<const P*>(table.grad[chunk.tensor]) + chunk.begin;
  t.exp_avg = static_cast<S*>(table.exp_avg[chunk.tensor]) + chunk.begin;
  t.exp_avg_sq = static_cast<S*>(table.exp_avg_sq[chunk.tensor]) + chunk.begin;
  bool is_vectorizable = is_aligned<kWidth>(t.param) && is_aligned<kWidth>(t.grad) && is_aligned<kWidth>(t.exp_avg) &&
                         is_aligned<kWidth>(t.exp_avg_sq);
  if constexpr (kAmsgrad) {
    t.max_exp_avg_sq = static_cast<S*>(table.max_exp_avg_sq[chunk.tensor]) + chunk.begin;
    is_vectorizable = is_vectorizable && is_aligned<kWidth>(t.max_exp_avg_sq);
  }
  if constexpr (kMaster) {
    t.master_param = static_cast<float*>(table.master_param[chunk.tensor]) + chunk.begin;
    is_vectorizable = is_vectorizable && is_aligned<kWidth>(t.master_param);
  }

  // An SM converts only 16 float64 a cycle: one thread does it.
  __shared__ AdamScalars<T> scalars_smem;
  if (threadIdx.x == 0) scalars_smem = to_scalars<T>(coefficients[chunk.tensor]);
  __syncthreads();
  const AdamScalars<T> scalars = scalars_smem;

  // Whole vectors, then what is left, element by element.
  const int vectors_end = is_vectorizable ? chunk.size / kWidth * kWidth : 0;
#pragma unroll 1
  for (int i = threadIdx.x * kWidth; i < vectors_end; i += kThreads * kWidth) {
    adam_update<kWidth, kAmsgrad, kMaster>(t, scalars, i);
  }
#pragma unroll 1
  for (int i = vectors_end + threadIdx.x; i < chunk.size; i += kThreads) {
    adam_update<1, kAmsgrad, kMaster>(t, scalars, i);
  }
}

// For grad_norm, which has no step to prepare.
__global__ void __launch_bounds__(kThreads)
    finish_norm_kernel(PartialSums sums, ScalarRef grad_scale, double* grad_norm) {
  const double norm = norm_of(sums, grad_scale);
  if (threadIdx.x == 0) *grad_norm = norm;
}

// ---- Host ----

template <class P, class S, bool kAmsgrad, bool kMaster>
void launch_adam_kernel(const AdamTensor* tensor, const AdamTensor* end, const AdamCoefficients* coefficients,
                        ScalarRef found_inf, int32_t device_index) {
  using Table = AdamTable<kAmsgrad, kMaster>;
  while (tensor != end) {
    Table table;
    for (; tensor != end && table.chunks.num_tensors < Table::kCapacity; ++tensor) {
      const int i = table.chunks.num_tensors;
      table.param[i] = tensor->param;
      table.grad[i] = tensor->grad;
      table.exp_avg[i] = tensor->exp_avg;
      table.exp_avg_sq[i] = tensor->exp_avg_sq;
      if constexpr (kAmsgrad) table.max_exp_avg_sq[i] = tensor->max_exp_avg_sq;
      if constexpr (kMaster) table.master_param[i] = tensor->master_param;
      table.chunks.add(tensor->numel, kAdamChunk<P, S, kMaster>);
    }
    if (table.chunks.num_chunks > 0) {
      launch(device_index, adam_kernel<P, S, kAmsgrad, kMaster>, table.chunks.num_chunks, kThreads, 0, table,
             coefficients, found_inf);
    }
    coefficients += table.chunks.num_tensors;
  }
}

// Tensors of one pair of dtypes. Flags are those of the call: an empty tensor's pointers may all be null.
void launch_adam(const AdamTensor* begin, const AdamTensor* end, bool amsgrad, bool has_master,
                 const AdamCoefficients* coefficients, ScalarRef found_inf, int32_t device_index) {
  FLOAT_SWITCH(begin->param_dtype, P, [&] {
    constexpr bool kIsHalf = sizeof(P) == 2;
    BOOL_SWITCH(kIsHalf && begin->state_dtype == ScalarType::Float, kFloatState, [&] {
      using S = std::conditional_t<kIsHalf && kFloatState, float, P>;
      BOOL_SWITCH(amsgrad, kAmsgrad, [&] {
        BOOL_SWITCH(kIsHalf && has_master, kMaster, [&] {
          launch_adam_kernel<P, S, kAmsgrad, kIsHalf && kMaster>(begin, end, coefficients, found_inf, device_index);
        });
      });
    });
  });
}

void launch_prepare_step(const std::vector<AdamTensor>& tensors, const AdamOptions& options, PartialSums sums,
                         AdamCoefficients* coefficients, int32_t device_index) {
  for (auto tensor = tensors.begin(); tensor != tensors.end();) {
    StepTable table;
    for (; tensor != tensors.end() && table.num_steps < StepTable::kCapacity; ++tensor) {
      table.step[table.num_steps++] = tensor->step;
    }
    launch(device_index, prepare_step_kernel, ceil_div(table.num_steps, kThreads), kThreads, 0, table, options, sums,
           coefficients);
    coefficients += table.num_steps;
  }
}

void adam_cuda(const AdamCall& call) {
  const AdamOptions& options = call.options;
  const int32_t device_index = call.device.index;
  const auto dtypes = [](const AdamTensor& t) { return std::make_pair(t.param_dtype, t.state_dtype); };
  std::vector<AdamTensor> tensors = call.tensors;
  sort_by(tensors, dtypes);
  const bool has_master =
      std::any_of(tensors.begin(), tensors.end(), [](const AdamTensor& t) { return t.master_param; });
  std::vector<Gradient> grads;
  if (options.needs_norm() && !options.grad_norm) grads = gradients_of(tensors);

  // What the kernels hand on to one another: coefficients [n], partial sums.
  constexpr int64_t kCoefficients = sizeof(AdamCoefficients) / sizeof(double);
  const int64_t n = tensors.size(), num_sums = num_partial_sums(grads);
  const Tensor scratch = new_scratch(n * kCoefficients + num_sums, ScalarType::Double, call.device);
  auto* coefficients = static_cast<AdamCoefficients*>(scratch.data_ptr());
  const PartialSums sums{reinterpret_cast<double*>(coefficients + n), num_sums};

  launch_partial_sums(grads, sums.data, device_index);
  launch_prepare_step(tensors, options, sums, coefficients, device_index);
  for_each_run(tensors, dtypes, [&](const AdamTensor* begin, const AdamTensor* end) {
    launch_adam(begin, end, options.amsgrad, has_master, coefficients + (begin - tensors.data()), options.found_inf,
                device_index);
  });
}

Tensor grad_norm_cuda(TensorList grads, std::optional<Tensor> grad_scale) {
  Staging staging;
  std::vector<Gradient> gradients = checked_gradients(grads, staging);
  const Device device = device_of(grads[0]);
  sort_by(gradients, [](const Gradient& grad) { return grad.dtype; });

  const Tensor out = torch::stable::new_empty(grads[0], {}, ScalarType::Double);
  const int64_t num_sums = num_partial_sums(gradients);
  const Tensor scratch = new_scratch(num_sums, ScalarType::Double, device);
  const PartialSums sums{static_cast<double*>(scratch.data_ptr()), num_sums};
  launch_partial_sums(gradients, sums.data, device.index);
  launch(device.index, finish_norm_kernel, 1, kThreads, 0, sums, scalar_ref("grad_scale", grad_scale, device),
         static_cast<double*>(out.data_ptr()));
  return out;
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CUDA, m) {
  using Ops = bigkern::AdamOps<bigkern::adam_cuda>;
  m.impl("adam_", TORCH_BOX(&Ops::adam_));
  m.impl("adam_kept_", TORCH_BOX(&Ops::adam_kept_));
  m.impl("grad_norm", TORCH_BOX(&bigkern::grad_norm_cuda));
}
