"""bigkern.nn.MultiheadAttention against torch's: results, gradients, state, errors."""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from torch import nn

from bigkern.nn import MultiheadAttention
from bigkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")
N, L, S, E, H = 6, 33, 39, 48, 4
CONFIGS = [
    {},
    {"batch_first": True},
    {"bias": False, "batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    {"kdim": 10, "vdim": 14},
    {"kdim": 10, "vdim": 14, "bias": False, "add_bias_kv": True, "batch_first": True},
]
# Arguments, and what the weights are then called.
WEIGHTS = [(False, True, None), (True, True, "mean weights"), (True, False, "weights")]


def make_torchs(dtype=torch.float32, **config):
    module = nn.MultiheadAttention(E, H, **config, dtype=dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.15)  # torch's own biases are 0
    return module


def make_masks(kind, num_queries, num_keys):
    """Keyword arguments; every query has a key."""
    hidden = torch.rand(N * H, num_queries, num_keys) < 0.4
    hidden[:, :, 0] = False
    padding = torch.arange(num_keys) >= num_keys - torch.arange(N)[:, None]
    attn_masks = {
        "2d": hidden[0],
        "3d": hidden,
        "float": torch.randn(num_queries, num_keys),
        "float3d": torch.randn(hidden.shape).masked_fill(hidden, -torch.inf),
        "causal": torch.ones(num_queries, num_keys).triu(1).bool(),
    }
    padding_masks = {"pad": padding, "floatpad": torch.randn(N, num_keys)}
    names = kind.split("+")
    masks = {"attn_mask": attn_masks, "key_padding_mask": padding_masks}
    return {key: some[name] for key, some in masks.items() for name in names if name in some}


MASKS = [
    "", "pad", "floatpad", "2d", "3d", "float", "float3d", "causal", "2d+pad", "3d+pad",
    "float+pad", "float3d+floatpad", "2d+floatpad", "causal+pad",
]  # fmt: skip


def make_inputs(module, same):
    """Query, key and value, with one object where they are the same."""

    def make(length, features):
        return torch.randn((N, length, features) if module.batch_first else (length, N, features))

    if same == "self":
        return (make(L, E),) * 3
    if same == "keys" and module.in_proj_weight is not None:
        return (make(L, E), *(make(S, E),) * 2)
    return make(L, E), make(S, module.kdim), make(S, module.vdim)


def results(module, inputs, masks, dtype, **hint):
    """Name -> outputs, weights or gradients, whatever the weights asked for: of all, flat."""
    found = {}
    for need_weights, average, weights_name in WEIGHTS:
        leaves = {}
        for x in inputs:
            leaves.setdefault(id(x), x.to(dtype, copy=True).requires_grad_())
        masks = {
            name: mask if mask.dtype == torch.bool else mask.to(dtype, copy=True).requires_grad_()
            for name, mask in masks.items()
        }
        out, weights = module(
            *(leaves[id(x)] for x in inputs),
            **masks,
            need_weights=need_weights,
            average_attn_weights=average,
            **hint,
        )
        outs = {"out": out} | ({weights_name: weights} if need_weights else {})
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outs.values()]
        named = dict(module.named_parameters()) | masks
        named |= {f"input {i}": leaf for i, leaf in enumerate(leaves.values())}
        named = {f"grad of {name}": x for name, x in named.items() if x.requires_grad}
        outs |= zip(
            named,
            torch.autograd.grad(list(outs.values()), list(named.values()), grads),
            strict=True,
        )
        for name, x in outs.items():
            found.setdefault(name, []).append(x.flatten())
    return {name: torch.cat(xs) for name, xs in found.items()}


def assert_like_torch(ours, theirs, inputs, masks, is_causal=False):
    dtype = ours.out_proj.weight.dtype
    expected = results(copy.deepcopy(theirs).double(), inputs, masks, torch.float64)
    baseline = results(theirs, inputs, masks, dtype)
    actual = results(ours, inputs, masks, dtype, is_causal=is_causal)
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        # The weights take the sums from one pass and the scores from another.
        factor = 2.0 if name == "out" else 3.0
        assert_as_accurate(x, expected[name], baseline[name], factor)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_same_as_torch(config, masks):
    theirs = make_torchs(**config)
    is_causal = "causal" in masks
    same = "self" if is_causal and theirs.in_proj_weight is not None else "keys"
    inputs = make_inputs(theirs, same)
    num_keys = L if same == "self" else S
    masks = make_masks(masks, L, num_keys)
    ours = MultiheadAttention.from_torch(theirs)
    assert_like_torch(ours, theirs, inputs, masks, is_causal)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masks", ["", "pad", "float3d+pad", "causal"])
@pytest.mark.parametrize("same", ["self", "keys", "nothing"])
def test_same_as_torch_in_halves(same, masks, dtype):
    theirs = make_torchs(dtype, batch_first=same != "self")
    masks = make_masks(masks, L, L if same == "self" else S)
    ours = MultiheadAttention.from_torch(theirs)
    assert_like_torch(ours, theirs, make_inputs(theirs, same), masks)


