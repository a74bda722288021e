"""The attention ``"bigkern"`` of Hugging Face models; to import this module registers it.

>>> import bigkern.integrations.transformers
>>> model = AutoModel.from_pretrained(name, attn_implementation="bigkern")

It serves whatever goes through transformers' attention interface: training and generation, every
cache, ``torch.compile`` and gradient checkpointing. A query all of whose keys are masked, as those
of padding may be, gives zeros.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from bigkern.ops.attention import attention_with_weights, scaled_dot_product_attention

NAME = "bigkern"

_UNSUPPORTED = {
    "sinks": ("attention sinks of each token", "eager"),
    "indices": ("sparse attention by indices", "sdpa"),
    "block_indices": ("sparse attention by blocks", "sdpa"),
}


class _Parts(NamedTuple):
    """What a mask is made of, by which the kernel skips keys: valid while nobody wrote into it."""

    padding: Tensor | None  # [B, 1, 1, S]
    window: tuple[int, int]
    version: int


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """:func:`bigkern.scaled_dot_product_attention` in the words of transformers.

    Args:
        module: the layer; its ``is_causal`` counts where the argument is None.
        query: (B, H, L, E).
        key: (B, Hkv, S, E), where Hkv divides H.
        value: (B, Hkv, S, Ev).
        attention_mask: of :func:`mask`, or any other that broadcasts to (B, H, L, S): bool, True
            where query and key meet, or added to the scores. It alone then says who meets whom.
            With None the window and ``is_causal`` do: causal is aligned to the top left if there
            is more than one query, as in a static cache that is still empty.
        sliding_window: a query meets as many keys up to its own, and after it if not causal.
        s_aux: (H), the attention sink: the logit of a further key, whose value is zero.
        position_bias: added to the scores, broadcastable to (B, H, L, S); may have a gradient.
        output_attentions: return the weights too, dropped ones zero.

    Returns:
        (B, L, H, Ev), contiguous, and the weights (B, H, L, S) or None.

    Raises:
        NotImplementedError: sparse attention; sinks of each token; the weights together with a
            sink.
    """
    for name, (what, instead) in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"bigkern has no {what} ({name}); use attn_implementation={instead!r}"
            )
    window = None
    if attention_mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        L = query.size(2)
        if is_causal and 1 < L < key.size(2):
            key, value = key[:, :, :L], value[:, :, :L]
        window = _window(is_causal, L, key.size(2), sliding_window)
    elif (parts := _parts_of(attention_mask)) is not None:
        attention_mask, window = parts.padding, parts.window
    if position_bias is not None:
        attention_mask = _biased(attention_mask, position_bias[..., : key.size(2)])

    inputs = (query, key, value, attention_mask)
    options = {
        "dropout_p": dropout,
        "scale": scaling,
        "enable_gqa": True,
        "window": window,
        "softcap": softcap,
    }
    weights = None
    if s_aux is not None:
        if output_attentions:
            raise NotImplementedError(
                "bigkern doesn't return the weights beside attention sinks (s_aux); use "
                "attn_implementation='eager' or output_attentions=False"
            )
        out, lse = scaled_dot_product_attention(*inputs, **options, return_lse=True)
        # The sink takes exp(s_aux) of the sum of exp(scores) + exp(s_aux).
        share = torch.sigmoid(lse - s_aux[:, None])
        out = (out * share[..., None]).to(out.dtype)
    elif output_attentions:
        out, weights = attention_with_weights(*inputs, **options)
    else:
        out = scaled_dot_product_attention(*inputs, **options)
    return out.transpose(1, 2).contiguous(), weights


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs,
) -> Tensor | None:
    """transformers' mask for torch's attention: bool, (B, 1, L, S), or None where nothing but
    ``is_causal`` is needed.

    One that is padding alone is a view of (B, 1, 1, S). Others that are padding and a window are
    remembered as such: where a layer gets the tensor as it is, the kernel takes padding and window
    instead, and skips the keys outside of it. A layer that cuts it, or adds to it, gets the whole.
    """
    arguments = kwargs | {
        "batch_size": batch_size,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "attention_mask": attention_mask,
        "local_size": local_size,
    }
    row = {"q_length": 1, "mask_function": bidirectional_mask_function}
    if mask_function is bidirectional_mask_function:
        first = sdpa_mask(**arguments | row)
        return first if first is None else first.expand(-1, -1, q_length, -1)

    whole = sdpa_mask(
        **arguments, q_length=q_length, q_offset=q_offset, mask_function=mask_function
    )
    if whole is None or torch.compiler.is_compiling() or whole.is_inference():
        return whole
    window = _window_of(mask_function, local_size)
    is_aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if window is not None and is_aligned:
        row |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
        padding = sdpa_mask(**arguments | row | {"local_size": None})
        whole.bigkern_parts = _Parts(padding, window, whole._version)
    return whole


def enable(model: PreTrainedModel) -> Callable[[], None]:
    """Lets a model and its parts attend by ``"bigkern"``; returns what undoes it.

    Raises:
        TypeError: not a ``PreTrainedModel``.
        NotImplementedError: a model that doesn't use transformers' attention interface.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model)}")
    before = [(config, config._attn_implementation) for config in _configs(model)]

    def undo() -> None:
        for config, name in before:  # of a part after that of the whole, which sets its parts too
            config._attn_implementation = name

    try:
        model.set_attn_implementation(NAME)
        if all(config._attn_implementation != NAME for config, _ in before):
            raise NotImplementedError(
                f"{type(model).__name__} doesn't use transformers' attention interface; its "
                "attention stays as it is"
            )
    except BaseException:
        undo()
        raise
    return undo


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Of the model and its parts, a part's after that of the whole."""
    found = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in found:  # grows meanwhile
        parts = (getattr(config, name, None) for name in config.sub_configs)
        found += [part for part in parts if part is not None]
    return list({id(config): config for config in found}.values())


def _window(is_causal: bool, L: int, S: int, sliding_window: int | None) -> tuple[int, int]:
    """Of what is aligned to the top left and has no more keys than queries, or of one query."""
    left = -1 if sliding_window is None else sliding_window - 1
    if not is_causal:
        return left, left
    return left, L - S if L > S else 0  # not max: with symbols it is no integer


def _parts_of(attention_mask: Tensor) -> _Parts | None:
    if torch.compiler.is_compiling():
        return None
    parts = getattr(attention_mask, "bigkern_parts", None)
    return parts if parts is not None and parts.version == attention_mask._version else None


def _biased(attention_mask: Tensor | None, position_bias: Tensor) -> Tensor:
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, position_bias, -torch.inf)
    return position_bias + attention_mask


def _window_of(mask_function: Callable, local_size: int | None) -> tuple[int, int] | None:
    """The window that a mask function stands for; None if it is another, or more than that."""
    if mask_function is causal_mask_function:
        return -1, 0
    if local_size is not None:
        if _is_same(mask_function, sliding_window_causal_mask_function(local_size)):
            return local_size - 1, 0
        if _is_same(mask_function, sliding_window_bidirectional_mask_function(local_size)):
            return local_size, local_size
    return None


def _is_same(a: object, b: object) -> bool:
    """Whether two functions are the same code over the same integers and functions."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if hasattr(a, "__code__") and hasattr(b, "__code__"):
        return a.__code__ is b.__code__ and _is_same(_closure(a), _closure(b))
    return isinstance(a, int) and isinstance(b, int) and a == b


def _closure(function: Callable) -> tuple:
    return tuple(cell.cell_contents for cell in function.__closure__ or ())


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
