// Quantisation of a row, for one instruction set; included by each_isa.h.

// max|x|; NaN if an element is NaN or infinite.
template <class V, class T>
BK_TARGET float largest_magnitude(const T* x, int64_t n) {
  using Reg = typename V::Reg;
  const Reg zero = V::set(0);
  constexpr int kSums = 4;  // hide the latency
  Reg largest[kSums] = {zero, zero, zero, zero};
  Reg nothing[kSums] = {zero, zero, zero, zero};  // of x * 0, which is NaN for the others
  int64_t k = 0;
  for (; k + kSums * V::kWidth <= n; k += kSums * V::kWidth) {
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

// scale = max|x| / 127 or static, q = round(x / scale)
template <class V, class T>
BK_TARGET float quantize_row(const FloatRows& x, int64_t i, int8_t* values) {
  const T* row = static_cast<const T*>(x.data) + i * x.row;
  const int64_t n = x.cols;
  const bool is_static = x.static_scale != nullptr;
  const float largest = largest_magnitude<V>(row, n);
  const float scale = std::isnan(largest) ? largest : is_static ? x.scale_of(i) : largest / 127;
  if (!(scale > 0)) {
    std::memset(values, 0, n);
    return scale;
  }
  using Reg = typename V::Reg;
  const Reg s = V::set(scale), low = V::set(-127), zero = V::set(0);
  int64_t k = 0;
  if (is_static || largest / scale > 127) {  // saturates; or the scale is denormal, and coarse
    for (; k + V::kWidth <= n; k += V::kWidth) {
      const Reg minus = V::max(low, V::sub(zero, V::div(V::load(row + k), s)));
      store_int8<V>(values + k, V::max(low, V::sub(zero, minus)));
    }
  } else {
    for (; k + V::kWidth <= n; k += V::kWidth) store_int8<V>(values + k, V::div(V::load(row + k), s));
  }
  for (; k < n; ++k) {
    const float steps = std::nearbyint(static_cast<float>(row[k]) / scale);
    values[k] = static_cast<int8_t>(std::min(std::max(steps, -127.0f), 127.0f));
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
