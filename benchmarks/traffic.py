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
    """A call of an op. It is emulated at the size `small`; what is moved at `large` is more by the
    ratio of the products, or of the minima where there are none."""

    name: str
    op: str
    prepare: Callable[..., Callable[[], object]]  # the call
    minimum: Callable[..., int]  # bytes: each input read and each output written once
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


def attention_case(kind: str, passes: int, products: int, small: tuple, large: tuple) -> Case:
    """Forward: 4 tensors of bfloat16 and the log-sum-exp are moved, 2 products made; backward
    twice that, and 5."""
    return Case(
        f"attention {kind}, bfloat16, E {large[2]}",
        "attention_backward" if passes == 2 else "attention",
        attention_backward if passes == 2 else attention_forward,
        lambda queries, keys, E: passes * (4 * (queries + keys) * E + 4 * queries),
        small,
        large,
        lambda queries, keys, E: products * queries * keys * E,
    )


CASES = [
    Case("Adam, float32", "adam_", adam, lambda n: 28 * n, (2**16,), (2**24,)),
    *(
        attention_case("forward", 1, 2, (256, 256, E), (16384, 16384, E))
        for E in (64, 128, 256)
    ),
    *(
        attention_case("backward", 2, 5, (256, 256, E), (16384, 16384, E))
        for E in (64, 128)
    ),
    attention_case("decoding", 1, 2, (1, 1024, 128), (1, 2**19, 128)),
    Case(
        "int8_mm",
        "int8_mm",
        int8_mm,
        lambda M, N, K: M * K + N * K + 4 * M * N,
        (512, 512, 256),
        (8192, 8192, 8192),
        lambda M, N, K: M * N * K,
        2.0,
    ),
    Case(
        "int8_linear, bfloat16",
        "int8_linear",
        int8_linear,
        lambda M, N, K: 2 * M * K + N * K + 8 * N + 2 * M * N,
        (512, 512, 256),
        (8192, 8192, 8192),
        lambda M, N, K: M * N * K,
        2.0,
    ),
    Case(
        "weight_only_linear, 1 row of bfloat16",
        "weight_only_linear",
        weight_only_linear,
        lambda M, N, K: 2 * M * K + N * K + 4 * N + 2 * M * N,
        (1, 1024, 1024),
        (1, 8192, 8192),
    ),
]  # fmt: skip


def emulate_all(card: str = "h100") -> tuple[list[dict], dict[str, int]]:
    """What each call moved, and the dynamic shared memory that each kernel was launched with.

    Raises:
        RuntimeError: this card doesn't launch a kernel.
        cuda_compiler.NoCompilerError: nothing is cached, and there is no nvcc.
    """
    controls = ops.load()
    controls.set_device(card)
    calls, dynamic_smem = [], {}
    with ops.backend():
        for case in CASES:
            if "emulated" not in backends.table()[case.op]:
                continue
            run = case.prepare(*case.small)
            controls.take_launches()
            run()
            launches = controls.take_launches()
            calls.append(describe(case, launches))
            for launch in launches:
                name = short_name(launch["kernel"])
                dynamic_smem[name] = max(dynamic_smem.get(name, 0), launch["dynamic_smem"])
    return calls, dynamic_smem


def describe(case: Case, launches: list[dict]) -> dict:
    read, written = (sum(x[f"global_{kind}"] for x in launches) for kind in ("read", "written"))
    products, minimum = case.products(*case.large), case.minimum(*case.large)
    growth = (
        products / case.products(*case.small) if products else minimum / case.minimum(*case.small)
    )
    return {
        "call": case.name,
        "kernels": [short_name(launch["kernel"]) for launch in launches],
        "emulated_size": case.small,
        "emulated_read": read,
        "emulated_written": written,
        "emulated_minimum": case.minimum(*case.small),
        "size": case.large,
        "moved": (read + written) * growth,
        "minimum": minimum,
        "flops": 2 * products,
        "rate": case.rate,
    }
