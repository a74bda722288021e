"""bigkern.optim against torch.optim: the same arguments, results, state dicts and errors."""

import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import PAIRS, assert_close, make_params, run, set_grads
from torch import nn

import bigkern
from bigkern import backends
from bigkern.ops import adam

OWN = {"max_grad_norm", "state_dtype", "master_weights"}
DEVICES = ["cpu", "triton", "cuda"]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_signature_is_torchs(ours, theirs):
    mine = inspect.signature(ours.__init__).parameters
    torchs = inspect.signature(theirs.__init__).parameters
    assert [n for n in mine if n not in OWN] == list(torchs)
    for name, parameter in torchs.items():
        assert mine[name].default == parameter.default, name
        assert mine[name].kind == parameter.kind, name
    assert issubclass(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "amsgrad": True},
        {"maximize": True, "foreach": True},
        {"fused": True, "betas": (0.5, 0.9), "eps": 1e-3},
        {"lr": torch.tensor(0.02)},
        {"lr": torch.tensor(0.02, dtype=torch.float64)},
        {"betas": (torch.tensor(0.8), torch.tensor(0.9)), "foreach": False},
    ],
)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_same_as_torch(ours, theirs, options, device):
    a, b = make_params(device), make_params(device)
    ours, theirs = ours(a, **options), theirs(b, **options)
    run([ours, theirs], [a, b], 20)
    assert_close(a, b)
    assert repr(ours) == repr(theirs)


def test_capturable_constructs_and_steps(device):
    a, b = make_params(device), make_params(device)
    run([bigkern.optim.Adam(a, capturable=True), torch.optim.Adam(b)], [a, b], 3)
    assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_cuda_graph_reads_step_and_learning_rate_from_the_device(backend):
    a, b = make_params("cuda"), make_params("cuda")
    lr = torch.tensor(0.01, device="cuda")
    ours, theirs = bigkern.optim.Adam(a, lr, capturable=True), torch.optim.Adam(b, 0.01)
    set_grads(a, b)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), backends.use(backend):
        ours.step()
    torch.cuda.current_stream().wait_stream(side)
    theirs.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), backends.use(backend):
        ours.step()
    for i in range(5):
        lr.fill_(0.01 * (i + 1))
        theirs.param_groups[0]["lr"] = 0.01 * (i + 1)
        graph.replay()
        theirs.step()
    assert_close(a, b)


def test_several_groups_added_group_and_scheduler():
    def make(cls):
        params = make_params()
        optimizer = cls(
            [{"params": params[:2], "lr": 0.1}, {"params": params[2:4]}], weight_decay=0.1
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return params, optimizer, scheduler

    (a, ours, s1), (b, theirs, s2) = make(bigkern.optim.AdamW), make(torch.optim.AdamW)
    for step in range(20):
        if step == 10:
            for optimizer, params in ((ours, a), (theirs, b)):
                optimizer.add_param_group({"params": params[4:], "amsgrad": True, "lr": 0.3})
        run([ours, theirs], [a, b], 1, start=step)
        s1.step()
        s2.step()
    assert_close(a, b)


def test_parameters_without_gradients_keep_their_own_step():
    a, b = make_params(), make_params()
    ours, theirs = bigkern.optim.Adam(a), torch.optim.Adam(b)
    for step in range(6):
        set_grads(a, b, step=step)
        for p in (a[0], b[0]) if step < 3 else (a[1], b[1]) if step == 4 else ():
            p.grad = None
        ours.step()
        theirs.step()
    assert_close(a, b)
    assert [int(ours.state[p]["step"]) for p in a] == [3, 5, 6, 6, 6]
    for p in a:
        p.grad = None
    before = [p.detach().clone() for p in a]
    assert ours.step() is None
    assert_close(a, before)


def test_closure_and_hooks():
    a, b = make_params(), make_params()
    calls = []
    for optimizer, params in ((bigkern.optim.Adam(a, 0.1), a), (torch.optim.Adam(b, 0.1), b)):
        optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *args: calls.append("post"))

        def closure(optimizer=optimizer, params=params):
            optimizer.zero_grad()
            loss = sum(p.square().sum() for p in params)
            loss.backward()
            return loss

        losses = [optimizer.step(closure) for _ in range(5)]
        assert losses[-1] < losses[0]
    assert calls == ["pre", "post"] * 10
    assert_close(a, b)


def test_one_kernel_call_per_step_and_group():
    params = [torch.randn(5, requires_grad=True) for _ in range(100)]
    optimizer = bigkern.optim.Adam(
        [{"params": params[:60]}, {"params": params[60:]}], max_grad_norm=None
    )
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.profiler.profile() as profile:
        optimizer.step()
    ops = {event.key: event.count for event in profile.key_averages() if "adam" in event.key}
    assert ops.pop("bigkern::adam_kept_") == 2
    assert not [name for name in ops if name.startswith("bigkern::")]


