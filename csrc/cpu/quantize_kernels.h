// Quantisation of a row, for one instruction set; included by each_isa.h.

// max|x|; NaN if an element is NaN or infinite.
template <class V, class T>
BK_TARGET float largest_magnitude(const T* x, int64_t n) {
  using Reg = typename V::Reg;
  const Reg zero = V::set(0);
  constexpr int kSums = 4;                      // hide the latency
  constexpr int64_t kAhead = 2048 / sizeof(T);  // fetched beyond the end of a page too, where the hardware stops
  Reg largest[kSums] = {zero, zero, zero, zero};
  Reg nothing[kSums] = {zero, zero, zero, zero};  // of x * 0, which is NaN for the others
  int64_t k = 0;
  for (; k + kSums * V::kWidth <= n; k += kSums * V::kWidth) {
    for (int j = 0; j < kSums * V::kWidth; j += 64 / sizeof(T)) __builtin_prefetch(x + k + j + kAhead);
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) {
      const Reg v = V::load(x + k + s * V::kWidth);
      largest[s] = V::max(largest[s], V::max(v, V::sub(zero, v)));
      nothing[s] = V::fma(v, zero, nothing[s]);
    }
  }
  float result = 0, rest = 0;
  for (int s = 0; s < kSums; ++s) {
    result = std::max(result, V::reduce_max(largest[s]));
    rest += V::sum(nothing[s]);
  }
  for (; k < n; ++k) {
    const float v = static_cast<float>(x[k]);
    result = std::max(result, std::fabs(v));
    rest += v * 0;
  }
  return rest == 0 ? result : std::numeric_limits<float>::quiet_NaN();
}

// x / scale, correctly rounded: by its reciprocal and one correction (Markstein 1990), in a third of a division's time.
template <class V, bool kByReciprocal>
BK_TARGET __attribute__((always_inline)) inline typename V::Reg quotient(typename V::Reg x, float scale) {
  if constexpr (kByReciprocal) {
    const typename V::Reg reciprocal = V::set(1 / scale), q = V::mul(x, reciprocal);
    return V::fma(V::fma(q, V::set(-scale), x), reciprocal, q);
  } else {
    return V::div(x, V::set(scale));
  }
}

template <class V, bool kByReciprocal, bool kSaturates, class T>
BK_TARGET void quantize(const T* x, int64_t n, float scale, int8_t* values) {
  using Reg = typename V::Reg;
  int64_t k = 0;
  for (; k + V::kWidth <= n; k += V::kWidth) {
    Reg q = quotient<V, kByReciprocal>(V::load(x + k), scale);
    if constexpr (kSaturates) {
      const Reg zero = V::set(0), low = V::set(-127);
      q = V::max(low, V::sub(zero, V::max(low, V::sub(zero, q))));
    }
    store_int8<V>(values + k, q);
  }
  for (; k < n; ++k) {
    const float steps = std::nearbyint(static_cast<float>(x[k]) / scale);
    values[k] = static_cast<int8_t>(std::min(std::max(steps, -127.0f), 127.0f));
  }
}

// scale = max|x| / 127 or static, q = round(x / scale)
template <class V, class T>
BK_TARGET float quantize_row(const FloatRows& x, int64_t i, int8_t* values) {
  const T* row = static_cast<const T*>(x.data) + i * x.row;
  const float largest = largest_magnitude<V>(row, x.cols);
  const bool is_static = x.static_scale != nullptr;
  const float scale = std::isnan(largest) ? largest : is_static ? x.scale_of(i) : largest / 127;
  if (!(scale > 0)) {
    std::memset(values, 0, x.cols);
    return scale;
  }
  // Of a scale that is denormal, and coarse, there may be more than 127 steps as well. Where the correction of a
  // quotient is denormal it is too small to matter, if the scale is in this range.
  const bool saturates = is_static || largest / scale > 127;
  const bool is_plain = V::kWidth > 1 && scale > 1e-18f && scale < 1e18f && largest / scale < 1e18f;
  if (is_plain) {
    (saturates ? quantize<V, true, true, T> : quantize<V, true, false, T>)(row, x.cols, scale, values);
  } else {
    quantize<V, false, true>(row, x.cols, scale, values);
  }
  return scale;
}

inline QuantizeRow quantize_row_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return &quantize_row<Float, Half>;
    case ScalarType::BFloat16: return &quantize_row<Float, BFloat16>;
    default: return &quantize_row<Float, float>;
  }
}
