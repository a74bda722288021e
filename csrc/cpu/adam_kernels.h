// Adam's micro-kernels for one instruction set; included by each_isa.h.

// The coefficients, broadcast to the lanes of a register.
template <class V>
struct AdamLanes {
  typename V::Reg grad_factor, l2, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size,
      inv_sqrt_bias_correction2, eps;
  bool has_l2;

  BK_TARGET explicit AdamLanes(const AdamCoefficients& c) {
    using T = typename V::Scalar;
    grad_factor = V::set(T(c.grad_factor));
    l2 = V::set(T(c.l2));
    decay = V::set(T(c.decay));
    beta1 = V::set(T(c.beta1));
    one_minus_beta1 = V::set(T(1.0 - c.beta1));
    beta2 = V::set(T(c.beta2));
    one_minus_beta2 = V::set(T(1.0 - c.beta2));
    step_size = V::set(T(-c.step_size));
    inv_sqrt_bias_correction2 = V::set(T(c.inv_sqrt_bias_correction2));
    eps = V::set(T(c.eps));
    has_l2 = c.l2 != 0.0;
  }
};

// One register's width of the step, at offset i.
template <class V, bool kAmsgrad, bool kMaster, class P, class S>
BK_TARGET __attribute__((always_inline)) inline void adam_update(const AdamStreams<P, S>& t, const AdamLanes<V>& c,
                                                                 int64_t i) {
  using Reg = typename V::Reg;
  Reg param;
  if constexpr (kMaster) {
    param = V::load(t.master_param + i);
  } else {
    param = V::load(t.param + i);
  }
  // g = grad * factor + l2 * param
  Reg grad = V::mul(V::load(t.grad + i), c.grad_factor);
  if (c.has_l2) grad = V::fma(c.l2, param, grad);  // not always: 0 * inf would be NaN
  // m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
  const Reg exp_avg = V::fma(c.beta1, V::load(t.exp_avg + i), V::mul(c.one_minus_beta1, grad));
  Reg exp_avg_sq = V::fma(c.beta2, V::load(t.exp_avg_sq + i), V::mul(c.one_minus_beta2, V::mul(grad, grad)));
  V::store(t.exp_avg + i, exp_avg);
  V::store(t.exp_avg_sq + i, exp_avg_sq);
  if constexpr (kAmsgrad) {
    exp_avg_sq = V::max(V::load(t.max_exp_avg_sq + i), exp_avg_sq);
    V::store(t.max_exp_avg_sq + i, exp_avg_sq);
  }
  // param = decay * param - step_size * m / (sqrt(v) / sqrt(bias_correction2) + eps)
  const Reg denominator = V::fma(V::sqrt(exp_avg_sq), c.inv_sqrt_bias_correction2, c.eps);
  param = V::fma(c.step_size, V::div(exp_avg, denominator), V::mul(param, c.decay));
  if constexpr (kMaster) V::store(t.master_param + i, param);
  V::store(t.param + i, param);
}

