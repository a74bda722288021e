"""Swapping a model's layers: what is replaced, what is left and why, and the way back."""

import copy
import functools
import io
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from swap_helpers import Attention, OpCounter, snapshot
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import bigkern
from bigkern.nn import Int8Conv2d, Int8Linear, Int8TrainingLinear, MultiheadAttention, input_ranges
from bigkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def cnn():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))


def reason(report, name):
    return report.as_dict()[name]["reason"]


def test_attention_layers_stay_the_same_objects():
    model = encoder()
    model.layers[1].self_attn.eval()
    model.layers[0].self_attn.out_proj.eval()
    expected = copy.deepcopy(model)
    before, attention = snapshot(model), model.layers[0].self_attn
    seen = []
    attention.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    with_hook = snapshot(model)
    report = bigkern.swap(model)

    assert model.layers[0].self_attn is attention
    assert type(attention) is MultiheadAttention
    assert attention.training
    assert not model.layers[1].self_attn.training
    assert list(model.state_dict()) == list(expected.state_dict())
    parameters = [module._parameters for module in model.modules()]
    assert parameters == [before[module][1]["_parameters"] for module in model.modules()]
    x = torch.randn(3, 7, 16)
    assert_as_accurate(model(x), copy.deepcopy(expected).double()(x.double()), expected(x))
    assert seen == [MultiheadAttention]

    report.undo()
    assert snapshot(model) == with_hook
    assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight_only"])
def test_int8(mode):
    model, x = cnn().eval(), torch.randn(4, 2, 6, 6)
    before, expected = snapshot(model), model(x)
    ranges = input_ranges(model, [x]) if mode == "static" else None
    report = bigkern.swap(model, linear="int8", conv2d="int8", mode=mode, input_ranges=ranges)
    assert type(model[3]) is Int8Linear
    assert model[3].mode == mode
    if mode == "weight_only":
        assert "mode must be one of dynamic, static" in reason(report, "0")
    else:
        assert type(model[0]) is Int8Conv2d
        assert model[0].mode == mode
    relative = (model(x) - expected).norm() / expected.norm()
    assert 0 < relative < 10 ** (-35 / 20)  # 35 dB, as of a layer alone
    report.undo()
    assert snapshot(model) == before
    assert torch.equal(model(x), expected)


def test_linear_layers_that_train():
    model = cnn()
    before, weight = snapshot(model), model[3].weight
    optimizer = bigkern.optim.AdamW(model.parameters(), lr=1e-2)
    report = bigkern.swap(model, linear="int8_training")
    assert type(model[3]) is Int8TrainingLinear
    assert model[3].weight is weight
    x, target = torch.randn(8, 2, 6, 6), torch.arange(8) % 5
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), target)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    report.undo()
    assert snapshot(model) == before


class Checkpointed(nn.Module):
    """Attention that is recomputed in the backward, when the model's forward is over."""

    def __init__(self):
        super().__init__()
        self.attention = Attention(16, 2)

    def forward(self, x):
        return checkpoint(self.attention, x, use_reentrant=False) if self.training else x


@pytest.mark.parametrize("make", [lambda: Attention(16, 2), Checkpointed])
def test_calls_of_torchs_attention(make):
    model = make()
    x, other = torch.randn(2, 5, 16), torch.randn(1, 1, 4, 8)
    expected, before = model(x), snapshot(model)
    expected.sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    # Layers of attention are left, to see their calls inside.
    report = bigkern.swap(model, attention=True, skip="*")
    assert reason(report, "") is None
    with (
        OpCounter("bigkern::attention") as forward,
        OpCounter("bigkern::attention_backward") as back,
    ):
        out = model(x)
        out.sum().backward()
    recomputed = isinstance(model, Checkpointed)
    assert forward.count == (2 if recomputed or isinstance(model, nn.TransformerEncoder) else 1)
    assert back.count == (2 if isinstance(model, nn.TransformerEncoder) else 1)
    torch.testing.assert_close(out, expected)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    model.zero_grad()
    with OpCounter("bigkern::attention") as outside:
        F.scaled_dot_product_attention(other, other, other)
    assert outside.count == 0
    report.undo()
    assert snapshot(model) == before
    assert torch.equal(model(x), expected)


