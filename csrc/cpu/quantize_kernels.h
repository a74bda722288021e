// Quantisation of a row, for one instruction set; included by each_isa.h.

// scale = max|x| / 127, q = round(x / scale)
template <class V, class T>
BK_TARGET float quantize_row(const FloatRows& x, int64_t i, int8_t* values) {
  const T* row = static_cast<const T*>(x.data) + i * x.row;
  const int64_t n = x.cols;
  float largest = 0;
  bool is_finite = true;
  for (int64_t k = 0; k < n; ++k) {
    const float value = std::fabs(static_cast<float>(row[k]));
    largest = std::max(largest, value);
    is_finite &= value <= std::numeric_limits<float>::max();
  }
  const float scale = x.static_scale != nullptr ? x.scale_of(i) : largest / 127;
  if (!is_finite || scale == 0) {
    std::memset(values, 0, n);
    return is_finite ? scale : std::numeric_limits<float>::quiet_NaN();
  }
  for (int64_t k = 0; k < n; ++k) {
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
