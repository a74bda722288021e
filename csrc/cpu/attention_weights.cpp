// attention_weights on the CPU.
#include "../attention_ops.h"
#include "../philox.h"
#include "attention_units.h"
#include "workspace.h"

namespace bigkern {

using AttentionWeightsKernel = void (*)(const AttentionProblem&, const AnyStrided& weights,
                                        const AttentionWeightsUnit&);

}  // namespace bigkern

#define BK_KERNELS "attention_weights_kernels.h"
#include "each_isa.h"

namespace bigkern {

namespace {

void attention_weights(const AttentionProblem& problem, const AnyStrided& weights) {
  std::vector<AttentionWeightsUnit> units;
  const int64_t heads_at_once = weights.head == 0 ? problem.heads : 1;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t length = problem.sequence(b).q_len;
    for (int64_t h = 0; h < problem.heads; h += heads_at_once) {
      for (int64_t i = 0; i < length; i += kBackwardBlockQ) {
        units.push_back({b, h, heads_at_once, i, std::min(kBackwardBlockQ, length - i)});
      }
    }
  }
  const AttentionWeightsKernel kernel = select(scalar::attention_weights_kernel, avx2::attention_weights_kernel,
                                               avx512::attention_weights_kernel)(problem.dtype);
  run_units(units, work_of(problem), [&](const AttentionWeightsUnit& unit) { kernel(problem, weights, unit); });
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) {
  using namespace bigkern;
  m.impl("attention_weights", TORCH_BOX((&attention_weights_op<Memory::kHost, attention_weights>)));
}
