"""bigkern.optim against torch.optim: the same arguments, results, state dicts and errors."""

import copy
import inspect
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

import bigkern
from bigkern.testing import assert_as_accurate

PAIRS = [
    (bigkern.optim.Adam, torch.optim.Adam),
    (bigkern.optim.AdamW, torch.optim.AdamW),
]
OWN = {"max_grad_norm", "state_dtype", "master_weights"}


def make_params(device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7,), (12, 33), (0,), (3, 5, 2, 2), ()]
    params = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    return [p.requires_grad_() for p in params]


def set_grads(*param_lists, step=0):
    generator = torch.Generator().manual_seed(1000 + step)
    for group in zip(*param_lists, strict=True):
        grad = torch.randn(group[0].shape, generator=generator)
        for p in group:
            p.grad = grad.to(p.device, p.dtype).clone()


def assert_close(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), check_device=False)


def run(optimizers, param_lists, steps, start=0):
    for step in range(start, start + steps):
        set_grads(*param_lists, step=step)
        for optimizer in optimizers:
            optimizer.step()


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
        {"betas": (torch.tensor(0.8), torch.tensor(0.9))},
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
def test_cuda_graph_reads_step_and_learning_rate_from_the_device():
    a, b = make_params("cuda"), make_params("cuda")
    lr = torch.tensor(0.01, device="cuda")
    ours, theirs = bigkern.optim.Adam(a, lr, capturable=True), torch.optim.Adam(b, 0.01)
    set_grads(a, b)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ours.step()
    torch.cuda.current_stream().wait_stream(side)
    theirs.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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


