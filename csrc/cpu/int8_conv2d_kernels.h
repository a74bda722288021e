// What int8_conv2d does besides multiplying, for one instruction set; included by each_isa.h.
#include "quantize_kernels.h"

template <class T>
float row_magnitude(const void* x, int64_t n) {
  return largest_magnitude<Float, T>(static_cast<const T*>(x), n);
}

inline RowMagnitude row_magnitude_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return &row_magnitude<Half>;
    case ScalarType::BFloat16: return &row_magnitude<BFloat16>;
    default: return &row_magnitude<float>;
  }
}
