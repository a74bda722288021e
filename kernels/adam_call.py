"""The door of adam_ and grad_norm: what csrc/adam_call.h checks, and where the tensors lie."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from bigkern.kernels import tuning
from bigkern.kernels.multi_tensor import scalar
from torch import Tensor

_HALVES = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, torch.float64, *_HALVES)

# A row of the table: the chunks before this tensor, its elements, scalar(step), addresses.
ROW = 8
FIRST_CHUNK, NUMEL, STEP, PARAM, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, MASTER_PARAM = range(ROW)


class AdamLists(NamedTuple):
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    state_steps: list[Tensor]
    master_params: list[Tensor]


class Run(NamedTuple):
    """Tensors of one pair of dtypes."""

    positions: list[int]
    param_dtype: torch.dtype
    state_dtype: torch.dtype
    config: dict[str, int]  # of the kernel
    rows: tuple[int, ...]
    counts: tuple[int, ...]  # of chunks


class Staging:
    """Contiguous copies, for the time of a call, of tensors that can't be walked in memory order
    side by side: a strided view, or a gradient in another layout than its parameter."""

    def __init__(self) -> None:
        self.written: list[tuple[Tensor, Tensor]] = []

    def write(self, tensor: Tensor) -> Tensor:
        if any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"can't write to an expanded tensor of shape {[*tensor.shape]}")
        copy = tensor.contiguous()
        if copy is not tensor:
            self.written.append((tensor, copy))
        return copy

    def write_back(self) -> None:
        for original, copy in self.written:
            original.copy_(copy)


def check_scalar(name: str, tensor: Tensor | None, device: torch.device) -> None:
    if tensor is None:
        return
    if tensor.numel() != 1 or tensor.dtype not in (torch.float32, torch.float64):
        got = f"{tensor.dtype} {[*tensor.shape]}"
        raise ValueError(f"{name} must be one torch.float32 or torch.float64, got {got}")
    _check_device(name, tensor, device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the first tensor, got {tensor.device}")


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        wanted = "torch.float32, float64, float16 or bfloat16"
        raise ValueError(f"{name} must be {wanted}, got {tensor.dtype}")


def _check_lengths(lists: AdamLists, amsgrad: bool) -> None:
    n = len(lists.params)
    wanted = dict.fromkeys(AdamLists._fields, n)
    wanted["max_exp_avg_sqs"] = n if amsgrad else 0
    wanted["master_params"] = n if lists.master_params else 0
    for (name, tensors), want in zip(lists._asdict().items(), wanted.values(), strict=True):
        if len(tensors) != want:
            raise ValueError(f"{name} must have {want} tensors for {n} params, got {len(tensors)}")


def _check_tensors(lists: AdamLists, i: int, device: torch.device) -> None:
    param, state_dtype = lists.params[i], lists.exp_avgs[i].dtype
    _check_dtype(f"params[{i}]", param)
    is_half = param.dtype in _HALVES
    if state_dtype != param.dtype and not (is_half and state_dtype == torch.float32):
        wanted = f"{param.dtype}{' or torch.float32' if is_half else ''} like its parameter"
        raise ValueError(f"exp_avgs[{i}] must be {wanted}, got {state_dtype}")
    if lists.master_params and not is_half:
        wanted = "is for float16 and bfloat16 parameters"
        raise ValueError(f"master_params[{i}] {wanted}, got {param.dtype}")
    dtypes = {
        "params": param.dtype,
        "grads": param.dtype,
        "exp_avgs": state_dtype,
        "exp_avg_sqs": state_dtype,
        "max_exp_avg_sqs": state_dtype,
        "master_params": torch.float32,
    }
    for name, dtype in dtypes.items():
        for tensor in getattr(lists, name)[i : i + 1]:
            if tensor.dtype != dtype:
                raise ValueError(f"{name}[{i}] must have dtype {dtype}, got {tensor.dtype}")
            if tensor.shape != param.shape:
                want, got = [*param.shape], [*tensor.shape]
                raise ValueError(f"{name}[{i}] must have shape {want}, got {got}")
            _check_device(f"{name}[{i}]", tensor, device)
    check_scalar("state_steps", lists.state_steps[i], device)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _are_side_by_side(tensors: Sequence[Tensor]) -> bool:
    if all(t.is_contiguous() for t in tensors):
        return True
    strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in tensors]
    return all(s == strides[0] for s in strides) and _is_dense(tensors[0])


def _staged(lists: AdamLists, staging: Staging) -> AdamLists:
    """The lists, with copies in place of tensors that don't lie side by side."""
    lists = AdamLists(*(list(tensors) for tensors in lists))
    of_elements = [ts for name, ts in lists._asdict().items() if ts and name != "state_steps"]
    for i in range(len(lists.params)):
        if not _are_side_by_side([tensors[i] for tensors in of_elements]):
            for tensors in of_elements:
                is_read = tensors is lists.grads
                tensors[i] = tensors[i].contiguous() if is_read else staging.write(tensors[i])
    return lists


