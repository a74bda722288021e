"""Automatic mixed precision: a GradScaler that lets the optimizer's kernel find inf and NaN."""

from typing import Any

import torch

from bigkern.optim import Adam


class GradScaler(torch.amp.GradScaler):
    """:class:`torch.amp.GradScaler`, except that bigkern's optimizers look for inf and NaN in the
    gradients themselves.

    That saves a pass which reads and writes all gradients; with `max_grad_norm` the pass that
    computes the norm finds them. Other optimizers, and gradients on another device than the scale,
    are handled as torch does.
    """

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        grads = (p.grad for group in optimizer.param_groups for p in group["params"])
        is_checked_in_kernel = isinstance(optimizer, Adam) and all(
            grad is None or grad.device == scale.device for grad in grads
        )
        if not is_checked_in_kernel:
            return super()._check_inf_per_device(optimizer)
        # step() writes to the tensor that update() will read.
        optimizer.inf_to_be_found = torch.zeros((), device=scale.device)
        found = {scale.device: optimizer.inf_to_be_found}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found
