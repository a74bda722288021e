"""The bytes that calls of the ops move, as the tests' emulator counts them on the CPU."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from cubins import short_name

import bigkern
from bigkern import backends

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from cuda_compiler import NoCompilerError as NoCompilerError
from emulator import ops

SECTOR_BYTES = 32


@dataclass(frozen=True)
class Case:
    """A call of an op, emulated at the sizes `small`. What it moves at `large` is more by the ratio
    of the least. If it multiplies, a part of it grows as the products, and a part as the results:
    two sizes tell them.
    """

    name: str
    op: str
    prepare: Callable[..., Callable[[], object]]  # the call
    least: Callable[..., tuple[int, int]]  # bytes of the inputs and of the outputs
    small: list[tuple[int, ...]]
    large: tuple[int, ...]
    products: Callable[..., int] = lambda *size: 0  # multiply-adds
    rate: float = 1.0  # of the tensor cores: 1 for half precision


def adam(n: int) -> Callable[[], object]:
    param = torch.zeros(n, requires_grad=True)
    param.grad = torch.ones(n)
    return bigkern.optim.Adam([param]).step


def qkv(queries: int, keys: int, head_dim: int) -> list[torch.Tensor]:
    lengths = (queries, keys, keys)
    return [torch.full((1, 1, n, head_dim), 0.5, dtype=torch.bfloat16) for n in lengths]


def attention_forward(queries: int, keys: int, head_dim: int) -> Callable[[], object]:
    q, k, v = qkv(queries, keys, head_dim)
    return lambda: bigkern.scaled_dot_product_attention(q, k, v)


def attention_backward(queries: int, keys: int, head_dim: int) -> Callable[[], object]:
    inputs = [x.requires_grad_() for x in qkv(queries, keys, head_dim)]
    out = bigkern.scaled_dot_product_attention(*inputs)
    return lambda: torch.autograd.grad(out, inputs, torch.ones_like(out))


def int8_mm(M: int, N: int, K: int) -> Callable[[], object]:
    a, b = torch.ones(M, K, dtype=torch.int8), torch.ones(N, K, dtype=torch.int8)
    return lambda: bigkern.int8_mm(a, b.T)


def int8_linear(M: int, N: int, K: int) -> Callable[[], object]:
    x, weight = torch.ones(M, K, dtype=torch.bfloat16), torch.ones(N, K, dtype=torch.int8)
    return lambda: bigkern.int8_linear(x, weight, torch.ones(N), torch.ones(N))


def weight_only_linear(M: int, N: int, K: int) -> Callable[[], object]:
    x, weight = torch.ones(M, K, dtype=torch.bfloat16), torch.ones(N, K, dtype=torch.int8)
    return lambda: bigkern.weight_only_linear(x, weight, torch.ones(N))


def forward_least(queries: int, keys: int, E: int) -> tuple[int, int]:
    """Of bfloat16, and of the row maxima and sums in float32."""
    return 2 * (queries + 2 * keys) * E, (2 * E + 8) * queries


def backward_least(queries: int, keys: int, E: int) -> tuple[int, int]:
    """Query, out and its gradient, maxima and sums; keys and values; and three gradients."""
    return (6 * E + 8) * queries + 4 * keys * E, 2 * (queries + 2 * keys) * E


def products(M: int, N: int, K: int) -> int:
    return M * N * K


CASES = [
    Case("Adam, float32", "adam_", adam, lambda n: (16 * n, 12 * n), [(2**16,)], (2**24,)),
    *(
        Case(
            f"attention, bfloat16, E {E}",
            "attention",
            attention_forward,
            forward_least,
            [(128, 128, E), (256, 256, E)],
            (16384, 16384, E),
            lambda *size: 2 * products(*size),
        )
        for E in (64, 128, 256)
    ),
    *(
        Case(
            f"attention backward, bfloat16, E {E}",
            "attention_backward",
            attention_backward,
            backward_least,
            [(128, 128, E), (256, 256, E)],
            (16384, 16384, E),
            lambda *size: 5 * products(*size),
        )
        for E in (64, 128)
    ),
    Case(
        "attention of one query, bfloat16",
        "attention",
        attention_forward,
        forward_least,
        [(1, 1024, 128)],
        (1, 2**19, 128),
    ),
    # As many tiles as on a card with all SMs busy, so that the large tile is taken.
    Case(
        "int8_mm",
        "int8_mm",
        int8_mm,
        lambda M, N, K: (M * K + N * K, 4 * M * N),
        [(2048, 2048, 64), (2048, 2048, 128)],
        (8192, 8192, 8192),
        products,
        2.0,
    ),
    Case(
        "int8_linear, bfloat16",
        "int8_linear",
        int8_linear,
        lambda M, N, K: (2 * M * K + N * K + 8 * N, 2 * M * N),
        [(2048, 2048, 64), (2048, 2048, 128)],
        (8192, 8192, 8192),
        products,
        2.0,
    ),
    Case(
        "weight_only_linear of one row, bfloat16",
        "weight_only_linear",
        weight_only_linear,
        lambda M, N, K: (2 * M * K + N * K + 4 * N, 2 * M * N),
        [(1, 1024, 1024)],
        (1, 8192, 8192),
    ),
]


def emulate_all(card: str = "h100") -> tuple[list[dict], dict[str, int]]:
    """What each call moved, and the dynamic shared memory that each kernel was launched with.

    Raises:
        RuntimeError: this card doesn't launch a kernel.
        cuda_compiler.NoCompilerError: nothing is cached, and there is no nvcc.
    """
    controls = ops.load()
    calls, dynamic_smem = [], {}
    controls.set_device(card)
    controls.count_sectors(True)
    try:
        with ops.backend():
            for case in CASES:
                if "emulated" not in backends.table()[case.op]:
                    continue
                launches = []
                for size in case.small:
                    call = case.prepare(*size)
                    controls.take_launches()
                    call()
                    launches.append(controls.take_launches())
                calls.append(describe(case, launches))
                for launch in itertools.chain(*launches):
                    name = short_name(launch["kernel"])
                    dynamic_smem[name] = max(dynamic_smem.get(name, 0), launch["dynamic_smem"])
    finally:
        controls.count_sectors(False)
        controls.set_device("h100")
    return calls, dynamic_smem


def describe(case: Case, launches: list[list[dict]]) -> dict:
    """`launches` of each small size."""
    # Each warp's access takes whole sectors, each once for all its lanes.
    read, written = (
        [SECTOR_BYTES * sum(launch[f"sectors_{kind}"] for launch in each) for each in launches]
        for kind in ("read", "written")
    )
    return {
        "call": case.name,
        "kernels": [short_name(launch["kernel"]) for launch in launches[-1]],
        "emulated_size": case.small[-1],
        "emulated_read": read[-1],
        "emulated_written": written[-1],
        "emulated_least": sum(case.least(*case.small[-1])),
        "size": case.large,
        "moved": moved_at_large(case, [r + w for r, w in zip(read, written, strict=True)]),
        "least": sum(case.least(*case.large)),
        "flops": 2 * case.products(*case.large),
        "rate": case.rate,
    }


def moved_at_large(case: Case, moved: list[int]) -> float:
    """From the bytes at the small sizes."""
    least = [case.least(*size) for size in (*case.small, case.large)]
    if len(moved) == 1:
        return moved[0] * sum(least[-1]) / sum(least[0])
    # moved = a * results + b * products
    products = [case.products(*size) for size in (*case.small, case.large)]
    results = [written for _, written in least]
    determinant = results[0] * products[1] - results[1] * products[0]
    a = (moved[0] * products[1] - moved[1] * products[0]) / determinant
    b = (results[0] * moved[1] - results[1] * moved[0]) / determinant
    return a * results[2] + b * products[2]
