"""Int8TrainingLinear: results, gradients, reproducibility, training."""

import copy
import json
import pickle
from dataclasses import asdict, replace

import pytest
import torch
from helpers import SMALL, parameters, small_task
from torch import nn

import bigkern
from bigkern.cli import main
from bigkern.nn import Int8TrainingLinear
from bigkern.ops import int8_training, reference_int8, reference_int8_training
from bigkern.ops.int8_training import int8_training_linear
from bigkern.testing import assert_as_accurate
from bigkern.train import checkpoint
from bigkern.train.cnn import run
from bigkern.train.config import CnnConfig, read_config
from bigkern.train.errors import UserError
from bigkern.train.loop import train

DEVICES = ["cpu", "emulated", "triton", "cuda"]
pytestmark = pytest.mark.usefixtures("one_thread")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
GRADS = ["int8", "float"]


# The layer


def problem(M=33, N=65, K=127, dtype=torch.float32, weight_dtype=torch.float32, device="cpu"):
    x = torch.randn(M, K).to(device, dtype).requires_grad_()
    weight = torch.randn(N, K).to(device, weight_dtype).requires_grad_()
    bias = torch.randn(N).to(device, weight_dtype).requires_grad_()
    return x, weight, bias, torch.randn(M, N).to(device, dtype)


def quantized(x, dtype):
    """x as its integers stand for it."""
    return reference_int8.dequantize(*reference_int8.quantize_rows(x.detach()), dtype=dtype)


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_forward_quantizes_both(dtype, weight_dtype, grad):
    x, weight, bias, _ = problem(dtype=dtype, weight_dtype=weight_dtype)
    expected = bigkern.int8_linear(x, *bigkern.quantize_rows(weight), bias)
    assert torch.equal(int8_training_linear(x, weight, bias, grad=grad), expected)
    with torch.no_grad():
        assert torch.equal(int8_training_linear(x, weight, bias, grad=grad), expected)
    lead = x.view(3, 11, -1)
    assert torch.equal(int8_training_linear(lead, weight, bias), expected.view(3, 11, -1))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(33, 65, 127), (1, 1, 1), (7, 1000, 3), (0, 4, 5)], ids=str)
def test_float_gradients_are_straight_through(shape, dtype):
    x, weight, bias, grad = problem(*shape, dtype=dtype)
    y = int8_training_linear(x, weight, bias, grad="float")
    actual = torch.autograd.grad(y, (x, weight, bias), grad)
    found = []
    for wide in (torch.float64, torch.float32):
        q, w, g = quantized(x, wide), quantized(weight, wide), grad.to(wide)
        found.append((g @ w, g.T @ q, g.sum(0)))
    for a, leaf, expected, baseline in zip(actual, (x, weight, bias), *found, strict=True):
        assert a.dtype == leaf.dtype
        assert_as_accurate(a, expected, baseline.to(a.dtype), factor=3.0)


@pytest.mark.parametrize("shape", [(33, 65, 127), (1, 1, 1), (7, 1000, 3), (0, 4, 5)], ids=str)
def test_int8_gradients_are_products_of_int8(shape, device):
    x, weight, bias, grad = problem(*shape, device=device)
    torch.manual_seed(3)
    y = int8_training_linear(x, weight, bias)
    actual = torch.autograd.grad(y, (x, weight, bias), grad)
    torch.manual_seed(3)
    philox = torch.randint(-(2**63), 2**63 - 1, (2, 2), device=device)
    for a, rows, (values, scale), key in (
        (actual[0], grad, reference_int8.quantize_rows(weight.detach()), philox[0]),
        (actual[1], grad.T, reference_int8.quantize_rows(x.detach()), philox[1]),
    ):
        q, s = reference_int8_training.quantize_rows_stochastic(rows, key, scale)
        assert torch.equal(a, reference_int8.int8_mm(q, values) * s[:, None])
    assert_as_accurate(actual[2], grad.double().sum(0), grad.sum(0), factor=3.0)


def test_int8_gradients_are_the_float_ones_on_average():
    x, weight, _, grad = problem(16, 33, 20)
    n, leaves = 300, (x, weight)
    y = int8_training_linear(x, weight, grad="float")
    expected = torch.autograd.grad(y, leaves, grad)
    draws = [torch.autograd.grad(int8_training_linear(x, weight), leaves, grad) for _ in range(n)]
    for e, *many in zip(expected, *draws, strict=True):
        many = torch.stack(many).double()
        assert many.std(0).min() > 0
        assert ((many.mean(0) - e).abs() <= 5 * many.std(0) / n**0.5).all()


