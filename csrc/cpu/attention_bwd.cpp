// attention_backward on the CPU.
#include "../attention_ops.h"
#include "../philox.h"
#include "attention_units.h"
#include "workspace.h"

namespace bigkern {

struct AttentionBackwardKernels {
  void (*run)(const AttentionBackwardProblem&, const AttentionBackwardUnit&);
  void (*delta)(const AttentionBackwardProblem&, int64_t b, int64_t h);
  void (*mask_grad)(const AttentionBackwardProblem&, const AttentionMaskUnit&);
};

}  // namespace bigkern

#define BK_KERNELS "attention_bwd_kernels.h"
#include "each_isa.h"

namespace bigkern {

namespace {

struct Head {
  int64_t b, h;
};

AttentionBackwardKernels kernels_of(const AttentionBackwardProblem& backward) {
  return select(scalar::backward_kernels_of<scalar::Float>, avx2::backward_kernels_of<avx2::Float>,
                avx512::backward_kernels_of<avx512::Float>)(backward);
}

// One unit for each entry and head of keys computes each tile once. Where that leaves threads idle, units of queries
// and units of keys compute each tile twice, but are many. The sums are the same, in the same order.
std::vector<AttentionBackwardUnit> units_of(const AttentionProblem& problem) {
  std::vector<AttentionBackwardUnit> units;
  const int64_t group = problem.group(), num_heads = problem.batch * problem.kv_heads;
  const bool at_once = num_heads % torch::stable::get_num_threads() == 0 || num_heads > 64;
  constexpr int64_t kQueries = 2 * kBackwardBlockQ;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const auto [q_begin, q_len, k_begin, k_len] = problem.sequence(b);
    for (int64_t kv_head = 0; kv_head < problem.kv_heads; ++kv_head) {
      const int64_t h = kv_head * group;
      if (at_once) {
        units.push_back({b, h, group, 0, q_len, 0, k_len, true, true});
        continue;
      }
      for (int64_t j = 0; j < k_len; j += kBlockKV) {
        units.push_back({b, h, group, 0, q_len, j, std::min(j + kBlockKV, k_len), false, true});
      }
      for (int64_t g = 0; g < group; ++g) {
        for (int64_t i = q_len == 0 ? 0 : (q_len - 1) / kQueries * kQueries; i >= 0; i -= kQueries) {
          units.push_back({b, h + g, 1, i, std::min(i + kQueries, q_len), 0, k_len, true, false});
        }
      }
    }
  }
  return units;
}

// All that the mask's element at `index` is broadcast to, or `block` of its elements.
std::vector<ColumnRange> blocks(int64_t mask_size, int64_t size, int64_t block) {
  if (mask_size == 1) return {{0, size}};
  std::vector<ColumnRange> ranges;
  for (int64_t begin = 0; begin < mask_size; begin += block) ranges.push_back({begin, std::min(begin + block, size)});
  return ranges;
}

void attention_mask_grad(const AttentionBackwardProblem& backward) {
  const AttentionProblem& problem = *backward.forward;
  std::vector<AttentionMaskUnit> units;
  for (const ColumnRange& b : blocks(problem.mask_batch, problem.batch, 1)) {
    for (const ColumnRange& h : blocks(problem.mask_heads, problem.heads, 1)) {
      for (const ColumnRange& i : blocks(problem.mask_rows, problem.q_rows, kBackwardBlockQ)) {
        for (const ColumnRange& j : blocks(problem.mask_cols, problem.k_rows, kBlockKV)) units.push_back({b, h, i, j});
      }
    }
  }
  const AttentionBackwardKernels kernels = kernels_of(backward);
  run_units(units, work_of(problem), [&](const AttentionMaskUnit& unit) { kernels.mask_grad(backward, unit); });
}

void attention_backward(const AttentionBackwardProblem& backward) {
  const AttentionProblem& problem = *backward.forward;
  const AttentionBackwardKernels kernels = kernels_of(backward);
  std::vector<Head> heads;
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t h = 0; h < problem.heads; ++h) heads.push_back({b, h});
  }
  const double work = work_of(problem);
  run_units(heads, work, [&](const Head& head) { kernels.delta(backward, head.b, head.h); });

  std::vector<AttentionBackwardUnit> units = units_of(problem);
  const int64_t element_size = problem.dtype == ScalarType::Double ? sizeof(double) : sizeof(float);
  const int64_t row = round_up(problem.head_dim, 16);
  run_units(units, work, [&](const AttentionBackwardUnit& unit) {
    if (!unit.owns_queries) return kernels.run(backward, unit);
    AttentionBackwardUnit own = unit;
    Workspace sums;  // for the time of the unit: they may be large
    own.grad_query = sums.take<char>(unit.num_heads * (unit.i_end - unit.i_begin) * row * element_size);
    kernels.run(backward, own);
  });
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) {
  using namespace bigkern;
  m.impl("attention_backward",
         TORCH_BOX((&attention_backward_op<Memory::kHost, attention_backward, attention_mask_grad>)));
}
