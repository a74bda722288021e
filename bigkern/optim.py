"""Adam and AdamW, drop-in for :mod:`torch.optim`'s: one kernel call a step and group."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, ValuesView
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigkern.ops import AdamGroup, grad_norm

_HALVES = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, torch.float64, *_HALVES)
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class _Batch(NamedTuple):
    """What one kernel call steps: parameters of a group that are on one device."""

    group_index: int
    positions: list[int] | None  # of the parameters in their group; None: all of it
    tensors: AdamGroup


class Adam(torch.optim.Adam):
    """Adam (Kingma and Ba 2015); with the arguments, and the results, of :class:`torch.optim.Adam`.

    Parameters are float32, float64, float16 or bfloat16, of any strides. `foreach`, `fused` and
    `capturable` are accepted and change nothing: the step is one fused kernel call a group, and
    never synchronizes with the device. On CUDA the state's ``"step"`` lives on the device, as in
    torch with ``fused=True``. ``state_dict()`` is torch's, both ways. With
    :class:`torch.amp.GradScaler` the kernel unscales the gradients, and a step with inf or NaN
    among them changes nothing; with :class:`bigkern.amp.GradScaler` it looks for them too.

    Args:
        max_grad_norm: clips the global L2 norm of the gradients of all groups within the step, as
            :func:`torch.nn.utils.clip_grad_norm_` before it would, without touching ``.grad``. Then
            ``optimizer.grad_norm`` is the norm at the last step: float64, shape [].
        state_dtype: ``torch.float32`` keeps the moments of float16 and bfloat16 parameters in
            float32 (default: in the parameter's dtype, as torch).
        master_weights: keeps float32 copies of float16 and bfloat16 parameters in the state
            (``"master_param"``), which are what is updated, and rounded into the parameters.
            Parameters that are then changed by hand need a new optimizer.

    Raises:
        ValueError: a hyperparameter out of range; a parameter that is twice in a group.
        TypeError: complex or integer parameters.
        RuntimeError: ``differentiable=True``; at a step, sparse gradients. The errors of
            :func:`bigkern.ops.adam_` are those of a step.
    """

    # GradScaler leaves unscaling and skipping to a step() so marked, and sets grad_scale and
    # found_inf on the optimizer.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
    ) -> None:
        self._set_options(differentiable, max_grad_norm, state_dtype, master_weights)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )

    def _set_options(
        self,
        differentiable: bool,
        max_grad_norm: float | None,
        state_dtype: torch.dtype | None,
        master_weights: bool,
    ) -> None:
        if differentiable:
            raise RuntimeError("differentiable=True isn't supported; use torch.optim")
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm must be at least 0, got {max_grad_norm}")
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"state_dtype must be None or torch.float32, got {state_dtype}")
        self.max_grad_norm = max_grad_norm
        self.state_dtype = state_dtype
        self.master_weights = master_weights
        self.grad_norm: Tensor | None = None
        self._forget_batches()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        try:
            for p in params:
                if p.dtype not in _DTYPES:
                    raise TypeError(f"parameters must be one of {_DTYPES}, got {p.dtype}")
            if len(set(params)) < len(params):
                raise ValueError("params must be different tensors, got one twice in a group")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step over all groups; returns the loss of `closure`, which reevaluates the model."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        to_be_found = self.__dict__.pop("inf_to_be_found", None)  # set by bigkern.amp.GradScaler
        grads = [[p.grad for p in group["params"]] for group in self.param_groups]
        batches = [(b, _pick(grads, b)) for b in self._current_batches(grads)]
        if not batches:
            return loss

        grad_scale = getattr(self, "grad_scale", None)
        check_inf = to_be_found is not None
        found_inf = to_be_found if check_inf else getattr(self, "found_inf", None)
        norm = norm_out = None
        if self.max_grad_norm is not None or check_inf:
            if len(batches) == 1:
                first_grad = batches[0][1][0]
                norm_out = first_grad.new_empty((), dtype=torch.float64)
                self.grad_norm = norm_out
            else:
                norm = self.grad_norm = _global_norm([g for _, g in batches], grad_scale)

        for batch, batch_grads in batches:
            group, device = self.param_groups[batch.group_index], batch_grads[0].device
            beta1, beta2 = group["betas"]
            lr = group["lr"]
            batch.tensors.step_(
                batch_grads,
                lr=float(lr) if isinstance(lr, Tensor) and lr.is_cpu else _on(lr, device),
                beta1=float(beta1),
                beta2=float(beta2),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=group["amsgrad"],
                maximize=group["maximize"],
                decoupled_weight_decay=group["decoupled_weight_decay"],
                grad_scale=_on(grad_scale, device),
                found_inf=_on(found_inf, device),
                check_inf=check_inf,
                max_grad_norm=self.max_grad_norm,
                grad_norm=_on(norm, device),
                grad_norm_out=norm_out,
            )
        return loss

    def _forget_batches(self) -> None:
        self._batches: list[_Batch] = []
        # Of the time when they were made: which parameters had a gradient, and _sources().
        self._has_grad: list[list[bool]] = []
        self._seen: list[Any] = []
        self._views: list[ValuesView] = []  # on what the dicts in self.state hold by now

    def _current_batches(self, grads: list[list[Tensor | None]]) -> list[_Batch]:
        """The batches, made anew if anything that they were made of is another object than then."""
        has_grad = [[grad is not None for grad in group_grads] for group_grads in grads]
        if has_grad != self._has_grad or not all(map(is_, self._sources(), self._seen)):
            self._batches = [
                batch for i in range(len(grads)) for batch in self._new_batches(i, has_grad[i])
            ]
            self._views = [s.values() for s in self.state.values() if isinstance(s, dict)]
            self._has_grad, self._seen = has_grad, list(self._sources())
        return self._batches

    def _sources(self) -> Iterator[Any]:
        """All objects that the batches depend on, but for the gradients."""
        return chain(
            chain.from_iterable(group["params"] for group in self.param_groups),
            (group["amsgrad"] for group in self.param_groups),
            self.state.values(),
            chain.from_iterable(self._views),
            [self],  # the end: what follows it in a longer list would not be compared
        )

    def _new_batches(self, group_index: int, has_grad: list[bool]) -> list[_Batch]:
        """Of one group: one, unless it is spread over devices, or only some have a master."""
        group = self.param_groups[group_index]
        batches = defaultdict(list)
        for i, p in enumerate(group["params"]):
            if has_grad[i]:
                batches[p.device, self._has_master(p)].append(i)
        return [
            _Batch(
                group_index,
                None if len(positions) == len(group["params"]) else positions,
                self._adam_group([group["params"][i] for i in positions], group["amsgrad"]),
            )
            for positions in batches.values()
        ]

    @torch._disable_dynamo  # as torch's own add_param_group is
    def _adam_group(self, params: list[Tensor], amsgrad: bool) -> AdamGroup:
        states = [self._complete_state(p, amsgrad) for p in params]
        has_master = self._has_master(params[0])
        return AdamGroup(
            params,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if amsgrad else [],
            [state["step"] for state in states],
            [state["master_param"] for state in states] if has_master else [],
        )

    def _complete_state(self, p: Tensor, amsgrad: bool) -> dict[str, Any]:
        state = self.state[p]
        if "step" not in state:
            is_double = torch.get_default_dtype() == torch.float64
            dtype = torch.float64 if is_double else torch.float32
            state["step"] = torch.zeros((), dtype=dtype, device=p.device)
        for name in _MOMENTS if amsgrad else _MOMENTS[:2]:
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=self._state_dtype(p))
        if self._has_master(p) and "master_param" not in state:
            state["master_param"] = p.detach().to(torch.float32)
        return state

    def _has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype in _HALVES

    def _state_dtype(self, p: Tensor) -> torch.dtype:
        return self.state_dtype or p.dtype if p.dtype in _HALVES else p.dtype

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # torch casts the state to the dtype of the parameter: what is kept in float32 is taken from
        # the source once more, which is the dict as the user's own hooks left it.
        sources: list[dict[str, Any]] = []
        hook = self.register_load_state_dict_pre_hook(lambda _, source: sources.append(source))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        ids = chain.from_iterable(group["params"] for group in sources[0]["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for param_id, p in zip(ids, params, strict=True):
            for name, value in sources[0]["state"].get(param_id, {}).items():
                if name == "master_param":
                    del self.state[p][name]  # where there is no master, it would go stale
                    if self._has_master(p):
                        self.state[p][name] = value.to(p.device, torch.float32)
                elif name in _MOMENTS:
                    self.state[p][name] = value.to(p.device, self._state_dtype(p))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget_batches()
        super().__setstate__(state)
        for p, p_state in self.state.items():
            if isinstance(p, Tensor) and "step" in p_state:
                p_state["step"] = p_state["step"].to(p.device)

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_grad_norm", "state_dtype", "master_weights", "grad_norm")
        return super().__getstate__() | {name: getattr(self, name) for name in own}


class AdamW(Adam, torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), with the arguments of
    :class:`torch.optim.AdamW` and those that :class:`bigkern.optim.Adam` adds.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
    ) -> None:
        self._set_options(differentiable, max_grad_norm, state_dtype, master_weights)
        torch.optim.AdamW.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )


def _on(scalar: float | Tensor | None, device: torch.device) -> float | Tensor | None:
    return scalar.to(device, non_blocking=True) if isinstance(scalar, Tensor) else scalar


def _pick(grads: list[list[Tensor]], batch: _Batch) -> list[Tensor]:
    group_grads = grads[batch.group_index]
    return group_grads if batch.positions is None else [group_grads[i] for i in batch.positions]


def _global_norm(batches: list[list[Tensor]], grad_scale: Tensor | None) -> Tensor:
    """The norm of the gradients of all batches, on the device of the first."""
    by_device = defaultdict(list)
    for grads in batches:
        by_device[grads[0].device] += grads
    norms = [grad_norm(grads, _on(grad_scale, device)) for device, grads in by_device.items()]
    return torch.linalg.vector_norm(torch.stack([_on(norm, norms[0].device) for norm in norms]))
