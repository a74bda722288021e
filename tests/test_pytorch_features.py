"""What PyTorch offers to any module, on whole models that were swapped."""

import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import bigkern
from bigkern.models import SimpleCNN, Transformer, TransformerConfig
from bigkern.nn import Int8Conv2d, Int8Linear, Int8TrainingLinear, MultiheadAttention
from bigkern.testing import assert_as_accurate

E = 16
INT8 = {"linear": "int8", "conv2d": "int8"}


class Encoder(nn.Module):
    """Of torch's layers: attention, linear layers, a head."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(E, 5)

    def forward(self, x):
        return self.head(self.encoder(x)).mean(1)


class SmallCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


MODELS = {"encoder": Encoder, "cnn": SmallCNN}


def inputs(name, batch=3, size=7):
    shape = (batch, size, E) if name == "encoder" else (batch, 3, 2 * size, 2 * size)
    return torch.randn(shape)


def sizes(name):
    """Those that are dynamic."""
    return (0, 1) if name == "encoder" else (0,)


every_model = pytest.mark.parametrize("name", MODELS)


def loss_of(model, x):
    return F.cross_entropy(model(x), torch.arange(len(x)) % 5)


def gradients(model, x, loss_of=loss_of):
    loss = loss_of(model, x)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def double(model):
    return copy.deepcopy(model).double()


# torch.compile


@every_model
def test_a_compiled_training_step(name):
    """Forward and backward are compiled, once for all sizes; the parameters that bigkern's AdamW
    makes of them are as near to those in float64 as without compiling."""
    torch._dynamo.reset()
    exact = double(MODELS[name]())
    eager = copy.deepcopy(exact).float()
    bigkern.swap(eager)
    compiled = copy.deepcopy(eager)
    backend = CompileCounterWithBackend("aot_eager")
    compiled_loss = torch.compile(loss_of, fullgraph=True, backend=backend)
    optimizers = [
        bigkern.optim.AdamW(model.parameters(), 0.01, eps=1e-3, max_grad_norm=1.0)
        for model in (eager, compiled, exact)
    ]
    for batch, size in ((3, 7), (4, 9), (5, 11), (2, 8)):
        x = inputs(name, batch, size)
        for dim in (*sizes(name), *((2, 3) if name == "cnn" else ())):
            torch._dynamo.mark_dynamic(x, dim)
        loss_of(eager, x).backward()
        compiled_loss(compiled, x).backward()
        loss_of(exact, x.double()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert backend.frame_count == 1
    for actual, expected, baseline in zip(
        *(model.parameters() for model in (compiled, exact, eager)), strict=True
    ):
        assert_as_accurate(actual, expected, baseline)


@every_model
def test_compiled_inference(name):
    torch._dynamo.reset()
    model = MODELS[name]().eval()
    exact = double(model)
    bigkern.swap(model, **INT8)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for size in (7, 9, 12):
            x = inputs(name, 3, size)
            torch._dynamo.mark_dynamic(x, 1 if name == "encoder" else 2)
            if name == "cnn":
                torch._dynamo.mark_dynamic(x, 3)
            assert_as_accurate(compiled(x), exact(x.double()), model(x))
    assert backend.frame_count == 1


def test_a_step_by_inductor():
    torch._dynamo.reset()
    exact = double(Encoder())
    model = copy.deepcopy(exact).float()
    bigkern.swap(model)
    x = inputs("encoder")
    compiled = torch.compile(loss_of, fullgraph=True)
    for triple in zip(
        gradients(model, x, compiled), gradients(exact, x.double()), gradients(model, x),
        strict=True,
    ):  # fmt: skip
        assert_as_accurate(*triple)


@every_model
def test_int8_training_compiles(name):
    torch._dynamo.reset()
    model = MODELS[name]()
    x = inputs(name)
    exact = gradients(double(model), x.double())
    bigkern.swap(model, linear="int8_training")
    assert isinstance(model.head, Int8TrainingLinear)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for triple in zip(gradients(model, x, compiled), exact, gradients(model, x), strict=True):
        assert_as_accurate(*triple, factor=3)


# Mixed precision


@every_model
def test_autocast_and_grad_scaler(name):
    """Gradients, unscaled, as near to those in float64 as torch's layers give."""
    theirs = MODELS[name]()
    exact, ours = double(theirs), copy.deepcopy(theirs)
    bigkern.swap(ours)
    x = inputs(name)
    found = []
    for model in (ours, theirs):
        scaler = bigkern.amp.GradScaler("cpu")
        optimizer = bigkern.optim.AdamW(model.parameters(), 0.0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found.append([p.grad for p in model.parameters()])
        assert scaler.step(optimizer) is None
        scaler.update()
        assert optimizer.state  # the step wasn't skipped
    for ours, expected, theirs in zip(found[0], gradients(exact, x.double())[1:], found[1],
                                      strict=True):  # fmt: skip
        assert ours.dtype == torch.float32
        assert_as_accurate(ours, expected, theirs, factor=3)


@every_model
@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_half_precision(name, cast):
    """A model that is cast before or after the swap is as accurate as torch's."""
    theirs = getattr(MODELS[name](), cast)().eval()
    exact = double(theirs)
    x = getattr(inputs(name), cast)()
    before, after = copy.deepcopy(theirs), copy.deepcopy(exact).float()
    bigkern.swap(before)
    bigkern.swap(after)
    getattr(after, cast)()
    with torch.no_grad():
        expected = exact(x.double())
        for model in (before, after):
            assert_as_accurate(model(x), expected, theirs(x))


@every_model
@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_int8_in_half_precision(name, cast):
    """It is no less accurate than in float32, or than torch's layers in this dtype, by much."""
    model = getattr(MODELS[name](), cast)().float().eval()
    exact, theirs = double(model), getattr(copy.deepcopy(model), cast)()
    bigkern.swap(model, **INT8)
    x = getattr(inputs(name), cast)()
    with torch.no_grad():
        expected, wide = exact(x.double()), model(x.float())
        y = getattr(model, cast)()(x)
        baselines = [wide.to(y.dtype), theirs(x)]
    worst = max(baselines, key=lambda baseline: (baseline.double() - expected).abs().max())
    assert_as_accurate(y, expected, worst)


# torch.utils.checkpoint


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_recompute_the_same(use_reentrant):
    """Dropout of the attention, and the rounding of gradients, are drawn again alike."""
    layer = nn.TransformerEncoderLayer(E, 4, 32, dropout=0.2, batch_first=True)
    bigkern.swap(layer, linear="int8_training")
    model = nn.Sequential(layer, copy.deepcopy(layer))
    x = inputs("encoder").requires_grad_()

    def through_checkpoints(model, x):
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=use_reentrant)
        return x.square().sum()

    found = []
    for run in (through_checkpoints, lambda model, x: model(x).square().sum()):
        torch.manual_seed(1)
        model.zero_grad()
        x.grad = None
        run(model, x).backward()
        found.append([leaf.grad for leaf in (x, *model.parameters())])
    assert all(map(torch.equal, *found))


