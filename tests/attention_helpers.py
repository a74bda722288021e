"""Cases of attention, and how they are run through the function, the raw ops and the reference."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bigkern import backends, scaled_dot_product_attention
from bigkern.ops import reference
from bigkern.testing import assert_as_accurate, max_error

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

SEEDS = [
    (0, 0),
    (1, 2**32 - 1),
    (-1, 0),
    (2**63 - 1, 2**31),
    (-(2**63), 5),
    (2**32, 2**32 + 7),
]  # and offset, of dropout

# The same cases each time: a failure is seen by whoever made it. It prints the case as it is,
# since a smaller one would only be luckier.
draw = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    print_blob=True,
    phases=[Phase.explicit, Phase.generate],
)


@dataclass
class Case:
    """Options, and the shapes and kinds of the inputs, which `seed` makes."""

    dtype: torch.dtype = torch.float32
    B: int = 2
    H: int = 4
    Hkv: int = 4
    L: int = 5
    S: int = 7
    E: int = 8
    Ev: int = 8
    layout: str = "contiguous"
    mask: str = "none"  # or bool, float (of query's dtype), float32
    mask_dims: tuple[bool, ...] = (True,) * 4  # those that aren't broadcast
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: str = "none"  # or H, BH
    dropout: float = 0.0
    seqlens: bool = False
    seed: int = 0
    device: str = field(default="cpu", repr=False)
    turn: int = 0  # thirds by which the features are rolled: see `baselines`

    @property
    def scale(self):
        return 0.5 / math.sqrt(max(self.E, 1))  # few scores are much larger than the rest

    def generator(self):
        return torch.Generator(self.device).manual_seed(self.seed)

    def philox(self):
        if not self.dropout:
            return None
        return torch.randint(
            -(2**63), 2**63 - 1, (2,), generator=self.generator(), device=self.device
        )

    def raw_options(self):
        return {
            "scale": self.scale,
            "is_causal": self.causal,
            "window_left": self.window[0],
            "window_right": self.window[1],
            "softcap": self.softcap,
            "dropout_p": self.dropout,
        }

    def inputs(self):
        """query, key, value."""
        generator = torch.Generator().manual_seed(self.seed)
        tensors = [torch.randn(s, generator=generator) for s in self.shapes()]
        tensors = [rolled(x, self.turn).to(self.device, self.dtype) for x in tensors]
        return [_laid_out(x, self.layout) for x in tensors]

    def shapes(self):
        return [
            (self.B, self.H, self.L, self.E),
            (self.B, self.Hkv, self.S, self.E),
            (self.B, self.Hkv, self.S, self.Ev),
        ]

    def tensors(self):
        """attn_mask, alibi_slopes, philox, and lengths of sequences: the raw ops' seven."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        full = (self.B, self.H, self.L, self.S)
        shape = [n if kept else 1 for n, kept in zip(full, self.mask_dims, strict=True)]
        keep = torch.rand(shape, generator=generator) > 0.2
        mask = slopes = None
        if self.mask == "bool":
            mask = keep
        elif self.mask != "none":
            mask = torch.randn(shape, generator=generator).masked_fill(~keep, -math.inf)
            mask = mask.to(self.dtype if self.mask == "float" else torch.float32)
        if self.alibi != "none":
            heads = (self.H,) if self.alibi == "H" else (self.B, self.H)
            slopes = torch.rand(heads, generator=generator)
        lengths = [None, None]
        if self.seqlens:
            lengths = [
                torch.randint(0, n + 1, (self.B,), generator=generator, dtype=torch.int32)
                for n in (self.L, self.S)
            ]
        tensors = [mask, slopes, self.philox(), None, None, *lengths]
        return [None if t is None else t.to(self.device) for t in tensors]


@dataclass
class PackedCase(Case):
    lengths: tuple[list[int], list[int]] = ()  # of queries and of keys

    def shapes(self):
        total_q, total_k = map(sum, self.lengths)
        return [
            (total_q, self.H, self.E),
            (total_k, self.Hkv, self.E),
            (total_k, self.Hkv, self.Ev),
        ]

    def starts(self):
        return [
            torch.tensor([0, *ns], device=self.device).cumsum(0).to(torch.int32)
            for ns in self.lengths
        ]

    def raw_options(self):
        longest = dict(zip(("max_seqlen_q", "max_seqlen_k"), map(max, self.lengths), strict=True))
        return super().raw_options() | longest

    def tensors(self):
        return [*super().tensors()[:3], *self.starts(), None, None]


