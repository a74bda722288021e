// weight_only_linear on the CPU.
#include "../int8_mm_call.h"
#include "int8_vec.h"
#include "rounding.h"
#include "units.h"

namespace bigkern {

struct WeightOnlyProblem {
  int64_t rows, depth, cols, group_size, num_groups;
  const float* x;             // [rows, depth]
  const int8_t* weight;       // [cols, depth]
  const float* weight_scale;  // [cols, num_groups]
  const float* bias;          // [cols] or nullptr
  void* out;                  // [rows, cols]
};

using WeightOnlyUnit = void (*)(const WeightOnlyProblem&, int64_t j_begin, int64_t j_end);
using WeightOnlyChoice = WeightOnlyUnit (*)(ScalarType, bool is_grouped);

}  // namespace bigkern

#define BK_KERNELS "weight_only_linear_kernels.h"
#include "each_isa.h"

namespace bigkern {

namespace {

constexpr int64_t kUnitCols = 32;  // their weights and four rows of x fit the L2 cache up to K = 8,192

Tensor weight_only_linear_op(Tensor x, Tensor weight_q, Tensor weight_scale, OptionalTensor bias, int64_t group_size) {
  const WeightOnlyCall call = check_weight_only(x, weight_q, weight_scale, group_size);
  TensorList keep;
  const auto contiguous = [&keep](const Tensor& t) {
    keep.push_back(torch::stable::contiguous(t));
    return keep.back().data_ptr();
  };
  const Tensor wide = x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float);
  Tensor out = torch::stable::new_empty(x, with_last(x, call.N), x.scalar_type());
  const WeightOnlyProblem problem{call.rows,
                                  call.K,
                                  call.N,
                                  call.group_size,
                                  call.num_groups,
                                  static_cast<const float*>(contiguous(wide)),
                                  static_cast<const int8_t*>(contiguous(weight_q)),
                                  read_weight_scale(weight_scale, x, keep),
                                  read_bias(bias, x, call.N, keep),
                                  out.data_ptr()};
  const WeightOnlyUnit unit = select<WeightOnlyChoice>(scalar::weight_only_unit_of, avx2::weight_only_unit_of,
                                                       avx512::weight_only_unit_of)(x.scalar_type(), group_size > 0);
  std::vector<int64_t> begins;
  for (int64_t j = 0; j < call.N; j += kUnitCols) begins.push_back(j);
  run_units(begins, static_cast<double>(call.rows) * call.N * call.K,
            [&](int64_t begin) { unit(problem, begin, std::min(begin + kUnitCols, call.N)); });
  return out;
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) { m.impl("weight_only_linear", TORCH_BOX(&bigkern::weight_only_linear_op)); }