_seen: dict[tuple, list[Run]] = {}


def checked_call(lists: AdamLists, amsgrad: bool, staging: Staging) -> tuple[AdamLists, list[Run]]:
    """The lists, staged, and their tensors by dtypes.

    What was seen to be right is known again by its addresses, where nothing is staged: to check
    thousands of tensors takes longer than the step.
    """
    _check_lengths(lists, amsgrad)
    key = (
        tuning.state(),
        *((t.dtype, t.shape, t.stride()) for t in (*lists.params, *lists.grads)),
        *(tuple(t.data_ptr() for t in tensors) for tensors in lists),
    )
    if key in _seen:
        return lists, _seen[key]
    for i in range(len(lists.params)):
        _check_tensors(lists, i, lists.params[0].device)
    staged_lists = _staged(lists, staging)
    runs = _runs(staged_lists)
    if all(a is b for a, b in zip(chain(*lists), chain(*staged_lists), strict=True)):
        if len(_seen) >= 64:
            _seen.clear()
        _seen[key] = runs
    return staged_lists, runs


def _runs(lists: AdamLists) -> list[Run]:
    by_dtypes = defaultdict(list)
    for i, (param, exp_avg) in enumerate(zip(lists.params, lists.exp_avgs, strict=True)):
        by_dtypes[param.dtype, exp_avg.dtype].append(i)
    addresses = [
        [0 if not tensors else tensors[i].data_ptr() for tensors in _streams(lists)]
        for i in range(len(lists.params))
    ]
    return [
        new_run(
            positions,
            *dtypes,
            [lists.params[i].numel() for i in positions],
            [[scalar(lists.state_steps[i]), *addresses[i]] for i in positions],
        )
        for dtypes, positions in by_dtypes.items()
    ]


def _streams(lists: AdamLists) -> tuple[list[Tensor], ...]:
    """In the order of a row."""
    moments = (lists.exp_avgs, lists.exp_avg_sqs, lists.max_exp_avg_sqs)
    return lists.params, *moments, lists.master_params


def new_run(
    positions: list[int],
    param_dtype: torch.dtype,
    state_dtype: torch.dtype,
    numels: list[int],
    columns: list[list[int]],  # from STEP on
) -> Run:
    config = tuning.lookup("adam_", param_dtype)
    counts = [-(-numel // config["BLOCK"]) for numel in numels]
    firsts = accumulate(counts, initial=0)
    rows = chain.from_iterable(
        (first, numel, *rest) for first, numel, rest in zip(firsts, numels, columns, strict=False)
    )
    return Run(positions, param_dtype, state_dtype, config, tuple(rows), tuple(counts))


def checked_gradients(grads: list[Tensor]) -> tuple[list[Tensor], list[Run]]:
    """The arguments of grad_norm, contiguous where they aren't dense."""
    if not grads:
        raise ValueError("grads must have at least one tensor")
    for i, grad in enumerate(grads):
        _check_dtype(f"grads[{i}]", grad)
        _check_device(f"grads[{i}]", grad, grads[0].device)
    grads = [grad if _is_dense(grad) else grad.contiguous() for grad in grads]
    by_dtype = defaultdict(list)
    for i, grad in enumerate(grads):
        by_dtype[grad.dtype].append(i)
    return grads, [
        new_run(
            positions,
            dtype,
            dtype,
            [grads[i].numel() for i in positions],
            [[0] * (ROW - STEP) for _ in positions],
        )
        for dtype, positions in by_dtype.items()
    ]
