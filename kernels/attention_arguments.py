"""The arguments of the attention ops, checked as those of the compiled ones: see
``csrc/attention_call.h``."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MOST_FEATURES = 256


def require(condition: bool, *message: Any) -> None:
    if not condition:
        raise ValueError("".join(map(str, message)))


def shape(x: Tensor) -> list[int]:
    return list(x.shape)


@dataclass
class Arguments:
    """In the words of ``csrc/ops.cpp``."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    attn_mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    philox: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqlens_q: Tensor | None = None
    seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    scale: float = 1.0
    is_causal: bool = False
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0

    def __post_init__(self) -> None:
        self.check_inputs()
        self.check_sequences()
        self.check_mask()
        self.check_slopes()
        self.check_rest()

    # ---- What follows from them ----

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch(self) -> int:
        return self.cu_seqlens_q.size(0) - 1 if self.is_packed else self.query.size(0)

    @property
    def heads(self) -> int:
        return self.query.size(1)

    @property
    def kv_heads(self) -> int:
        return self.key.size(1)

    @property
    def group(self) -> int:
        return self.heads // max(self.kv_heads, 1)

    @property
    def max_q_len(self) -> int:
        return self.max_seqlen_q if self.is_packed else self.query.size(2)

    @property
    def max_k_len(self) -> int:
        return self.max_seqlen_k if self.is_packed else self.key.size(2)

    @property
    def value_dim(self) -> int:
        return 0 if self.value is None else self.value.size(-1)

    @property
    def threshold(self) -> int:
        return math.floor(self.dropout_p * 65536 + 0.5)

    @property
    def is_plain(self) -> bool:
        """Whether scores are scaled products of the keys that causality and window select."""
        extras = self.attn_mask is not None or self.alibi_slopes is not None or self.threshold
        return self.scale > 0 and self.softcap == 0 and not extras

    def stats_shape(self) -> tuple[int, ...]:
        if self.is_packed:
            return self.heads, self.query.size(0)
        return tuple(self.query.shape[:3])

    # ---- Checks ----

    def check_device(self, name: str, x: Tensor) -> None:
        require(
            x.device == self.query.device,
            name, " must be on the device of query, ", self.query.device, ", got ", x.device,
        )  # fmt: skip

    def check_dtype(self, name: str, x: Tensor, dtype: torch.dtype) -> None:
        require(x.dtype == dtype, name, " must be ", dtype, ", got ", x.dtype)
        self.check_device(name, x)

    def check_inputs(self) -> None:
        query, key, value = self.query, self.key, self.value
        dtype, features = query.dtype, query.shape[-1:]
        require(dtype in DTYPES, "query must be float32, float64, float16 or bfloat16, got ", dtype)
        dim = 3 if self.is_packed else 4
        layout = "[total, heads, head_dim]" if dim == 3 else "[batch, heads, length, head_dim]"
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x is None:
                continue
            require(x.dim() == dim, name, " must be ", layout, ", got shape ", shape(x))
            require(
                x.dtype == dtype, name, " must have the dtype of query, ", dtype, ", got ", x.dtype
            )
            self.check_device(name, x)
            require(
                self.is_packed or x.size(0) == query.size(0),
                name, " must have the batch size of query, ", query.size(0), ", got shape ",
                shape(x),
            )  # fmt: skip
        require(
            key.shape[-1:] == features,
            "key must have the head_dim of query, ", features[0], ", got shape ", shape(key),
        )  # fmt: skip
        if value is not None:
            require(
                value.shape[:-1] == key.shape[:-1],
                "value must have as many heads and rows as key, ", shape(key), ", got ",
                shape(value),
            )  # fmt: skip
        H, Hkv = query.size(1), key.size(1)
        require(
            H % Hkv == 0 if Hkv else H == 0,
            "query must have a multiple of key's ", Hkv, " heads, got ", H,
        )  # fmt: skip
        require(
            dtype != torch.float64,
            "query must be float32, float16 or bfloat16 on a GPU, got ", dtype,
        )  # fmt: skip
        require(
            max(features[0], self.value_dim) <= MOST_FEATURES,
            "query and value must have at most ", MOST_FEATURES, " features on a GPU, got ",
            features[0], " and ", self.value_dim,
        )  # fmt: skip

    def check_sequences(self) -> None:
        starts = (self.cu_seqlens_q, self.cu_seqlens_k)
        require(
            (starts[0] is None) == (starts[1] is None),
            "cu_seqlens_q and cu_seqlens_k must be given together, got only ",
            "cu_seqlens_k" if starts[0] is None else "cu_seqlens_q",
        )
        if self.is_packed:
            require(
                self.seqlens_q is None and self.seqlens_k is None,
                "seqlens are for the padded layout, cu_seqlens for the packed one: give one of "
                "them, got both",
            )
            require(
                starts[0].dim() == 1 and starts[0].size(0) > 0,
                "cu_seqlens_q must have shape [batch + 1], got ", shape(starts[0]),
            )  # fmt: skip
        for name in ("cu_seqlens_q", "cu_seqlens_k", "seqlens_q", "seqlens_k"):
            x, n = getattr(self, name), self.batch + self.is_packed
            if x is None:
                continue
            require(
                x.dim() == 1 and x.size(0) == n,
                name, " must have shape [", n, "], got ", shape(x),
            )  # fmt: skip
            self.check_dtype(name, x, torch.int32)
            require(
                n < 2 or x.stride(0) == 1,
                name, " must be contiguous, got a stride of ", x.stride(0),
            )  # fmt: skip

    def check_mask(self) -> None:
        mask, dtype = self.attn_mask, self.query.dtype
        if mask is None:
            return
        require(not self.is_packed, "attn_mask can't be given with cu_seqlens")
        sizes = [*self.query.shape[:3], self.key.size(2)]
        require(
            mask.dim() == 4 and all(m in (1, n) for m, n in zip(mask.shape, sizes, strict=True)),
            "attn_mask must be broadcastable to ", sizes, " with 4 dimensions, got shape ",
            shape(mask),
        )  # fmt: skip
        require(
            mask.dtype in (torch.bool, torch.float32, dtype),
            "attn_mask must be bool, float32 or of the dtype of query, ", dtype, ", got ",
            mask.dtype,
        )  # fmt: skip
        self.check_device("attn_mask", mask)

    def check_slopes(self) -> None:
        slopes = self.alibi_slopes
        if slopes is None:
            return
        B, H = self.batch, self.heads
        require(
            shape(slopes) in ([H], [B, H]),
            "alibi_slopes must have shape [", H, "] or [", B, ", ", H, "], got ", shape(slopes),
        )  # fmt: skip
        self.check_dtype("alibi_slopes", slopes, torch.float32)

    def check_rest(self) -> None:
        require(math.isfinite(self.scale), "scale must be finite, got ", self.scale)
        require(
            0 <= self.softcap < math.inf,
            "softcap must be 0 (none) or positive, got ", self.softcap,
        )  # fmt: skip
        window = (self.window_left, self.window_right)
        require(
            min(window) >= -1,
            "window must be two numbers from 0 on, or -1 for unbounded, got ", window,
        )  # fmt: skip
        require(0 <= self.dropout_p <= 1, "dropout_p must be from 0 to 1, got ", self.dropout_p)
        if self.dropout_p == 0:
            return
        require(self.philox is not None, "philox must be given for dropout_p ", self.dropout_p)
        require(
            self.philox.shape == (2,) and self.philox.dtype == torch.int64,
            "philox must be (seed, offset), torch.int64 of shape [2], got ", self.philox.dtype,
            " of shape ", shape(self.philox),
        )  # fmt: skip
        self.check_device("philox", self.philox)

    def check_stats(self, *stats: tuple[str, Tensor]) -> None:
        for name, x in stats:
            require(
                tuple(x.shape) == self.stats_shape(),
                name, " must have one element for each row of query ", shape(self.query), ", got ",
                shape(x),
            )  # fmt: skip
            self.check_dtype(name, x, torch.float32)

    def check_out(self, name: str, x: Tensor) -> None:
        """It must have the shape of the output."""
        sizes = [*self.query.shape[:-1], self.value_dim]
        require(
            shape(x) == sizes,
            name, " must have the shape of query ", shape(self.query), " with the last size ",
            self.value_dim, ", got ", shape(x),
        )  # fmt: skip
        self.check_dtype(name, x, self.query.dtype)