@pytest.mark.parametrize("num_groups", [1, 3])
def test_max_grad_norm_equals_clip_grad_norm(num_groups, device):
    a, b = make_params(device), make_params(device)
    ours, theirs = (
        cls([{"params": ps[i::num_groups]} for i in range(num_groups)], 0.01, **options)
        for cls, ps, options in (
            (bigkern.optim.Adam, a, {"max_grad_norm": 0.7}),
            (torch.optim.Adam, b, {}),
        )
    )
    for step in range(5):
        set_grads(a, b, step=step)
        for p in (*a, *b):
            p.grad *= 10.0 ** (step - 3)  # the same factor each time would change nothing in Adam
        ours.step()
        norm = torch.nn.utils.clip_grad_norm_(b, 0.7)
        theirs.step()
        torch.testing.assert_close(ours.grad_norm.float(), norm)
    assert_close(a, b)


def test_channels_last_model_trains_as_with_torch():
    results = []
    for cls in (bigkern.optim.Adam, torch.optim.Adam):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        model = model.to(memory_format=torch.channels_last)
        optimizer = cls(model.parameters(), 0.01)
        for _ in range(5):
            x = torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        results.append(list(model.parameters()))
    assert_close(*results)


def test_gradients_of_another_layout_or_dtype():
    a, b = (torch.arange(12.0).view(3, 4).requires_grad_() for _ in range(2))
    grad = torch.randn(4, 3).T
    for p, cls in ((a, bigkern.optim.Adam), (b, torch.optim.Adam)):
        p.grad = grad
        cls([p]).step()
    assert_close([a], [b])
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    p.data = p.data.bfloat16()
    with pytest.raises(ValueError, match=r"grads\[0\] must have dtype torch.bfloat16, got torch.f"):
        bigkern.optim.Adam([p]).step()


def test_what_is_refused():
    p = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        bigkern.optim.Adam([p], differentiable=True)
    with pytest.raises(ValueError, match="max_grad_norm must be at least 0, got -1"):
        bigkern.optim.Adam([p], max_grad_norm=-1)
    with pytest.raises(ValueError, match=r"state_dtype must be None or torch.float32, got torch.f"):
        bigkern.optim.Adam([p], state_dtype=torch.float16)
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"parameters must be one of .*, got {dtype}"):
            bigkern.optim.Adam([torch.ones(2).to(dtype).requires_grad_()])
    with (
        pytest.raises(ValueError, match="twice"),
        pytest.warns(UserWarning, match="duplicate"),
    ):
        bigkern.optim.Adam([p, p])
    for options in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1}, {"weight_decay": -1}):
        with pytest.raises(ValueError, match="Invalid"):
            bigkern.optim.AdamW([p], **options)
    optimizer = bigkern.optim.Adam([p])
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"grads\[0\] must be dense"):
        optimizer.step()
    with pytest.raises(TypeError, match="complex"):
        optimizer.add_param_group({"params": [torch.ones(2, dtype=torch.cfloat).requires_grad_()]})
    assert len(optimizer.param_groups) == 1


def test_a_stale_graph_is_noticed_as_in_torch():
    p = torch.ones(3, requires_grad=True)
    loss = p.square().sum()
    p.grad = torch.ones(3)
    bigkern.optim.Adam([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inside_torch_compile(monkeypatch):
    """What is kept is not traced: torch would go through weakref's table while others leave it."""
    is_traced = []

    def finalize(*_):
        is_traced.append(torch.compiler.is_compiling())

    monkeypatch.setattr(adam, "weakref", SimpleNamespace(finalize=finalize))
    a, b = make_params(), make_params()
    ours, theirs = bigkern.optim.Adam(a), torch.optim.Adam(b)

    @torch.compile(backend="eager")
    def step():
        ours.step()

    for i in range(4):
        set_grads(a, b, step=i)
        step()
        theirs.step()
    assert_close(a, b)
    assert is_traced == [False]


def test_thousands_of_tensors_of_every_size():
    sizes = list(itertools.islice(itertools.cycle([1, 7, 256, 0, 5000]), 3000))
    a, b = ([torch.ones(n, requires_grad=True) for n in sizes] for _ in range(2))
    ours, theirs = bigkern.optim.Adam(a, 0.1), torch.optim.Adam(b, 0.1)
    for _ in range(2):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert_close([torch.cat(a)], [torch.cat(b)])
