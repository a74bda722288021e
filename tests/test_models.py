"""The reference CNN: its layers, its shapes, its gradients."""

import pytest
import torch

from bigkern.models import SimpleCNN


def test_parameters_have_the_documented_shapes():
    shapes = {name: tuple(p.shape) for name, p in SimpleCNN().named_parameters()}
    assert shapes == {
        "conv1.weight": (32, 1, 3, 3),
        "conv1.bias": (32,),
        "fc1.weight": (128, 32 * 26 * 26),
        "fc1.bias": (128,),
        "fc2.weight": (10, 128),
        "fc2.bias": (10,),
    }


def test_forward_is_the_layers_in_their_order():
    torch.manual_seed(0)
    model = SimpleCNN().double()
    images = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    p = dict(model.named_parameters())
    x = torch.conv2d(images, p["conv1.weight"], p["conv1.bias"]).clamp(min=0)
    x = (x.reshape(3, -1) @ p["fc1.weight"].T + p["fc1.bias"]).clamp(min=0)
    expected = x @ p["fc2.weight"].T + p["fc2.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    model = SimpleCNN()
    model(torch.rand(2, 1, 28, 28)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_no_image_gives_no_logits():
    assert SimpleCNN()(torch.zeros(0, 1, 28, 28)).shape == (0, 10)


@pytest.mark.parametrize("shape", [(2, 1, 27, 28), (2, 3, 28, 28), (1, 28, 28), (28, 28)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"must have shape \[N, 1, 28, 28\], got \["):
        SimpleCNN()(torch.zeros(shape))
