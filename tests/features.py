"""What the ops can do, each feature with the tests that show it. README's tables are made of this:
a backend has a feature if one of its tests runs over it (tools/readme.py)."""

from typing import NamedTuple


class Feature(NamedTuple):
    text: str
    tests: str  # of tests/, as file::function
    torch: str = "-"
    arguments: str = ""  # of the ops' schemas, that it stands for
    nobody: bool = False  # the tests are of its refusal


class Table(NamedTuple):
    ops: str
    torch: str  # what the last column compares with
    features: list[Feature]


ADAM = Table(
    "adam_ grad_norm",
    "torch fused",
    [
        Feature(
            "float32, float64, float16, bfloat16",
            "test_adam::test_accuracy_over_100_steps",
            "yes",
            "params grads exp_avgs exp_avg_sqs state_steps lr beta1 beta2 eps",
        ),
        Feature(
            "parameters, gradients and states of any strides",
            "test_adam::test_layouts",
            "dense ones",
        ),
        Feature(
            "amsgrad, maximize, L2 and decoupled weight decay",
            "test_adam::test_accuracy_over_100_steps",
            "yes",
            "max_exp_avg_sqs amsgrad maximize weight_decay decoupled_weight_decay",
        ),
        Feature(
            "tensor lr, per-parameter step; capturable",
            "test_adam::test_scalars_in_tensors",
            "yes",
            "lr_tensor",
        ),
        Feature(
            "GradScaler: unscale and skip in the kernel",
            "test_adam::test_found_inf_changes_nothing test_adam::test_scalars_in_tensors",
            "yes",
            "grad_scale found_inf",
        ),
        Feature(
            "looks for inf and NaN in the kernel",
            "test_grad_norm::test_check_inf_finds_and_skips",
            arguments="check_inf",
        ),
        Feature(
            "clips the global norm in the kernel (`max_grad_norm`)",
            "test_grad_norm::test_clipping_equals_clip_grad_norm_then_step",
            arguments="max_grad_norm grad_norm grad_norm_out",
        ),
        Feature(
            "float32 states (`state_dtype`) and master weights for half parameters",
            "test_adam::test_float32_states_and_master_weights_of_half_parameters",
            arguments="master_params",
        ),
        Feature(
            "sparse gradients, complex parameters, `differentiable`",
            "test_adam::test_sparse_gradients_are_refused test_optim::test_what_is_refused",
            nobody=True,
        ),
    ],
)

# Two tests whose cases are named after the features.
TRITON = (
    "test_attention_triton::test_accuracy test_attention_triton::test_accuracy_of_other_kernels"
)
RAW_OPS = f"test_attention::test_raw_ops {TRITON}"

ATTENTION = Table(
    "attention attention_backward attention_weights",
    "torch, CPU (fused)",
    [
        Feature(
            "float32, bfloat16, float16; any lengths and strides, heads of any size to 256",
            f"test_attention::test_function {TRITON}",
            "yes",
            "query key value scale out row_max row_sum grad_out",
        ),
        Feature(
            "float64; heads of any size",
            "test_attention_grad::test_query_key_value",
            "yes",
        ),
        Feature(
            "bool and additive masks, of any shape that broadcasts",
            f"test_attention::test_function {TRITON}",
            "yes",
            "attn_mask",
        ),
        Feature(
            "gradient of an additive mask",
            f"test_attention_backward::test_gradient_of_a_mask {TRITON}",
            arguments="needs_mask_grad",
        ),
        Feature(
            "dropout, of the same mask on each backend, recomputed from a counter in the backward",
            "test_attention_features::test_the_mask_of_dropout_is_the_documented_one "
            "test_attention_triton::test_the_mask_of_dropout_is_the_documented_one",
            arguments="dropout_p philox",
        ),
        Feature(
            "top-left causal; bottom-right causal and sliding window",
            RAW_OPS,
            "top-left",
            "is_causal window_left window_right",
        ),
        Feature("softcap, ALiBi", RAW_OPS, "-", "softcap alibi_slopes"),
        Feature("grouped queries, without copies of the keys", RAW_OPS),
        Feature(
            "log-sum-exp, with its gradient",
            RAW_OPS,
            arguments="grad_lse",
        ),
        Feature(
            "the weights themselves, or their mean over the heads",
            RAW_OPS,
            arguments="average_heads",
        ),
        Feature(
            "packed sequences (`varlen_attention`)",
            f"test_attention::test_packed_sequences {TRITON}",
            arguments="cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
        ),
        Feature(
            "few queries against many keys, split over all cores or SMs; key-value cache",
            f"test_kv_cache::test_prompt_and_steps_equal_the_whole {TRITON}",
            arguments="seqlens_q seqlens_k",
        ),
        Feature(
            "same bits for every number of threads",
            "test_attention_features::test_bits_do_not_depend_on_threads "
            "test_attention_triton::test_same_bits_in_any_order_of_blocks",
            "not promised",
            "deterministic",
        ),
        Feature(
            "second derivative",
            "test_attention_grad::test_double_backward_is_refused",
            nobody=True,
        ),
    ],
)