def test_attention_in_one_thread_is_not_that_of_others():
    model, x = Attention(16, 2), torch.randn(2, 5, 16)
    bigkern.swap(model, attention=True)
    counts = []

    def elsewhere(*_):
        with OpCounter("bigkern::attention") as counter:
            F.scaled_dot_product_attention(x, x, x)
        counts.append(counter.count)

    with ThreadPoolExecutor(1) as pool:
        model.qkv.register_forward_hook(lambda *_: pool.submit(elsewhere).result())
        model(x)
    assert counts == [0]


@pytest.mark.parametrize("name", ["pickle", "deepcopy", "state_dict"])
def test_swapped_models_are_kept(name):
    def swapped(seed):
        torch.manual_seed(seed)
        model = nn.ModuleDict({"a": Attention(16, 2), "b": encoder(), "c": cnn()}).eval()
        bigkern.swap(model, attention=True, linear="int8", conv2d="int8", skip="a.qkv")
        for child in model.values():  # what is called
            bigkern.swap(child, attention=True)
        return model

    model, file = swapped(0), io.BytesIO()
    if name == "pickle":
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    elif name == "deepcopy":
        other = copy.deepcopy(model)
    else:
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = swapped(1)
        other.load_state_dict(torch.load(file))
    x, image = torch.randn(2, 5, 16), torch.randn(2, 2, 6, 6)
    for child, y in (("a", x), ("b", x), ("c", image)):
        assert torch.equal(model[child](y), other[child](y))
    with OpCounter("bigkern::attention") as counter:
        other["a"](x)
    assert counter.count == 1


def test_filters():
    def chosen(**filters):
        report = bigkern.swap(model, linear="int8", **filters)
        names = {module.names[0] for module in report.modules if module.now}
        if names:
            report.undo()
        return names

    model = encoder()
    first = {"layers.0.self_attn", "layers.0.self_attn.out_proj"}
    mlp = {"layers.0.linear1", "layers.0.linear2"}
    assert chosen(only="layers.0") == first | mlp
    assert chosen(only=["layers.0.self_attn", "layers.0.linear1"]) == first | {"layers.0.linear1"}
    assert chosen(only="layers.0", skip="*.linear?") == first
    assert chosen(only=re.compile(r"^layers\.0"), skip=re.compile("linear1$")) == first | {
        "layers.0.linear2"
    }
    large = functools.partial(chosen, only=lambda name, module: "0" in name)
    assert large(skip=lambda name, module: getattr(module, "out_features", 0) > 16) == first | {
        "layers.0.linear2"
    }
    report = bigkern.swap(model, only="layers.1")
    assert reason(report, "layers.0.self_attn") == "it isn't among only"
    assert "layers.0.self_attn: torch.nn.MultiheadAttention left: it isn't among only" in str(
        report
    )
    assert str(report).startswith("1 swapped, 1 left\n")


class Linear(nn.Linear):
    pass


def replaced_forward():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    return layer


def pruned():
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)


def infinite():
    layer = nn.Linear(4, 4)
    nn.init.constant_(layer.weight, torch.inf)
    return layer


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Linear(4, 4), "subclass of Linear"),
        (parametrizations.weight_norm(nn.Linear(4, 4)), "subclass of Linear"),
        (nn.LazyLinear(4), "subclass of Linear"),
        (replaced_forward(), "its forward was replaced"),
        (pruned(), "it has tensors of others: weight_mask, weight_orig"),
        (nn.Linear(4, 4, device="meta"), "its weight is on the device meta"),
        (nn.Linear(4, 4, dtype=torch.float64), "float64"),
        (infinite(), "must be finite"),
    ],
)
def test_layers_that_are_left(layer, why):
    model = nn.ModuleDict({"odd": layer, "plain": nn.Linear(4, 4)})
    before = snapshot(model)
    report = bigkern.swap(model, linear="int8")
    assert why in reason(report, "odd")
    assert report.as_dict()["plain"]["now"] == "bigkern.nn.Int8Linear"
    report.undo()
    assert snapshot(model) == before


def test_static_without_a_range_is_left():
    report = bigkern.swap(cnn(), linear="int8", mode="static", input_ranges={})
    assert "needs input_range" in reason(report, "3")


class Subclass(nn.MultiheadAttention):
    pass


def test_layers_whose_weights_torchs_modules_read_are_left():
    model = nn.ModuleList([encoder().layers[0], Subclass(16, 2)])
    report = bigkern.swap(model, linear="int8", skip="0.self_attn")
    assert reason(report, "0.linear1") == "its weight is read by TransformerEncoderLayer"
    assert reason(report, "1") == "it is a subclass of MultiheadAttention"
    assert reason(report, "1.out_proj") == "its weight is read by Subclass"
    x = torch.randn(2, 5, 16)
    model[0].eval()(x)
    model[1](x, x, x)


