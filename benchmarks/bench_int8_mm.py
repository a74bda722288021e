"""INT8 products and layers: bigkern against torch's.

python benchmarks/bench_int8_mm.py [--device cuda] [--save]
"""

import math
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from common import alternate, copy_bandwidth, main, skip_without_kernels, with_triton
from torch import nn
from torch.nn import functional as F

import bigkern
from bigkern.backends import available

BY_DEVICE = {
    "shape": {  # M, N, K
        "cpu": [
            (1, 4096, 4096),
            (16, 4096, 4096),
            (64, 128, 21632),
            (128, 1024, 1024),
            (512, 2048, 512),
            (2048, 2048, 2048),
            (197, 3072, 768),
        ],
        "cuda": [
            (8192, 8192, 8192),
            (4096, 4096, 4096),
            (4096, 1000, 4096),
            (64, 8192, 8192),
            (16, 8192, 8192),
            (1, 8192, 8192),
        ],
    },
    "dtype": {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16"]},
    "side": {"cpu": [4096], "cuda": [8192]},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# torch._int_mm has no kernel for most CPUs without VNNI, where it takes seconds.
PRODUCT_ROUNDS, MOST_ROW_MAJOR = 9, 2**32


def dynamically_quantized(linear):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but the fastest that torch has
        torch.backends.quantized.engine = "x86"
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})