# torch.export


@every_model
@pytest.mark.parametrize("options", [{}, INT8], ids=["float", "int8"])
def test_export(name, options):
    model = MODELS[name]().eval()
    bigkern.swap(model, **options)
    dynamic = {dim: torch.export.Dim(f"size{dim}", min=2) for dim in sizes(name)}
    program = torch.export.export(model, (inputs(name),), dynamic_shapes=(dynamic,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x = inputs(name, 5, 11 if name == "encoder" else 7)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


# The meta device

SMALL = TransformerConfig(vocab_size=8, context=12, dim=E, num_heads=2, num_blocks=1)
LAYERS = {
    "MultiheadAttention": lambda: MultiheadAttention(E, 4, kdim=6, vdim=5, add_bias_kv=True),
    "Int8Linear": lambda: Int8Linear(E, 8),
    "static": lambda: Int8Linear(E, 8, mode="static", has_input_factor=True, num_outliers=2),
    "weight_only": lambda: Int8Linear(E, 8, mode="weight_only", group_size=4),
    "Int8Conv2d": lambda: Int8Conv2d(4, 6, 3, groups=2),
    "Int8TrainingLinear": lambda: Int8TrainingLinear(E, 8),
    "SimpleCNN": SimpleCNN,
    "rotary": lambda: Transformer(replace(SMALL, positions="rotary")),
    "learned": lambda: Transformer(replace(SMALL, positions="learned")),
}


def run_layer(model):
    torch.manual_seed(5)
    if isinstance(model, MultiheadAttention):
        x = [torch.randn(5, 2, n) for n in (E, 6, 5)]
    elif isinstance(model, Transformer):
        x = [torch.randint(8, (2, 5))]
    else:
        shape = {Int8Conv2d: (2, 4, 7, 7), SimpleCNN: (2, 1, 28, 28)}.get(type(model), (3, E))
        x = [torch.randn(shape)]
    y = model(*x)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_meta_device_and_to_empty(make, monkeypatch):
    """A model without memory is given some, which may hold anything, and then its state."""
    model = make()
    state = model.state_dict()
    for value in state.values():  # those of int8 layers are zeros at first
        if value.dtype == torch.int8:
            value.random_(-127, 128)
        elif value.is_floating_point():
            value.uniform_(0.01, 1)
    model.load_state_dict(state)
    with torch.device("meta"):
        other = make()
    assert all(x.is_meta for x in (*other.parameters(), *other.buffers()))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda x, device: torch.full_like(x, 77, device=device))
        other.to_empty(device="cpu")
    other.load_state_dict(state)
    assert torch.equal(run_layer(other), run_layer(model))


def test_swap_on_the_meta_device():
    with torch.device("meta"):
        model = Encoder().eval()
    report = bigkern.swap(model)
    assert sum(module.now is not None for module in report.modules) == 2
    trained = Encoder().eval()
    model.to_empty(device="cpu")
    model.load_state_dict(trained.state_dict())
    bigkern.swap(trained)
    x = inputs("encoder")
    with torch.no_grad():
        assert torch.equal(model(x), trained(x))
