// Quantisation of a row, for the ops that begin with it.
#pragma once

#include "../int8_mm.h"

namespace bigkern {

// Writes row i in int8 to `values` [cols] and returns its scale.
using QuantizeRow = float (*)(const FloatRows& x, int64_t i, int8_t* values);

// For x of so a dtype.
QuantizeRow quantize_row_kernel(ScalarType dtype);

}  // namespace bigkern
