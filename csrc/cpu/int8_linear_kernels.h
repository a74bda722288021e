// What follows the sums of int8_linear, for one instruction set; included by each_isa.h.
#include "math_kernels.h"

inline float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu: return x < 0 ? 0 : x;
    case Activation::kGelu: return 0.5f * x * (1 + std::erf(x * 0.70710678118654752f));
    case Activation::kGeluTanh: return 0.5f * x * (1 + std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case Activation::kSilu: return x / (1 + std::exp(-x));
    default: return x;
  }
}

template <class V, class T>
BK_TARGET void finish_unit(const LinearProblem& problem, const Int8Unit& unit, const int32_t* tile) {
  for (int64_t i = 0; i < unit.num_rows; ++i) {
    const float scale = problem.x_scale[unit.i_begin + i];
    T* out = static_cast<T*>(problem.out) + (unit.i_begin + i) * problem.cols + unit.j_begin;
    for (int64_t j = 0; j < unit.num_cols; ++j) {
      float y = static_cast<float>(tile[i * kTileCols + j]) * (scale * problem.weight_scale[unit.j_begin + j]);
      if (problem.bias != nullptr) y += problem.bias[unit.j_begin + j];
      out[j] = static_cast<T>(activate(problem.activation, y));
    }
  }
}

inline FinishUnit finish_unit_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return &finish_unit<Float, Half>;
    case ScalarType::BFloat16: return &finish_unit<Float, BFloat16>;
    default: return &finish_unit<Float, float>;
  }
}
