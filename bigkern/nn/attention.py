"""Multi-head attention, drop-in for :class:`torch.nn.MultiheadAttention`."""

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops.attention import (
    attention_with_weights,
    scaled_dot_product_attention,
    varlen_attention,
)


def _run_forward(module: torch.nn.Module, args: tuple) -> None:
    """Does nothing: that a hook is there keeps torch.nn.TransformerEncoderLayer, when evaluated,
    from its own fused kernel, which reads the weights and never calls this layer."""


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) by the fused kernel; with the
    arguments, the parameters, the ``state_dict()`` and the results of
    :class:`torch.nn.MultiheadAttention`.

    What differs: a query all of whose keys are masked attends to nothing, and its output is that of
    zeros (torch: NaN). In a :class:`torch.nn.TransformerEncoderLayer` this layer runs in evaluation
    too, where torch's own is bypassed.
    """

    @functools.wraps(torch.nn.MultiheadAttention.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_forward_pre_hook(_run_forward)

    @classmethod
    def from_torch(cls, module: torch.nn.MultiheadAttention) -> "MultiheadAttention":
        """A layer that shares the parameters of `module`, and is in its training mode."""
        if type(module) not in (torch.nn.MultiheadAttention, cls):
            raise TypeError(f"module must be a torch.nn.MultiheadAttention, got {type(module)}")
        layer = cls(
            module.embed_dim,
            module.num_heads,
            module.dropout,
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            add_zero_attn=module.add_zero_attn,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            device="meta",
        )
        for name, parameter in module.named_parameters(recurse=False):
            setattr(layer, name, parameter)
        layer.out_proj = module.out_proj
        layer.training = module.training  # its output projection, which is shared, has a mode too
        return layer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends, and returns the output and, if `need_weights`, the weights, else None.

        With L queries, S keys, batches of N, and H heads; without the dimension N throughout for an
        input that isn't batched:

        Args:
            query: [L, N, embed_dim], or [N, L, embed_dim] with ``batch_first``. All three may be
                one nested tensor, without masks and weights.
            key, value: [S, N, kdim] and [S, N, vdim], or [N, S, ...].
            key_padding_mask: [N, S]; bool, True where a key is to be ignored, or added to the
                scores: in the dtype of the projected query, or float32.
            need_weights: return the weights too, dropout included. They take a pass of their own.
            attn_mask: [L, S] or [N * H, L, S], of the same dtypes. The masks' may differ.
            average_attn_weights: the weights are [N, L, S], the mean over the heads, instead of
                [N, H, L, S].
            is_causal: a promise that `attn_mask`, which must be given, is the causal one, so that
                it needn't be read.

        Raises:
            ValueError: another shape than stated here; `is_causal` without `attn_mask`.
            TypeError: integer masks.
            NotImplementedError: nested tensors with masks, with weights, with appended keys, or
                that differ.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            masked = key_padding_mask is not None or attn_mask is not None
            if need_weights or masked or not query is key is value:
                raise NotImplementedError(
                    "nested tensors are supported as query, key and value in one, with "
                    "need_weights=False and without masks; else use to_padded_tensor and "
                    "key_padding_mask"
                )
            return self._attend_nested(query), None
        self._check(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint on attn_mask, which must be given, got None")

        q, k, v = map(self._split_heads, self._project(query, key, value))  # [N, L or S, H, E]
        num_appended = (self.bias_k is not None) + self.add_zero_attn
        if num_appended:
            k, v = self._append(k, self.bias_k), self._append(v, self.bias_v)
        # A causal window would hide the keys that were appended. It is aligned to the bottom right.
        if need_weights or num_appended or q.size(1) != k.size(1):
            is_causal = False
        if is_causal:
            attn_mask = None
        mask = self._merge_masks(key_padding_mask, attn_mask, num_appended, q.dtype)
        dropout_p = self.dropout if self.training else 0.0
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        weights = None
        if need_weights:
            out, weights = attention_with_weights(
                q, k, v, mask, dropout_p, average_heads=average_attn_weights
            )
        else:
            window = (-1, 0) if is_causal else None
            out = scaled_dot_product_attention(q, k, v, mask, dropout_p, window=window)
        out = out.transpose(1, 2).flatten(2)  # [N, L, embed_dim]; the op wrote it in this order
        if query.dim() == 2:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return self.out_proj(out), weights

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> None:
        if query.dim() not in (2, 3):
            raise ValueError(f"query must have 2 or 3 dimensions, got shape {list(query.shape)}")
        batched = query.dim() == 3
        seq_dim = int(batched and self.batch_first)
        L = query.shape[seq_dim]
        S = key.shape[seq_dim] if key.dim() == query.dim() else "S"
        N = query.shape[1 - seq_dim] if batched else 1

        def batch(*shape) -> list:
            return [N, *shape] if batched else [*shape]

        for name, x, length, features in (
            ("query", query, L, self.embed_dim),
            ("key", key, S, self.kdim),
            ("value", value, S, self.vdim),
        ):
            shape = batch(length, features) if seq_dim else [length, *batch(features)]
            if list(x.shape) != shape:
                wanted = ", ".join(map(str, shape))
                raise ValueError(f"{name} must have shape [{wanted}], got {list(x.shape)}")
        for name, mask, shapes in (
            ("key_padding_mask", key_padding_mask, [batch(S)]),
            ("attn_mask", attn_mask, [[L, S], [N * self.num_heads, L, S]]),
        ):
            if mask is None:
                continue
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(f"{name} must be bool or floating point, got {mask.dtype}")
            if list(mask.shape) not in shapes:
                wanted = " or ".join(map(str, shapes))
                raise ValueError(f"{name} must have shape {wanted}, got {list(mask.shape)}")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, by one matrix product for each input that differs."""
        weight, bias, E = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if weight is not None and query is key is value:
            return F.linear(query, weight, bias).chunk(3, dim=-1)
        counts = (1, 1, 1) if weight is None or key is not value else (1, 2)
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = weight.split([n * E for n in counts])
        biases = [None] * 3 if bias is None else bias.split([n * E for n in counts])
        return [
            y
            for x, w, b, n in zip((query, key, value), weights, biases, counts, strict=False)
            for y in F.linear(x, w, b).chunk(n, dim=-1)
        ]

    def _split_heads(self, x: Tensor) -> Tensor:
        """[N, L, H, E], a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _append(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values [N, S, H, E], and what every sequence has besides: `bias`, zeros."""
        N, _, H, E = x.shape
        rows = [x]
        if bias is not None:
            rows.append(bias.to(x.dtype).view(1, 1, H, E).expand(N, 1, H, E))
        if self.add_zero_attn:
            rows.append(x.new_zeros(N, 1, H, E))
        return torch.cat(rows, dim=1)

    def _merge_masks(
        self,
        padding: Tensor | None,
        attn_mask: Tensor | None,
        num_appended: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """One mask for the op, that broadcasts to [N, H, L, S]: bool (True: attend) or additive."""
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            padding = padding[..., None, None, :]
        masks = [mask for mask in (attn_mask, padding) if mask is not None]
        if not masks:
            return None
        if all(mask.dtype == torch.bool for mask in masks):
            merged = functools.reduce(torch.logical_or, masks)
        else:
            additive = (
                torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
                if mask.dtype == torch.bool
                else mask
                for mask in masks
            )
            merged = functools.reduce(torch.add, additive)
        if num_appended:
            merged = F.pad(merged, (0, num_appended))
        return ~merged if merged.dtype == torch.bool else merged

    def _attend_nested(self, x: Tensor) -> Tensor:
        """The sequences end to end, so that none is padded."""
        if self.in_proj_weight is None or self.bias_k is not None or self.add_zero_attn:
            raise NotImplementedError(
                "nested tensors are supported without kdim, vdim, add_bias_kv and add_zero_attn"
            )
        sequences = x.unbind()
        lengths = [len(sequence) for sequence in sequences]
        packed = torch.cat(sequences)
        q, k, v = (
            y.unflatten(-1, (self.num_heads, self.head_dim))
            for y in self._project(packed, packed, packed)
        )
        cu_seqlens = torch.tensor(
            [0, *itertools.accumulate(lengths)], dtype=torch.int32, device=x.device
        )
        longest = max(lengths)
        dropout_p = self.dropout if self.training else 0.0
        out = varlen_attention(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, dropout_p=dropout_p
        )
        return torch.nested.as_nested_tensor(list(self.out_proj(out.flatten(1)).split(lengths)))
