"""The reference Transformer: a language model that writes, or an encoder that classifies."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bigkern.models.attention import IMPLEMENTATIONS
from bigkern.models.sampling import check_sampling, sample
from bigkern.ops.kv_cache import KVCache

POSITIONS = ("learned", "rotary")


@dataclass(frozen=True)
class TransformerConfig:
    """What a :class:`Transformer` is made of. Raises ValueError for values out of range."""

    vocab_size: int = 256  # tokens that it reads and, as a language model, predicts: bytes
    num_features: int | None = None  # it reads vectors of this size instead of tokens
    num_classes: int | None = None  # an encoder that classifies; None: a decoder, a language model
    context: int = 1024  # the longest sequence
    dim: int = 512
    num_heads: int = 8
    num_blocks: int = 6
    dropout: float = 0.0
    positions: str = "learned"
    norm_first: bool = True  # pre-norm; else LayerNorm follows the residual sum (post-norm)
    attention: str = "bigkern"  # or torch, to compare with

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "dim", "num_heads", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_features", "num_classes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be None or at least 1, got {getattr(self, name)}")
        if self.num_features is not None and self.num_classes is None:
            raise ValueError("num_features needs num_classes: a language model reads tokens")
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim {self.dim}, got {self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name, choices in (("positions", POSITIONS), ("attention", tuple(IMPLEMENTATIONS))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head size, got {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.is_causal = config.num_classes is None
        self.implementation = IMPLEMENTATIONS[config.attention]

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """[B, L, D] from x [B, L, D]; the others as in :meth:`Transformer.features`."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, L, 3, H, E]
        q, k, v = (y.transpose(1, 2) for y in qkv.unbind(2))  # [B, H, L, E] each, views
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            out = self.implementation.attention_with_cache(q, k, v, cache, lengths=lengths)
        else:
            dropout = self.dropout if self.training else 0.0
            out = self.implementation.attention(
                q, k, v, dropout_p=dropout, is_causal=self.is_causal
            )
        return self.out(out.transpose(1, 2).flatten(2))  # [B, L, D]