def test_shared_modules_stay_shared_and_tied_weights_tied():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "embed": nn.Embedding(4, 4)})
    model["again"], model["head"] = model["a"], nn.Linear(4, 4)
    model["head"].weight = model["embed"].weight
    report = bigkern.swap(model, linear="int8")
    assert type(model["a"]) is Int8Linear
    assert model["again"] is model["a"]
    assert report.as_dict()["a"]["also"] == ["again"]
    assert "a, again: torch.nn.Linear -> bigkern.nn.Int8Linear" in str(report)
    assert reason(report, "head") == "its weight is that of embed too"
    assert model["head"].weight is model["embed"].weight


class Unusual(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.read = nn.Linear(16, 16), nn.Linear(16, 16)
        self.cast, self.nested = nn.Linear(16, 16), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        x = self.plain(input=F.dropout(x)) + F.linear(x, self.read.weight)
        x = self.cast(x.to(self.cast.weight.dtype))
        x = self.nested(torch.nested.as_nested_tensor(list(x))).to_padded_tensor(0.0)
        return self.attention(x, x, x)[0]


def test_a_trial_finds_unusual_calls():
    model, x = Unusual(), torch.randn(2, 5, 16)
    before, state = snapshot(model), torch.get_rng_state()
    report = bigkern.swap(model, linear="int8", inputs=x)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("plain", "attention", "attention.out_proj"):
        assert reason(report, name) is None
    for name in ("read", "cast"):
        assert reason(report, name) == "its weight is read by others"
    assert "called as in the trial, " in reason(report, "nested")
    model(x)
    report.undo()
    assert snapshot(model) == before


def test_nothing_changes_where_the_trial_fails():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2)
    before = snapshot(model)
    with pytest.raises(AssertionError):  # torch's
        bigkern.swap(model, linear="int8", attention=True, inputs=torch.randn(2, 5, 3))
    assert snapshot(model) == before


def test_an_encoder_with_nested_tensors_and_int8_layers():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    batch = {"src": x, "src_key_padding_mask": padding}
    with torch.no_grad():
        expected = model(**batch)
        report = bigkern.swap(model, linear="int8", inputs=batch)
        assert {module.reason for module in report.modules} == {None}
        relative = (model(**batch) - expected)[~padding].norm() / expected[~padding].norm()
        assert relative < 10 ** (-35 / 20)
        report.undo()
        assert torch.equal(model(**batch), expected)


def test_undo_refuses_what_it_would_break():
    model = cnn()
    report = bigkern.swap(model, linear="int8", conv2d="int8")
    mine = bigkern.nn.Int8Linear.from_linear(nn.Linear(48, 5))
    model[3].__class__ = nn.Identity
    swapped = snapshot(model)
    with pytest.raises(RuntimeError, match="3 has changed since it was swapped"):
        report.undo()
    assert snapshot(model) == swapped
    model[3].__class__ = type(mine)
    report.undo()
    with pytest.raises(RuntimeError, match="undone before"):
        report.undo()


def test_swaps_are_undone_in_turn():
    model = nn.Sequential(Attention(16, 2), encoder())
    before = snapshot(model)
    first = bigkern.swap(model)
    second = bigkern.swap(model, linear="int8", attention=True)
    second.undo()
    first.undo()
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"linear": "int4"}, ValueError, "linear must be one of .*, got 'int4'"),
        ({"conv2d": "int8_training"}, ValueError, "conv2d must be one of .*, got 'int8_training'"),
        ({"mode": "fast"}, ValueError, "mode must be one of .*, got 'fast'"),
        ({"mode": "static"}, ValueError, "mode static needs input_ranges"),
        ({"only": "fc"}, ValueError, "only must fit a module of the model, got 'fc'"),
        ({"skip": ["3", re.compile("x")]}, ValueError, "skip must fit a module"),
        ({"skip": 3}, TypeError, "skip must be names, patterns or functions"),
        ({"skip": [3]}, TypeError, "skip must be names, patterns or functions"),
    ],
)
def test_errors(options, error, message):
    model = cnn()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        bigkern.swap(model, **{"linear": "int8", **options})
    assert snapshot(model) == before


def test_the_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got <class 'list'>"):
        bigkern.swap([nn.Linear(1, 1)])