@pytest.mark.parametrize("masks", ["", "pad", "float", "3d+pad", "causal"])
@pytest.mark.parametrize("config", CONFIGS[:5], ids=str)
def test_without_a_batch(config, masks):
    theirs = make_torchs(**config)
    x = torch.randn(L, E)
    masks = make_masks(masks, L, L)
    if "key_padding_mask" in masks:
        masks["key_padding_mask"] = masks["key_padding_mask"][0]
    if masks and masks["attn_mask" if "attn_mask" in masks else "key_padding_mask"].dim() == 3:
        masks["attn_mask"] = masks["attn_mask"][:H]
    ours = MultiheadAttention.from_torch(theirs)
    assert_like_torch(ours, theirs, (x, x, x), masks)


def test_a_query_without_keys_gets_zeros():
    layer = MultiheadAttention.from_torch(make_torchs(batch_first=True))
    x = torch.randn(N, L, E, requires_grad=True)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0] = True
    out, weights = layer(x, x, x, key_padding_mask=padding)
    assert torch.equal(out[0], layer.out_proj.bias.expand(L, E))
    assert (weights[0] == 0).all()
    out.sum().backward()
    assert (x.grad[0] == 0).all()
    assert x.grad.isfinite().all()


def test_dropout_in_training_only():
    p, size = 0.25, 64
    layer = MultiheadAttention(size, 1, dropout=p, batch_first=True)
    with torch.no_grad():
        layer.out_proj.weight.copy_(torch.eye(size))
        layer.in_proj_weight[2 * size :] = torch.eye(size)
    x = torch.randn(1, 256, size)
    whole, undropped = layer.eval()(x, x, x)
    assert (undropped != 0).all()
    layer.train()
    draws = [layer(x, x, x) for _ in range(40)]
    for out, weights in draws[:3]:
        assert_as_accurate(out, weights.double() @ x.double(), weights @ x)
        expected = torch.where(weights == 0, 0, undropped / (1 - p))
        assert_as_accurate(weights, expected.double(), expected)
    # Five standard errors: of the number dropped, and of the mean of the outputs.
    dropped = torch.stack([weights == 0 for _, weights in draws]).double()
    assert abs(dropped.mean() - p) < 5 * math.sqrt(p * (1 - p) / dropped.numel())
    outs = torch.stack([out for out, _ in draws]).double()
    error = (outs.mean(0) - whole).flatten()
    variance = outs.var(0).flatten() / len(draws)
    assert error.sum().abs() < 5 * variance.sum().sqrt()
    torch.manual_seed(5)
    first = layer(x, x, x, need_weights=False)[0]
    torch.manual_seed(5)
    assert torch.equal(first, layer(x, x, x, need_weights=False)[0])


def test_arguments_and_state_are_torchs():
    for name in ("__init__", "forward"):
        mine, torchs = (
            inspect.signature(getattr(cls, name)).parameters
            for cls in (MultiheadAttention, nn.MultiheadAttention)
        )
        assert [(n, p.default) for n, p in mine.items()] == [
            (n, p.default) for n, p in torchs.items()
        ]
    for config in CONFIGS:
        torch.manual_seed(1)
        theirs = nn.MultiheadAttention(E, H, **config)
        torch.manual_seed(1)
        ours = MultiheadAttention(E, H, **config)
        assert isinstance(ours, nn.MultiheadAttention)
        assert repr(ours) == repr(theirs)
        for (name, p), (their_name, their_p) in zip(
            ours.named_parameters(), theirs.named_parameters(), strict=True
        ):
            assert name == their_name
            assert torch.equal(p, their_p)
        other = make_torchs(**config)
        ours.load_state_dict(other.state_dict())
        theirs.load_state_dict(ours.state_dict())
        assert all(map(torch.equal, theirs.parameters(), other.parameters()))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_from_torch_shares_the_parameters(config):
    theirs = make_torchs(torch.float64, dropout=0.1, **config).eval()
    theirs.in_proj_bias is None or theirs.in_proj_bias.requires_grad_(False)
    ours = MultiheadAttention.from_torch(theirs)
    assert dict(ours.named_parameters()) == dict(theirs.named_parameters())
    assert not ours.training
    assert MultiheadAttention.from_torch(theirs.train()).training
    skipped = {"_parameters", "_modules", "_forward_pre_hooks", "training"}
    for name in vars(theirs).keys() - skipped:
        assert getattr(ours, name) == getattr(theirs, name), name
    with pytest.raises(TypeError, match=r"must be a torch.nn.MultiheadAttention, got .*Linear"):
        MultiheadAttention.from_torch(nn.Linear(2, 2))


def test_copies_and_pickles():
    layer, x = MultiheadAttention(E, H).eval(), torch.randn(L, N, E)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert type(other) is MultiheadAttention
        assert torch.equal(other(x, x, x)[0], layer(x, x, x)[0])


def ops_of(function, *args):
    with torch.profiler.profile() as profile:
        function(*args)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("batch_first", [True, False])
