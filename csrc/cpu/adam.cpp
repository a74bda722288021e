// adam_ and grad_norm on the CPU: the work of a whole parameter group, cut evenly over the threads.
#include "../adam_call.h"
#include "rounding.h"

namespace bigkern {

using AdamKernel = void (*)(const AdamTensor&, const AdamCoefficients&, int64_t begin, int64_t end);
using SumOfSquares = double (*)(const void* data, int64_t n);

}  // namespace bigkern

#define BK_KERNELS "adam_kernels.h"
#include "each_isa.h"

namespace bigkern {

namespace {

// Work is cut into blocks of one tensor's elements, at places that don't depend on the number of threads. Shares are
// counted in units of 64 elements, a tensor of any size costing one more, so that one huge tensor, thousands of tiny
// ones and any mixture split evenly.
constexpr int64_t kUnit = 64;
constexpr int64_t kUnitsPerBlock = 64;
constexpr int64_t kBlock = kUnit * kUnitsPerBlock;
constexpr int64_t kGrain = 16 * kUnitsPerBlock;

// Calls f(tensor, begin, end) for ranges of whole blocks that cover all tensors, from several threads.
template <class F>
void parallel_over_blocks(const std::vector<int64_t>& numels, const F& f) {
  std::vector<int64_t> start(numels.size() + 1, 0);  // units before each tensor
  for (size_t i = 0; i < numels.size(); ++i) start[i + 1] = start[i] + ceil_div(numels[i], kUnit) + 1;

  torch::stable::parallel_for(0, start.back(), kGrain, [&](int64_t units_begin, int64_t units_end) {
    // A block belongs to the thread in whose share it starts.
    const auto first_element = [&](size_t tensor, int64_t unit) {
      return std::max<int64_t>(0, ceil_div(unit - start[tensor], kUnitsPerBlock)) * kBlock;
    };
    size_t tensor = std::upper_bound(start.begin(), start.end(), units_begin) - start.begin() - 1;
    for (; tensor < numels.size() && start[tensor] < units_end; ++tensor) {
      const int64_t begin = first_element(tensor, units_begin);
      const int64_t end = std::min(first_element(tensor, units_end), numels[tensor]);
      if (begin < end) f(tensor, begin, end);
    }
  });
}

// The error grows with log2(n), not with n.
double pairwise_sum(const double* x, int64_t n) {
  if (n <= 2) return n == 2 ? x[0] + x[1] : n == 1 ? x[0] : 0.0;
  return pairwise_sum(x, n / 2) + pairwise_sum(x + n / 2, n - n / 2);
}

double norm(const std::vector<Gradient>& grads) {
  constexpr int64_t kPart = 512;  // elements that are summed up one after another
  static_assert(kBlock % kPart == 0);
  std::vector<int64_t> numels, first_part;
  int64_t num_parts = 0;
  for (const Gradient& grad : grads) {
    numels.push_back(grad.numel);
    first_part.push_back(num_parts);
    num_parts += ceil_div(grad.numel, kPart);
  }
  std::vector<double> sums(num_parts);
  const auto kernel = select(scalar::sum_of_squares_kernel, avx2::sum_of_squares_kernel, avx512::sum_of_squares_kernel);
  parallel_over_blocks(numels, [&](size_t tensor, int64_t begin, int64_t end) {
    const Gradient& grad = grads[tensor];
    const SumOfSquares sum_of_squares = kernel(grad.dtype);
    const int64_t element_size = grad.dtype == ScalarType::Double ? 8 : grad.dtype == ScalarType::Float ? 4 : 2;
    for (int64_t i = begin; i < end; i += kPart) {
      sums[first_part[tensor] + i / kPart] =
          sum_of_squares(static_cast<const char*>(grad.data) + i * element_size, std::min(kPart, end - i));
    }
  });
  return std::sqrt(pairwise_sum(sums.data(), num_parts));
}

double unscaled(double norm, ScalarRef grad_scale) { return grad_scale ? norm / grad_scale.get() : norm; }

double known_or_computed_norm(const AdamCall& call) {
  const AdamOptions& options = call.options;
  return options.grad_norm ? options.grad_norm.get() : unscaled(norm(gradients_of(call.tensors)), options.grad_scale);
}

void adam_cpu(const AdamCall& call) {
  const AdamOptions& options = call.options;
  const double grad_norm = options.needs_norm() ? known_or_computed_norm(call) : 0.0;
  if (options.grad_norm_out) options.grad_norm_out.set(grad_norm);
  if (options.check_inf && !std::isfinite(grad_norm)) options.found_inf.set(1.0);
  if (options.found_inf && options.found_inf.get() != 0.0) return;

  const auto kernel = select(scalar::adam_kernel, avx2::adam_kernel, avx512::adam_kernel);  // may raise
  const double grad_factor = gradient_factor(options, grad_norm);
  const int64_t n = call.tensors.size();
  std::vector<AdamCoefficients> coefficients(n);
  std::vector<int64_t> numels(n);
  torch::stable::parallel_for(0, n, /*grain_size=*/256, [&](int64_t begin, int64_t end) {
    double previous_step = 0.0;  // tensors mostly share their step: its powers are computed once
    for (int64_t i = begin; i < end; ++i) {
      const AdamTensor& t = call.tensors[i];
      const double step = t.step.get() + 1.0;
      t.step.set(step);
      coefficients[i] = step == previous_step ? coefficients[i - 1] : adam_coefficients(options, step, grad_factor);
      previous_step = step;
      numels[i] = t.numel;
    }
  });
  parallel_over_blocks(numels, [&](size_t tensor, int64_t begin, int64_t end) {
    const AdamTensor& t = call.tensors[tensor];
    kernel(t)(t, coefficients[tensor], begin, end);
  });
}

Tensor grad_norm_cpu(TensorList grads, std::optional<Tensor> grad_scale) {
  Staging staging;
  const std::vector<Gradient> gradients = checked_gradients(grads, staging);
  Tensor out = torch::stable::empty({}, ScalarType::Double);
  const ScalarRef scale = scalar_ref("grad_scale", grad_scale, device_of(out));
  *static_cast<double*>(out.data_ptr()) = unscaled(norm(gradients), scale);
  return out;
}

int64_t adam_keep(TensorList params, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList max_exp_avg_sqs,
                  TensorList state_steps, TensorList master_params) {
  return reinterpret_cast<int64_t>(new AdamLists{std::move(params), std::move(exp_avgs), std::move(exp_avg_sqs),
                                                 std::move(max_exp_avg_sqs), std::move(state_steps),
                                                 std::move(master_params)});
}

void adam_forget(int64_t kept) { delete reinterpret_cast<AdamLists*>(kept); }

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) {
  using Ops = bigkern::AdamOps<bigkern::adam_cpu>;
  m.impl("adam_", TORCH_BOX(&Ops::adam_));
  m.impl("adam_kept_", TORCH_BOX(&Ops::adam_kept_));
  m.impl("grad_norm", TORCH_BOX(&bigkern::grad_norm_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(bigkern, CompositeExplicitAutograd, m) {
  m.impl("adam_keep", TORCH_BOX(&bigkern::adam_keep));
  m.impl("adam_forget", TORCH_BOX(&bigkern::adam_forget));
}