class TestReplacedAndMoved:
    """What is kept between steps never hides what the user did to a tensor."""

    def compare(self, change, steps=3):
        results = []
        for cls in (bigkern.optim.Adam, torch.optim.Adam):
            params = make_params()
            optimizer = cls(params, 0.05)
            run([optimizer], [params], steps)
            params = change(optimizer, params) or params
            run([optimizer], [params], steps, start=steps)
            results.append(params)
        assert_close(*results)

    def test_parameter_data(self):
        def change(optimizer, params):
            for p in params:
                p.data = p.data.clone() * 2

        self.compare(change)

    def test_parameter_memory_reused_with_another_layout(self):
        def change(optimizer, params):
            params[3].data = params[3].data.contiguous(memory_format=torch.channels_last)

        self.compare(change)

    def test_dtype(self):
        def change(optimizer, params):
            for p in params:
                p.grad = None
                p.data = p.data.double()
                state = optimizer.state[p]
                state["exp_avg"], state["exp_avg_sq"] = (
                    state[name].double() for name in ("exp_avg", "exp_avg_sq")
                )

        self.compare(change)

    def test_state_tensors(self):
        def change(optimizer, params):
            for p in params:
                optimizer.state[p]["exp_avg"] = torch.zeros_like(p)

        self.compare(change)

    def test_state_data_in_place_of_the_tensor(self):
        def change(optimizer, params):
            for state in optimizer.state.values():
                state["exp_avg_sq"].data = state["exp_avg_sq"].data.clone() + 1

        self.compare(change)

    def test_one_state_dropped(self):
        def change(optimizer, params):
            del optimizer.state[params[1]]

        self.compare(change)

    def test_last_state_dropped(self):
        def change(optimizer, params):
            del optimizer.state[params[-1]]

        self.compare(change)

    def test_all_state_dropped(self):
        def change(optimizer, params):
            optimizer.state.clear()

        self.compare(change)

    def test_parameter_replaced_in_its_group(self):
        def change(optimizer, params):
            new = torch.randn(9, generator=torch.Generator().manual_seed(5)).requires_grad_()
            optimizer.param_groups[0]["params"][0] = new
            del optimizer.state[params[0]]
            return [new, *params[1:]]

        self.compare(change)

    def test_parameter_replaced_with_its_state(self):
        """As when points are added to a scene: the state moves on to a larger parameter."""

        def change(optimizer, params):
            old = params[0]
            new = torch.cat([old.detach(), torch.ones(2)]).requires_grad_()
            state = optimizer.state.pop(old)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.cat([state[name], torch.zeros(2)])
            optimizer.state[new] = state
            optimizer.param_groups[0]["params"][0] = new
            return [new, *params[1:]]

        self.compare(change)

    def test_amsgrad_switched_on(self):
        params = make_params()
        optimizer = bigkern.optim.Adam(params)
        run([optimizer], [params], 2)
        optimizer.param_groups[0]["amsgrad"] = True
        run([optimizer], [params], 2, start=2)
        assert all("max_exp_avg_sq" in state for state in optimizer.state.values())


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_state_dict_goes_to_torch_and_back(ours, theirs, dtype, options, device):
    """5 steps of torch, 5 of bigkern, 5 of torch: as accurate as 15 of torch."""

    def through_a_file(state_dict):
        file = io.BytesIO()
        torch.save(state_dict, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    a, b, exact = make_params(device, dtype), make_params(device, dtype), make_params(dtype=dtype)
    exact = [p.detach().double().requires_grad_() for p in exact]
    alone, reference = theirs(b, 0.01, **options), theirs(exact, 0.01, **options)
    run([alone, reference], [b, exact], 15)

    first = theirs(a, 0.01, **options)
    run([first], [a], 5)
    middle = ours(a, 0.5)  # its options too come from the state dict
    middle.load_state_dict(through_a_file(first.state_dict()))
    run([middle], [a], 5, start=5)
    last = theirs(a, 0.7)
    last.load_state_dict(through_a_file(middle.state_dict()))
    run([last], [a], 5, start=10)
    for x, e, y in zip(a, exact, b, strict=True):
        assert_as_accurate(x, e, y)

    mine, torchs = middle.state_dict(), first.state_dict()
    assert mine["param_groups"] == torchs["param_groups"]
    assert mine["state"].keys() == torchs["state"].keys()
    for i, state in torchs["state"].items():
        assert list(mine["state"][i]) == list(state)
        for key, value in state.items():
            assert mine["state"][i][key].dtype == value.dtype, key
            assert mine["state"][i][key].shape == value.shape, key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_state_dict_moves_between_devices(first, second):
    a, b = make_params(first), make_params()
    theirs, ours = torch.optim.Adam(b), bigkern.optim.Adam(a)
    run([ours, theirs], [a, b], 10)
    moved = [p.detach().to(second).requires_grad_() for p in a]
    other = bigkern.optim.Adam(moved)
    other.load_state_dict(ours.state_dict())
    run([other, theirs], [moved, b], 10, start=10)
    assert_close(moved, b)


def test_default_dtype_float64_gives_float64_steps_as_in_torch():
    torch.set_default_dtype(torch.float64)
    try:
        a, b = make_params(), make_params()
        ours, theirs = bigkern.optim.Adam(a), torch.optim.Adam(b)
        run([ours, theirs], [a, b], 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(a, b)
    dtypes = [[o.state[p]["step"].dtype for p in ps] for o, ps in ((ours, a), (theirs, b))]
    assert dtypes[0] == dtypes[1] == [torch.float64] * len(a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_states_and_masters_survive_the_state_dict(dtype):
    options = {"state_dtype": torch.float32, "master_weights": True}
    a, b = make_params(dtype=dtype), make_params(dtype=dtype)
    straight, first = bigkern.optim.Adam(a, **options), bigkern.optim.Adam(b, **options)
    run([straight, first], [a, b], 5)
    second = bigkern.optim.Adam(b, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run([straight, second], [a, b], 5, start=5)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for p, q in zip(a, b, strict=True):
        for key, value in straight.state[p].items():
            assert value.dtype == torch.float32
            assert torch.equal(value, second.state[q][key]), key
        assert torch.equal(p, straight.state[p]["master_param"].to(dtype))
    third = bigkern.optim.Adam(b)
    third.load_state_dict(second.state_dict())
    assert "master_param" not in third.state[b[0]]
    assert third.state[b[0]]["exp_avg"].dtype == dtype


def test_masters_gather_updates_too_small_for_bfloat16():
    results = {}
    for master in (False, True):
        p = torch.ones(10, dtype=torch.bfloat16, requires_grad=True)
        optimizer = bigkern.optim.Adam([p], 1e-4, master_weights=master)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        results[master] = p[0].item()
    assert results[False] == 1.0
    assert results[True] == pytest.approx(0.99, abs=0.004)


def test_mixed_dtypes_with_masters_in_one_group():
    params = [*make_params(dtype=torch.bfloat16), *make_params()]
    optimizer = bigkern.optim.Adam(params, master_weights=True, max_grad_norm=1.0)
    run([optimizer], [params], 3)
    assert "master_param" in optimizer.state[params[0]]
    assert "master_param" not in optimizer.state[params[-1]]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(copied):
    params = make_params()
    optimizer = bigkern.optim.AdamW(params, 0.01, max_grad_norm=0.5)
    run([optimizer], [params], 3)
    other_params, other = copied((params, optimizer))
    assert other.max_grad_norm == 0.5
    run([optimizer, other], [params, other_params], 3, start=3)
    assert all(torch.equal(x, y) for x, y in zip(params, other_params, strict=True))


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


def test_inside_torch_compile():
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
