// Table of contents: every op of bigkern. The contract of each is the docstring of its public function in bigkern/ops/.
#include <torch/csrc/stable/library.h>

// Options of a step, the same for both ops that make one.
#define ADAM_OPTIONS                                                                                                \
  "*, float lr, float beta1, float beta2, float weight_decay, float eps, bool amsgrad=False, bool maximize=False, " \
  "bool decoupled_weight_decay=False, Tensor? lr_tensor=None, Tensor? grad_scale=None, "                            \
  "Tensor(g!)? found_inf=None, bool check_inf=False, float? max_grad_norm=None, Tensor? grad_norm=None, "           \
  "Tensor(h!)? grad_norm_out=None"

// What attention is made of, the same for forward, backward and weights. Padded layout: query [B, H, L, E], key
// [B, Hkv, S, E], value [B, Hkv, S, Ev], with seqlens [B] where entries are shorter. Packed layout, where cu_seqlens
// [B + 1] are given: [total, H, E]. philox is (seed, offset) of the dropout mask.
#define ATTENTION_OPTIONS                                                                                 \
  "Tensor? attn_mask=None, Tensor? alibi_slopes=None, Tensor? philox=None, Tensor? cu_seqlens_q=None, "   \
  "Tensor? cu_seqlens_k=None, Tensor? seqlens_q=None, Tensor? seqlens_k=None, *, SymInt max_seqlen_q=0, " \
  "SymInt max_seqlen_k=0, float scale, bool is_causal=False, int window_left=-1, int window_right=-1, "   \
  "float softcap=0.0, float dropout_p=0.0"

STABLE_TORCH_LIBRARY(bigkern, m) {
  // One Adam step of a parameter group. Lists run over the group's tensors; max_exp_avg_sqs and master_params may be
  // empty.
  m.def(
      "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, Tensor(f!)[] master_params, " ADAM_OPTIONS ") -> ()");
  // The same for lists that are handed over once: long ones take the dispatcher longer than the step.
  m.def(
      "adam_keep(Tensor[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] max_exp_avg_sqs, "
      "Tensor[] state_steps, Tensor[] master_params) -> int");
  m.def("adam_kept_(int kept, Tensor[] grads, " ADAM_OPTIONS ") -> ()");
  m.def("adam_forget(int kept) -> ()");
  m.def("grad_norm(Tensor[] grads, Tensor? grad_scale=None) -> Tensor");

  // row_max and row_sum are the softmax's largest score and denominator, [B, H, L] or packed [H, total].
  m.def("attention(Tensor query, Tensor key, Tensor value, " ATTENTION_OPTIONS
        ") -> (Tensor out, Tensor row_max, Tensor row_sum)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor row_max, Tensor row_sum, " ATTENTION_OPTIONS
      ", bool needs_mask_grad=False, bool deterministic=False) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)");
  // The softmax itself, [B, H, L, S], or its mean over the heads, [B, L, S].
  m.def("attention_weights(Tensor query, Tensor key, Tensor row_max, Tensor row_sum, " ATTENTION_OPTIONS
        ", bool average_heads=False) -> Tensor");

  // a [M, K] or [B, M, K], b [K, N] or [B, K, N], int8, to int32.
  m.def("int8_mm(Tensor a, Tensor b) -> Tensor");
  // The product times row_scale [M], in float32 or out_dtype.
  m.def("int8_scaled_mm(Tensor a, Tensor b, Tensor row_scale, *, ScalarType? out_dtype=None) -> Tensor");
  // To int8 and the scale of each row, float32. static_scale has one element, or one for each row.
  m.def("quantize_rows(Tensor x, Tensor? static_scale=None) -> (Tensor values, Tensor scale)");
  // The same of x * factor, [K] over the columns, rounded at random by philox, (seed, offset), but right on average.
  m.def("quantize_rows_stochastic(Tensor x, Tensor philox, Tensor? factor=None) -> (Tensor values, Tensor scale)");
  // weight_q [N, K] in the order that int8_linear reads: of one dimension, which tells it from the plain one.
  m.def("pack_weight(Tensor weight_q) -> Tensor");
  m.def("unpack_weight(Tensor packed, SymInt N, SymInt K) -> Tensor");
  // x [..., K], weight_q [N, K] or packed, weight_scale [N], bias [N]; x_scale as static_scale above. activation: relu,
  // gelu, gelu_tanh or silu.
  m.def(
      "int8_linear(Tensor x, Tensor weight_q, Tensor weight_scale, Tensor? bias=None, Tensor? x_scale=None, *, "
      "str? activation=None, ScalarType? out_dtype=None) -> Tensor");
  // x [N, C, H, W], with the images in the order [N, H, W, C] if channels_last, as then the output. weight_q
  // [O, C / groups, kH, kW], or packed: pack_weight of each group's [O / groups, kH * kW * C / groups], one after
  // another; small groups as one, with zeros where they don't meet. padding: top, bottom, left, right. x_scale has one
  // element, or one for each image.
  m.def(
      "int8_conv2d(Tensor x, Tensor weight_q, Tensor weight_scale, Tensor? bias=None, Tensor? x_scale=None, *, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups=1, str? activation=None, "
      "ScalarType? out_dtype=None, bool channels_last=False) -> Tensor");
  // weight_scale [N], or with a group_size [N, ceil(K / group_size)].
  m.def(
      "weight_only_linear(Tensor x, Tensor weight_q, Tensor weight_scale, Tensor? bias=None, *, int group_size=0) -> "
      "Tensor");

  // What `bigkern info` asks the compiled libraries.
  m.def("cpu_isa() -> str");
  m.def("best_cpu_isa() -> str");
  m.def("cuda_toolkit() -> str");
}
