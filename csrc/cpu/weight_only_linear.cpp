// weight_only_linear on the CPU.
#include "../int8_mm_call.h"
#include "rounding.h"
#include "units.h"

namespace bigkern {

struct WeightOnlyProblem {
  int64_t rows, depth, cols, group_size, num_groups;
  const float* x;             // [rows, depth]
  const int8_t* weight;       // [cols, depth]
  const float* weight_scale;  // [cols, num_groups]
  const float* bias;          // [cols] or nullptr
  float* out;                 // [rows, cols]
};

using WeightOnlyUnit = void (*)(const WeightOnlyProblem&, int64_t j_begin, int64_t j_end);

}  // namespace bigkern

#define BK_KERNELS "weight_only_linear_kernels.h"
#include "each_isa.h"

namespace bigkern {

namespace {

Tensor weight_only_linear_op(Tensor x, Tensor weight_q, Tensor weight_scale, OptionalTensor bias, int64_t group_size) {
  check_float("x", x.scalar_type());
  check_int8("weight_q", weight_q);
  BK_CHECK(x.dim() > 0, "x must have shape [..., K], got []");
  BK_CHECK(weight_q.dim() == 2 && weight_q.size(1) == x.size(x.dim() - 1),
           "weight_q must have shape [N, K] with the last size of x ", shape(x), " as K, got ", shape(weight_q));
  check_same_device("weight_q", weight_q, "x", x);
  const int64_t N = weight_q.size(0), K = weight_q.size(1);
  BK_CHECK(group_size >= 0, "group_size must be 0 (whole rows) or positive, got ", group_size);
  const int64_t num_groups = group_size == 0 ? 1 : ceil_div(K, group_size);
  if (group_size == 0) {
    BK_CHECK(weight_scale.dim() == 1 && weight_scale.size(0) == N, "weight_scale must have shape [", N, "], got ",
             shape(weight_scale));
  } else {
    BK_CHECK(weight_scale.dim() == 2 && weight_scale.size(0) == N && weight_scale.size(1) == num_groups,
             "weight_scale must have shape [", N, ", ", num_groups, "] for group_size ", group_size, ", got ",
             shape(weight_scale));
  }
  TensorList keep;
  const auto contiguous = [&keep](const Tensor& t) {
    keep.push_back(torch::stable::contiguous(t));
    return keep.back().data_ptr();
  };
  const Tensor wide = x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float);
  Tensor out = torch::stable::new_empty(x, with_last(x, N), ScalarType::Float);
  const int64_t rows = numel(x) / std::max<int64_t>(K, 1);
  const WeightOnlyProblem problem{K == 0 ? numel(out) / std::max<int64_t>(N, 1) : rows,
                                  K,
                                  N,
                                  group_size == 0 ? K : group_size,
                                  num_groups,
                                  static_cast<const float*>(contiguous(wide)),
                                  static_cast<const int8_t*>(contiguous(weight_q)),
                                  read_weight_scale(weight_scale, x, keep),
                                  read_bias(bias, x, N, keep),
                                  static_cast<float*>(out.data_ptr())};
  const WeightOnlyUnit unit = select(scalar::weight_only_unit<scalar::Float>, avx2::weight_only_unit<avx2::Float>,
                                     avx512::weight_only_unit<avx512::Float>);
  torch::stable::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) { unit(problem, begin, end); });
  return x.scalar_type() == ScalarType::Float ? out : torch::stable::to(out, x.scalar_type());
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) { m.impl("weight_only_linear", TORCH_BOX(&bigkern::weight_only_linear_op)); }