def rolled(x, turn):
    return x.roll(turn * (x.size(-1) // 3), -1)


def _laid_out(x, layout):
    if layout == "BLHE":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":  # the last dimension too
        return torch.stack([x, x], -1)[..., 1]
    if layout == "unaligned":
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    if layout == "expanded":
        return x[:, :1].expand_as(x)
    return x.contiguous()


sizes = st.one_of(st.integers(1, 9), st.sampled_from([16, 31, 33, 64, 65, 100, 129]))
features = st.one_of(st.integers(1, 20), st.sampled_from([32, 63, 64, 72, 128, 257]))
bounds = st.one_of(st.just(-1), st.integers(0, 40))

# The largest error of fewer numbers than this is a matter of luck, torch's as well as ours.
ENOUGH = 500


@st.composite
def cases(draw, **fixed):
    H, L, S, E, Ev = draw(st.integers(1, 3)), *map(draw, (sizes, sizes, features, features))
    Hkv = draw(st.sampled_from([n for n in (1, 2, 3) if H % n == 0]))
    B = draw(st.integers(1, 2)) + ENOUGH // min(L, S)
    drawn = {
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(["contiguous", "BLHE", "strided", "unaligned", "expanded"]),
        "mask": st.sampled_from(["none", "bool", "float", "float32"]),
        "mask_dims": st.tuples(*[st.booleans()] * 4),
        "causal": st.booleans(),
        "window": st.tuples(bounds, bounds),
        "softcap": st.sampled_from([0.0, 0.0, 2.0]),
        "alibi": st.sampled_from(["none", "H", "BH"]),
        "dropout": st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0]),
        "seqlens": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
    rest = {name: draw(strategy) for name, strategy in drawn.items()} | fixed
    if (
        math.prod(n for n, kept in zip((B, H, L, S), rest["mask_dims"], strict=True) if kept)
        < ENOUGH
    ):
        rest["mask_dims"] = (True,) * 4
    return Case(B=B, H=H, Hkv=Hkv, L=L, S=S, E=E, Ev=Ev, **rest)


def served(case, device):
    """The nearest case that the kernels of `device`, a fixture's, serve."""
    case = replace(case, device=device)
    if not on_gpu(device):
        return case
    dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
    return replace(case, dtype=dtype, E=min(case.E, 256), Ev=min(case.Ev, 256))


def on_gpu(device):
    """Whether CUDA kernels run, if only in the emulator."""
    return device == "cuda" or "emulated" in backends.available("attention", device)


def check_drawn(cases, device, check, max_examples):
    """`check` of drawn cases as `device` serves them: half as many for the emulator, which takes a
    second for each."""
    if device == "cpu" and on_gpu(device):
        max_examples //= 2

    @settings(draw, max_examples=max_examples)
    @given(cases)
    def run(case):
        check(served(case, device))

    run()


def as_dtype(tensors, dtype):
    """Those of floating point in `dtype`."""
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


def wide(dtype):
    """What is accumulated in, and the log-sum-exp returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lse_of(row_max, row_sum):
    """The log-sum-exp, with zero gradients in rows without a key."""
    return row_max + torch.where(row_sum == 0, 1, row_sum).log()


def run_function(case, inputs, tensors):
    mask, slopes = tensors[:2]
    return scaled_dot_product_attention(
        *inputs, mask, case.dropout, case.causal, case.scale, case.Hkv != case.H,
        window=case.window, softcap=case.softcap, alibi_slopes=slopes, return_lse=True,
        generator=case.generator(),
    )  # fmt: skip


def run_reference(case, inputs, tensors):
    """Output and log-sum-exp."""
    out, row_max, row_sum = reference.attention(*inputs, *tensors, **case.raw_options())
    return out, lse_of(row_max, row_sum)


def in_dtype(case, dtype):
    """The inputs, all in `dtype` if it isn't the case's own."""
    inputs, tensors = as_dtype(case.inputs(), dtype), case.tensors()
    if dtype != case.dtype:
        tensors[:1] = as_dtype(tensors[:1], dtype)
    return inputs, tensors


def random_grads(case, outs):
    """Of the output and the log-sum-exp, the same for each dtype, after rounding to the case's."""
    generator = torch.Generator().manual_seed(case.seed + 2)
    grads = [torch.randn(x.shape, generator=generator).to(x.device, case.dtype) for x in outs]
    grads[0] = rolled(grads[0], case.turn)
    return [g.to(x.dtype) for g, x in zip(grads, outs, strict=True)]


def with_gradients(run, case, inputs, tensors):
    """Outputs, and gradients of query, key, value, and the mask, empty if it isn't additive."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    has_mask = case.mask.startswith("float")
    leaves = [*inputs, *([tensors[0].requires_grad_()] if has_mask else [])]
    outs = run(case, inputs, tensors)
    grads = torch.autograd.grad(outs, leaves, random_grads(case, outs), materialize_grads=True)
    return outs, [*grads, *([] if has_mask else [inputs[0].new_empty(0)])]


def plain_with_gradients(case, inputs, tensors):
    """The same in plain PyTorch, step by step as the raw ops."""
    options = case.raw_options()
    out, *stats = reference.attention(*inputs, *tensors, **options)
    outs = (out, lse_of(*stats))
    grads = reference.attention_backward(
        *random_grads(case, outs), *inputs, out, *stats, *tensors, **options,
        needs_mask_grad=case.mask.startswith("float"),
    )  # fmt: skip
    return outs, grads


def raw_ops(ops, case, inputs, tensors):
    """All that they return, the two of a row as its log-sum-exp; the weights if not packed."""
    options = case.raw_options()
    outs = ops.attention(*inputs, *tensors, **options)
    grads = ops.attention_backward(
        *random_grads(case, outs[:2]), *inputs, *outs, *tensors, **options,
        needs_mask_grad=case.mask.startswith("float"),
    )  # fmt: skip
    softmax = [
        ops.attention_weights(*inputs[:2], *outs[1:], *tensors, **options, average_heads=average)
        for average in (() if isinstance(case, PackedCase) else (False, True))
    ]
    return [outs[0], lse_of(*outs[1:]), *softmax], grads


def check(actual, expected, baseline, factor=2.0):
    """assert_as_accurate; float64, where plain PyTorch is the reference itself, by torch's own
    measure of what is close."""
    actual, expected, baseline = actual.detach(), expected.detach(), baseline.detach()
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, expected)
    else:
        assert_as_accurate(actual, expected, baseline, factor)


def factors(case):
    """Of outputs and of gradients: 2 and 3, but 3 and 4 for float32 by tensor cores. Those cut sums
    off where float32 rounds; of rowsum(dO * O), which is rounded, dO V^T is taken. Plain PyTorch
    keeps the softmax itself, and needs no such difference.
    """
    others = [torch.ops.bigkern_triton] + [torch.ops.bigkern] * (case.device == "cpu")
    by_tensor_cores = backends.select("attention", case.device) not in others
    return (3.0, 4.0) if case.dtype == torch.float32 and by_tensor_cores else (2.0, 3.0)


def check_all(actual, expected, baselines, factors=(2.0, 3.0)):
    """`check` of outputs and gradients against the worst of the baselines."""
    for factor, *results in zip(factors, actual, expected, *baselines, strict=True):
        for a, e, *plain in zip(*results, strict=True):
            check(a, e, max(plain, key=lambda x, e=e: max_error(x, e)), factor)


def baselines(run, case):
    """What plain PyTorch makes of it in the case's dtype: three times, with the features in
    different order, since the largest of its errors is a matter of luck."""
    for turn in range(3):
        turned = replace(case, turn=turn)
        (out, *stats), (*grads, grad_mask) = run(turned, *in_dtype(turned, case.dtype))
        yield [rolled(out, -turn), *stats], [*(rolled(g, -turn) for g in grads), grad_mask]


def check_function(run, case):
    """Outputs and gradients of `run` against the reference."""
    check_all(
        with_gradients(run, case, case.inputs(), case.tensors()),
        with_gradients(run_reference, case, *in_dtype(case, torch.float64)),
        baselines(plain_with_gradients, case),
        factors(case),
    )


def small_inputs(q=(2, 4, 3, 8), k=(2, 4, 5, 8), v=(2, 4, 5, 6)):
    return [torch.randn(s) for s in (q, k, v)]


# What must be in the error -> what changes the arguments of the raw op so.
RAW_ERRORS = {
    "query": lambda a: a | {"query": a["query"][0]},
    "key": lambda a: a | {"key": a["key"][:1]},
    "value": lambda a: a | {"value": a["value"][:, :, :2]},
    "attn_mask": lambda a: a | {"attn_mask": torch.zeros(3, 5)},
    "alibi_slopes": lambda a: a | {"alibi_slopes": torch.zeros(7)},
    "philox": lambda a: a | {"philox": torch.zeros(3, dtype=torch.int64), "dropout_p": 0.5},
    "philox must be given": lambda a: a | {"dropout_p": 0.5},
    "seqlens_q": lambda a: a | {"seqlens_q": torch.zeros(2)},
    "seqlens_k": lambda a: a | {"seqlens_k": torch.tensor([1, 9], dtype=torch.int32)},
    "dropout_p": lambda a: a | {"dropout_p": 1.5, "philox": torch.zeros(2, dtype=torch.int64)},
    "softcap": lambda a: a | {"softcap": -1.0},
}
