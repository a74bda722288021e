"""INT8 products and layers on the CPU: bigkern against torch's.

python benchmarks/bench_int8_mm.py [--save]
"""

import math
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from common import alternate, copy_bandwidth, main
from torch import nn
from torch.nn import functional as F

import bigkern

SHAPES = [  # M, N, K
    (1, 4096, 4096),
    (16, 4096, 4096),
    (64, 128, 21632),
    (128, 1024, 1024),
    (512, 2048, 512),
    (2048, 2048, 2048),
    (197, 3072, 768),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# torch._int_mm has no kernel for most CPUs without VNNI, where it takes seconds.
PRODUCT_ROUNDS, MOST_ROW_MAJOR = 9, 2**32


def dynamically_quantized(linear):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but the fastest that torch has
        torch.backends.quantized.engine = "x86"
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(benchmark, shape, device):
    M, N, K = shape
    linear, x = nn.Linear(K, N).requires_grad_(False), torch.randn(M, K)
    dynamic = dynamically_quantized(linear)
    weight, scale = bigkern.quantize_rows(linear.weight)
    packed = bigkern.pack_weight(weight)
    contenders = {
        "bigkern": lambda: bigkern.int8_linear(x, packed, scale, linear.bias),
        "not packed": lambda: bigkern.int8_linear(x, weight, scale, linear.bias),
        "dynamic": lambda: dynamic(x),
        "float32": lambda: linear(x),
    }
    with torch.inference_mode():
        alternate(benchmark, contenders, device)
    benchmark.extra_info |= {"work": "linear", "shape": shape}


@pytest.mark.parametrize("order", ["column-major", "row-major"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(benchmark, shape, order, device):
    M, N, K = shape
    if order == "row-major" and M * N * K > MOST_ROW_MAJOR:
        pytest.skip("takes minutes with torch._int_mm")
    a = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    b = torch.randint(-128, 128, (K, N), dtype=torch.int8)
    if order == "column-major":
        b = b.T.contiguous().T
    contenders = {
        "bigkern": lambda: bigkern.int8_mm(a, b),
        "torch": lambda: torch._int_mm(a, b),
    }
    alternate(benchmark, contenders, device, rounds=PRODUCT_ROUNDS)
    benchmark.extra_info |= {"work": f"product, b {order}", "shape": shape}


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_only(benchmark, dtype, device):
    """One token: the time is that of reading the weight."""
    N = K = 4096
    weight, x = torch.randn(N, K), torch.randn(1, K).to(DTYPES[dtype])
    weight_q, scale = bigkern.quantize_rows(weight)
    groups = torch.rand(N, K // 128)
    plain = weight.to(DTYPES[dtype])
    contenders = {
        "bigkern": lambda: bigkern.weight_only_linear(x, weight_q, scale),
        "groups of 128": lambda: bigkern.weight_only_linear(x, weight_q, groups, group_size=128),
        "torch": lambda: F.linear(x, plain),
    }
    alternate(benchmark, contenders, device)
    benchmark.extra_info |= {"work": "weight-only", "shape": (1, N, K), "dtype": dtype}


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
