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

using FinishUnit = void (*)(const LinearProblem&, const Int8Unit&, const int32_t* tile);
using FinishChoice = FinishUnit (*)(ScalarType, Activation);

}  // namespace bigkern
