"""From logits to the next token."""

import math

import torch
from torch import Generator, Tensor


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for an option of :func:`sample` that is out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number from 0 up, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Draws one token [B] for each row of `logits` [B, V].

    Args:
        temperature: divides the logits; 0: the likeliest token.
        top_k: only among the k likeliest tokens, and those that tie with the last of them.
        top_p: only among the likeliest tokens that together have this probability (Holtzman et al.
            2020, https://arxiv.org/abs/1904.09751), after `top_k`.
        generator: by default torch's.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        before = probabilities.cumsum(dim=-1) - probabilities  # of all tokens likelier than this
        is_dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(is_dropped, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)
