"""adam_ and grad_norm: the tensors of a group, thousands or one, in one launch.

In this order, and nothing is read back, so that a step can be captured in a CUDA graph:

  _sum_of_squares   partial sums of the norm, where one is asked for: reads the gradients
  _prepare          the norm, found_inf, the steps, the coefficients of each tensor
  _adam             the update: reads and writes everything once

A program takes a chunk, BLOCK elements of one tensor. A launch for each pair of dtypes; where the
tensors lie stands in tables on the device, `rows` (adam_call.py) and `grads`.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from bigkern.kernels import adam_call, multi_tensor
from bigkern.kernels.adam_call import AdamLists, Run, Staging, check_scalar
from bigkern.kernels.multi_tensor import load_scalar, pointer, scalar, store_scalar
from torch import Tensor

_TENSORS = 128  # of a program of _prepare
_NUM_COEFFICIENTS = 10
_SCALARS = ("lr_tensor", "grad_scale", "found_inf", "grad_norm", "grad_norm_out")


@triton.jit
def _find_chunk(rows, chunks, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """The program's tensor, and its elements: the first and how many are left from there."""
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + chunk)
    begin = (chunk - tl.load(rows + tensor * ROW)) * BLOCK
    return tensor, begin, tl.load(rows + tensor * ROW + 1) - begin


@triton.jit
def _are_vectors(addresses, size, BLOCK: tl.constexpr):
    """Whether a chunk is made of whole vectors of 16 elements, at multiples of 16 bytes."""
    return ((addresses % 16 == 0) & (tl.minimum(size, BLOCK) % 16 == 0)).to(tl.int1)


