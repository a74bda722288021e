"""A call of each op that a table of tile sizes has rows of, and what its kernels must have."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bigkern.ops import adam_

Row = dict[str, Any]
NVIDIAS = ("sm_80", "sm_90", "sm_100", "sm_120")
# 16 bytes an access.
VECTORS = dict.fromkeys(NVIDIAS, r"ld\.global[.\w]*\.(v4\.b32|v2\.b64)") | {
    "gfx942": r"(global|buffer)_load_dwordx4"
}
COPIES = dict.fromkeys(NVIDIAS, r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10")
PRODUCTS = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
    "sm_120": r"mma\.sync",
    "gfx942": r"v_mfma",
}


class Case(NamedTuple):
    run: Callable[[Row], object]  # calls the op so that it takes the row
    expected: Callable[[Row, str], dict[str, list[str]]]  # kernel -> what is in its assembly


def dtype_of(row: Row) -> torch.dtype:
    return getattr(torch, row["dtype"])


def run_adam(row: Row) -> None:
    params = [torch.zeros(100, dtype=dtype_of(row))]
    lists = [[torch.zeros_like(params[0])] for _ in range(3)]
    scalars = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    adam_(params, *lists, [], [torch.zeros(())], **scalars, max_grad_norm=1.0)


def expected_of_adam(row: Row, architecture: str) -> dict[str, list[str]]:
    return {name: [VECTORS[architecture]] for name in ("_adam", "_sum_of_squares")}


CASES = {"adam_": Case(run_adam, expected_of_adam)}