def test_long_sums_do_not_overflow():
    """140,000 products of 127 by 127 are beyond 2**31."""
    x, weight = torch.ones(140_000, 1), torch.ones(1, 1, requires_grad=True)
    int8_training_linear(x, weight).sum().backward()
    assert weight.grad.item() == pytest.approx(140_000, rel=1e-6)


def test_sums_in_parts_are_sums(monkeypatch):
    monkeypatch.setattr(int8_training, "MAX_TERMS", 10)
    x, weight, _, grad = problem(35, 1, 5)
    n = 300
    expected = torch.autograd.grad(int8_training_linear(x, weight, grad="float"), weight, grad)[0]
    draws = torch.stack(
        [torch.autograd.grad(int8_training_linear(x, weight), weight, grad)[0] for _ in range(n)]
    ).double()
    assert ((draws.mean(0) - expected).abs() <= 5 * draws.std(0) / n**0.5).all()


def gradients(layer, x):
    layer.zero_grad()
    layer(x).square().sum().backward()
    return [p.grad.clone() for p in layer.parameters()]


def test_manual_seed_decides_the_rounding():
    layer, x = Int8TrainingLinear(127, 65), torch.randn(33, 127)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(gradients(layer, x)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    before = torch.get_rng_state()
    with torch.no_grad():
        layer.eval()(x)  # so that a run with evaluations trains as one without
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("grad", GRADS)
def test_gradients_that_are_not_finite_show(grad):
    """So that GradScaler finds them."""
    x, weight, bias, grad_y = problem(dtype=torch.float16)
    y = int8_training_linear(x, weight, bias, grad=grad)
    grad_y[3, 5] = torch.inf
    grad_x, grad_weight, grad_bias = torch.autograd.grad(y, (x, weight, bias), grad_y)
    assert not grad_x[3].isfinite().any()
    assert grad_x[:3].isfinite().all()
    assert not grad_weight[5].isfinite().any()
    assert not grad_bias[5].isfinite()


@pytest.mark.parametrize("grad", GRADS)
def test_only_what_is_asked_for_is_computed(grad):
    x, weight, bias, grad_y = problem()
    for leaves in ((x,), (weight,), (bias,), (x, weight)):
        frozen = [t if any(t is leaf for leaf in leaves) else t.detach() for t in (x, weight, bias)]
        y = int8_training_linear(*frozen, grad=grad)
        found = torch.autograd.grad(y, leaves, grad_y)
        assert [g.shape for g in found] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("grad", GRADS)
def test_a_second_derivative_is_refused(grad):
    x, weight, _, grad_y = problem()
    y = int8_training_linear(x, weight, grad=grad)
    (grad_x,) = torch.autograd.grad(y, x, grad_y.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()


@pytest.mark.parametrize("grad", GRADS)
def test_is_drop_in_for_torchs(grad):
    linear = nn.Linear(127, 65).eval()
    layer = Int8TrainingLinear.from_linear(linear, grad=grad)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert Int8TrainingLinear.from_linear(nn.Linear(3, 4, bias=False)).bias is None
    other = Int8TrainingLinear(127, 65, grad=grad)
    other.load_state_dict(linear.state_dict())
    linear.load_state_dict(layer.state_dict())
    x = torch.randn(9, 127)
    copies = [other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for same in copies:
        assert torch.equal(same(x), layer(x))
        assert same.grad == grad
    assert repr(layer).endswith(f"bias=True, grad={grad})")
    torch.manual_seed(5)
    theirs = nn.Linear(127, 65)
    torch.manual_seed(5)
    assert torch.equal(Int8TrainingLinear(127, 65).weight, theirs.weight)


@pytest.mark.parametrize("grad", GRADS)
def test_autocast(grad):
    layer, x = Int8TrainingLinear(127, 65, grad=grad), torch.randn(9, 127)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(y, layer(x.detach()))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x).bfloat16())
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("grad", GRADS)
def test_compiles_whole(grad):
    torch._dynamo.reset()
    layer, x = Int8TrainingLinear(127, 65, grad=grad), torch.randn(9, 127)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for module in (layer, compiled):
        y = module(x)
        torch.manual_seed(1)
        found.append([y, *gradients(module, x)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_bad_arguments():
    with pytest.raises(ValueError, match="grad must be one of int8, float, got 'int4'"):
        Int8TrainingLinear(3, 4, grad="int4")
    with pytest.raises(ValueError, match="grad must be one of int8, float, got 'int4'"):
        int8_training_linear(torch.ones(2, 3), torch.ones(4, 3), grad="int4")
    with pytest.raises(TypeError, match=r"dtype must be torch\.float32 or .*, got torch\.float64"):
        Int8TrainingLinear(3, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"linear.weight must be torch\.float32 or .*float64"):
        Int8TrainingLinear.from_linear(nn.Linear(3, 4).double())
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, got <class"):
        Int8TrainingLinear.from_linear(nn.Conv2d(3, 4, 1))
    layer = Int8TrainingLinear(3, 4)
    with pytest.raises(ValueError, match=r"x .*\[2, 4\]"):
        layer(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"x must .*float64"):
        layer(torch.ones(2, 3).double())
    with pytest.raises(ValueError, match=r"must .*float64"):
        layer.double()(torch.ones(2, 3))


# Training with it


def int8_task(grad="int8"):
    def build_model():
        hidden = Int8TrainingLinear(3, 8, grad=grad)
        return nn.Sequential(hidden, nn.ReLU(), Int8TrainingLinear(8, 1, grad=grad))

    return replace(small_task(), build_model=build_model)


@pytest.mark.parametrize("grad", GRADS)
def test_a_regression_is_learnt(grad):
    losses = train(int8_task(grad), replace(SMALL, epochs=60)).losses
    assert sum(losses[-3:]) < 0.05 * sum(losses[:3])


def test_a_resumed_run_rounds_as_a_whole_one(tmp_path):
    whole = train(int8_task(), SMALL)
    train(int8_task(), replace(SMALL, epochs=2), tmp_path)
    rest = train(int8_task(), SMALL, tmp_path, resume=True)
    assert torch.equal(parameters(rest.model), parameters(whole.model))
    assert rest.losses == whole.losses[-3:]


QUICK = ["train", "cnn", "--device", "cpu", "--batch-size", "512", "--epochs", "1"]


def test_the_command_line_trains_and_evaluates_it(tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "run")
    assert main([*QUICK, "--linear", "int8", "--out", out]) == 0
    trained = capsys.readouterr().out
    calls = []
    forward = Int8TrainingLinear.forward
    monkeypatch.setattr(
        Int8TrainingLinear, "forward", lambda self, x: calls.append(x.shape) or forward(self, x)
    )
    assert main(["evaluate", out]) == 0
    held_out = [line for line in trained.splitlines() if "held-out images" in line]
    assert held_out[0] in capsys.readouterr().out.splitlines()
    assert calls
    assert main(["train", "cnn", "--resume", out, "--linear", "float"]) == 1
    assert "has linear 'int8', not 'float'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*QUICK, "--linear", "int4"])


def test_a_run_that_is_older_than_an_option_goes_on(tmp_path):
    whole = train(small_task(), SMALL)
    train(small_task(), replace(SMALL, epochs=2), tmp_path)
    for path in checkpoint.list_checkpoints(tmp_path):
        state = checkpoint.load_checkpoint(path)
        del state["identity"]["weight_decay"], state["config"]["weight_decay"]
        with checkpoint.atomic_file(path) as file:
            hashing = checkpoint._HashingFile(file)
            torch.save(state, hashing)
            file.write(checkpoint.SEAL + hashing.sha256.hexdigest().encode())
    with pytest.raises(UserError, match="no usable checkpoint"):
        train(small_task(), replace(SMALL, weight_decay=0.1), tmp_path, resume=True)
    rest = train(small_task(), SMALL, tmp_path, resume=True)
    assert torch.equal(parameters(rest.model), parameters(whole.model))


def test_a_config_that_is_older_than_int8_is_of_float(tmp_path):
    saved = {"task": "cnn", **asdict(CnnConfig(seed=3))}
    del saved["linear"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert read_config(tmp_path, "cnn", CnnConfig, {}) == CnnConfig(seed=3, linear="float")


@pytest.mark.slow
def test_the_cnn_learns_as_with_float():
    accuracies = [run(CnnConfig(device="cpu", linear=linear)) for linear in ("float", "int8")]
    floats, int8 = (summary.test_accuracy for summary in accuracies)
    assert floats > 0.95
    assert abs(int8 - floats) <= 0.01
