"""The global norm: grad_norm, and clipping and the check for inf within adam_."""

import math

import numpy as np
import pytest
import torch
from helpers import DTYPES, EPS, OPTIONS, SHAPES, Problem

from bigkern.ops import adam_, grad_norm, reference
from bigkern.testing import assert_as_accurate

DEVICES = ["cpu", "emulated", "triton", "triton sm_90", "cuda"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 1024.0, 3.0])
@pytest.mark.parametrize("max_norm", [0.5, 1e9, 0.0])
def test_clipping_equals_clip_grad_norm_then_step(dtype, scale, max_norm, device):
    options = OPTIONS | {"eps": EPS[dtype]}
    actual = Problem(dtype, device)
    expected = first_step_in_long_double(actual, max_norm, scale or 1.0)
    baseline = actual.to(dtype)
    before = [g.clone() for g in actual.grads]
    grad_scale = None if scale is None else torch.tensor(scale, device=device)
    adam_(*actual.lists(), **options, max_grad_norm=max_norm, grad_scale=grad_scale)
    assert all(torch.equal(a, b) for a, b in zip(actual.grads, before, strict=True))
    for p, g in zip(baseline.params, baseline.grads, strict=True):
        p.grad = g if scale is None else g / scale
    torch.nn.utils.clip_grad_norm_(baseline.params, max_norm)
    baseline.grads = [p.grad for p in baseline.params]
    reference.adam_(*baseline.lists(), **options)
    actual, baseline = actual.params + actual.exp_avgs, baseline.params + baseline.exp_avgs
    for a, e, b in zip(actual, expected, baseline, strict=True):
        assert_as_accurate(a, e, b)


def first_step_in_long_double(problem, max_norm, scale):
    """Parameters, then first moments, after step 1: m / (1 - beta1) = g, v / (1 - beta2) = g^2."""
    wide = np.longdouble
    grads = [g.cpu().double().numpy().astype(wide) / scale for g in problem.grads]
    norm = np.sqrt(sum((g * g).sum() for g in grads))
    clipped = [g * min(wide(1), max_norm / (norm + wide(1e-6))) for g in grads]
    lr, eps = wide(OPTIONS["lr"]), wide(EPS[problem.params[0].dtype])
    params = [
        p.cpu().double().numpy() - lr * g / (np.abs(g) + eps)
        for p, g in zip(problem.params, clipped, strict=True)
    ]
    exp_avgs = [(1 - wide(OPTIONS["beta1"])) * g for g in clipped]
    return [torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in params + exp_avgs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [SHAPES, [(300_001,)], [(5,)] * 1000, [(0,)]])
def test_grad_norm(dtype, shapes, device):
    grads = Problem(dtype, device, shapes=shapes).grads
    baseline = reference.grad_norm([g.cpu() for g in grads])
    wide = [g.cpu().double().numpy().astype(np.longdouble) for g in grads]
    expected = torch.tensor(float(np.sqrt(sum((g * g).sum() for g in wide))), dtype=torch.float64)
    norm = grad_norm(grads)
    assert_as_accurate(norm.cpu(), expected, baseline)
    scale = torch.tensor(8.0, device=device)
    assert torch.equal(grad_norm(grads, scale), norm / 8)
    transposed = [g.mT.contiguous().mT if g.dim() == 2 else g for g in grads]
    assert_as_accurate(grad_norm(transposed).cpu(), expected, baseline)


def test_grad_norm_of_nothing_of_huge_and_of_nan():
    assert grad_norm([]).item() == 0
    assert grad_norm([torch.full((3,), 3e38)]).item() == pytest.approx(3e38 * 3**0.5)
    for bad in (math.nan, math.inf, -math.inf):
        assert not grad_norm([torch.tensor([1.0, bad])]).isfinite()


def test_grad_norm_depends_not_on_threads():
    grads = [torch.randn(n) for n in (1_000_003, 5, 70_000)]
    norms = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        norms.append(grad_norm(grads))
    torch.set_num_threads(2)
    assert torch.equal(norms[0], norms[1])
    assert torch.equal(norms[0], norms[2])


@pytest.mark.sanitize
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_check_inf_finds_and_skips(dtype, bad, device):
    for position in (0, 126, 4096):
        problem = Problem(dtype, device)
        problem.grads[-3][position] = bad  # of 4097
        before = [t.clone() for t in problem.tensors()]
        found = torch.zeros((), device=device)
        adam_(*problem.lists(), **OPTIONS, found_inf=found, check_inf=True)
        assert found.item() == 1
        for a, b in zip(problem.tensors(), before, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
    problem = Problem(dtype, device)
    found = torch.zeros((), device=device)
    adam_(*problem.lists(), **OPTIONS, found_inf=found, check_inf=True)
    assert found.item() == 0
    assert all(step.item() == 1 for step in problem.steps)


def test_a_known_norm_is_used_and_a_computed_one_reported(device):
    known = torch.tensor(100.0, dtype=torch.float64, device=device)
    a, b = Problem(torch.float32, device), Problem(torch.float32, device)
    adam_(*a.lists(), **OPTIONS, max_grad_norm=1.0, grad_norm=known)
    for g in b.grads:
        g.mul_(1.0 / (100.0 + 1e-6))
    adam_(*b.lists(), **OPTIONS)
    torch.testing.assert_close(a.exp_avgs, b.exp_avgs)
    out = torch.zeros((), dtype=torch.float64, device=device)
    adam_(*a.lists(), **OPTIONS, max_grad_norm=1.0, grad_norm_out=out)
    assert out.item() == pytest.approx(grad_norm(a.grads).item())
