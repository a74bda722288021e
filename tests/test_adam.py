"""adam_ against the reference in float64."""

import itertools
import math

import pytest
import torch
from helpers import DTYPES, EPS, HALVES, OPTIONS, Problem

import bigkern
from bigkern.ops import AdamGroup, adam_, grad_norm, reference
from bigkern.testing import assert_as_accurate

DEVICES = ["cpu", "emulated", "triton", "triton sm_90", "cuda"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_worked_example(device):
    p, g, m, v = (torch.tensor([x], device=device) for x in (0.5, -0.1, 0.0, 0.0))
    step = torch.zeros((), device=device)
    adam_([p], [g], [m], [v], [], [step], **OPTIONS)
    assert step.item() == 1
    assert math.isclose(m.item(), -0.01, rel_tol=1e-6)
    assert math.isclose(v.item(), 0.00001, rel_tol=1e-6)
    assert math.isclose(p.item(), 0.51, rel_tol=1e-6)


@pytest.mark.one_architecture
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}, "decoupled"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_over_100_steps(dtype, amsgrad, decay, maximize, device):
    decay = {"weight_decay": 0.1, "decoupled_weight_decay": True} if decay == "decoupled" else decay
    options = OPTIONS | decay | {"amsgrad": amsgrad, "maximize": maximize, "eps": EPS[dtype]}
    actual = Problem(dtype, device, shapes=[(1,), (127,), (10, 13)])
    expected, baseline = actual.to(torch.float64), actual.to(dtype)
    # In float64 the reference would be its own baseline: there torch's fused kernel is.
    torch_optimizer = None
    if dtype == torch.float64:
        for p in baseline.params:
            p.requires_grad_()
        options_of_torch = {k: v for k, v in options.items() if k not in ("beta1", "beta2")}
        torch_optimizer = torch.optim.Adam(baseline.params, fused=True, **options_of_torch)
    for _ in range(100):
        actual.new_grads()
        for other in (expected, baseline):
            for a, b in zip(actual.grads, other.grads, strict=True):
                b.copy_(a)
        adam_(*actual.lists(amsgrad), **options)
        reference.adam_(*expected.lists(amsgrad), **options)
        if torch_optimizer is None:
            reference.adam_(*baseline.lists(amsgrad), **options)
        else:
            for p, g in zip(baseline.params, baseline.grads, strict=True):
                p.grad = g
            torch_optimizer.step()
    for a, e, b in zip(actual.params, expected.params, baseline.params, strict=True):
        assert_as_accurate(a, e, b)
    assert all(step.item() == 100 for step in actual.steps)


def test_reference_is_torch():
    """The definition itself, with every option: as near to torch's loop as torch's fused kernel."""
    for amsgrad, maximize, decoupled in itertools.product([False, True], repeat=3):
        problem = Problem(torch.float64)
        flags = {
            "weight_decay": 0.1,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled,
        }
        loop, fused = ([p.clone().requires_grad_() for p in problem.params] for _ in range(2))
        optimizers = [
            torch.optim.Adam(loop, 0.01, foreach=False, **flags),
            torch.optim.Adam(fused, 0.01, fused=True, **flags),
        ]
        for _ in range(10):
            problem.new_grads()
            for weights, optimizer in zip((loop, fused), optimizers, strict=True):
                for w, g in zip(weights, problem.grads, strict=True):
                    w.grad = g.clone()
                optimizer.step()
            reference.adam_(*problem.lists(amsgrad), **OPTIONS | flags)
        for actual, expected, baseline in zip(problem.params, loop, fused, strict=True):
            assert_as_accurate(actual, expected.detach(), baseline.detach())


