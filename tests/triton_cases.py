"""The kernels that a row of a table of tile sizes is for, and what their assembly must have."""

from collections.abc import Callable
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


def expected_of_int8_mm(row: Row, architecture: str) -> Expected:
    # Of 64 rows at least.
    large = {
        "sm_90": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
        "sm_100": r"tcgen05\.mma\.cta_group::1\.kind::i8",
    }
    small = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.(satfinite\.)?s32\.s8\.s8"
    if architecture == "gfx942":
        return {"int8_mm_kernel": [r"v_mfma_i32\w*_i8"]}
    product = large.get(architecture, small) if row["config"]["BLOCK_M"] >= 64 else small
    return {"int8_mm_kernel": [product, COPIES[architecture]]}


def expected_of_int8_conv2d(row: Row, architecture: str) -> Expected:
    vectors = [VECTORS[architecture]]
    return {"image_magnitude_kernel": vectors, "quantize_images_kernel": vectors}


def expected_of_quantize_rows(row: Row, architecture: str) -> Expected:
    return {"quantize_rows_kernel": [VECTORS[architecture]]}


def expected_of_weight_only(row: Row, architecture: str) -> Expected:
    if row["shape"]["M"] == 1:
        return {"weight_only_row_kernel": [VECTORS[architecture]]}
    return {"weight_only_kernel": []}


def expected_of_attention(*kernels: str) -> Callable[[Row, str], Expected]:
    def expected(row: Row, architecture: str) -> Expected:
        if row["dtype"] == "float32":  # tensor cores would round the operands
            return {name: [] for name in kernels}
        rows = row["config"]["BLOCK_KV" if kernels == ("keys_kernel",) else "BLOCK_Q"]
        is_small = rows < 64 and architecture in ("sm_90", "sm_100")
        return {name: [PRODUCTS["sm_80" if is_small else architecture]] for name in kernels}

    return expected


# op -> row, architecture -> kernel -> regular expressions
EXPECTED = {
    "adam_": expected_of_adam,
    "attention": expected_of_attention("attention_kernel"),
    "attention_extras": expected_of_attention("attention_kernel"),
    "attention_keys": expected_of_attention("keys_kernel"),
    "attention_keys_extras": expected_of_attention("keys_kernel"),
    "attention_queries": expected_of_attention("queries_kernel"),
    "attention_queries_extras": expected_of_attention("queries_kernel"),
    "attention_mask": expected_of_attention("mask_kernel"),
    "int8_conv2d": expected_of_int8_conv2d,
    "int8_mm": expected_of_int8_mm,
    "quantize_rows": expected_of_quantize_rows,
    "weight_only_linear": expected_of_weight_only,
}
