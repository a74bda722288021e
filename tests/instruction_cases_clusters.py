"""Instructions on another block's shared memory, alone, with what numpy says."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """%0: where `old` is in the other block; then values, and the address of its mbarrier."""

    text: str
    type: str  # as in `instruction_cases.TYPES`
    expected: Callable  # of arrays: old, value
    values: int = 1  # of a thread
    is_async: bool = True  # the mbarrier counts its bytes


TO_BARRIER = "mbarrier::complete_tx::bytes"
RED = f"red.async.relaxed.cluster.shared::cluster.{TO_BARRIER}"
STORE = f"st.async.weak.shared::cluster.{TO_BARRIER}"


def add(old, value):
    return old + value


def keep_new(old, value):
    return value


def increment(old, value):
    return np.where(old >= value, 0, old + 1)


def decrement(old, value):
    return np.where((old == 0) | (old > value), value, old - 1)


REDUCTIONS = [
    *(("add", kind, add) for kind in ("u32", "s32", "u64")),
    *(("min", kind, np.minimum) for kind in ("u32", "s32")),
    *(("max", kind, np.maximum) for kind in ("u32", "s32")),
    *(("inc", "u32", increment), ("dec", "u32", decrement)),
    *(("and", "b32", np.bitwise_and), ("or", "b32", np.bitwise_or), ("xor", "b32", np.bitwise_xor)),
]
CASES = [
    *(
        Case(f"{RED}.{name}.{kind} [%0], %1, [%2];", kind.replace("b", "u"), expected)
        for name, kind, expected in REDUCTIONS
    ),
    *(
        Case(f"{STORE}.{kind} [%0], %1, [%2];", held, keep_new)
        for kind, held in {
            **{kind: kind for kind in ("u32", "s32", "f32", "u64", "s64", "f64")},
            **{"b32": "u32", "b64": "u64"},
        }.items()
    ),
    Case(f"st.async.shared::cluster.{TO_BARRIER}.u32 [%0], %1, [%2];", "u32", keep_new),
    *(
        Case(f"{STORE}.v2.{kind} [%0], {{%1, %2}}, [%3];", held, keep_new, 2)
        for kind, held in {"b32": "u32", "f32": "f32", "b64": "u64", "f64": "f64"}.items()
    ),
    Case(f"{STORE}.v4.b32 [%0], {{%1, %2, %3, %4}}, [%5];", "u32", keep_new, 4),
    Case("st.shared::cluster.u32 [%0], %1;", "u32", keep_new, 1, False),
    Case("st.relaxed.cluster.shared::cluster.u64 [%0], %1;", "u64", keep_new, 1, False),
    Case("st.shared::cluster.v2.f32 [%0], {%1, %2};", "f32", keep_new, 2, False),
    Case("red.shared::cluster.add.u32 [%0], %1;", "u32", add, 1, False),
    Case("red.relaxed.cluster.shared::cluster.max.s32 [%0], %1;", "s32", np.maximum, 1, False),
    Case(
        "{.reg .b32 a; atom.acq_rel.cluster.shared::cluster.exch.b32 a, [%0], %1;}",
        "u32",
        keep_new,
        1,
        False,
    ),
    Case(
        "{.reg .b64 a, b; ld.shared::cluster.u64 a, [%0]; add.u64 b, a, %1;"
        " atom.shared::cluster.cas.b64 a, [%0], a, b;}",
        "u64",
        add,
        1,
        False,
    ),
]
