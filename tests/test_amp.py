"""Optimizers under GradScaler, torch's and bigkern's: unscaled once, clipped once, skipped
whole."""

import math

import pytest
import torch

import bigkern

SCALERS = [torch.amp.GradScaler, bigkern.amp.GradScaler]
SCALE = 2.0**10
DEVICES = ["cpu", "triton", "cuda"]


def make(cls, device, num_groups=1, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator).to(device) for s in [(33,), (4, 5), (700,)]]
    params = [p.requires_grad_() for p in params]
    groups = [{"params": params[i::num_groups]} for i in range(num_groups)]
    return params, cls(groups, 0.01, **options)


def backward(params, scaler, step, bad=None):
    generator = torch.Generator().manual_seed(step)
    factors = [torch.randn(p.shape, generator=generator).to(p.device) for p in params]
    if bad is not None:
        factors[1][0, 3] = bad
    for p in params:
        p.grad = None
    scaler.scale(sum((p * f).sum() for p, f in zip(params, factors, strict=True))).backward()


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("scaler_type", SCALERS)
def test_same_as_torch(scaler_type, max_norm, unscale_first, num_groups, device):
    """Against unscale_, clip_grad_norm_ and a plain step; step 2 overflows, and both skip it."""
    a, ours = make(bigkern.optim.Adam, device, num_groups, max_grad_norm=max_norm)
    b, theirs = make(torch.optim.Adam, device, num_groups, foreach=False)
    mine = scaler_type(device, init_scale=SCALE, growth_interval=3)
    torchs = torch.amp.GradScaler(device, init_scale=SCALE, growth_interval=3)
    for step in range(8):
        bad = math.inf if step == 2 else None
        backward(a, mine, step, bad)
        backward(b, torchs, step, bad)
        if unscale_first:
            mine.unscale_(ours)
        grads = [p.grad.clone() for p in a]
        mine.step(ours)
        assert all(torch.equal(p.grad, g) for p, g in zip(a, grads, strict=True) if bad is None)
        torchs.unscale_(theirs)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(b, max_norm)
        torchs.step(theirs)
        mine.update()
        torchs.update()
        assert mine.get_scale() == torchs.get_scale()
        assert not hasattr(ours, "found_inf")
        assert not hasattr(ours, "grad_scale")
        assert not hasattr(ours, "inf_to_be_found")
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)
        assert ours.state[x]["step"] == theirs.state[y]["step"].item() == 7


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("scaler_type", SCALERS)
def test_a_skipped_step_changes_nothing(scaler_type, max_norm, bad, num_groups, device):
    params, optimizer = make(bigkern.optim.Adam, device, num_groups, max_grad_norm=max_norm)
    scaler = scaler_type(device, init_scale=SCALE)
    backward(params, scaler, 0)
    scaler.step(optimizer)
    scaler.update()
    tensors = [*params, *(t for state in optimizer.state.values() for t in state.values())]
    before = [t.detach().clone() for t in tensors]
    backward(params, scaler, 1, bad)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert scaler.get_scale() == SCALE / 2


@pytest.mark.parametrize("scaler_type", SCALERS)
def test_unscaled_once_and_clipped_by_hand(scaler_type, device):
    """unscale_, then one's own clipping, then step: the scale is divided out just once."""
    a, ours = make(bigkern.optim.AdamW, device)
    b, theirs = make(torch.optim.AdamW, device)
    scaler = scaler_type(device, init_scale=SCALE)
    for step in range(4):
        backward(a, scaler, step)
        scaler.unscale_(ours)
        torch.nn.utils.clip_grad_norm_(a, 0.1)
        scaler.step(ours)
        scaler.update()
        backward(b, torch.amp.GradScaler(device, enabled=False), step)
        torch.nn.utils.clip_grad_norm_(b, 0.1)
        theirs.step()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("scaler_type", SCALERS)
def test_the_users_own_scale_is_multiplied_in(scaler_type):
    a, ours = make(bigkern.optim.Adam, "cpu", eps=1.0)
    b, theirs = make(torch.optim.Adam, "cpu", eps=1.0, fused=True)
    for params, optimizer, scaler in (
        (a, ours, scaler_type("cpu", init_scale=8.0)),
        (b, theirs, torch.amp.GradScaler("cpu", init_scale=8.0)),
    ):
        optimizer.grad_scale = torch.tensor(4.0)
        backward(params, scaler, 0)
        scaler.step(optimizer)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_a_step_without_gradients_leaves_nothing_behind():
    params, optimizer = make(bigkern.optim.Adam, "cpu")
    scaler = bigkern.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    params[0].grad = torch.full_like(params[0], math.inf)
    optimizer.step()  # without the scaler: not skipped
    assert optimizer.state[params[0]]["step"] == 1


def test_other_optimizers_are_left_to_torch():
    results = []
    for scaler_type in SCALERS:
        params, optimizer = make(torch.optim.SGD, "cpu")
        scaler = scaler_type("cpu", init_scale=8.0)
        for step in range(3):
            backward(params, scaler, step, math.nan if step == 1 else None)
            scaler.step(optimizer)
            scaler.update()
        results.append((params, scaler.get_scale()))
    assert results[0][1] == results[1][1] == 4.0
    for x, y in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(x, y)


def test_a_disabled_scaler_steps_plainly():
    a, ours = make(bigkern.optim.Adam, "cpu")
    b, theirs = make(torch.optim.Adam, "cpu")
    scaler = bigkern.amp.GradScaler("cpu", enabled=False)
    for params, optimizer in ((a, ours), (b, theirs)):
        backward(params, scaler, 0)
        scaler.step(optimizer)
        scaler.update()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_state_dict_of_the_scaler_is_torchs():
    mine, torchs = bigkern.amp.GradScaler("cpu", init_scale=4.0), torch.amp.GradScaler("cpu")
    torchs.load_state_dict(mine.state_dict())
    assert torchs.get_scale() == 4.0
