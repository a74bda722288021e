"""Decoding: attention to the keys and values of the tokens so far, which are kept."""

import torch
from torch import Tensor

from bigkern import backends
from bigkern.ops.attention import _bounds, _check_slopes, _options


class KVCache:
    """Keys and values of up to `capacity` tokens for each sequence of a batch, for inference.

    Attributes:
        keys: [B, Hkv, capacity, E].
        values: [B, Hkv, capacity, Ev].
        lengths: int32 [B], the number of tokens of each sequence. What lies beyond is undefined.
        longest: the largest of `lengths`, and
        all_equal: whether they are the same: on the host, so that a step doesn't wait for the
            device. All five are to be read only.

    Args:
        batch_size, num_heads, capacity, head_dim: B, Hkv, capacity and E, at least 1 each. With
            fewer heads than queries have, these share them (GQA).
        value_dim: Ev, by default E.
        dtype: float32, float64, float16 or bfloat16.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        sizes = (batch_size, num_heads, capacity, head_dim, value_dim)
        if min(sizes) < 1:
            raise ValueError(f"sizes must be at least 1, got {sizes}")
        self.keys = torch.empty(sizes[:4], dtype=dtype, device=device)
        self.values = torch.empty(*sizes[:3], value_dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.longest = 0
        self.all_equal = True
        self._device_type = self.keys.device.type  # to ask for it takes 10 us amid other work

    @property
    def capacity(self) -> int:
        return self.keys.size(2)

    def append(self, k_new: Tensor, v_new: Tensor, lengths: Tensor | None = None) -> None:
        """Adds tokens to each sequence, in place.

        While the sequences are equally long, and `lengths` isn't given, this never waits for the
        device.

        Args:
            k_new, v_new: [B, Hkv, L, E] and [B, Hkv, L, Ev], of any strides, in the cache's dtype.
            lengths: int32 or int64 [B], on any device: how many of the L tokens of each sequence
                count, from the left; by default all.

        Raises:
            ValueError: another shape, dtype or device than stated here; lengths out of range; more
                tokens than there is room for. Nothing is changed then.
            RuntimeError: `k_new` or `v_new` requires grad.
        """
        B, H, _, E = self.keys.shape
        L = k_new.size(2) if k_new.dim() == 4 else "L"
        Ev = self.values.size(3)
        self._check(("k_new", k_new, (B, H, L, E)), ("v_new", v_new, (B, H, L, Ev)))
        self._append(k_new, v_new, lengths)

    def _append(self, k_new: Tensor, v_new: Tensor, lengths: Tensor | None) -> None:
        """:meth:`append` of what was checked."""
        L, capacity = k_new.size(2), self.keys.size(2)
        longest, all_equal = self.longest + L, self.all_equal
        if lengths is not None:
            self._check_integers("lengths", lengths)
            added = lengths.tolist()
            if not all(0 <= n <= L for n in added):
                raise ValueError(f"lengths must be from 0 to {L}, got {added}")
            totals = [n + m for n, m in zip(self.lengths.tolist(), added, strict=True)]
            longest, all_equal = max(totals), min(totals) == max(totals)
            lengths = lengths.to(self.lengths)
        if longest > capacity:
            raise ValueError(f"sequences must fit a capacity of {capacity}, got {longest} tokens")

        if not self.all_equal:
            self._scatter(k_new, v_new, lengths)
        else:  # with the tokens that don't count: they lie beyond the lengths, if there is room
            fitting = min(L, capacity - self.longest)
            for buffer, new in ((self.keys, k_new), (self.values, v_new)):
                new = new if fitting == L else new.narrow(2, 0, fitting)
                buffer.narrow(2, self.longest, fitting).copy_(new)
        if all_equal:
            self.lengths.fill_(longest)  # a quarter of the time that adding takes
        else:
            self.lengths += L if lengths is None else lengths
        self.longest, self.all_equal = longest, all_equal

    def _check(self, *inputs: tuple[str, Tensor, tuple]) -> None:
        """Of each its name, itself, and the shape that it must have."""
        dtype, device = self.keys.dtype, self.keys.device
        for name, x, shape in inputs:
            if x.shape != shape:
                wanted = ", ".join(map(str, shape))
                raise ValueError(f"{name} must have shape [{wanted}], got {list(x.shape)}")
            for what, wanted, got in (("dtype", dtype, x.dtype), ("device", device, x.device)):
                if wanted != got:
                    raise ValueError(f"{name} must have {what} {wanted}, the cache's, got {got}")
            if x.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"KVCache is for inference, but {name} requires grad; use torch.no_grad()"
                )

    def _check_integers(self, name: str, x: Tensor) -> None:
        B = self.lengths.size(0)
        if list(x.shape) != [B] or x.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} must be int32 or int64 of shape [{B}], got {x.dtype} of shape "
                f"{list(x.shape)}"
            )

    def _scatter(self, k_new: Tensor, v_new: Tensor, lengths: Tensor | None) -> None:
        """Writes tokens behind each sequence's own."""
        B, _, L, _ = k_new.shape
        batch = torch.arange(B, device=k_new.device).unsqueeze(1)  # [B, 1]
        token = torch.arange(L, device=k_new.device)
        if lengths is not None:
            batch, token = (token < lengths.unsqueeze(1)).nonzero(as_tuple=True)
        position = self.lengths[batch] + token  # [B, L], or [number of tokens]
        for buffer, new in ((self.keys, k_new), (self.values, v_new)):
            buffer.transpose(1, 2)[batch, position] = new.transpose(1, 2)[batch, token]

    def reorder_(self, indices: Tensor) -> None:
        """Replaces sequence b by what sequence ``indices[b]`` was, in place, as beam search does.

        Args:
            indices: int32 or int64 [B], from 0 to B - 1.
        """
        self._check_integers("indices", indices)
        for buffer in (self.keys, self.values):
            used = buffer.narrow(2, 0, self.longest)
            used.copy_(used[indices])
        self.lengths.copy_(self.lengths[indices])
        if not self.all_equal:
            shortest, longest = (int(n) for n in self.lengths.aminmax())
            self.longest, self.all_equal = longest, shortest == longest

    def reset(self) -> None:
        """Forgets all tokens."""
        self.lengths.zero_()
        self.longest, self.all_equal = 0, True


