"""The attention that a model runs on: bigkern's, or torch's to compare with."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops import scaled_dot_product_attention
from bigkern.ops.kv_cache import KVCache, attention_with_cache


def torch_attention_with_cache(
    query: Tensor, k_new: Tensor, v_new: Tensor, cache: KVCache, *, lengths: Tensor | None = None
) -> Tensor:
    """:func:`bigkern.attention_with_cache` by torch; what it returns for tokens that don't count is
    undefined."""
    start, L = cache.lengths.clone(), query.size(2)
    is_empty, is_even = cache.longest == 0, cache.all_equal and lengths is None
    if is_empty:  # what is masked is multiplied by 0, which NaN would survive
        cache.keys.zero_(), cache.values.zero_()
    cache.append(k_new, v_new, lengths)
    if is_empty:  # a prompt, whose padding is to its right: no token of it sees any
        return F.scaled_dot_product_attention(query, k_new, v_new, is_causal=True)
    keys, values = (x[:, :, : cache.longest] for x in (cache.keys, cache.values))
    mask = None
    if not (is_even and L == 1):
        position = start[:, None] + torch.arange(L, device=query.device)  # [B, L]
        mask = torch.arange(cache.longest, device=query.device) <= position[..., None]  # [B, L, S]
        mask = mask.unsqueeze(1)
    return F.scaled_dot_product_attention(query, keys, values, mask)


class Implementation(NamedTuple):
    attention: Callable[..., Tensor]
    attention_with_cache: Callable[..., Tensor]


IMPLEMENTATIONS = {
    "bigkern": Implementation(scaled_dot_product_attention, attention_with_cache),
    "torch": Implementation(F.scaled_dot_product_attention, torch_attention_with_cache),
}
