// What int8_conv2d does besides quantising and multiplying, for one instruction set; included by each_isa.h.
#include "int8_linear_kernels.h"

// max|x|, or infinity if one of them isn't finite.
template <class T>
BK_TARGET float largest_magnitude(const void* x, int64_t n) {
  using V = Float;
  const T* p = static_cast<const T*>(x);
  typename V::Reg largest = V::set(0), not_finite = V::set(0);
  T tail[V::kWidth] = {};
  for (int64_t i = 0; i < n; i += V::kWidth) {
    const T* from = p + i;
    if (i + V::kWidth > n) {
      std::copy_n(from, n - i, tail);
      from = tail;
    }
    const typename V::Reg a = V::load(from);
    largest = V::max(V::max(a, V::sub(V::set(0), a)), largest);
    not_finite = V::fma(a, V::set(0), not_finite);
  }
  return V::sum(not_finite) == 0 ? V::reduce_max(largest) : std::numeric_limits<float>::infinity();
}

inline LargestMagnitude largest_magnitude_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return &largest_magnitude<Half>;
    case ScalarType::BFloat16: return &largest_magnitude<BFloat16>;
    default: return &largest_magnitude<float>;
  }
}