def attention_with_cache(
    query: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    cache: KVCache,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Appends new tokens to `cache` and attends to all that it then has, causally: token i of
    sequence b is at position ``lengths[b] + i`` with the length before the call, and attends to all
    positions up to its own.

    The prompt, padded to the right where `lengths` differ, and each token after it are calls alike.

    Args:
        query: [B, H, L, E], where H is a multiple of the cache's Hkv; in the cache's dtype.
        k_new, v_new, lengths: as in :meth:`KVCache.append`.
        scale: of the scores, by default 1 / sqrt(E).
        window: (left, right): attends to `left` positions before its own only; -1: to all. `right`
            is 0, or -1 to the same effect.
        softcap: bounds the scores x by softcap * tanh(x / softcap), as in Gemma 2.
        alibi_slopes: float32, [H] or [B, H]: the scores fall by slope * distance.

    Returns:
        [B, H, L, Ev]; zeros for tokens that don't count.

    Raises:
        ValueError, RuntimeError: as :meth:`KVCache.append`, for `query` and the options too.
            Nothing is changed then.
        NotImplementedError: no backend for the device.
    """
    B, Hkv, _, E = cache.keys.shape
    H, L = query.shape[1:3] if query.dim() == 4 else ("H", "L")
    cache._check(
        ("query", query, (B, f"a multiple of {Hkv}" if H == "H" or H % Hkv else H, L, E)),
        ("k_new", k_new, (B, Hkv, L, E)),
        ("v_new", v_new, (B, Hkv, L, cache.values.size(3))),
    )
    left, right = _bounds(window)
    if right not in (-1, 0):
        raise ValueError(f"window must be (left, 0), since attention is causal, got {window}")
    options = _options(E, 0.0, False, scale, (left, 0), softcap)
    _check_slopes(alibi_slopes, query.device, B, H)
    ops = backends.select("attention", cache._device_type)
    cache._append(k_new, v_new, lengths)
    out, _, _ = ops.attention.default(
        query,
        cache.keys,
        cache.values,
        alibi_slopes=alibi_slopes,
        seqlens_q=None if lengths is None else lengths.to(cache.lengths),
        seqlens_k=cache.lengths,
        **options,
    )
    return out