def test_copies_nothing(batch_first):
    layer = MultiheadAttention(E, H, bias=False, batch_first=batch_first)  # adding it is a copy
    x = torch.randn(N, L, E) if batch_first else torch.randn(L, N, E)
    ops = ops_of(lambda: layer(x, x, x, need_weights=False))
    assert "bigkern::attention" in ops
    # But for one into the layout of the result, where the batch isn't first.
    assert ("aten::copy_" in ops) == (not batch_first)


def test_causal_hint_is_taken_and_never_hides_appended_keys():
    x = torch.randn(L, N, E)
    hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
    hidden[0, 0] = True  # so that the mask isn't the causal one
    first = x[:1], x[:1], x[:1]
    layer = MultiheadAttention(E, H)
    outs = layer(x, x, x, attn_mask=hidden, is_causal=True, need_weights=False)[0]
    assert_as_accurate(
        outs[:1], copy.deepcopy(layer).double()(*[y.double() for y in first])[0], layer(*first)[0]
    )
    for config in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        layer = MultiheadAttention.from_torch(make_torchs(**config))
        outs = [
            layer(x, x, x, attn_mask=hidden, is_causal=hint, need_weights=False)[0]
            for hint in (True, False)
        ]
        assert torch.equal(*outs)


def test_autocast():
    theirs = make_torchs(batch_first=True)
    ours, x = MultiheadAttention.from_torch(theirs), torch.randn(N, L, E)
    for masks in ("", "2d+pad", "float"):
        masks = make_masks(masks, L, L)
        double = {k: m.double() if m.is_floating_point() else m for k, m in masks.items()}
        expected = copy.deepcopy(theirs).double()(*[x.double()] * 3, **double)
        with torch.autocast("cpu", torch.bfloat16):
            actual, baseline = ours(x, x, x, **masks), theirs(x, x, x, **masks)
        for triple in zip(actual, expected, baseline, strict=True):
            assert_as_accurate(*triple)


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiles_whole(need_weights):
    layer = MultiheadAttention.from_torch(make_torchs(batch_first=True, add_zero_attn=True))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(N, L, E, requires_grad=True)
    masks = make_masks("2d+pad", L, L)
    found = []
    for run in (layer, compiled):
        out, weights = run(x, x, x, **masks, need_weights=need_weights)
        loss = out.square().sum() + (weights.square().sum() if need_weights else 0)
        found.append([out, *torch.autograd.grad(loss, [x, *layer.parameters()])])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(5)}, ValueError, r"query must have 2 or 3 dimensions, got .* \[5\]"),
        ({"query": torch.ones(4, 2, 9)}, ValueError, r"query .* \[4, 2, 8\], got \[4, 2, 9\]"),
        ({"query": torch.ones(4, 8)}, ValueError, r"key .* \[S, 8\], got \[5, 2, 8\]"),
        ({"key": torch.ones(5, 3, 8)}, ValueError, r"key .* \[5, 2, 8\], got \[5, 3, 8\]"),
        ({"value": torch.ones(6, 2, 8)}, ValueError, r"value .* \[5, 2, 8\], got \[6, 2, 8\]"),
        (
            {"key_padding_mask": torch.ones(5, 2) > 0},
            ValueError,
            r"key_padding_mask must have shape \[2, 5\], got \[5, 2\]",
        ),
        (
            {"attn_mask": torch.ones(2, 4, 5)},
            ValueError,
            r"attn_mask must have shape \[4, 5\] or \[4, 4, 5\], got \[2, 4, 5\]",
        ),
        (
            {"attn_mask": torch.ones(4, 5).int()},
            TypeError,
            "attn_mask must be bool or floating point, got torch.int32",
        ),
        (
            {"key_padding_mask": torch.ones(2, 5).long()},
            TypeError,
            "key_padding_mask must be bool or floating point, got torch.int64",
        ),
        ({"is_causal": True}, ValueError, "is_causal is a hint on attn_mask, .* got None"),
    ],
)
def test_bad_input(change, error, message):
    layer = MultiheadAttention(8, 2)
    x, memory = torch.ones(4, 2, 8), torch.ones(5, 2, 8)
    with pytest.raises(error, match=message):
        layer(**{"query": x, "key": memory, "value": memory} | change)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors():
    layer = MultiheadAttention.from_torch(make_torchs()).eval()
    sequences = [torch.randn(length, E) for length in (5, 0, 8)]
    x = torch.nested.as_nested_tensor(sequences)
    out, weights = layer(x, x, x, need_weights=False)
    assert weights is None
    for sequence, y in zip(sequences, out.unbind(), strict=True):
        assert_as_accurate(
            y,
            copy.deepcopy(layer).double()(*[sequence.double()] * 3, need_weights=False)[0],
            layer(sequence, sequence, sequence, need_weights=False)[0],
        )
    for arguments in ({}, {"need_weights": False, "attn_mask": torch.zeros(8, 8)}):
        with pytest.raises(NotImplementedError, match="use to_padded_tensor"):
            layer(x, x, x, **arguments)
    with pytest.raises(NotImplementedError, match="without kdim, vdim, add_bias_kv and add_zero"):
        MultiheadAttention(E, H, add_zero_attn=True)(x, x, x, need_weights=False)
