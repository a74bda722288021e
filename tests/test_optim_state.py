"""The state of bigkern's optimizers: replaced, moved, saved, loaded, copied."""

import copy
import io
import pickle

import pytest
import torch
from helpers import PAIRS, assert_close, make_params, run

import bigkern
from bigkern.testing import assert_as_accurate

DEVICES = ["cpu", "triton", "cuda"]


class TestReplacedAndMoved:
    """What is kept between steps never hides what the user did to a tensor."""

    @pytest.fixture(autouse=True)
    def _on(self, device):
        self.device = device

    def compare(self, change, steps=3):
        results = []
        for cls in (bigkern.optim.Adam, torch.optim.Adam):
            params = make_params(self.device)
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
            new = torch.randn(9, generator=torch.Generator().manual_seed(5))
            new = new.to(self.device).requires_grad_()
            optimizer.param_groups[0]["params"][0] = new
            del optimizer.state[params[0]]
            return [new, *params[1:]]

        self.compare(change)

    def test_parameter_replaced_with_its_state(self):
        """As when points are added to a scene: the state moves on to a larger parameter."""

        def change(optimizer, params):
            old = params[0]
            new = torch.cat([old.detach(), old.detach()[:2]]).requires_grad_()
            state = optimizer.state.pop(old)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.cat([state[name], torch.zeros_like(state[name][:2])])
            optimizer.state[new] = state
            optimizer.param_groups[0]["params"][0] = new
            return [new, *params[1:]]

        self.compare(change)

    def test_amsgrad_switched_on(self):
        params = make_params(self.device)
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
