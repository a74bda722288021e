"""What the assembly of each op's kernels must have, by the op that a table of tile sizes names."""

from typing import Any

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


Expected = dict[str, list[str]]


def expected_of_adam(row: Row, architecture: str) -> Expected:
    return {name: [VECTORS[architecture]] for name in ("_adam", "_sum_of_squares")}


def expected_of_attention(row: Row, architecture: str) -> Expected:
    return {}


# op -> row, architecture -> kernel -> regular expressions
EXPECTED = {"adam_": expected_of_adam}
