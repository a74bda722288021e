// The attention ops of a device, given its kernels: allocates what they return.
#pragma once

#include <limits>
#include <tuple>
#include <vector>

#include "attention_call.h"

namespace bigkern {

// A tensor with the sizes of `like` but for the last, dense, in the order of memory of `like`: [B, H, L, E] or, where a
// position's heads lie side by side, [B, L, H, E].
inline Tensor empty_like_attention(const Tensor& like, int64_t last) {
  const ScalarType dtype = like.scalar_type();
  if (like.dim() == 3) return empty_in_order(like, {like.size(0), like.size(1), last}, {2, 1, 0}, dtype);
  const std::vector<int64_t> sizes{like.size(0), like.size(1), like.size(2), last};
  if (like.stride(1) < like.stride(2)) return empty_in_order(like, sizes, {3, 1, 2, 0}, dtype);
  return empty_in_order(like, sizes, {3, 2, 1, 0}, dtype);
}

// attention, given a device's forward.
template <Memory memory, void (*forward)(const AttentionProblem&)>
std::tuple<Tensor, Tensor, Tensor> attention_op(Tensor query, Tensor key, Tensor value, ATTENTION_PARAMETERS) {
  const AttentionOptions options = ATTENTION_ARGUMENTS;
  AttentionDoor door(query, key, value, options, memory);
  AttentionProblem& problem = door.problem;
  Tensor out = empty_like_attention(query, problem.value_dim);
  Tensor row_max = door.empty_stats(), row_sum = door.empty_stats();
  if (options.seqlens_q) {  // the rows that aren't there
    torch::stable::zero_(out);
    torch::stable::fill_(row_max, -std::numeric_limits<double>::infinity());
    torch::stable::zero_(row_sum);
  }
  problem.out = strided(out, options.is_packed());
  door.read_stats(row_max, row_sum);
  forward(problem);
  return {out, row_max, row_sum};
}

// attention_backward, given a device's. `mask_grad` adds to zeros.
template <Memory memory, void (*backward)(const AttentionBackwardProblem&),
          void (*mask_grad)(const AttentionBackwardProblem&)>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_op(Tensor grad_out, OptionalTensor grad_lse, Tensor query,
                                                                 Tensor key, Tensor value, Tensor out, Tensor row_max,
                                                                 Tensor row_sum, ATTENTION_PARAMETERS,
                                                                 bool needs_mask_grad, bool deterministic) {
  const AttentionOptions options = ATTENTION_ARGUMENTS;
  AttentionDoor door(query, key, value, options, memory);
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

  AttentionBackwardProblem p{&problem};
  p.deterministic = deterministic;
  p.grad_out = strided(grad_out, is_packed);
  if (grad_lse) p.grad_lse = strided_stats(*grad_lse, is_packed);
  const Tensor delta = door.empty_stats();
  p.delta = strided_stats(delta, is_packed);
  Tensor grad_query = empty_like_attention(query, problem.head_dim);
  Tensor grad_key = empty_like_attention(key, problem.head_dim);
  Tensor grad_value = empty_like_attention(value, problem.value_dim);
  if (options.seqlens_q) torch::stable::zero_(grad_query);  // rows that aren't there
  if (options.seqlens_k) {
    torch::stable::zero_(grad_key);
    torch::stable::zero_(grad_value);
  }
  p.grad_query = strided(grad_query, is_packed);
  p.grad_key = strided(grad_key, is_packed);
  p.grad_value = strided(grad_value, is_packed);
  backward(p);

  Tensor grad = torch::stable::new_empty(query, {0});
  if (needs_mask_grad) {
    const Tensor& mask = *options.attn_mask;
    grad = torch::stable::new_empty(mask, {mask.size(0), mask.size(1), mask.size(2), mask.size(3)});
    torch::stable::zero_(grad);
    p.grad_mask = strided(grad, false);
    mask_grad(p);
  }
  return {grad_query, grad_key, grad_value, grad};
}

// attention_weights, given a device's, which writes to `weights` over (batch entry, head, query, key): those of each
// head, or if it has no stride of heads, their mean.
template <Memory memory, void (*write)(const AttentionProblem&, const AnyStrided& weights)>
Tensor attention_weights_op(Tensor query, Tensor key, Tensor row_max, Tensor row_sum, ATTENTION_PARAMETERS,
                            bool average_heads) {
  const AttentionOptions options = ATTENTION_ARGUMENTS;
  BK_CHECK(!options.is_packed(), "attention_weights is for the padded layout: cu_seqlens can't be given");
  AttentionDoor door(query, key, std::nullopt, options, memory);
  door.read_stats(row_max, row_sum);
  const int64_t B = query.size(0), H = query.size(1), L = query.size(2), S = key.size(2);
  const std::vector<int64_t> sizes = average_heads ? std::vector<int64_t>{B, L, S} : std::vector<int64_t>{B, H, L, S};
  Tensor weights = torch::stable::new_empty(query, sizes);
  torch::stable::zero_(weights);
  write(door.problem, average_heads ? AnyStrided{weights.data_ptr(), L * S, 0, S, 1}
                                    : AnyStrided{weights.data_ptr(), H * L * S, L * S, S, 1});
  return weights;
}

}  // namespace bigkern