def test_linear(benchmark, shape, device):
    """The whole layer: quantize, multiply, scale, add the bias."""
    skip_without_kernels("int8_linear", device)
    M, N, K = shape
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    linear = nn.Linear(K, N, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(M, K, device=device).to(dtype)
    weight, scale = bigkern.quantize_rows(linear.weight)
    packed = bigkern.pack_weight(weight) if available("pack_weight", device) else weight
    not_packed = {"bigkern": lambda: bigkern.int8_linear(x, weight, scale, linear.bias)}
    contenders = with_triton(not_packed, device)  # which takes a plain weight
    contenders["bigkern"] = lambda: bigkern.int8_linear(x, packed, scale, linear.bias)
    if device == "cpu":
        dynamic = dynamically_quantized(linear)
        contenders["not packed"] = not_packed["bigkern"]
        contenders["dynamic"] = lambda: dynamic(x)
        contenders["float32"] = lambda: linear(x)
    else:
        contenders["torch bfloat16"] = lambda: linear(x)
    with torch.inference_mode():
        alternate(benchmark, contenders, device)
    benchmark.extra_info |= {"work": "linear", "shape": shape, **products(shape)}


@pytest.mark.parametrize("order", ["column-major", "row-major"])
def test_product(benchmark, shape, order, device):
    skip_without_kernels("int8_mm", device)
    M, N, K = shape
    if device == "cpu" and order == "row-major" and M * N * K > MOST_ROW_MAJOR:
        pytest.skip("takes minutes with torch._int_mm")
    a = torch.randint(-128, 128, (M, K), dtype=torch.int8, device=device)
    b = torch.randint(-128, 128, (K, N), dtype=torch.int8, device=device)
    if order == "column-major":
        b = b.T.contiguous().T
    contenders = {
        "bigkern": lambda: bigkern.int8_mm(a, b),
        "torch": lambda: torch._int_mm(a, b),
    }
    alternate(benchmark, with_triton(contenders, device), device, rounds=PRODUCT_ROUNDS)
    work = {"work": f"product, b {order}", "shape": shape}
    benchmark.extra_info |= work | products(shape)


def test_weight_only(benchmark, dtype, side, device):
    """One token: the time is that of reading the weight."""
    skip_without_kernels("weight_only_linear", device)
    N = K = side
    weight = torch.randn(N, K, device=device)
    x = torch.randn(1, K, device=device).to(DTYPES[dtype])
    weight_q, scale = bigkern.quantize_rows(weight)
    groups = torch.rand(N, K // 128, device=device)
    plain = weight.to(DTYPES[dtype])
    contenders = {
        "bigkern": lambda: bigkern.weight_only_linear(x, weight_q, scale),
        "groups of 128": lambda: bigkern.weight_only_linear(x, weight_q, groups, group_size=128),
        "torch": lambda: F.linear(x, plain),
    }
    alternate(benchmark, with_triton(contenders, device), device)
    work = {"work": "weight-only", "shape": (1, N, K), "dtype": dtype}
    benchmark.extra_info |= work | {"bytes": N * K, "roof": "copy"}


def products(shape):
    return {"flops": 2 * math.prod(shape), "roof": "2 x bfloat16 product"}


def limit():
    """OP/s of a bare loop on all threads."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "int8_limit"
        source = Path(__file__).with_name("int8_limit.cpp")
        subprocess.run(["c++", "-O2", "-pthread", source, "-o", program], check=True)
        command = [program, str(torch.get_num_threads())]
        return 1e9 * float(subprocess.run(command, check=True, capture_output=True).stdout)


def mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(name, values):
    return f"{name}: geometric mean {mean(values):.2f}, least {min(values):.2f}"


def tables(benchmarks, device):
    infos = [benchmark["extra_info"] for benchmark in benchmarks]
    peak = limit()
    lines = [
        f"limits: int8 products in registers {peak / 1e9:.0f} GOP/s; copy "
        f"{copy_bandwidth(device):.1f} GB/s (read + written)\n",
        "| int8_linear (M, N, K) | bigkern ms (quartiles) | of limit | not packed ms | "
        "quantize_dynamic ms | float32 ms | dynamic / bigkern | float32 / bigkern |",
        "|---" * 8 + "|",
    ]
    dynamic_ratios, float_ratios = [], []
    for info in infos:
        if info["work"] != "linear":
            continue
        low, ours, high = info["quartiles_ms"]["bigkern"]
        others = {name: quartiles[1] for name, quartiles in info["quartiles_ms"].items()}
        dynamic_ratios.append(others["dynamic"] / ours)
        float_ratios.append(others["float32"] / ours)
        row = (
            str(tuple(info["shape"])),
            f"{ours:.3f} ({low:.3f}..{high:.3f})",
            f"{2e3 * math.prod(info['shape']) / ours / peak:.0%}",
            *(f"{others[name]:.3f}" for name in ("not packed", "dynamic", "float32")),
            f"{dynamic_ratios[-1]:.2f}",
            f"{float_ratios[-1]:.2f}",
        )
        lines.append(f"| {' | '.join(row)} |")
    if dynamic_ratios:
        lines += ["", summary("quantize_dynamic / bigkern", dynamic_ratios)]
        lines += [summary("float32 nn.Linear / bigkern", float_ratios)]

    lines += [
        "\n| int8_mm (M, N, K) | b | bigkern ms (quartiles) | of limit | torch._int_mm ms | "
        "torch / bigkern |",
        "|---" * 6 + "|",
    ]
    ratios = []
    for info in infos:
        if not info["work"].startswith("product"):
            continue
        low, ours, high = info["quartiles_ms"]["bigkern"]
        theirs = info["quartiles_ms"]["torch"][1]
        ratios.append(theirs / ours)
        row = (
            str(tuple(info["shape"])),
            info["work"].removeprefix("product, b "),
            f"{ours:.3f} ({low:.3f}..{high:.3f})",
            f"{2e3 * math.prod(info['shape']) / ours / peak:.0%}",
            f"{theirs:.3f}",
            f"{ratios[-1]:.2f}",
        )
        lines.append(f"| {' | '.join(row)} |")
    if ratios:
        lines += ["", summary("torch._int_mm / bigkern", ratios)]

    lines += [
        "\n| weight_only_linear (M, N, K) | dtype | bigkern ms | read GB/s | groups of 128 ms | "
        "F.linear ms | torch / bigkern |",
        "|---" * 7 + "|",
    ]
    for info in infos:
        if info["work"] != "weight-only":
            continue
        medians = {name: quartiles[1] for name, quartiles in info["quartiles_ms"].items()}
        M, N, K = info["shape"]
        row = (
            str((M, N, K)),
            info["dtype"],
            f"{medians['bigkern']:.3f}",
            f"{N * K / medians['bigkern'] / 1e6:.1f}",
            f"{medians['groups of 128']:.3f}",
            f"{medians['torch']:.3f}",
            f"{medians['torch'] / medians['bigkern']:.2f}",
        )
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(__file__, tables))
