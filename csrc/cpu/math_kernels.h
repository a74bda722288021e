// exp2, exp and tanh in the vector unit, for one instruction set; included by an op's kernels.

// 2^x = 2^n * (1 + f * q(f)), n whole and |f| <= 1/2; q interpolates (2^f - 1) / f at Chebyshev nodes, to 1e-8 for
// float, 2e-17 for double.
template <class V>
struct Exp2Parts {
  typename V::Reg n, f, q;
};

template <class V>
BK_TARGET __attribute__((always_inline)) inline Exp2Parts<V> exp2_parts(typename V::Reg x) {
  using Reg = typename V::Reg;
  using T = typename V::Scalar;
  const Reg n = V::round(x);
  const Reg f = V::sub(x, n);
  Reg q;
  if constexpr (sizeof(T) == 4) {
    q = V::set(1.5453163e-4f);
    q = V::fma(q, f, V::set(1.33908633e-3f));
    q = V::fma(q, f, V::set(9.61808302e-3f));
    q = V::fma(q, f, V::set(5.55035695e-2f));
    q = V::fma(q, f, V::set(2.40226507e-1f));
    q = V::fma(q, f, V::set(6.93147182e-1f));
  } else {
    q = V::set(2.5729324177362305e-11);
    q = V::fma(q, f, V::set(4.4558179083360645e-10));
    q = V::fma(q, f, V::set(7.0548973041554995e-09));
    q = V::fma(q, f, V::set(1.0178057087733941e-07));
    q = V::fma(q, f, V::set(1.3215486808705563e-06));
    q = V::fma(q, f, V::set(1.5252733841556773e-05));
    q = V::fma(q, f, V::set(1.5403530393370734e-04));
    q = V::fma(q, f, V::set(1.333355814640647e-03));
    q = V::fma(q, f, V::set(9.61812910762848e-03));
    q = V::fma(q, f, V::set(5.5504108664821625e-02));
    q = V::fma(q, f, V::set(2.4022650695910072e-01));
    q = V::fma(q, f, V::set(6.931471805599453e-01));
  }
  return {n, f, q};
}

// 2^x for x <= 127; what would be denormal is 0, since products of denormals are slow. NaN stays NaN.
template <class V>
BK_TARGET __attribute__((always_inline)) inline typename V::Reg exp2(typename V::Reg x) {
  using T = typename V::Scalar;
  constexpr T kLeast = sizeof(T) == 4 ? -126 : -1022;
  const auto [n, f, q] = exp2_parts<V>(x);
  return V::keep_unless_less(V::scale(V::fma(f, q, V::set(T(1))), n), x, V::set(kLeast));
}

// (e^2x - 1) / (e^2x + 1), with e^2x - 1 = 2^n * f * q + (2^n - 1): to a few roundings of the result, near 0 as well.
template <class V>
BK_TARGET __attribute__((always_inline)) inline typename V::Reg tanh(typename V::Reg x) {
  using Reg = typename V::Reg;
  using T = typename V::Scalar;
  constexpr T kOne = 20;  // tanh is 1 from here on
  x = V::sub(V::set(T(0)), V::max(V::set(-kOne), V::sub(V::set(T(0)), V::max(V::set(-kOne), x))));
  const auto [n, f, q] = exp2_parts<V>(V::mul(x, V::set(T(2.885390081777926815))));  // 2 / ln 2
  const Reg power = V::scale(V::set(T(1)), n);
  const Reg expm1 = V::fma(power, V::mul(f, q), V::sub(power, V::set(T(1))));
  return V::div(expm1, V::add(expm1, V::set(T(2))));
}
