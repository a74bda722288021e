"""The backward of attention at the edges of the tiles of the CUDA kernels, with each feature."""

from dataclasses import replace
from functools import partial

import emulator.ops
import pytest
import torch
from attention_helpers import (
    Case,
    PackedCase,
    baselines,
    check_all,
    in_dtype,
    lse_of,
    random_grads,
)

from bigkern import backends, scaled_dot_product_attention
from bigkern.ops import reference

DEVICES = ["cpu", "emulated", "cuda"]
pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


def run(ops, case, inputs, tensors, deterministic=False):
    """What the raw ops return: output and log-sum-exp, gradients."""
    options = case.raw_options()
    outs = ops.attention(*inputs, *tensors, **options)
    grads = ops.attention_backward(
        *random_grads(case, outs[:2]), *inputs, *outs, *tensors, **options,
        needs_mask_grad=case.mask.startswith("float"), deterministic=deterministic,
    )  # fmt: skip
    return [outs[0], lse_of(*outs[1:])], grads


def check(case, deterministic=False):
    ops = backends.select("attention_backward", case.device)
    check_all(
        run(ops, case, case.inputs(), case.tensors(), deterministic),
        run(reference, case, *in_dtype(case, torch.float64)),
        baselines(partial(run, reference), case),
    )


# Tiles have 16 to 128 queries or keys, and 64, 128 or 256 features.
SHAPES = {
    "one query": Case(HALF, 3, 4, 4, 1, 130, 64, 64),
    "one key": Case(FLOAT, 3, 4, 4, 65, 1, 64, 64),
    "one of each": Case(BRAIN, 40, 4, 4, 1, 1, 7, 5),
    "63 and 65": Case(BRAIN, 2, 2, 2, 63, 65, 64, 64),
    "64 and 64": Case(FLOAT, 1, 2, 2, 64, 64, 64, 64),
    "65 and 128": Case(HALF, 1, 2, 2, 65, 128, 64, 64),
    "129 and 257": Case(HALF, 1, 1, 1, 129, 257, 64, 64, causal=True),
    "128 features": Case(BRAIN, 1, 2, 2, 66, 130, 128, 128),
    "128 features of float32": Case(FLOAT, 1, 1, 1, 33, 70, 128, 128),
    "127 and 3 features": Case(HALF, 2, 2, 2, 31, 33, 127, 3, causal=True),
    "256 features": Case(HALF, 1, 1, 1, 35, 66, 256, 256),
    "256 features of float32": Case(FLOAT, 1, 1, 1, 17, 33, 256, 256),
    "72 and 200 features": Case(BRAIN, 2, 1, 1, 17, 34, 72, 200),
    "1 feature": Case(FLOAT, 4, 3, 3, 20, 31, 1, 1),
}

FEATURES = {
    "shared keys": Case(HALF, 2, 6, 2, 20, 40, 64, 32),
    "one head of keys": Case(FLOAT, 1, 4, 1, 20, 40, 64, 64),
    "causal": Case(HALF, 1, 2, 2, 70, 150, 128, 64, causal=True),
    "causal, more queries": Case(BRAIN, 2, 1, 1, 150, 20, 64, 64, causal=True),
    "window": Case(HALF, 1, 2, 1, 140, 130, 40, 64, window=(20, 10)),
    "window without keys": Case(FLOAT, 1, 2, 2, 100, 40, 32, 32, window=(5, 0)),
    "softcap": Case(HALF, 2, 2, 2, 30, 50, 64, 64, softcap=2.0),
    "alibi": Case(FLOAT, 2, 3, 3, 40, 30, 16, 16, alibi="BH"),
    "alibi, 128 features": Case(BRAIN, 1, 2, 2, 40, 70, 128, 128, alibi="H", causal=True),
    "bool mask": Case(HALF, 2, 2, 2, 33, 70, 64, 64, "BLHE", "bool"),
    "dropout": Case(HALF, 1, 2, 2, 70, 90, 64, 64, dropout=0.3),
    "dropout, 128 features": Case(HALF, 1, 2, 1, 40, 130, 128, 128, dropout=0.1),
    "dropout, 256 features": Case(BRAIN, 1, 2, 2, 20, 50, 256, 20, dropout=0.5),
    "dropout of float32": Case(FLOAT, 2, 2, 2, 17, 66, 48, 64, dropout=0.5, causal=True),
    "dropout of all": Case(FLOAT, 2, 2, 2, 17, 20, 8, 8, dropout=1.0),
    "lengths": Case(HALF, 6, 2, 2, 70, 90, 64, 64, seqlens=True, causal=True),
    "lengths, all features": Case(
        FLOAT, 6, 4, 2, 33, 40, 24, 24, mask="float", alibi="H", softcap=2.0, dropout=0.2,
        window=(9, 4), seqlens=True,
    ),
    "strided": Case(HALF, 2, 2, 2, 30, 40, 24, 72, "strided"),
    "unaligned": Case(BRAIN, 2, 2, 2, 30, 40, 64, 64, "unaligned"),
    "expanded": Case(FLOAT, 2, 2, 2, 30, 40, 64, 64, "expanded"),
}  # fmt: skip