@triton.jit
def _elements(stream, size, ARE_VECTORS: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to a chunk's elements [BLOCK], and which of them are there."""
    i = tl.arange(0, BLOCK)
    if ARE_VECTORS:
        return tl.multiple_of(stream + i, 16), tl.max_constancy(i < size, 16)
    return stream + i, i < size


# ---- The norm, in float64: of float32 no square overflows ----


@triton.jit
def _sum_of_squares(
    rows, grads, chunks, sums, DTYPE: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr
):
    """sums[chunk] = sum of squares."""
    tensor, begin, size = _find_chunk(rows, chunks, ROW, BLOCK)
    address = tl.load(grads + tensor)
    grad = pointer(address, DTYPE) + begin
    if _are_vectors(address, size, BLOCK):
        elements, mask = _elements(grad, size, True, BLOCK)
        x = tl.load(elements, mask, other=0.0)
    else:
        elements, mask = _elements(grad, size, False, BLOCK)
        x = tl.load(elements, mask, other=0.0)
    x = x.to(tl.float64)  # however it was loaded, the sum is the same bit for bit
    tl.store(sums + tl.program_id(0), tl.sum(x * x))


@triton.jit
def _norm_of(sums, num_sums, grad_scale):
    """sqrt(sum of partial sums) / grad_scale."""
    BLOCK: tl.constexpr = 1024
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, num_sums, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        total += tl.load(sums + i, i < num_sums, other=0.0)
    norm = tl.sqrt(tl.sum(total))
    if grad_scale != 0:
        norm /= load_scalar(grad_scale)
    return norm


@triton.jit(do_not_specialize=["num_sums", "grad_scale"])
def _finish_norm(sums, num_sums: tl.int64, grad_scale: tl.int64, norm):
    tl.store(norm, _norm_of(sums, num_sums, grad_scale))


# ---- The step ----


@triton.jit(
    do_not_specialize=[
        "num_tensors", "num_sums", "lr_tensor", "grad_scale", "found_inf", "grad_norm",
        "grad_norm_out", "check_inf",
    ]
)  # fmt: skip
def _prepare(
    rows, coefficients, num_tensors: tl.int64, sums, num_sums: tl.int64,
    lr: tl.float64, log2_beta1: tl.float64, log2_beta2: tl.float64, beta1: tl.float64,
    beta2: tl.float64, l2: tl.float64, decoupled_weight_decay: tl.float64, eps: tl.float64,
    sign: tl.float64, max_grad_norm: tl.float64, check_inf: tl.int64,
    lr_tensor: tl.int64, grad_scale: tl.int64, found_inf: tl.int64, grad_norm: tl.int64,
    grad_norm_out: tl.int64, ROW: tl.constexpr, COEFFICIENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """coefficients[tensor], [COEFFICIENTS], of the tensors [BLOCK] of a program. Once a tensor
    rather than once a chunk: powers in float64 take microseconds."""
    clips = max_grad_norm < float("inf")
    norm = load_scalar(grad_norm)
    if (grad_norm == 0) & (clips | (check_inf != 0)):
        norm = _norm_of(sums, num_sums, grad_scale)

    # All programs decide alike, whether they see what the first one writes or not.
    has_inf = (check_inf != 0) & ~(tl.abs(norm) < float("inf"))
    skips = has_inf | (load_scalar(found_inf) != 0)
    is_first = tl.program_id(0) == 0
    store_scalar(found_inf, tl.full([], 1, tl.float64), is_first & has_inf)
    store_scalar(grad_norm_out, norm, is_first)

    tensor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (tensor < num_tensors) & ~skips
    step_ref = tl.load(rows + tensor * ROW + 2, mask, other=0)
    step = load_scalar(step_ref, mask) + 1
    tl.debug_barrier()  # several warps may have loaded the same
    store_scalar(step_ref, step, mask)

    # What multiplies every gradient: the sign of the objective, the inverse of the loss scale, and
    # the factor of torch.nn.utils.clip_grad_norm_, which a NaN norm makes NaN.
    factor = sign
    if grad_scale != 0:
        factor /= load_scalar(grad_scale)
    clip = max_grad_norm / (norm + 1e-6)
    factor = tl.where(clips & ~(clip >= 1), factor * clip, factor)
    if lr_tensor != 0:
        lr = load_scalar(lr_tensor)

    c = coefficients + tensor * COEFFICIENTS
    zeros = tl.zeros([BLOCK], tl.float64)
    tl.store(c + 0, zeros + factor, mask)
    tl.store(c + 1, zeros + l2, mask)
    tl.store(c + 2, zeros + (1 - lr * decoupled_weight_decay), mask)
    tl.store(c + 3, zeros + beta1, mask)
    tl.store(c + 4, zeros + (1 - beta1), mask)
    tl.store(c + 5, zeros + beta2, mask)
    tl.store(c + 6, zeros + (1 - beta2), mask)
    tl.store(c + 7, -lr / (1 - tl.exp2(step * log2_beta1)), mask)
    tl.store(c + 8, 1 / tl.sqrt(1 - tl.exp2(step * log2_beta2)), mask)
    tl.store(c + 9, zeros + eps, mask)


@triton.jit
def _sqrt(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def _divide(x, y):
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def _update(
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master_param, c, size,
    AMSGRAD: tl.constexpr, MASTER: tl.constexpr, ARE_VECTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = c.dtype.element_ty  # of the computation
    grad, mask = _elements(grad, size, ARE_VECTORS, BLOCK)
    exp_avg, mask = _elements(exp_avg, size, ARE_VECTORS, BLOCK)
    exp_avg_sq, mask = _elements(exp_avg_sq, size, ARE_VECTORS, BLOCK)
    max_exp_avg_sq, mask = _elements(max_exp_avg_sq, size, ARE_VECTORS, BLOCK)
    master_param, mask = _elements(master_param, size, ARE_VECTORS, BLOCK)
    param, mask = _elements(param, size, ARE_VECTORS, BLOCK)
    g = tl.load(grad, mask).to(T)
    m = tl.load(exp_avg, mask).to(T)
    v = tl.load(exp_avg_sq, mask).to(T)
    if AMSGRAD:
        max_v = tl.load(max_exp_avg_sq, mask).to(T)
    p = tl.load(master_param if MASTER else param, mask).to(T)

    # g = grad * factor + l2 * param
    l2 = tl.load(c + 1)
    g = g * tl.load(c)
    g = tl.where(l2 != 0, tl.fma(p, l2, g), g)  # not always: 0 * inf would be NaN
    # m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
    m = tl.fma(m, tl.load(c + 3), tl.load(c + 4) * g)
    v = tl.fma(v, tl.load(c + 5), tl.load(c + 6) * (g * g))
    tl.store(exp_avg, m, mask)
    tl.store(exp_avg_sq, v, mask)
    if AMSGRAD:
        v = tl.where(max_v > v, max_v, v)  # v where either is NaN
        tl.store(max_exp_avg_sq, v, mask)
    # param = decay * param - step_size * m / (sqrt(v) / sqrt(bias_correction2) + eps)
    denominator = tl.fma(_sqrt(v), tl.load(c + 8), tl.load(c + 9))
    p = tl.fma(_divide(m, denominator), tl.load(c + 7), p * tl.load(c + 2))
    if MASTER:
        tl.store(master_param, p, mask)
    tl.store(param, p, mask)


@triton.jit(do_not_specialize=["found_inf"])
def _adam(
    rows, grads, chunks, coefficients, found_inf: tl.int64, PARAM: tl.constexpr,
    STATE: tl.constexpr, AMSGRAD: tl.constexpr, MASTER: tl.constexpr, ROW: tl.constexpr,
    COEFFICIENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if load_scalar(found_inf) != 0:
        return
    tensor, begin, size = _find_chunk(rows, chunks, ROW, BLOCK)
    c = coefficients + tensor * COEFFICIENTS
    row = rows + tensor * ROW + 3
    grad = tl.load(grads + tensor)
    param, exp_avg, exp_avg_sq = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    max_exp_avg_sq, master_param = tl.load(row + 3), tl.load(row + 4)
    all_addresses = param | grad | exp_avg | exp_avg_sq | max_exp_avg_sq | master_param

    param = pointer(param, PARAM) + begin
    grad = pointer(grad, PARAM) + begin
    exp_avg = pointer(exp_avg, STATE) + begin
    exp_avg_sq = pointer(exp_avg_sq, STATE) + begin
    max_exp_avg_sq = pointer(max_exp_avg_sq, STATE) + begin
    master_param = pointer(master_param, tl.float32) + begin
    if _are_vectors(all_addresses, size, BLOCK):
        _update(
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master_param, c, size,
            AMSGRAD, MASTER, True, BLOCK,
        )  # fmt: skip
    else:
        _update(
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master_param, c, size,
            AMSGRAD, MASTER, False, BLOCK,
        )  # fmt: skip


# ---- Host ----

_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def _partial_sums(runs: Sequence[Run], grads: Sequence[Tensor]) -> Tensor:
    """[chunks], float64, of all runs, one after another."""
    device = grads[0].device
    sums = torch.empty(sum(sum(run.counts) for run in runs), dtype=torch.float64, device=device)
    begin = 0
    for run in runs:
        num_chunks = sum(run.counts)
        if num_chunks > 0:
            _sum_of_squares[(num_chunks,)](
                *_tables(run, grads),
                sums[begin:],
                DTYPE=_DTYPES[run.param_dtype],
                ROW=adam_call.ROW,
                **run.config,
            )
        begin += num_chunks
    return sums


def _tables(run: Run, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """rows [tensors, ROW], grads [tensors], chunks [chunks]."""
    device = grads[0].device
    addresses = tuple(grads[i].data_ptr() for i in run.positions)
    return (
        multi_tensor.table(run.rows, device),
        multi_tensor.table(addresses, device),
        multi_tensor.chunks(run.counts, device),
    )


def grad_norm(grads: list[Tensor], grad_scale: Tensor | None = None) -> Tensor:
    """As bigkern.ops.grad_norm."""
    grads, runs = adam_call.checked_gradients(grads)
    check_scalar("grad_scale", grad_scale, grads[0].device)
    norm = grads[0].new_empty((), dtype=torch.float64)
    sums = _partial_sums(runs, grads)
    _finish_norm[(1,)](sums, sums.numel(), scalar(grad_scale), norm)
    return norm


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    master_params: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    check_inf: bool = False,
    max_grad_norm: float | None = None,
    grad_norm: Tensor | None = None,
    grad_norm_out: Tensor | None = None,
) -> None:
    """As bigkern.ops.adam_."""
    if not params:
        return
    device = params[0].device
    if check_inf and found_inf is None:
        raise ValueError("check_inf needs found_inf, to report what it found, got None")
    if max_grad_norm is not None and not max_grad_norm >= 0:
        raise ValueError(f"max_grad_norm must be at least 0, got {max_grad_norm:g}")
    scalars = (lr_tensor, grad_scale, found_inf, grad_norm, grad_norm_out)
    for name, tensor in zip(_SCALARS, scalars, strict=True):
        check_scalar(name, tensor, device)
    lists = AdamLists(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, master_params
    )
    staging = Staging()
    lists, runs = adam_call.checked_call(lists, amsgrad, staging)

    needs_norm = (check_inf or max_grad_norm is not None) and grad_norm is None
    sums = _partial_sums(runs if needs_norm else [], lists.grads)
    step_options = (
        lr,
        *(math.log2(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)),
        beta1,
        beta2,
        0.0 if decoupled_weight_decay else weight_decay,
        weight_decay if decoupled_weight_decay else 0.0,
        eps,
        -1.0 if maximize else 1.0,
        math.inf if max_grad_norm is None else max_grad_norm,
        int(check_inf),
        *map(scalar, scalars),
    )
    for run in runs:
        _step(run, lists, sums, step_options, scalar(found_inf), amsgrad)
    staging.write_back()


def _step(
    run: Run, lists: AdamLists, sums: Tensor, options: tuple, found_inf: int, amsgrad: bool
) -> None:
    n, num_chunks = len(run.positions), sum(run.counts)
    rows, grads, chunks = _tables(run, lists.grads)
    wide = torch.float64 if run.param_dtype == torch.float64 else torch.float32
    coefficients = torch.empty(n, _NUM_COEFFICIENTS, dtype=wide, device=rows.device)
    sizes = {"ROW": adam_call.ROW, "COEFFICIENTS": _NUM_COEFFICIENTS}
    _prepare[(triton.cdiv(n, _TENSORS),)](
        rows, coefficients, n, sums, sums.numel(), *options, **sizes, BLOCK=_TENSORS
    )
    if num_chunks > 0:
        _adam[(num_chunks,)](
            rows,
            grads,
            chunks,
            coefficients,
            found_inf,
            PARAM=_DTYPES[run.param_dtype],
            STATE=_DTYPES[run.state_dtype],
            AMSGRAD=amsgrad,
            MASTER=bool(lists.master_params),
            **sizes,
            **run.config,
        )
