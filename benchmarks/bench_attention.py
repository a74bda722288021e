"""Attention: bigkern against torch's F.scaled_dot_product_attention.

python benchmarks/bench_attention.py [--device cuda] [--save]
"""

import math
import sys

import pytest
import torch
from common import alternate, copy_bandwidth, main, product_rate, skip_without_kernels, with_triton
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import bigkern
from bigkern.testing import memory_beyond_results

# 16k tokens on a GPU, as in FlashAttention's benchmarks.
BY_DEVICE = {
    "shape": {  # B, H, L, E
        "cpu": [
            (2, 8, 512, 64),
            (1, 8, 2048, 64),
            (1, 8, 4096, 64),
            (1, 8, 2048, 128),
            (4, 4, 197, 64),
        ],
        "cuda": [(1, 16, 16384, 128), (1, 32, 16384, 64), (8, 16, 2048, 128), (32, 16, 512, 128)],
    },
    "dtype": {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16"]},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DECODING = {"keys": 8192, "head_dim": 128, "heads": 32}


def by_backend(backend):
    """torch's function, on this backend of it alone."""

    def attention(*args, **options):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*args, **options)

    return attention


FUNCTIONS = {
    "cpu": {
        "bigkern": bigkern.scaled_dot_product_attention,
        "torch": F.scaled_dot_product_attention,
    },
    "cuda": {
        "bigkern": bigkern.scaled_dot_product_attention,
        "torch flash": by_backend(SDPBackend.FLASH_ATTENTION),
        "torch cuDNN": by_backend(SDPBackend.CUDNN_ATTENTION),
        "torch efficient": by_backend(SDPBackend.EFFICIENT_ATTENTION),
    },
}


def make(shape, dtype, device, **options):
    return torch.randn(shape, device=device).to(dtype).requires_grad_(**options)


@pytest.mark.parametrize("kind", ["full", "causal", "additive mask"])
def test_forward(benchmark, shape, kind, dtype, device):
    skip_without_kernels("attention", device)
    q, k, v = (make(shape, DTYPES[dtype], device, requires_grad=False) for _ in range(3))
    mask = make((1, 1, shape[2], shape[2]), DTYPES[dtype], device, requires_grad=False)
    options = {
        "is_causal": kind == "causal",
        "attn_mask": mask if kind == "additive mask" else None,
    }
    contenders = {
        name: lambda function=function: function(q, k, v, **options)
        for name, function in FUNCTIONS[device].items()
    }
    alternate(benchmark, with_triton(contenders, device), device)
    benchmark.extra_info |= describe("forward", kind, shape, dtype)


@pytest.mark.parametrize("kind", ["full", "causal"])
def test_forward_backward(benchmark, shape, kind, dtype, device):
    skip_without_kernels("attention_backward", device)
    inputs = [make(shape, DTYPES[dtype], device) for _ in range(3)]
    grad = make(shape, DTYPES[dtype], device, requires_grad=False)

    def step(function):
        torch.autograd.grad(function(*inputs, is_causal=kind == "causal"), inputs, grad)

    contenders = {
        name: lambda function=function: step(function)
        for name, function in FUNCTIONS[device].items()
    }
    alternate(benchmark, with_triton(contenders, device), device)
    benchmark.extra_info |= describe("+ backward", kind, shape, dtype)


@pytest.mark.parametrize("kind", ["full", "causal"])
def test_backward(benchmark, shape, kind, dtype, device):
    """Without its forward."""
    if device == "cpu":
        pytest.skip("on a CPU it is measured with its forward")
    skip_without_kernels("attention_backward", device)
    inputs = [make(shape, DTYPES[dtype], device) for _ in range(3)]
    grad = make(shape, DTYPES[dtype], device, requires_grad=False)
    outs = {}

    def step(name, function):
        if name not in outs:  # not before, since a backend may lack it
            outs[name] = function(*inputs, is_causal=kind == "causal")
        torch.autograd.grad(outs[name], inputs, grad, retain_graph=True)

    contenders = {
        name: lambda name=name, function=function: step(name, function)
        for name, function in FUNCTIONS[device].items()
    }
    alternate(benchmark, with_triton(contenders, device), device)
    benchmark.extra_info |= describe("backward", kind, shape, dtype)


@pytest.mark.parametrize("kv_heads", [32, 8])
def test_decoding(benchmark, kv_heads, dtype, device):
    """One query against a long cache."""
    skip_without_kernels("attention", device)
    heads, keys, head_dim = DECODING["heads"], DECODING["keys"], DECODING["head_dim"]
    q = make((1, heads, 1, head_dim), DTYPES[dtype], device, requires_grad=False)
    k, v = (
        make((1, kv_heads, keys, head_dim), DTYPES[dtype], device, requires_grad=False)
        for _ in range(2)
    )
    contenders = {
        name: lambda function=function: function(q, k, v, enable_gqa=True)
        for name, function in FUNCTIONS[device].items()
    }
    contenders["a sum of keys and values"] = lambda: (k.sum(), v.sum())
    alternate(benchmark, with_triton(contenders, device), device)
    benchmark.extra_info |= {
        "work": "decoding",
        "kind": f"{heads} query heads, {kv_heads} of keys",
        "shape": tuple(k.shape),
        "dtype": dtype,
        "bytes": k.nbytes + v.nbytes,
        "roof": "copy",
    }


def describe(work, kind, shape, dtype):
    """FLOPs as FlashAttention counts: two products forward, five backward; half if causal."""
    B, H, L, E = shape
    products = {"forward": 2, "backward": 5, "+ backward": 7}[work]
    return {
        "work": work,
        "kind": kind,
        "shape": shape,
        "dtype": dtype,
        "flops": products * 2 * B * H * L * L * E / (2 if kind == "causal" else 1),
        "roof": f"{dtype} product",
    }


def test_memory(benchmark, device):
    """What a forward and backward take beyond inputs, results and gradients."""
    if device != "cpu":
        pytest.skip("reads the process's memory")
    q, k, v = (make((1, 8, 16384, 64), torch.float32, device) for _ in range(3))
    grad = torch.randn(q.shape)
    small = [t[:, :, :2048] for t in (q, k, v)]
    attention = bigkern.scaled_dot_product_attention
    torch.autograd.grad(attention(*small), small, grad[:, :, :2048])  # threads start

    def step():
        out = attention(q, k, v)
        return [out, *torch.autograd.grad(out, (q, k, v), grad)]

    beyond = benchmark.pedantic(lambda: memory_beyond_results(step), rounds=1)
    benchmark.extra_info |= {"beyond": beyond}


def tables(benchmarks, device):
    # torch's product of bfloat16 is a bare loop on a CPU without instructions for it.
    limits = {name: product_rate(dtype, 640, device) for name, dtype in DTYPES.items()}
    limits["bfloat16"] = max(limits.values())  # at worst it is widened to float32
    bandwidth = copy_bandwidth(device)
    listed = ", ".join(f"{dtype} {limit / 1e9:.0f} GFLOP/s" for dtype, limit in limits.items())
    lines = [
        f"limits: matrix product {listed}; copy {bandwidth:.1f} GB/s (read + written)\n",
        "| work | dtype | keys (B, H, L, E) | bigkern ms (quartiles) | torch ms (quartiles) | "
        "bigkern | of limit | torch / bigkern |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ratios = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if "beyond" in info:
            lines.append(
                f"\nmemory beyond inputs and results, forward and backward, float32, "
                f"L 16,384: {info['beyond'] / 2**20:.1f} MiB"
            )
            continue
        (low, ours, high), (torch_low, theirs, torch_high) = (
            info["quartiles_ms"][name] for name in FUNCTIONS[device]
        )
        if "bytes" in info:
            speed = info["bytes"] / ours / 1e6
            read = info["bytes"] / info["quartiles_ms"]["a sum of keys and values"][1] / 1e6
            speeds = f"{speed:.1f} GB/s | {speed / read:.0%} of a sum's {read:.1f}"
        else:
            speed = info["flops"] / ours * 1e3
            speeds = f"{speed / 1e9:.0f} GFLOP/s | {speed / limits[info['dtype']]:.0%}"
            kind = "additive mask" if info["kind"] == "additive mask" else "full and causal"
            ratios.setdefault((info["work"], info["dtype"], kind), []).append(theirs / ours)
        row = (
            f"{info['work']}, {info['kind']}",
            info["dtype"],
            str(tuple(info["shape"])),
            f"{ours:.2f} ({low:.2f}..{high:.2f})",
            f"{theirs:.2f} ({torch_low:.2f}..{torch_high:.2f})",
            speeds,
            f"{theirs / ours:.2f}",
        )
        lines.append(f"| {' | '.join(row)} |")
    lines += ["\n| geometric mean of torch / bigkern | dtype | |", "|---|---|---|"]
    for (work, dtype, kind), values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        lines.append(f"| {work}, {kind} | {dtype} | {mean:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(__file__, tables))
