// What follows the sums of int8_linear, for one instruction set; included by each_isa.h.
#include "math_kernels.h"

template <class V>
BK_TARGET __attribute__((always_inline)) inline typename V::Reg negate(typename V::Reg x) {
  return V::sub(V::set(0), x);
}

template <class V>
BK_TARGET __attribute__((always_inline)) inline typename V::Reg min(typename V::Reg a, typename V::Reg b) {
  return negate<V>(V::max(negate<V>(a), negate<V>(b)));  // b where either is NaN
}

template <class V>
BK_TARGET __attribute__((always_inline)) inline typename V::Reg relu(typename V::Reg x) {
  return V::max(V::set(0), x);
}

// x Phi(x) = max(x, 0) - t (1 - Phi(t)), t = |x|. 1 - Phi(t) = 2^(r(t) - t^2 / (2 ln 2)), where r was fitted from 0 to
// 8 so that the error of the whole is below 1e-7 x; beyond, the last term is less than 1e-14.
template <class V>
BK_TARGET __attribute__((always_inline)) inline typename V::Reg gelu(typename V::Reg x) {
  using Reg = typename V::Reg;
  const Reg t = min<V>(V::set(8), V::max(negate<V>(x), x));
  Reg r = V::set(3.6097316e-7f);
  r = V::fma(r, t, V::set(-7.2896923e-6f));
  r = V::fma(r, t, V::set(6.0987491e-5f));
  r = V::fma(r, t, V::set(-2.3822230e-4f));
  r = V::fma(r, t, V::set(-7.3595060e-5f));
  r = V::fma(r, t, V::set(7.0321001e-3f));
  r = V::fma(r, t, V::set(-5.2501459e-2f));
  r = V::fma(r, t, V::set(0.26214981f));
  r = V::fma(r, t, V::set(-1.1511081f));
  r = V::fma(r, t, V::set(-0.99999982f));
  const Reg tail = exp2<V>(V::fma(V::mul(t, t), V::set(-0.72134752f), r));
  return V::sub(relu<V>(x), V::mul(t, tail));
}

// x / (1 + e^-x)
template <class V>
BK_TARGET __attribute__((always_inline)) inline typename V::Reg silu(typename V::Reg x) {
  const typename V::Reg power = exp2<V>(min<V>(V::set(126), V::mul(x, V::set(-1.44269504f))));
  return V::div(x, V::add(V::set(1), power));
}

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
template <class V>
BK_TARGET __attribute__((always_inline)) inline typename V::Reg gelu_tanh(typename V::Reg x) {
  const typename V::Reg factor = V::fma(V::mul(x, x), V::set(0.044715f * 0.79788456f), V::set(0.79788456f));
  const typename V::Reg half = V::mul(x, V::set(0.5f));
  return V::fma(half, tanh<V>(V::mul(x, factor)), half);
}

template <class V, Activation kActivation>
BK_TARGET __attribute__((always_inline)) inline typename V::Reg activate(typename V::Reg x) {
  if constexpr (kActivation == Activation::kRelu) return relu<V>(x);
  if constexpr (kActivation == Activation::kGelu) return gelu<V>(x);
  if constexpr (kActivation == Activation::kGeluTanh) return gelu_tanh<V>(x);
  if constexpr (kActivation == Activation::kSilu) return silu<V>(x);
  return x;
}

// Y = act(sums * (x_scale x weight_scale) + bias), of one unit.
template <class V, class T, Activation kActivation>
BK_TARGET void finish_unit(const LinearProblem& problem, const Int8Unit& unit, const int32_t* tile) {
  using Reg = typename V::Reg;
  // Whole registers, which the tile has as well.
  float weight_scale[kTileCols] = {}, bias[kTileCols] = {};
  std::copy_n(problem.weight_scale + unit.j_begin, unit.num_cols, weight_scale);
  if (problem.bias != nullptr) std::copy_n(problem.bias + unit.j_begin, unit.num_cols, bias);
  for (int64_t i = 0; i < unit.num_rows; ++i, tile += kTileCols) {
    const Reg x_scale = V::set(problem.x_scale[unit.i_begin + i]);
    T* out = static_cast<T*>(problem.out) + (unit.i_begin + i) * problem.cols + unit.j_begin;
    T last[V::kWidth];
    for (int64_t j = 0; j < unit.num_cols; j += V::kWidth) {
      const Reg scale = V::mul(x_scale, V::load(weight_scale + j));
      const Reg y = activate<V, kActivation>(V::fma(load_int<V>(tile + j), scale, V::load(bias + j)));
      const bool is_whole = j + V::kWidth <= unit.num_cols;
      V::store(is_whole ? out + j : last, y);
      if (!is_whole) std::copy_n(last, unit.num_cols - j, out + j);
    }
  }
}

template <class T>
FinishUnit finish_unit_of(Activation activation) {
  switch (activation) {
    case Activation::kRelu: return &finish_unit<Float, T, Activation::kRelu>;
    case Activation::kGelu: return &finish_unit<Float, T, Activation::kGelu>;
    case Activation::kGeluTanh: return &finish_unit<Float, T, Activation::kGeluTanh>;
    case Activation::kSilu: return &finish_unit<Float, T, Activation::kSilu>;
    default: return &finish_unit<Float, T, Activation::kNone>;
  }
}

inline FinishUnit finish_unit_of(ScalarType dtype, Activation activation) {
  switch (dtype) {
    case ScalarType::Half: return finish_unit_of<Half>(activation);
    case ScalarType::BFloat16: return finish_unit_of<BFloat16>(activation);
    default: return finish_unit_of<float>(activation);
  }
}
