"""The bytes that calls of the ops move, as the tests' emulator counts them on the CPU."""

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


@dataclass(frozen=True)
class Case:
    """A call of an op. It is emulated at the size `small`; at `large` it reads more by the ratio of
    the products, or of the least where there are none, and writes more by the ratio of the least.
    """

    name: str
    op: str
    prepare: Callable[..., Callable[[], object]]  # the call
    least: Callable[..., tuple[int, int]]  # bytes of the inputs and of the outputs
    small: tuple[int, ...]
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
    Case("Adam, float32", "adam_", adam, lambda n: (16 * n, 12 * n), (2**16,), (2**24,)),
    *(
        Case(
            f"attention, bfloat16, E {E}",
            "attention",
            attention_forward,
            forward_least,
            (256, 256, E),
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
            (256, 256, E),
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
        (1, 1024, 128),
        (1, 2**19, 128),
    ),
    # As many tiles as on a card with all SMs busy, so that the large tile is taken.
    Case(
        "int8_mm",
        "int8_mm",
        int8_mm,
        lambda M, N, K: (M * K + N * K, 4 * M * N),
        (2048, 2048, 64),
        (8192, 8192, 8192),
        products,
        2.0,
    ),
    Case(
        "int8_linear, bfloat16",
        "int8_linear",
        int8_linear,
        lambda M, N, K: (2 * M * K + N * K + 8 * N, 2 * M * N),
        (2048, 2048, 64),
        (8192, 8192, 8192),
        products,
        2.0,
    ),
    Case(
        "weight_only_linear of one row, bfloat16",
        "weight_only_linear",
        weight_only_linear,
        lambda M, N, K: (2 * M * K + N * K + 4 * N, 2 * M * N),
        (1, 1024, 1024),
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
    try:
        with ops.backend():
            for case in CASES:
                if "emulated" not in backends.table()[case.op]:
                    continue
                call = case.prepare(*case.small)
                controls.take_launches()
                call()
                launches = controls.take_launches()
                calls.append(describe(case, launches))
                for launch in launches:
                    name = short_name(launch["kernel"])
                    dynamic_smem[name] = max(dynamic_smem.get(name, 0), launch["dynamic_smem"])
    finally:
        controls.set_device("h100")
    return calls, dynamic_smem


def describe(case: Case, launches: list[dict]) -> dict:
    read, written = (sum(x[f"global_{kind}"] for x in launches) for kind in ("read", "written"))
    least, large = case.least(*case.small), case.least(*case.large)
    products = case.products(*case.large)
    growth = products / case.products(*case.small) if products else large[0] / least[0]
    return {
        "call": case.name,
        "kernels": [short_name(launch["kernel"]) for launch in launches],
        "emulated_size": case.small,
        "emulated_read": read,
        "emulated_written": written,
        "emulated_least": sum(least),
        "size": case.large,
        "moved": read * growth + written * large[1] / least[1],
        "least": sum(large),
        "flops": 2 * products,
        "rate": case.rate,
    }
