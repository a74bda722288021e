// What follows the sums of a product, for the ops that end with it.
#pragma once

#include "../int8_mm.h"
#include "int8_gemm.h"

namespace bigkern {

struct LinearProblem {
  const float *x_scale, *weight_scale, *bias;  // [rows], [cols], [cols] or nullptr
  Activation activation;
  void* out;  // [rows, cols]
  int64_t cols;
};

// Writes Y = act(sums * (x_scale x weight_scale) + bias) of a unit to `out`.
using FinishUnit = void (*)(const LinearProblem&, const Int8Unit&, const int32_t* tile);

// For an output of so a dtype.
FinishUnit finish_unit_kernel(ScalarType dtype, Activation activation);

}  // namespace bigkern
