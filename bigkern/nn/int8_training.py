"""A linear layer that trains with INT8 products."""

import torch
from torch import Tensor, nn

from bigkern.nn.int8_layer import check_float, output_dtype
from bigkern.ops.int8_training import GRADS, int8_training_linear


class Int8TrainingLinear(nn.Linear):
    """:class:`torch.nn.Linear` whose products are of int8: the float weight is quantized by row,
    and so is the input, in each forward.

    Arguments, parameters and ``state_dict()`` are those of :class:`torch.nn.Linear`, and:

    Args:
        grad: how the gradients of input and weight are multiplied.
            ``int8``: in int8, with stochastic rounding of the output's gradient, so that they are
            right on average; :func:`torch.manual_seed` decides them.
            ``float``: in floating point.
            In both the quantization counts as the identity (straight-through), and what is
            multiplied with are the quantized input and weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        grad: str = "int8",
    ) -> None:
        check_float("dtype", dtype or torch.get_default_dtype())
        super().__init__(in_features, out_features, bias, device, dtype)
        if grad not in GRADS:
            raise ValueError(f"grad must be one of {', '.join(GRADS)}, got {grad!r}")
        self.grad = grad

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, grad: str = "int8") -> "Int8TrainingLinear":
        """A layer that shares the parameters of `linear`, and is in its training mode."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear)}")
        check_float("linear.weight", linear.weight.dtype)
        layer = cls(
            linear.in_features, linear.out_features, bias=False, device="meta",
            dtype=linear.weight.dtype, grad=grad,
        )  # fmt: skip
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not (self.training or torch.is_grad_enabled()):  # an evaluation draws no seeds
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return int8_training_linear(
            input, weight, bias, grad=self.grad, out_dtype=output_dtype(input)
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, grad={self.grad}"
