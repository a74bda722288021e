"""Each bad input of attention is named, with what was wanted and what came."""

import re

import pytest
import torch
import torch.nn.functional as F
from attention_helpers import RAW_ERRORS, small_inputs
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from bigkern import backends, scaled_dot_product_attention, varlen_attention

SHAPES = {
    "at least 2 dimensions, got query [8], key [8], value [8]": [(8,)] * 3,
    "key must have a last dimension of 8 like query, got [2, 4, 5, 7]": [
        (2, 4, 3, 8), (2, 4, 5, 7), (2, 4, 5, 6),
    ],
    "value must have 5 rows, one for each key, got [2, 4, 6, 8]": [
        (2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 6, 8),
    ],
    "leading dimensions must broadcast, got query [2, 4, 3, 8], key [3, 4, 5, 8], "
    "value [3, 4, 5, 8]": [(2, 4, 3, 8), (3, 4, 5, 8), (3, 4, 5, 8)],
    "key [2, 2, 5, 8], value [2, 2, 5, 8]; fewer heads of keys need enable_gqa=True": [
        (2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8),
    ],
}  # fmt: skip


@pytest.mark.parametrize("message", SHAPES)
def test_shapes(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        scaled_dot_product_attention(*small_inputs(*SHAPES[message]))


@pytest.mark.parametrize("heads", [(3, 3), (2, 3), (3, 2), (8, 8)])
def test_heads_that_do_not_divide(heads):
    k, v = ((2, h, 5, 8) for h in heads)
    message = f"heads that divide the 4 of query, got query [2, 4, 3, 8], key {list(k)}, value"
    with pytest.raises(ValueError, match=re.escape(message)):
        scaled_dot_product_attention(*small_inputs(k=k, v=v), enable_gqa=True)


def test_shared_heads_need_a_dimension_of_heads():
    with pytest.raises(ValueError, match="at least 3 dimensions, got query"):
        scaled_dot_product_attention(*small_inputs((3, 8), (5, 8), (5, 8)), enable_gqa=True)


@pytest.mark.parametrize("index", [1, 2])
def test_dtypes_of_inputs(index):
    inputs = small_inputs()
    inputs[index] = inputs[index].double()
    name = ("query", "key", "value")[index]
    message = f"{name}, like query, must be torch.float32 on cpu, got torch.float64 on cpu"
    with pytest.raises(ValueError, match=message):
        scaled_dot_product_attention(*inputs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_dtypes_that_are_not_supported(dtype):
    with pytest.raises(ValueError, match="query must be"):
        scaled_dot_product_attention(*(x.to(dtype) for x in small_inputs()))


@pytest.mark.parametrize("index", [1, 2])
def test_devices_of_inputs(index):
    inputs = small_inputs()
    inputs[index] = inputs[index].to("meta")
    name = ("query", "key", "value")[index]
    with pytest.raises(
        ValueError, match=f"{name}, like query, must be .* got torch.float32 on meta"
    ):
        scaled_dot_product_attention(*inputs)


def test_device_without_a_backend():
    with pytest.raises(NotImplementedError, match="attention has no backend on meta; available"):
        scaled_dot_product_attention(*(x.to("meta") for x in small_inputs()))


@pytest.mark.parametrize(
    "shape", [(3, 4), (2, 5), (3, 4, 3, 5), (2, 2, 3, 5), (1, 1, 1, 3, 5), (0,)]
)
def test_shape_of_mask(shape):
    message = f"attn_mask must broadcast to [2, 4, 3, 5], got {list(shape)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        scaled_dot_product_attention(*small_inputs(), torch.zeros(shape))


def test_mask_does_not_widen_the_result():
    message = "attn_mask must broadcast to [1, 4, 3, 5], got [2, 4, 3, 5]"
    inputs = small_inputs((1, 4, 3, 8), (1, 4, 5, 8), (1, 4, 5, 8))
    with pytest.raises(ValueError, match=re.escape(message)):
        scaled_dot_product_attention(*inputs, torch.zeros(2, 4, 3, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.uint8])
def test_dtype_of_mask(dtype):
    message = f"attn_mask must be torch.bool or torch.float32 on cpu, got {dtype} on cpu"
    with pytest.raises(ValueError, match=message):
        scaled_dot_product_attention(*small_inputs(), torch.zeros(3, 5, dtype=dtype))


def test_device_of_mask():
    with pytest.raises(ValueError, match=r"attn_mask must be .* on cpu, got torch.float32 on meta"):
        scaled_dot_product_attention(*small_inputs(), torch.zeros(3, 5, device="meta"))


def test_mask_and_causal_are_refused_as_in_torch():
    for function in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        with pytest.raises(RuntimeError, match="attn_mask"):
            function(*small_inputs(), torch.zeros(3, 5), is_causal=True)


def test_causal_bias_and_causal_are_refused_as_in_torch():
    for function in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        with pytest.raises(ValueError, match="CausalBias"):
            function(*small_inputs(), causal_upper_left(3, 5), is_causal=True)


def test_size_of_causal_bias():
    with pytest.raises(ValueError, match=re.escape("CausalBias of (3, 5), got (2, 5)")):
        scaled_dot_product_attention(*small_inputs(), causal_lower_right(2, 5))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_dropout_out_of_range(p):
    with pytest.raises(ValueError, match=f"dropout_p must be from 0 to 1, got {p}"):
        scaled_dot_product_attention(*small_inputs(), dropout_p=p)


@pytest.mark.parametrize("window", [(-2, 0), (0, -2), (1,), (1, 2, 3), 3, (0.5, 1)])
def test_window(window):
    message = f"window must be two integers from -1 on, got {window}"
    with pytest.raises(ValueError, match=re.escape(message)):
        scaled_dot_product_attention(*small_inputs(), window=window)


@pytest.mark.parametrize("softcap", [-1.0, float("nan"), float("inf")])
def test_softcap(softcap):
    with pytest.raises(ValueError, match=f"softcap must be positive, or None, got {softcap}"):
        scaled_dot_product_attention(*small_inputs(), softcap=softcap)


def test_scale():
    with pytest.raises(ValueError, match="scale must be finite, got inf"):
        scaled_dot_product_attention(*small_inputs(), scale=float("inf"))


@pytest.mark.parametrize("shape", [(), (3,), (2,), (4, 2), (1, 4), (2, 4, 1)])
def test_shape_of_slopes(shape):
    message = f"alibi_slopes must have shape [4] or [2, 4], got {list(shape)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        scaled_dot_product_attention(*small_inputs(), alibi_slopes=torch.ones(shape))


def test_dtype_of_slopes():
    message = "alibi_slopes must be torch.float32 on cpu, got torch.float64 on cpu"
    with pytest.raises(ValueError, match=message):
        scaled_dot_product_attention(*small_inputs(), alibi_slopes=torch.ones(4).double())


def test_slopes_have_no_gradient():
    slopes = torch.ones(4, requires_grad=True)
    with pytest.raises(NotImplementedError, match=re.escape("alibi_slopes can't have a gradient")):
        scaled_dot_product_attention(*small_inputs(), alibi_slopes=slopes)
    with torch.no_grad():
        scaled_dot_product_attention(*small_inputs(), alibi_slopes=slopes)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_small_inputs():
    nested = torch.nested.nested_tensor([torch.randn(3, 8)] * 2, layout=torch.jagged)
    with pytest.raises(NotImplementedError, match=r"nested tensors .*: .* varlen_attention"):
        scaled_dot_product_attention(nested, nested, nested)


def test_forward_mode_is_refused():
    inputs = small_inputs()
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(scaled_dot_product_attention, tuple(inputs), tuple(inputs))


def packed(**changes):
    starts = [
        torch.tensor([0, 2, 5], dtype=torch.int32),
        torch.tensor([0, 3, 4], dtype=torch.int32),
    ]
    arguments = {
        "q": torch.randn(5, 4, 8),
        "k": torch.randn(4, 2, 8),
        "v": torch.randn(4, 2, 6),
        "cu_seqlens_q": starts[0],
        "cu_seqlens_k": starts[1],
        "max_seqlen_q": 3,
        "max_seqlen_k": 3,
    }
    return arguments | changes


PACKED = {
    "q must have 3 dimensions (total, heads, features), got [1, 5, 4, 8]": {
        "q": torch.randn(1, 5, 4, 8)
    },
    "v must have shape [4, 2, any], got [4, 4, 6]": {"v": torch.randn(4, 4, 6)},
    "k must have a last dimension of 8 like q, got [4, 2, 7]": {"k": torch.randn(4, 2, 7)},
    "k must have heads that divide the 4 of q, got [4, 3, 8]": {
        "k": torch.randn(4, 3, 8), "v": torch.randn(4, 3, 6),
    },
    "v, like q, must be torch.float32 on cpu, got torch.float64 on cpu": {
        "v": torch.randn(4, 2, 6).double()
    },
    "k, like q, must be torch.float32 on cpu, got torch.float32 on meta": {
        "k": torch.randn(4, 2, 8, device="meta")
    },
    "cu_seqlens_q and cu_seqlens_k must both be [B + 1], got [3] and [2]": {
        "cu_seqlens_k": torch.tensor([0, 4], dtype=torch.int32)
    },
    "alibi_slopes must have shape [4] or [2, 4], got [2]": {"alibi_slopes": torch.ones(2)},
    "dropout_p must be from 0 to 1, got 2.0": {"dropout_p": 2.0},
    "window must be two integers from -1 on, got (0, -3)": {"window": (0, -3)},
}  # fmt: skip


@pytest.mark.parametrize("message", PACKED)
def test_packed_sequences(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        varlen_attention(**packed(**PACKED[message]))


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([0, 2, 5]),
        torch.tensor([0, 5, 2], dtype=torch.int32),
        torch.tensor([1, 2, 4], dtype=torch.int32),
        torch.tensor([0, 2, 99], dtype=torch.int32),
        torch.tensor([0, 1, 2], dtype=torch.int32),
    ],
)
def test_starts_of_packed_sequences(name, bad):
    """Not int32, falling, not from 0, beyond the total, short of it."""
    with pytest.raises(ValueError, match=name):
        varlen_attention(**packed(**{name: bad}))


@pytest.mark.parametrize("name", RAW_ERRORS)
def test_raw_op(name):
    """Whoever calls it without the function."""
    arguments = dict(zip(("query", "key", "value"), small_inputs(), strict=True))
    with pytest.raises(ValueError, match=name):
        backends.select("attention", "cpu").attention(**RAW_ERRORS[name](arguments), scale=1.0)