INT8 = Table(
    "int8_mm quantize_rows pack_weight unpack_weight int8_linear weight_only_linear int8_conv2d "
    "quantize_rows_stochastic int8_scaled_mm",
    "torch, CPU",
    [
        Feature(
            "`int8_mm`: int8 by int8 to int32, exact, the full range",
            "test_int8_mm::test_longest_sums_that_fit_int32",
            "`_int_mm`",
            "a b",
        ),
        Feature(
            "any sizes, also empty; any strides; batches that broadcast",
            "test_int8_mm::test_product test_int8_mm::test_batches_broadcast",
            "2-D",
        ),
        Feature(
            "`int8_linear`: rows quantized on the fly, bias, activation, all in one op",
            "test_int8_mm::test_linear",
            "`quantize_dynamic`: ReLU",
            "weight_q weight_scale bias activation",
        ),
        Feature(
            "the input in float32, bfloat16, float16: all 8 bits, each row with its own scale",
            "test_int8_mm::test_quantize_rows",
            "float32, 7 bits, one scale",
            "x out_dtype",
        ),
        Feature(
            "a static scale",
            "test_int8_mm::test_linear_with_static_scale",
            "yes",
            "static_scale x_scale",
        ),
        Feature(
            "a weight that is packed once, or not",
            "test_int8_mm::test_pack_and_unpack",
            "packed",
            "packed N K",
        ),
        Feature(
            "`weight_only_linear`: int8 weight, scales by row or group",
            "test_int8_mm::test_weight_only",
            "private ops",
            "group_size",
        ),
        Feature(
            "`int8_conv2d`: stride, padding, dilation, groups; channels last",
            "test_int8_conv2d::test_is_the_reference",
            "static scales",
            "kernel_size stride padding dilation groups channels_last",
        ),
        Feature(
            "training: gradients by int8 products, rounded stochastically",
            "test_int8_training::test_int8_gradients_are_products_of_int8",
            arguments="philox factor",
        ),
        Feature(
            "- and products with a scale by row",
            "test_int8_scaled_mm::test_is_the_reference",
            arguments="row_scale",
        ),
        Feature(
            "gradient of the input and the bias",
            "test_int8_layers::test_forward_backward_and_state_on_each_device",
        ),
        Feature(
            "`torch.compile(fullgraph=True)`",
            "test_int8_torch::test_compile_without_graph_breaks",
        ),
        Feature(
            "NaN and infinities give NaN, in their row alone",
            "test_int8_mm::test_rows_that_are_not_finite_are_nan_and_others_are_not",
        ),
    ],
)

TABLES = {"Adam, AdamW": ADAM, "attention": ATTENTION, "INT8": INT8}