// Elements [begin, end) of a tensor.
template <class V, bool kAmsgrad, bool kMaster, class P, class S>
BK_TARGET void adam_range(const AdamTensor& tensor, const AdamCoefficients& coefficients, int64_t begin, int64_t end) {
  const AdamStreams<P, S> t{static_cast<P*>(tensor.param),          static_cast<const P*>(tensor.grad),
                            static_cast<S*>(tensor.exp_avg),        static_cast<S*>(tensor.exp_avg_sq),
                            static_cast<S*>(tensor.max_exp_avg_sq), static_cast<float*>(tensor.master_param)};
  const AdamLanes<V> c(coefficients);
  int64_t i = begin;
  for (; i + V::kWidth <= end; i += V::kWidth) adam_update<V, kAmsgrad, kMaster>(t, c, i);
  if (i == end) return;

  // The tail goes through a full register as well, so that an element's result doesn't depend on where it lies.
  P param[V::kWidth]{}, grad[V::kWidth]{};
  S exp_avg[V::kWidth]{}, exp_avg_sq[V::kWidth]{}, max_exp_avg_sq[V::kWidth]{};
  float master_param[V::kWidth]{};
  const int64_t n = end - i;
  std::copy_n(t.param + i, n, param);
  std::copy_n(t.grad + i, n, grad);
  std::copy_n(t.exp_avg + i, n, exp_avg);
  std::copy_n(t.exp_avg_sq + i, n, exp_avg_sq);
  if constexpr (kAmsgrad) std::copy_n(t.max_exp_avg_sq + i, n, max_exp_avg_sq);
  if constexpr (kMaster) std::copy_n(t.master_param + i, n, master_param);
  adam_update<V, kAmsgrad, kMaster>(AdamStreams<P, S>{param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master_param},
                                    c, 0);
  std::copy_n(param, n, t.param + i);
  std::copy_n(exp_avg, n, t.exp_avg + i);
  std::copy_n(exp_avg_sq, n, t.exp_avg_sq + i);
  if constexpr (kAmsgrad) std::copy_n(max_exp_avg_sq, n, t.max_exp_avg_sq + i);
  if constexpr (kMaster) std::copy_n(master_param, n, t.master_param + i);
}

template <class V, class P, class S>
AdamKernel adam_kernel_of(bool amsgrad, bool has_master) {
  if constexpr (sizeof(P) == 2) {
    if (has_master) return amsgrad ? &adam_range<V, true, true, P, S> : &adam_range<V, false, true, P, S>;
  }
  return amsgrad ? &adam_range<V, true, false, P, S> : &adam_range<V, false, false, P, S>;
}

inline AdamKernel adam_kernel(const AdamTensor& t) {
  const bool amsgrad = t.max_exp_avg_sq != nullptr, master = t.master_param != nullptr;
  const bool has_float_state = t.state_dtype == ScalarType::Float;
  switch (t.param_dtype) {
    case ScalarType::Double: return adam_kernel_of<Double, double, double>(amsgrad, master);
    case ScalarType::Half:
      return has_float_state ? adam_kernel_of<Float, Half, float>(amsgrad, master)
                             : adam_kernel_of<Float, Half, Half>(amsgrad, master);
    case ScalarType::BFloat16:
      return has_float_state ? adam_kernel_of<Float, BFloat16, float>(amsgrad, master)
                             : adam_kernel_of<Float, BFloat16, BFloat16>(amsgrad, master);
    default: return adam_kernel_of<Float, float, float>(amsgrad, master);
  }
}

// The sum of squares of n elements, in float64, which holds the square of any float32.
template <class T>
BK_TARGET double sum_of_squares(const void* data, int64_t n) {
  const T* x = static_cast<const T*>(data);
  typename Double::Reg sum0 = Double::set(0.0), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  int64_t i = 0;
  for (; i + 4 * Double::kWidth <= n; i += 4 * Double::kWidth) {
    const typename Double::Reg x0 = Double::load(x + i), x1 = Double::load(x + i + Double::kWidth);
    const typename Double::Reg x2 = Double::load(x + i + 2 * Double::kWidth);
    const typename Double::Reg x3 = Double::load(x + i + 3 * Double::kWidth);
    sum0 = Double::fma(x0, x0, sum0);
    sum1 = Double::fma(x1, x1, sum1);
    sum2 = Double::fma(x2, x2, sum2);
    sum3 = Double::fma(x3, x3, sum3);
  }
  double sum = Double::sum(Double::add(Double::add(sum0, sum1), Double::add(sum2, sum3)));
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

inline SumOfSquares sum_of_squares_kernel(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return &sum_of_squares<double>;
    case ScalarType::Half: return &sum_of_squares<Half>;
    case ScalarType::BFloat16: return &sum_of_squares<BFloat16>;
    default: return &sum_of_squares<float>;
  }
}