@pytest.mark.one_architecture
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("master", [False, True])
def test_float32_states_and_master_weights_of_half_parameters(dtype, amsgrad, master, device):
    options = OPTIONS | {"weight_decay": 0.1, "amsgrad": amsgrad}
    actual = Problem(dtype, device, [(1,), (127,), (10, 13)], torch.float32, master)
    expected = actual.to(torch.float64)
    baseline = actual.to(torch.float32)
    for _ in range(30):
        actual.new_grads()
        for other in (expected, baseline):
            for a, b in zip(actual.grads, other.grads, strict=True):
                b.copy_(a)
        adam_(*actual.lists(amsgrad), **options)
        reference.adam_(*expected.lists(amsgrad), **options)
        reference.adam_(*baseline.lists(amsgrad), **options)
        if not master:  # the parameter is rounded at each step: compare one step at a time
            for other in (expected, baseline):
                for a, b in zip(actual.params, other.params, strict=True):
                    assert_as_accurate(a, b, b.to(dtype))
                    b.copy_(a)
    if master:
        for a, e, b in zip(actual.masters, expected.masters, baseline.masters, strict=True):
            assert_as_accurate(a, e, b)
        for p, m in zip(actual.params, actual.masters, strict=True):
            assert torch.equal(p, m.to(dtype))
    else:
        for a, e, b in zip(actual.exp_avgs, expected.exp_avgs, baseline.exp_avgs, strict=True):
            assert_as_accurate(a, e, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_threads_nor_grouping_nor_position(dtype):
    def run(threads, split):
        torch.set_num_threads(threads)
        problem = Problem(dtype, shapes=[(1,), (100_003,), (0,), (7,), (4096,), (4097,)])
        for _ in range(3):
            problem.new_grads()
            if split:  # one call per tensor, and the large one in odd slices
                for row in zip(*problem.lists()[:4], problem.steps, strict=True):
                    p, g, m, v, step = row
                    if p.numel() < 100_000:
                        adam_([p], [g], [m], [v], [], [step], **OPTIONS)
                        continue
                    cuts = [0, 1, 12_345, 12_350, 100_003]
                    for i, j in itertools.pairwise(cuts):
                        s = step.clone()
                        adam_([p[i:j]], [g[i:j]], [m[i:j]], [v[i:j]], [], [s], **OPTIONS)
                    step.add_(1)
            else:
                adam_(*problem.lists(), **OPTIONS)
        return problem.params + problem.exp_avgs + problem.exp_avg_sqs

    whole = run(1, split=False)
    try:
        for threads, split in ((2, False), (7, False), (2, True)):
            for a, b in zip(whole, run(threads, split), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(2)


def _views(kind, shape=(6, 10, 4, 4)):
    """Five equal-valued memory layouts of (param, grad, exp_avg, exp_avg_sq)."""
    values = [torch.randn(shape) for _ in range(3)] + [torch.rand(shape)]
    layouts = {
        "contiguous": lambda t, i: t,
        "channels_last": lambda t, i: t.to(memory_format=torch.channels_last),
        "grad_channels_last": lambda t, i: t.to(memory_format=torch.channels_last) if i == 1 else t,
        "param_transposed": lambda t, i: t.mT.contiguous().mT if i == 0 else t,
        "param_strided": lambda t, i: torch.stack([t, t], -1)[..., 0] if i == 0 else t,
        "all_strided": lambda t, i: torch.stack([t, t], -1)[..., 1],
        "grad_expanded": lambda t, i: t[:1].expand(shape) if i == 1 else t,
    }
    return [layouts[kind](t, i) for i, t in enumerate(values)]


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "kind",
    ["channels_last", "grad_channels_last", "param_transposed", "param_strided", "all_strided",
     "grad_expanded"],
)  # fmt: skip
def test_layouts(kind, device):
    tensors = [t.to(device) for t in _views(kind)]
    strides = [t.stride() for t in tensors]
    plain = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    for p, g, m, v in (tensors, plain):
        adam_([p], [g], [m], [v], [], [torch.zeros((), device=device)], **OPTIONS)
    for a, b in zip(tensors, plain, strict=True):
        assert torch.equal(a, b)
    assert [t.stride() for t in tensors] == strides


@pytest.mark.sanitize
def test_unaligned_addresses(device):
    problem = Problem(torch.float32, device, shapes=[(1001,)] * 2)
    moved = [[torch.cat([t[:1], t])[1:] for t in ts] for ts in problem.lists()[:4]]
    steps = [s.clone() for s in problem.steps]
    adam_(*problem.lists(), **OPTIONS)
    adam_(*moved, [], steps, **OPTIONS)
    for a, b in zip(problem.params, moved[0], strict=True):
        assert torch.equal(a, b)


@pytest.mark.sanitize
def test_found_inf_changes_nothing(device):
    problem = Problem(torch.float32, device)
    before = [t.clone() for t in problem.tensors()]
    adam_(*problem.lists(), **OPTIONS, found_inf=torch.ones((), device=device))
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), before, strict=True))