MASKS = {
    "whole": Case(HALF, 2, 2, 2, 70, 90, 64, 64, mask="float"),
    "of float32": Case(BRAIN, 1, 2, 2, 33, 65, 128, 64, mask="float32", softcap=1.5),
    "of queries and keys": Case(
        FLOAT, 3, 2, 1, 40, 70, 16, 16, mask="float", mask_dims=(False, False, True, True),
        dropout=0.2, causal=True,
    ),
    "of keys": Case(
        BRAIN, 5, 2, 2, 70, 130, 64, 64, mask="float", mask_dims=(True, False, False, True),
        seqlens=True,
    ),
    "of queries": Case(
        FLOAT, 2, 2, 2, 260, 20, 64, 64, mask="float", mask_dims=(False, True, True, False)
    ),
    "of heads": Case(
        FLOAT, 2, 60, 60, 5, 7, 8, 8, mask="float", mask_dims=(False, True, False, False)
    ),
    "256 features": Case(
        HALF, 2, 1, 1, 33, 40, 200, 256, mask="float32", mask_dims=(False, True, True, True)
    ),
    "256 features of float32": Case(FLOAT, 2, 1, 1, 20, 40, 256, 8, mask="float"),
}  # fmt: skip

PACKED = {
    "some empty": PackedCase(
        HALF, 4, 2, 2, 0, 0, 64, 64, lengths=([70, 0, 5, 65], [33, 7, 0, 130]), causal=True
    ),
    "all features": PackedCase(
        FLOAT, 3, 4, 2, 0, 0, 32, 40, lengths=([1, 40, 17], [20, 3, 33]), window=(8, 3),
        alibi="H", softcap=2.0, dropout=0.3,
    ),
    "128 features": PackedCase(BRAIN, 2, 2, 2, 0, 0, 128, 128, lengths=([63, 2], [130, 64])),
}  # fmt: skip


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", [*SHAPES.values(), *FEATURES.values()], ids=[*SHAPES, *FEATURES])
def test_accuracy(case, deterministic, device):
    check(replace(case, device=device), deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED)
@pytest.mark.sanitize
def test_packed(case, deterministic, device):
    check(replace(case, device=device), deterministic)


@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
@pytest.mark.sanitize
def test_gradient_of_a_mask(case, device):
    check(replace(case, device=device))


@pytest.mark.parametrize("deterministic", [False, True])
def test_empty(deterministic, device):
    ops = backends.select("attention_backward", device)
    for B, L, E in [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 3, 4)]:
        for S in (0, 5):
            case = Case(FLOAT, B, 2, 2, L, S, E, 6, mask="float", device=device)
            grads = run(ops, case, case.inputs(), case.tensors(), deterministic)[1]
            expected = run(reference, case, case.inputs(), case.tensors())[1]
            assert [g.shape for g in grads] == [g.shape for g in expected]
            assert all(g.isfinite().all() for g in grads)
            if S == 0:
                assert not grads[0].any()
            if L == 0:
                assert not any(g.any() for g in grads)


DETERMINISM = {
    "plain": Case(HALF, 1, 2, 1, 140, 600, 64, 64, window=(-1, 50)),
    "all features": Case(
        FLOAT, 2, 2, 1, 40, 150, 64, 64, mask="float", mask_dims=(False, False, True, True),
        alibi="H", dropout=0.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DETERMINISM.values(), ids=DETERMINISM)
def test_same_bits_in_any_order_of_blocks(emulated_ops, case):
    """If they are asked for: the atomics of the default add in another order each time."""

    def grads(seed, deterministic):
        emulated_ops.set_schedule("random", seed)
        ops = torch.ops.bigkern_emulated
        return run(ops, case, case.inputs(), case.tensors(), deterministic)[1]

    expected = grads(0, deterministic=True)
    for seed in (1, 2):
        assert all(map(torch.equal, grads(seed, deterministic=True), expected))
    fast = [grads(seed, deterministic=False) for seed in range(3)]
    assert any(not torch.equal(fast[0][0], other[0]) for other in fast)
    for other in fast:
        assert all(map(torch.equal, other[1:], expected[1:]))


@pytest.mark.parametrize("flag", [False, True])
def test_torchs_flag_is_honoured(emulated_ops, flag):
    q, k, v = Case(HALF, 1, 2, 2, 20, 30, 64, 64).inputs()
    q.requires_grad_()
    torch.use_deterministic_algorithms(flag)
    try:
        with emulator.ops.backend():
            emulated_ops.take_launches()
            scaled_dot_product_attention(q, k, v).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    names = [launch["kernel"] for launch in emulated_ops.take_launches()]
    assert any("attention_queries_kernel" in name for name in names) == flag
    assert any("convert_query_kernel" in name for name in names) != flag


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("features", [64, 128, 256])
def test_no_bank_conflicts(emulated_ops, features, deterministic):
    case = Case(HALF, 1, 2, 1, 40, 70, features, features)
    emulated_ops.take_launches()
    emulated_ops.count_conflicts(True)
    try:
        run(torch.ops.bigkern_emulated, case, case.inputs(), case.tensors(), deterministic)
    finally:
        emulated_ops.count_conflicts(False)
    launches = emulated_ops.take_launches()
    names = ("attention_keys_kernel", "attention_queries_kernel")[: 1 + deterministic]
    for name in names:
        (launch,) = (x for x in launches if name in x["kernel"])
        assert launch["shared_accesses"] > 0
        assert launch["bank_conflicts"] == 0
