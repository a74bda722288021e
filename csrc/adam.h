// What a step of Adam needs beyond its tensors, for every device: options, scalars in memory, and the numbers that are
// the same for all elements of a tensor (Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2).
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstdint>

namespace bigkern {

using torch::headeronly::ScalarType;

// One float32 or float64 in the memory of the parameters' device; false where the argument is absent.
struct ScalarRef {
  void* data = nullptr;
  bool is_double = false;

  C10_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
  C10_HOST_DEVICE double get() const {
    return is_double ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
  }
  C10_HOST_DEVICE void set(double value) const {
    if (is_double) {
      *static_cast<double*>(data) = value;
    } else {
      *static_cast<float*>(data) = static_cast<float>(value);
    }
  }
};

// One parameter with its gradient and states: `numel` elements each, at the same offsets.
struct AdamTensor {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  void* master_param;    // null without master weights
  ScalarRef step;        // steps done so far
  int64_t numel;
  ScalarType param_dtype;  // of param and grad
  ScalarType state_dtype;  // of exp_avg, exp_avg_sq and max_exp_avg_sq
};

// The same with types, or a part of it: P is the type of parameters and gradients, S of the states.
template <class P, class S>
struct AdamStreams {
  P* param;
  const P* grad;
  S* exp_avg;
  S* exp_avg_sq;
  S* max_exp_avg_sq;
  float* master_param;
};

struct Gradient {
  const void* data;
  int64_t numel;
  ScalarType dtype;
};

struct AdamOptions {
  double lr, beta1, beta2, weight_decay, eps;
  bool amsgrad, maximize, decoupled_weight_decay, check_inf;
  double max_grad_norm;  // infinite: no clipping
  ScalarRef lr_tensor, grad_scale, found_inf, grad_norm, grad_norm_out;

  C10_HOST_DEVICE bool clips() const { return max_grad_norm != INFINITY; }
  C10_HOST_DEVICE bool needs_norm() const { return check_inf || clips(); }
};

// What multiplies every gradient: the sign of the objective, the inverse of the loss scale, and the factor of
// torch.nn.utils.clip_grad_norm_. A NaN norm makes NaN, as it does there.
C10_HOST_DEVICE inline double gradient_factor(const AdamOptions& options, double grad_norm) {
  double factor = options.maximize ? -1.0 : 1.0;
  if (options.grad_scale) factor /= options.grad_scale.get();
  if (options.clips()) {
    const double clip = options.max_grad_norm / (grad_norm + 1e-6);
    if (!(clip >= 1.0)) factor *= clip;
  }
  return factor;
}

// The numbers of a step that are the same for all elements of a tensor.
struct AdamCoefficients {
  double grad_factor;
  double l2;     // weight decay as a part of the gradient (Adam); 0 for AdamW
  double decay;  // weight decay as a factor of the parameter (AdamW); 1 for Adam
  double beta1, beta2;
  double step_size;                  // lr / (1 - beta1^step)
  double inv_sqrt_bias_correction2;  // 1 / sqrt(1 - beta2^step)
  double eps;
};

// `step` counts this step: 1 for the first.
C10_HOST_DEVICE inline AdamCoefficients adam_coefficients(const AdamOptions& options, double step, double grad_factor) {
  const double lr = options.lr_tensor ? options.lr_tensor.get() : options.lr;
  const bool decoupled = options.decoupled_weight_decay;
  return {grad_factor,
          decoupled ? 0.0 : options.weight_decay,
          decoupled ? 1.0 - lr * options.weight_decay : 1.0,
          options.beta1,
          options.beta2,
          lr / (1.0 - pow(options.beta1, step)),
          1.0 / sqrt(1.0 - pow(options.beta2, step)),
          options.eps};
}

}  // namespace bigkern