def test_nan_gradients_go_through_as_in_torch(device):
    problem = Problem(torch.float32, device, shapes=[(40,)])
    problem.grads[0][3], problem.grads[0][20] = math.nan, math.inf
    expected = problem.to(torch.float32)
    for amsgrad in (False, True):
        adam_(*problem.lists(amsgrad), **OPTIONS, amsgrad=amsgrad)
        reference.adam_(*expected.lists(amsgrad), **OPTIONS, amsgrad=amsgrad)
    assert torch.equal(problem.params[0].isnan(), expected.params[0].isnan())
    assert problem.params[0].isnan().sum() == 2


def test_infinite_parameter_without_weight_decay_spares_the_moments(device):
    problem = Problem(torch.float32, device, shapes=[(3,)])
    problem.params[0][0] = math.inf
    adam_(*problem.lists(), **OPTIONS)
    assert problem.exp_avgs[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalars_in_tensors(dtype, device):
    a, b = Problem(torch.float32, device), Problem(torch.float32, device)
    for problem in (a, b):
        problem.steps = [torch.tensor(4.0, dtype=dtype, device=device) for _ in problem.steps]
    adam_(*a.lists(), **OPTIONS | {"lr": torch.tensor(0.25, dtype=dtype, device=device)})
    adam_(*b.lists(), **OPTIONS | {"lr": 0.25})
    for x, y in zip(a.params, b.params, strict=True):
        assert torch.equal(x, y)
    assert all(step.item() == 5 and step.dtype == dtype for step in a.steps)


def _with(problem, name, index, tensor):
    getattr(problem, name)[index] = tensor


BAD = {
    "grads must have 2 tensors for 2 params, got 1": lambda p: p.grads.pop(),
    "exp_avgs must have 2 tensors for 2 params, got 3": lambda p: p.exp_avgs.append(p.exp_avgs[0]),
    "state_steps must have 2 tensors for 2 params, got 1": lambda p: p.steps.pop(),
    "grads[1] must have shape [4, 2], got [2, 4]": lambda p: _with(p, "grads", 1, p.grads[1].mT),
    "grads[0] must have dtype torch.float32, got torch.float64": lambda p: _with(
        p, "grads", 0, p.grads[0].double()
    ),
    "exp_avgs[1] must be torch.float32 like its parameter, got torch.float64": lambda p: _with(
        p, "exp_avgs", 1, p.exp_avgs[1].double()
    ),
    "exp_avg_sqs[1] must have dtype torch.float32, got torch.float16": lambda p: _with(
        p, "exp_avg_sqs", 1, p.exp_avg_sqs[1].half()
    ),
    "params[1] must be torch.float32, float64, float16 or bfloat16, got Long": lambda p: _with(
        p, "params", 1, p.params[1].long()
    ),
    "state_steps must be one torch.float32 or torch.float64, got Long []": lambda p: _with(
        p, "steps", 0, p.steps[0].long()
    ),
    "master_params[0] is for float16 and bfloat16 parameters, got torch.float32": lambda p: setattr(
        p, "masters", p.params
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_lists_are_named_and_nothing_is_changed(message):
    problem = Problem(torch.float32, shapes=[(3,), (4, 2)])
    BAD[message](problem)
    before = [t.clone() for t in problem.tensors()]
    with pytest.raises(ValueError, match=r".*") as error:
        adam_(*problem.lists(), **OPTIONS)
    assert message in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), before, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0, got -1"),
        ({"check_inf": True}, "check_inf needs found_inf, to report what it found, got None"),
        ({"grad_scale": torch.ones(2)}, "grad_scale must be one torch.float32 or torch.float64"),
        ({"found_inf": torch.ones((), dtype=torch.int32)}, "found_inf must be one torch.float32"),
        ({"amsgrad": True}, "max_exp_avg_sqs must have 1 tensors for 1 params, got 0"),
    ],
)
def test_bad_options_are_named(options, message):
    problem = Problem(torch.float32, shapes=[(3,)])
    with pytest.raises(ValueError, match=r".*") as error:
        adam_(*problem.lists(), **OPTIONS | options)
    assert message in str(error.value)
    assert problem.steps[0].item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.double(), "grads[1] must have dtype torch.float32, got torch.float64"),
        (lambda g: g.mT.contiguous(), "grads[1] must have shape [4, 2], got [2, 4]"),
        (lambda g: g[:2], "grads[1] must have shape [4, 2], got [2, 2]"),
        (None, "grads must have 2 tensors for 2 params, got 1"),
    ],
)
def test_kept_lists_check_each_call_anew(change, message):
    problem, plain = (Problem(torch.float32, shapes=[(3,), (4, 2)]) for _ in range(2))
    group = AdamGroup(
        problem.params, problem.exp_avgs, problem.exp_avg_sqs, [], problem.steps, problem.masters
    )
    for step in range(4):
        if step in (0, 2):
            bad = [problem.grads[0], change(problem.grads[1])] if change else problem.grads[:1]
            with pytest.raises(ValueError, match=r".*") as error:
                group.step_(bad, **OPTIONS)
            assert message in str(error.value)
        problem.new_grads()
        plain.new_grads()
        group.step_([g.clone() for g in problem.grads], **OPTIONS)
        adam_(*plain.lists(), **OPTIONS)
    for a, b in zip(problem.tensors(), plain.tensors(), strict=True):
        assert torch.equal(a, b)