class Block(nn.Module):
    """Self-attention and a feed-forward network, each with a residual connection and LayerNorm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.dim, 4 * config.dim),
            nn.ReLU(),
            nn.Linear(4 * config.dim, config.dim),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *where) -> Tensor:
        """[B, L, D] from x [B, L, D]; `where` are the arguments of the attention after x."""
        if self.norm_first:
            x = x + self.dropout(self.attention(self.attention_norm(x), *where))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, *where)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Transformer(nn.Module):
    """With L tokens of sequences in batches of B, D features, H heads of E, and V tokens to choose
    from:

        model = Transformer(TransformerConfig(context=256, num_blocks=2))
        logits = model(tokens)  # [B, L, V] from [B, L]
        (text,) = model.generate([prompt], max_new_tokens=100, temperature=0.8, seed=0)
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        if config.num_features is None:
            self.embedding = nn.Embedding(config.vocab_size, config.dim)
        else:
            self.embedding = nn.Linear(config.num_features, config.dim)
        if config.positions == "learned":
            self.position = nn.Embedding(config.context, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.dim) if config.norm_first else nn.Identity()
        self.head = nn.Linear(config.dim, config.num_classes or config.vocab_size)
        self.reset_parameters()
        # The state doesn't hold the tables, which to_empty loses.
        self.register_load_state_dict_post_hook(Transformer._make_tables)

    def _make_tables(self, *_: object) -> None:
        if self.config.positions == "rotary":
            for name, table in zip(("cos", "sin"), rotary_tables(self.config), strict=True):
                table = table.to(next(self.parameters()))  # [context, E / 2]
                self.register_buffer(name, table, persistent=False)

    def reset_parameters(self) -> None:
        """As GPT-2: what adds to the residual stream is the smaller, the more blocks there are."""
        self._make_tables()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                adds = name.endswith(("attention.out", "feed_forward.2"))
                depth = 2 * self.config.num_blocks if adds else 1
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(depth))
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def channels(self) -> dict[str, str]:
        """The layers whose output features can be taken out, each with the one that reads them."""
        networks = [f"blocks.{i}.feed_forward" for i in range(len(self.blocks))]
        return {f"{name}.0": f"{name}.2" for name in networks}

    def forward(
        self,
        inputs: Tensor,
        caches: Sequence[KVCache] | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, L, V] of the token after each; of an encoder those of the classes, [B, C].

        Args and errors as :meth:`features`.
        """
        x = self.features(inputs, caches, lengths)  # [B, L, D]
        return self.head(x if self.config.num_classes is None else x.mean(dim=1))

    def features(
        self,
        inputs: Tensor,
        caches: Sequence[KVCache] | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """What the head reads, [B, L, D].

        Args:
            inputs: int64 tokens [B, L], or [B, L, num_features], with L from 1 to the context.
            caches: those of :meth:`new_caches`: `inputs` go on where they end, and are added.
            lengths: int64 [B]: how many of the L tokens of each sequence count, from the left, if
                not all do; with `caches`.

        Raises:
            ValueError: another shape than stated here; more tokens than the context holds;
                `lengths` without `caches`.
        """
        self._check(inputs, caches, lengths)
        x = self.embedding(inputs)  # [B, L, D]
        position = torch.arange(inputs.size(1), device=inputs.device)  # [L]
        if caches is not None:
            position = caches[0].lengths[:, None] + position  # [B, L]
        rotation = None
        if self.config.positions == "learned":
            x = x + self.position(position)
        else:
            rotation = self.cos[position], self.sin[position]  # [L, E / 2] or [B, L, E / 2]
        for i, block in enumerate(self.blocks):
            x = block(x, rotation, None if caches is None else caches[i], lengths)
        return self.norm(x)

    def _check(self, inputs, caches, lengths) -> None:
        config = self.config
        features = () if config.num_features is None else (config.num_features,)
        if inputs.dim() != 2 + len(features) or inputs.shape[2:] != features:
            wanted = ", ".join(map(str, ("B", "L", *features)))
            raise ValueError(f"inputs must have shape [{wanted}], got {list(inputs.shape)}")
        if lengths is not None and caches is None:
            raise ValueError("lengths needs caches")
        if caches is not None and config.num_classes is not None:
            raise ValueError("caches are for a language model, but this one classifies")
        before = 0 if caches is None else caches[0].longest
        if not 1 <= inputs.size(1) <= config.context - before:
            raise ValueError(
                f"inputs must have from 1 to {config.context - before} tokens (the context is "
                f"{config.context}, {before} are cached), got {inputs.size(1)}"
            )

    def new_caches(self, batch_size: int, capacity: int) -> list[KVCache]:
        """An empty cache for each block, for sequences of up to `capacity` tokens."""
        config, bias = self.config, self.head.bias
        return [
            KVCache(
                batch_size,
                config.num_heads,
                capacity,
                config.head_dim,
                dtype=bias.dtype,
                device=bias.device,
            )
            for _ in self.blocks
        ]

    @torch.no_grad()
    def generate(
        self,
        prompt: Sequence[Sequence[int] | Tensor],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> list[Tensor]:
        """Goes on with each sequence of `prompt` by `max_new_tokens` tokens.

        Args:
            prompt: B sequences of tokens, which may differ in length, from 1 on.
            temperature, top_k, top_p: as in :func:`bigkern.models.sampling.sample`.
            seed: makes it repeatable; by default torch's generator is drawn from.

        Returns:
            B sequences int64: prompt and new tokens, on the model's device.

        Raises:
            ValueError: a prompt that is empty, has a token out of range, or leaves the context no
                room for the new tokens; an option out of range; a model that classifies.
        """
        check_sampling(temperature, top_k, top_p)
        prompts = self._check_prompt(prompt, max_new_tokens)
        device = self.head.bias.device
        lengths = torch.tensor([len(tokens) for tokens in prompts], device=device)
        longest = int(lengths.max())
        tokens = nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)  # [B, longest]
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)

        was_training = self.training
        self.eval()
        caches = self.new_caches(len(prompts), longest + max_new_tokens)
        is_even = bool((lengths == longest).all())
        x = self.features(tokens, caches, None if is_even else lengths)  # [B, longest, D]
        x = x[torch.arange(len(prompts), device=device), lengths - 1]  # [B, D]
        new = []
        while len(new) < max_new_tokens:
            new.append(sample(self.head(x), temperature, top_k, top_p, generator))  # [B]
            if len(new) < max_new_tokens:
                x = self.features(new[-1][:, None], caches)[:, -1]
        self.train(was_training)
        added = torch.stack(new, dim=1) if new else tokens[:, :0]  # [B, max_new_tokens]
        return [
            torch.cat([row[:n], end])
            for row, n, end in zip(tokens, lengths.tolist(), added, strict=True)
        ]

    def _check_prompt(self, prompt, max_new_tokens: int) -> list[Tensor]:
        config = self.config
        if config.num_classes is not None:
            raise ValueError("generate needs a language model, but this model classifies")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        prompts = [torch.as_tensor(tokens) for tokens in prompt]
        sizes = [x.numel() for x in prompts]
        if not prompts or min(sizes) < 1 or any(x.dim() != 1 for x in prompts):
            raise ValueError(
                "prompt must be sequences of at least one token, "
                f"got shapes {[list(x.shape) for x in prompts]}"
            )
        if max(sizes) + max_new_tokens > config.context:
            raise ValueError(
                f"prompt and max_new_tokens must fit the context of {config.context} tokens, "
                f"got {max(sizes)} + {max_new_tokens}"
            )
        low, high = min(int(x.min()) for x in prompts), max(int(x.max()) for x in prompts)
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"prompt must hold tokens from 0 to {config.vocab_size - 1}, got {low} to {high}"
            )
        return prompts


def rotary_tables(config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines [context, E / 2] of the angles by which positions turn pairs of features
    (Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 15)."""
    # In float64: float32 is off by up to 3e-5 at an angle of 1,000.
    pair = torch.arange(0, config.head_dim, 2, dtype=torch.float64)  # [E / 2]
    position = torch.arange(config.context, dtype=torch.float64)
    angle = torch.outer(position, 10000.0 ** (-pair / config.head_dim))
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, L, E], whose feature i is paired with i + E / 2, turned by its positions' angles."""
    cos, sin = cos.unsqueeze(-3).to(x.dtype), sin.unsqueeze(-3).to(x.dtype)  # [B or 1, 1, L, E / 2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
