// attention_backward on the CPU.
#include "../attention_call.h"
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
    const auto [q_begin, q_len, k_begin, k_len] = problem.sequences[b];
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

void attention_mask_grad(const AttentionBackwardProblem& backward, int64_t num_rows, int64_t num_cols) {
  const AttentionProblem& problem = *backward.forward;
  std::vector<AttentionMaskUnit> units;
  for (const ColumnRange& b : blocks(problem.mask_batch, problem.batch, 1)) {
    for (const ColumnRange& h : blocks(problem.mask_heads, problem.heads, 1)) {
      for (const ColumnRange& i : blocks(problem.mask_rows, num_rows, kBackwardBlockQ)) {
        for (const ColumnRange& j : blocks(problem.mask_cols, num_cols, kBlockKV)) units.push_back({b, h, i, j});
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

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

BackwardResult attention_backward_op(Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value,
                                     Tensor out, Tensor row_max, Tensor row_sum, ATTENTION_PARAMETERS,
                                     bool needs_mask_grad, bool /*deterministic: always*/) {
  const AttentionOptions options = ATTENTION_ARGUMENTS;
  AttentionDoor door(query, key, value, options);
  AttentionProblem& problem = door.problem;
  const bool is_packed = options.is_packed();
  const ScalarType accumulated = accumulation_type(problem.dtype);
  door.read_stats(row_max, row_sum);
  door.check_out("out", out);
  door.check_out("grad_out", grad_out);
  if (grad_lse) door.check_like("grad_lse", *grad_lse, row_max, "row_max", accumulated);
  BK_CHECK(!needs_mask_grad || (options.attn_mask && problem.mask_dtype != ScalarType::Bool),
           "needs_mask_grad needs an additive attn_mask, got ", options.attn_mask ? "a bool one" : "none");
  problem.out = strided(out, is_packed);
  // An expanded gradient, as a sum gives, is copied once instead of being read element by element for each tile.
  if (grad_out.stride(grad_out.dim() - 1) != 1) grad_out = torch::stable::contiguous(grad_out);

  AttentionBackwardProblem backward{&problem};
  backward.grad_out = strided(grad_out, is_packed);
  if (grad_lse) backward.grad_lse = strided_stats(*grad_lse, is_packed);
  const Tensor delta = door.empty_stats();
  backward.delta = strided_stats(delta, is_packed);
  Tensor grad_query = empty_like_attention(query, problem.head_dim);
  Tensor grad_key = empty_like_attention(key, problem.head_dim);
  Tensor grad_value = empty_like_attention(value, problem.value_dim);
  if (options.seqlens_q) torch::stable::zero_(grad_query);  // rows that aren't there
  if (options.seqlens_k) {
    torch::stable::zero_(grad_key);
    torch::stable::zero_(grad_value);
  }
  backward.grad_query = strided(grad_query, is_packed);
  backward.grad_key = strided(grad_key, is_packed);
  backward.grad_value = strided(grad_value, is_packed);
  attention_backward(backward);

  Tensor grad_mask = torch::stable::new_empty(query, {0});
  if (needs_mask_grad) {
    const Tensor& mask = *options.attn_mask;
    grad_mask = torch::stable::new_empty(mask, {mask.size(0), mask.size(1), mask.size(2), mask.size(3)});
    torch::stable::zero_(grad_mask);
    backward.grad_mask = strided(grad_mask, false);
    attention_mask_grad(backward, query.size(2), key.size(2));
  }
  return {grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) { m.impl("attention_backward", TORCH_BOX(&bigkern::attention_backward_op)); }
