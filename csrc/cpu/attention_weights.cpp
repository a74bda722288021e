// attention_weights on the CPU.
#include "../attention_call.h"
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

Tensor attention_weights_op(Tensor query, Tensor key, Tensor row_max, Tensor row_sum, ATTENTION_PARAMETERS,
                            bool average_heads) {
  const AttentionOptions options = ATTENTION_ARGUMENTS;
  BK_CHECK(!options.is_packed(), "attention_weights is for the padded layout: cu_seqlens can't be given");
  AttentionDoor door(query, key, std::nullopt, options);
  const AttentionProblem& problem = door.problem;
  door.read_stats(row_max, row_sum);
  const int64_t B = query.size(0), H = problem.heads, L = query.size(2), S = key.size(2);
  Tensor weights =
      torch::stable::new_empty(query, average_heads ? std::vector<int64_t>{B, L, S} : std::vector<int64_t>{B, H, L, S});
  torch::stable::zero_(weights);
  const AnyStrided rows = average_heads ? AnyStrided{weights.data_ptr(), L * S, 0, S, 1}
                                        : AnyStrided{weights.data_ptr(), H * L * S, L * S, S, 1};

  std::vector<AttentionWeightsUnit> units;
  const int64_t heads_at_once = average_heads ? H : 1;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = problem.sequences[b].q_len;
    for (int64_t h = 0; h < H; h += heads_at_once) {
      for (int64_t i = 0; i < length; i += kBackwardBlockQ) {
        units.push_back({b, h, heads_at_once, i, std::min(kBackwardBlockQ, length - i)});
      }
    }
  }
  const AttentionWeightsKernel kernel = select(scalar::attention_weights_kernel, avx2::attention_weights_kernel,
                                               avx512::attention_weights_kernel)(problem.dtype);
  run_units(units, work_of(problem), [&](const AttentionWeightsUnit& unit) { kernel(problem, rows, unit); });
  return weights;
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) { m.impl("attention_weights", TORCH_BOX(&bigkern::attention_weights_op)); }
