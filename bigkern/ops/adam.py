"""Adam and AdamW, a whole parameter group in one call."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigkern import backends, triton_ops

backends.register("adam_", fake=lambda *args, **kwargs: None)
backends.register(
    "grad_norm", fake=lambda grads, grad_scale=None: grads[0].new_empty((), dtype=torch.float64)
)
torch.library.register_fake("bigkern::adam_kept_", lambda *args, **kwargs: None)

# The ops change leaves in place and are not differentiable: autograd has nothing to do, and steps
# aside.
_libraries = []
for backend in backends.table()["adam_"]:
    _libraries.append(torch.library.Library(backends.NAMESPACES[backend], "IMPL"))
    _libraries[-1].impl("adam_", torch.library.fallthrough_kernel, "Autograd")
_libraries[0].impl("adam_keep", torch.library.fallthrough_kernel, "Autograd")


def _check_layout(grads: Sequence[Tensor]) -> None:
    for i, grad in enumerate(grads):
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"grads[{i}] must be dense, got {grad.layout}; see torch.optim.SparseAdam"
            )


@torch.no_grad()
def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    master_params: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    check_inf: bool = False,
    max_grad_norm: float | None = None,
    grad_norm: Tensor | None = None,
    grad_norm_out: Tensor | None = None,
) -> None:
    r"""One step of Adam for a list of parameters, in place.

    Kingma and Ba 2015 (https://arxiv.org/abs/1412.6980, algorithm 1), with the weight decay of
    Loshchilov and Hutter 2019 (https://arxiv.org/abs/1711.05101, algorithm 2) and AMSGrad of Reddi
    et al. 2018, as :mod:`torch.optim` defines them: for each parameter :math:`\theta` with gradient
    :math:`g`, after ``state_steps`` was raised by one to :math:`t`,

    .. math::
        g &\leftarrow \pm g / \mathrm{grad\_scale}
            \cdot \min(1, \mathrm{max\_grad\_norm} / (\|g\| + 10^{-6})) \;[+ \lambda\theta] \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow [(1 - \eta\lambda)]\,\theta
            - \frac{\eta}{1 - \beta_1^t} \, \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}

    Computed in float32 (float64 for float64 parameters), stored with round to nearest even. The
    result is the same, bit for bit, whatever the number of threads and the grouping of the tensors.

    Args:
        params: n tensors of any shape and strides; float32, float64, float16 or bfloat16.
        grads: n tensors with shape and dtype of their parameter. Only read.
        exp_avgs, exp_avg_sqs: :math:`m` and :math:`v`; shape of the parameter, dtype too, or
            float32 for half parameters.
        max_exp_avg_sqs: the largest :math:`v` so far, used in its place; empty unless ``amsgrad``.
        state_steps: n one-element tensors, float32 or float64: the steps done so far.
        master_params: empty, or n float32 copies of float16 and bfloat16 parameters: they are
            updated, and rounded into ``params``.
        lr: :math:`\eta`; a one-element tensor on the device of ``params`` is read there, without
            synchronization.
        weight_decay: :math:`\lambda`, added to the gradient, or to the parameter where
            ``decoupled_weight_decay``.
        maximize: ascend: the sign of the gradient is turned.
        grad_scale: one element; the gradients are divided by it.
        found_inf: one element; where it isn't 0, nothing is changed, not even ``state_steps``.
        check_inf: look for inf and NaN in the gradients, and set ``found_inf`` to 1 if there is
            one.
        max_grad_norm: clips the global L2 norm of the unscaled gradients, as
            :func:`torch.nn.utils.clip_grad_norm_` does; ``grads`` are not changed.
        grad_norm: the global norm, one element, if known (several groups share one); else that of
            ``grads`` is computed.
        grad_norm_out: one element that receives the norm, if ``max_grad_norm`` or ``check_inf``
            asked for it.

    Scalars in tensors are float32 or float64, on the device of ``params``.

    Raises:
        ValueError: lists of different lengths; a tensor with another shape, dtype or device than
            stated here.
        RuntimeError: sparse gradients.
        NotImplementedError: no backend for the device.
    """
    if not params:
        return
    ops = backends.select("adam_", params[0].device.type)
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, master_params)
    _step(
        ops.adam_.default,
        lists,
        params,
        grads,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=amsgrad,
        maximize=maximize,
        decoupled_weight_decay=decoupled_weight_decay,
        grad_scale=grad_scale,
        found_inf=found_inf,
        check_inf=check_inf,
        max_grad_norm=max_grad_norm,
        grad_norm=grad_norm,
        grad_norm_out=grad_norm_out,
    )


class AdamGroup:
    """The lists of :func:`adam_` but for the gradients, handed over once: a step is then no slower
    for thousands of tensors.

    What is kept are the tensors, so that a parameter whose data was replaced or moved is stepped
    where it is now.

    Args:
        params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, master_params: as in
            :func:`adam_`, at least one.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor],
        state_steps: Sequence[Tensor],
        master_params: Sequence[Tensor] = (),
    ) -> None:
        self.params = params
        self._states = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, master_params)
        self._kept = torch.ops.bigkern.adam_keep(params, *self._states)
        weakref.finalize(self, torch.ops.bigkern.adam_forget, self._kept)

    @torch.no_grad()
    def step_(self, grads: Sequence[Tensor], **options: Any) -> None:
        """:func:`adam_` with its options and errors."""
        ops = backends.select("adam_", grads[0].device.type)
        if ops.name == triton_ops.NAMESPACE:  # only compiled code keeps lists
            op, args = ops.adam_.default, (self.params, grads, *self._states)
        else:
            op, args = ops.adam_kept_.default, (self._kept, grads)
        _step(op, args, self.params, grads, **options)


def _step(op, args, params, grads, *, lr: float | Tensor, **options: Any) -> None:
    is_tensor = isinstance(lr, Tensor)
    try:
        op(*args, lr=0.0 if is_tensor else lr, lr_tensor=lr if is_tensor else None, **options)
    except NotImplementedError:
        _check_layout(grads)
        raise
    # Autograd then knows that a graph which saved a parameter is stale.
    torch.autograd.graph.increment_version(params)


def grad_norm(grads: Sequence[Tensor], grad_scale: Tensor | None = None) -> Tensor:
    """The L2 norm of all elements of all `grads` together, divided by `grad_scale`: a float64
    tensor of shape [].

    Sums are formed in float64, so that no float32, float16 or bfloat16 gradients overflow, and in
    an order that doesn't depend on the number of threads. ``nan`` or ``inf`` if and only if an
    element is (for float64, if a square overflows).

    Args:
        grads: tensors on one device, of any shape and strides; float32, float64, float16 or
            bfloat16.
        grad_scale: one element, float32 or float64, on the same device.
    """
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    ops = backends.select("grad_norm", grads[0].device.type)
    return ops.grad_norm.default(grads, grad_scale)