def test_a_state_on_another_device_is_named():
    problem = Problem(torch.float32, shapes=[(3,), (4, 2)])
    problem.exp_avgs[1] = problem.exp_avgs[1].to("meta")
    group = AdamGroup(*problem.lists()[:1], *problem.lists()[2:])
    with pytest.raises(
        ValueError, match=r"exp_avgs\[1\] must be on cpu like the first tensor, got "
    ):
        group.step_(problem.grads, **OPTIONS)
    assert problem.steps[0].item() == 0


def test_expanded_parameters_are_refused_before_anything_is_changed():
    problem = Problem(torch.float32, shapes=[(3,), (4, 2)])
    problem.params[1] = problem.params[1][:1].expand(4, 2)
    before = [t.clone() for t in problem.tensors()]
    with pytest.raises(ValueError, match=r"can't write to an expanded tensor of shape \[4, 2\]"):
        adam_(*problem.lists(), **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), before, strict=True))


def test_sparse_gradients_are_refused():
    problem = Problem(torch.float32, shapes=[(3,)])
    problem.grads[0] = problem.grads[0].to_sparse()
    with pytest.raises(RuntimeError, match=r"grads\[0\] must be dense, got torch.sparse_coo"):
        adam_(*problem.lists(), **OPTIONS)


def test_opcheck():
    problem = Problem(torch.float32, shapes=[(3,), (4, 2)])
    options = OPTIONS | {"amsgrad": True, "maximize": False, "decoupled_weight_decay": False}
    found = torch.zeros(())
    torch.library.opcheck(
        torch.ops.bigkern.adam_,
        problem.lists(amsgrad=True),
        options | {"found_inf": found, "check_inf": True, "max_grad_norm": 1.0},
    )
    torch.library.opcheck(torch.ops.bigkern.grad_norm, (problem.grads, None))


def test_compiles_without_graph_breaks():
    a, b = Problem(torch.float32), Problem(torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(lists):
        adam_(*lists, **OPTIONS, max_grad_norm=1.0)
        return grad_norm(lists[1])

    norm = step(a.lists())
    adam_(*b.lists(), **OPTIONS, max_grad_norm=1.0)
    assert torch.equal(norm, grad_norm(b.grads))
    for x, y in zip(a.params, b.params, strict=True):
        assert torch.equal(x, y)


@pytest.mark.slow
def test_more_than_2_31_elements(device):
    """One tensor is parameter (written last), gradient and moments, to fit in memory."""
    n = 2**31 + 128  # whole registers: a tail would be written in another order
    x = torch.zeros(n, dtype=torch.bfloat16, device=device)
    x[-64:] = 0.25
    assert grad_norm([x]).item() == pytest.approx(0.25 * 64**0.5)
    small = x[-64:].clone()
    adam_([x], [x], [x], [x], [], [torch.zeros((), device=device)], **OPTIONS)
    expected = [small.clone() for _ in range(4)]
    adam_(*[[t] for t in expected], [], [torch.zeros((), device=device)], **OPTIONS)
    assert torch.equal(x[-64:], expected[0])
    assert (x[:-64] == 0).all()


def test_forced_backend():
    problem = Problem(torch.float32, shapes=[(3,)])
    with bigkern.backends.use("native"):
        adam_(*problem.lists(), **OPTIONS)
    assert problem.steps[0].item() == 1
