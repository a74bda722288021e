"""Attention against the reference in float64: function and raw ops, with every option."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from attention_helpers import (
    DTYPES,
    ENOUGH,
    Case,
    PackedCase,
    as_dtype,
    baselines,
    cases,
    check,
    check_all,
    check_drawn,
    check_function,
    draw,
    factors,
    in_dtype,
    plain_with_gradients,
    raw_ops,
    run_function,
    run_reference,
    served,
    wide,
    with_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bigkern import backends, scaled_dot_product_attention, varlen_attention
from bigkern.ops import reference

DEVICES = ["cpu", "emulated", "cuda"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_worked_example():
    """Scores log 3 and 0 are weights 3/4 and 1/4."""
    query, key = torch.tensor([[1.0]]), torch.tensor([[math.log(3)], [0.0]])
    value = torch.tensor([[4.0, 0.0], [0.0, 8.0]])
    out, lse = scaled_dot_product_attention(query, key, value, return_lse=True)
    torch.testing.assert_close(out, torch.tensor([[3.0, 2.0]]))
    torch.testing.assert_close(lse, torch.tensor([math.log(4)]))


def test_philox_is_that_of_the_paper():
    """The known answers of Random123's kat_vectors."""
    zero = torch.zeros((), dtype=torch.int64)
    answers = {
        0: [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        0xFFFFFFFF: [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    }
    for number, words in answers.items():
        assert reference.philox([zero + number] * 4, [zero + number] * 2) == words


@pytest.mark.parametrize(
    ("mask", "is_causal"), [(None, False), (None, True), ("bool", False), ("float", False)]
)
def test_reference_is_torch(mask, is_causal):
    q, k, v = (torch.randn(2, 4, n, 8) for n in (5, 7, 7))
    masks = {"bool": torch.rand(2, 1, 5, 7) > 0.3, "float": torch.randn(4, 5, 7)[None]}
    options = {"attn_mask": masks.get(mask), "is_causal": is_causal}
    actual = reference.attention(*as_dtype([q, k, v], torch.float64), scale=8**-0.5, **options)[0]
    expected = F.scaled_dot_product_attention(*as_dtype([q, k, v], torch.float64), **{
        **options, "attn_mask": as_dtype([options["attn_mask"]], torch.float64)[0]
    })  # fmt: skip
    check(actual, expected, F.scaled_dot_product_attention(q, k, v, **options))


@settings(draw, max_examples=15)
@given(cases(dtype=torch.float64))
def test_backward_of_the_reference_is_its_derivative(case):
    inputs = in_dtype(case, torch.float64)
    actual = plain_with_gradients(case, *inputs)
    expected = with_gradients(run_reference, case, *inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(list(a), list(e))


def test_function(device):
    def check(case):
        if case.mask != "none":
            case = replace(case, causal=False)
        check_function(run_function, case)

    check_drawn(cases(seqlens=False), device, check, 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.sanitize
def test_more_than_a_tile(dtype, causal, device):
    case = Case(dtype, 1, 2, 1, 150, 300, 64, 64, causal=causal)
    check_function(run_function, served(case, device))


@pytest.mark.parametrize("window", [(40, 0), (-1, -1), (0, 40)])
@pytest.mark.parametrize(
    "options",
    [{"mask": "bool", "mask_dims": (True, False, False, True)}, {"softcap": 2.0}, {"alibi": "H"}],
    ids=lambda options: next(iter(options)),
)
def test_rows_without_a_key_in_a_tile(options, window, device):
    """Beside rows that have some."""
    check_function(run_function, Case(B=1, H=1, Hkv=1, L=290, S=290, window=window, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("H", "L", "E", "Ev", "window"),
    [(2, 1, 64, 64, (-1, -1)), (2, 3, 32, 72, (700, 0)), (8, 1, 72, 20, (700, 0))],
)
def test_few_queries_of_many_keys(dtype, H, L, E, Ev, window):
    """Keys and values are read where they lie, and shared out in parts; the window's first key is
    amid a block."""
    case = Case(dtype, 5, H, 2, L, 1100, E, Ev, layout="BLHE", window=window)
    check_function(run_function, case)


def test_raw_ops(device):
    """With lengths of sequences, and masks together with is_causal."""
    ops = backends.select("attention", device)

    def check(case):
        outs, grads = raw_ops(ops, case, case.inputs(), case.tensors())
        check_all(
            (outs, grads),
            raw_ops(reference, case, *in_dtype(case, torch.float64)),
            baselines(partial(raw_ops, reference), case),
            factors(case),
        )
        query, key, value = case.inputs()
        for actual, like in zip((outs[0], *grads), (query, query, key, value), strict=False):
            transposed = like.stride(1) < like.stride(2)
            assert (actual.transpose(1, 2) if transposed else actual).is_contiguous()
            assert actual.dtype == like.dtype
        assert outs[1].dtype == wide(case.dtype)

    check_drawn(cases(), device, check, 40)


@st.composite
def packed_cases(draw):
    case = draw(cases(mask="none", layout="contiguous", seqlens=False))
    length = st.one_of(st.just(0), st.integers(1, 70))
    pairs = draw(st.lists(st.tuples(length, length), min_size=1, max_size=4))
    rows = min(sum(ns) for ns in zip(*pairs, strict=True))
    more = 1 + ENOUGH // max(rows, 1)
    heads = {"H": case.H * more, "Hkv": case.Hkv * more}
    lengths = tuple(map(list, zip(*pairs, strict=True)))
    return PackedCase(**vars(case) | heads | {"B": len(pairs), "lengths": lengths})


def _run_varlen(case, inputs, tensors):
    return varlen_attention(
        *inputs, *case.starts(), *map(max, case.lengths), case.dropout, case.scale, case.causal,
        window=case.window, softcap=case.softcap, alibi_slopes=tensors[1], return_lse=True,
        generator=case.generator(),
    )  # fmt: skip


def test_packed_sequences(device):
    """Through the function and the raw op, each sequence with its own lengths, 0 included."""
    attention = backends.select("attention", device).attention

    def check(case):
        check_function(_run_varlen, case)
        out, row_max, row_sum = attention(*case.inputs(), *case.tensors(), **case.raw_options())
        expected = _run_varlen(case, case.inputs(), case.tensors())
        assert torch.equal(out, expected[0])
        assert torch.equal(row_max + row_sum.log(), expected[1])

    check_drawn(packed_cases(), device, check, 30)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty_queries(shape):
    q = torch.randn(shape, requires_grad=True)
    k, v = (torch.randn(*shape[:2], 5, n, requires_grad=True) for n in (shape[3], 6))
    out = scaled_dot_product_attention(q, k, v)
    assert out.shape == (*shape[:3], 6)
    out.sum().backward()
    assert all(x.grad.shape == x.shape and x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.sanitize
def test_no_keys_give_zeros(device):
    q, k, v = (torch.randn(2, 2, n, 4, device=device, requires_grad=True) for n in (3, 0, 0))
    mask = torch.randn(3, 0, device=device, requires_grad=True)
    out, lse = scaled_dot_product_attention(q, k, v, mask, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    out.sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q))
    assert k.grad.shape == k.shape
    assert mask.grad.shape == mask.shape
