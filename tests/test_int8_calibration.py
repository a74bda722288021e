"""Calibration, smoothing, and columns kept in floating point."""

import copy

import pytest
import torch
from int8_helpers import OutlierModel, double, sqnr
from torch import nn

from bigkern.nn import Int8Linear, input_ranges, smooth_
from bigkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_input_ranges(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 2)
            self.fc = nn.Linear(3, 4)
            self.unused = nn.Linear(3, 4)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            hidden.append(self.dropout(self.conv(x)).movedim(1, -1))
            return self.fc(hidden[-1])

    hidden = []
    model = Model()
    model.conv.eval()
    inputs = [torch.randn(n, 2, 5, 6) for n in (1, 4, 0)]
    as_batch = {"tensor": lambda x: x, "tuple": lambda x: (x,), "dict": lambda x: {"x": x}}[kind]
    ranges = input_ranges(model, map(as_batch, inputs))
    assert ranges.keys() == {"conv", "fc"}
    assert torch.equal(ranges["conv"], torch.cat(inputs).abs().amax((0, 2, 3)))
    assert torch.equal(ranges["fc"], torch.cat(hidden).abs().amax((0, 1, 2)))
    trained = {name for name, module in model.named_modules() if module.training}
    assert trained == {"", "fc", "unused", "dropout"}
    assert not model.fc._forward_pre_hooks


def test_input_ranges_end_with_their_errors():
    model = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="batches must hold one at least, got none"):
        input_ranges(model, [])
    with pytest.raises(RuntimeError):
        input_ranges(model, [torch.ones(2, 5)])
    assert not model._forward_pre_hooks
    assert model.training


def test_smoothing_changes_no_result():
    """Through every kind of layer that scales can be folded into."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 6, 3, bias=False), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 6, 1),
        nn.Flatten(2), nn.Linear(16, 10), nn.LayerNorm(10), nn.Linear(10, 9), nn.ReLU(),
        nn.Linear(9, 7), nn.RMSNorm(7), nn.Linear(7, 5),
    ).eval()  # fmt: skip
    folds = {"0": "2", "3": "5", "6": ["8"], "11": "12", "12": "14", "15": ["16"]}
    x = torch.randn(5, 3, 8, 8)
    expected, baseline = double(model)(x), model(x)
    ranges = input_ranges(model, [x])
    before = copy.deepcopy(model)
    smooth_(model, ranges, folds, alpha=0.7)
    # As many roundings again as in the products.
    assert_as_accurate(model(x), expected, baseline, factor=3.0)
    for name, found in input_ranges(model, [x]).items():
        torch.testing.assert_close(found, ranges[name])
    for name in folds:
        changed, unchanged = (m.get_submodule(name).weight for m in (model, before))
        assert not torch.equal(changed, unchanged)


def test_alpha_says_which_side_becomes_even():
    linear, input_range = nn.Linear(7, 5), torch.linspace(1, 5, 7)
    for alpha in (0.0, 1.0):
        layer = Int8Linear.from_linear(linear, alpha=alpha, input_range=input_range)
        smoothed = linear.weight / layer.input_factor
        columns = [input_range * layer.input_factor, smoothed.abs().amax(0)]
        torch.testing.assert_close(columns[alpha == 0.0], torch.ones(7))
    dead = input_range.index_fill(0, torch.tensor([5]), 0.0)
    layer = Int8Linear.from_linear(linear, alpha=0.5, input_range=dead)
    assert layer.input_factor[5] == 1
    assert layer.input_factor.isfinite().all()


def quantized(model, ranges, **options):
    """A copy whose linear layers are int8."""
    model = copy.deepcopy(model)
    for name in ("fc1", "fc2"):
        linear = model.get_submodule(name)
        setattr(model, name, Int8Linear.from_linear(linear, input_range=ranges[name], **options))
    return model


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_outliers_need_smoothing_or_floating_point(mode):
    model = OutlierModel()
    x, calibration = torch.randn(200, 128), torch.randn(500, 128)
    expected = double(model)(x)
    ranges = input_ranges(model, [calibration])
    plain = quantized(model, ranges, mode=mode)
    assert sqnr(plain(x), expected) < 20

    smoothed, folded = copy.deepcopy(model), dict(ranges)
    smooth_(smoothed, folded, {"norm": "fc1"})
    by_factor = quantized(model, ranges, mode=mode, alpha=0.5)
    apart = quantized(model, ranges, mode=mode, outlier_threshold=20.0)
    assert apart.fc1.outlier_columns.tolist() == list(OutlierModel.COLUMNS)
    assert not apart.fc1.weight_q[:, OutlierModel.COLUMNS].any()
    assert apart.fc2.outlier_columns is None
    for better in (quantized(smoothed, folded, mode=mode), by_factor, apart):
        assert sqnr(better(x), expected) > 33


def test_outliers_are_those_of_calibration():
    """Later values neither join them nor leave them."""
    linear = nn.Linear(4, 3)
    layer = Int8Linear.from_linear(
        linear, outlier_threshold=2.0, input_range=torch.tensor([1.0, 2.0, 1.9, 0.0])
    )
    assert layer.outlier_columns.tolist() == [1]
    x = torch.tensor([[0.0, 0.3, 0.0, 0.0]])
    assert_as_accurate(layer(x), double(linear)(x), linear(x))
    x = torch.full((1, 4), 50.0)
    assert sqnr(layer(x), double(linear)(x)) > 35


def test_values_beyond_the_static_range_saturate():
    linear = nn.Linear(1, 1, bias=False)
    layer = Int8Linear.from_linear(linear, "static", input_range=torch.tensor([2.0]))
    assert torch.equal(layer(torch.tensor([[9.0]])), layer(torch.tensor([[2.0]])))


@pytest.mark.parametrize(
    ("folds", "error", "message"),
    [
        ({"0": "9"}, AttributeError, "9"),
        ({"0": "3"}, ValueError, r"ranges must have '3', got \['0', '2'\]"),
        ({"1": "2"}, TypeError, "1 must be a norm, Linear or Conv2d with a weight, got ReLU"),
        ({"0": "1"}, ValueError, "ranges must have '1', got"),
        ({"3": "2"}, ValueError, r"3 must have 4 outputs, got a weight of shape \[5, 4\]"),
    ],
)
def test_bad_folds(folds, error, message):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Linear(4, 5))
    ranges = input_ranges(model[:3], [torch.randn(2, 3)])
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        smooth_(model, ranges, folds)
    for name, x in model.state_dict().items():
        assert torch.equal(x, state[name])
