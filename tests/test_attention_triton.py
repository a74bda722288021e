"""Attention's Triton kernels, compiled for A100 and H100: each feature, in few kernels, since each
takes seconds to compile, and in small tiles."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from attention_helpers import (
    RAW_ERRORS,
    SEEDS,
    Case,
    PackedCase,
    baselines,
    check_all,
    in_dtype,
    raw_ops,
    small_inputs,
)

from bigkern import backends
from bigkern.ops import reference

triton = pytest.importorskip("triton", reason="torch for CPUs comes without Triton")

DEVICES = ["triton", "triton sm_90", "cuda"]
pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16

# op -> queries and keys of a tile; one of 64 queries is the least that wgmma multiplies.
TILES = {
    "attention": {1: (16, 32), 4096: (64, 32)},
    "attention_keys": {1: (32, 64)},
    "attention_queries": {1: (64, 32)},
}


@pytest.fixture(autouse=True)
def small_tiles(tmp_path, monkeypatch):
    """For the emulator: a GPU has those of its table."""
    if torch.cuda.is_available():
        return
    rows = []
    for op, by_length in TILES.items():
        for length, (block_q, block_kv) in by_length.items():
            for dtype in ("bfloat16", "float32"):
                block_q = 16 if dtype == "float32" else block_q
                config = {"BLOCK_Q": block_q, "BLOCK_KV": 32 if dtype == "float32" else block_kv}
                config |= {"num_warps": 4, "num_stages": 2}
                shape = {"L": length, "E": 16} if op == "attention" else {"E": 16}
                rows += [
                    {"op": name, "dtype": dtype, "shape": shape, "config": config}
                    for name in (op, f"{op}_extras")
                ]
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps(dict.fromkeys(("sm_80", "sm_90"), rows)))
    monkeypatch.setenv("BIGKERN_TUNING", str(file))


PLAIN = {
    "causal, shared keys": Case(BRAIN, 2, 4, 2, 140, 150, 16, 16, causal=True),
    "window": Case(BRAIN, 2, 2, 2, 100, 130, 16, 16, "BLHE", window=(20, 10)),
    "window without keys": Case(BRAIN, 2, 2, 2, 150, 40, 16, 16, window=(5, 0)),
    "lengths": Case(BRAIN, 6, 2, 2, 70, 90, 16, 16, seqlens=True, causal=True),
    "expanded": Case(BRAIN, 3, 2, 2, 65, 64, 16, 16, "expanded"),
    "odd features": Case(HALF, 2, 2, 2, 67, 33, 7, 20, causal=True),
    "unaligned": Case(HALF, 2, 2, 2, 67, 70, 7, 20, "unaligned"),
    "strided": Case(HALF, 5, 3, 3, 1, 1, 7, 20, "strided"),
    "float32": Case(FLOAT, 2, 2, 1, 70, 90, 24, 16, window=(40, 0)),
}

ALL = {"mask": "float32", "alibi": "BH", "softcap": 2.0, "dropout": 0.3}
EXTRAS = {
    "all": Case(BRAIN, 3, 4, 2, 70, 90, 16, 16, seqlens=True, window=(60, 9), **ALL),
    "softcap": Case(BRAIN, 2, 2, 2, 30, 100, 16, 16, softcap=2.0),
    "alibi": Case(BRAIN, 2, 2, 2, 70, 80, 16, 16, alibi="H", causal=True),
    "dropout": Case(BRAIN, 2, 2, 2, 70, 100, 16, 16, dropout=0.3),
    "dropout of all": Case(BRAIN, 2, 2, 2, 17, 20, 16, 16, dropout=1.0),
    "bool mask": Case(HALF, 2, 2, 2, 70, 80, 16, 16, mask="bool"),
    "mask of keys": Case(
        FLOAT, 3, 2, 2, 70, 75, 16, 16, mask="float", mask_dims=(True, False, False, True)
    ),
    "mask of queries": Case(
        FLOAT, 2, 3, 3, 130, 20, 16, 16, mask="float", mask_dims=(False, True, True, False),
        dropout=0.2, causal=True,
    ),
}  # fmt: skip

# Their keys are split, of heads that share them as rows of one tile.
FEW_QUERIES = {
    "one": Case(BRAIN, 5, 8, 2, 1, 1100, 16, 16, layout="BLHE"),
    "some": Case(BRAIN, 5, 4, 2, 3, 900, 16, 16, window=(700, 0)),
}

PACKED = {
    "some empty": PackedCase(
        BRAIN, 4, 2, 2, 0, 0, 16, 16, lengths=([70, 0, 5, 65], [33, 7, 0, 130]), causal=True
    ),
    "extras": PackedCase(
        BRAIN, 3, 4, 2, 0, 0, 16, 16, lengths=([1, 40, 17], [20, 3, 33]), window=(8, 3),
        alibi="H", softcap=2.0, dropout=0.3,
    ),
}  # fmt: skip

CASES = PLAIN | EXTRAS | FEW_QUERIES | PACKED
# What has one kernel more each. On sm_90, only products differ.
OF_BOTH = {"causal, shared keys", "window", "lengths", "all", "dropout", "one"}


@pytest.fixture
def ops(device):
    return backends.select("attention", device)


def check(ops, case):
    """Outputs and gradients of the raw ops against the reference."""
    check_all(
        raw_ops(ops, case, case.inputs(), case.tensors()),
        raw_ops(reference, case, *in_dtype(case, torch.float64)),
        baselines(partial(raw_ops, reference), case),
    )


@pytest.mark.parametrize("name", sorted(OF_BOTH))
def test_accuracy(name, ops, device):
    check(ops, replace(CASES[name], device=device))


@pytest.mark.one_architecture
@pytest.mark.parametrize("name", sorted(CASES.keys() - OF_BOTH))
def test_accuracy_of_other_kernels(name, ops, device):
    check(ops, replace(CASES[name], device=device))


@pytest.mark.parametrize("device", ["triton", "triton sm_90"], indirect=True)
@pytest.mark.parametrize("name", ["causal, shared keys", "all"])
def test_same_bits_in_any_order_of_blocks(name, ops):
    case, results = CASES[name], []
    for seed in range(3):
        triton.runtime.driver.active.set_schedule("random", seed)
        outs, grads = raw_ops(ops, case, case.inputs(), case.tensors())
        results.append([*outs, *grads])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.parametrize(
    ("device", "name"),
    [
        *(("triton", name) for name in ("causal, shared keys", "all", "one")),
        # Not "all": there Triton leaves out the proxy fence between cp.async and wgmma.
        *(("triton sm_90", name) for name in ("causal, shared keys", "one")),
    ],
    indirect=["device"],
)
def test_no_races(name, ops):
    """Nor is memory read before a copy to it has arrived, whichever block comes first."""
    case = CASES[name]
    triton.runtime.driver.active.find_races(True)
    raw_ops(ops, case, case.inputs(), case.tensors())


@pytest.mark.parametrize("seed_offset", SEEDS)
def test_the_mask_of_dropout_is_the_documented_one(seed_offset, ops, device):
    B, H, L, S, E, p = 2, 3, 16, 133, 16, 0.4
    philox = torch.tensor(seed_offset, device=device)
    q, k, v = (torch.zeros(B, H, n, E, dtype=BRAIN, device=device) for n in (L, S, S))
    options = {"philox": philox, "dropout_p": p, "scale": 1.0}
    expected = reference.dropout_factors(philox, (B, H, L, S), p) > 0
    # Unit vectors as values, of some keys at a time, show the forward's.
    for j in range(0, S, E):
        v.zero_()[:, :, j : j + E] = torch.eye(E, device=device)[: S - j]
        out, *stats = ops.attention(q, k, v, **options)
        assert torch.equal(out[..., : S - j] > 0, expected[..., j : j + E])
    assert torch.equal(ops.attention_weights(q, k, *stats, **options) > 0, expected)
    # dV = W^T dO
    grad_out = torch.eye(L, dtype=BRAIN, device=device).expand(B, H, L, L)
    grad_value = ops.attention_backward(grad_out, None, q, k, v, out, *stats, **options)[2]
    assert torch.equal(grad_value.mT > 0, expected)


@pytest.mark.one_architecture
def test_empty(ops, device):
    for B, L, E in [(0, 3, 7), (2, 0, 7), (2, 3, 0), (2, 3, 7)]:
        for S in (0, 5):
            case = Case(HALF, B, 2, 2, L, S, E, 20, device=device)
            outs, grads = raw_ops(ops, case, case.inputs(), case.tensors())
            assert [x.shape for x in grads[:3]] == [(B, 2, L, E), (B, 2, S, E), (B, 2, S, 20)]
            assert outs[0].shape == (B, 2, L, 20)
            assert all(x.isfinite().all() for x in (outs[0], *grads))
            if S == 0:
                assert not outs[0].any()
                assert not grads[0].any()
            if L == 0:
                assert not any(x.any() for x in grads)


@pytest.mark.parametrize(
    "name", [n for n in RAW_ERRORS if n != "seqlens_k"]
)  # its values aren't read
def test_bad_input_is_named(name):
    attention = pytest.importorskip("bigkern.kernels.attention").attention
    arguments = dict(zip(("query", "key", "value"), small_inputs(), strict=True))
    with pytest.raises(ValueError, match=name):
        attention(**RAW_ERRORS[name](arguments), scale=1.0)
