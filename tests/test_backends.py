"""Which backend runs, and what is said where none does."""

import os
import subprocess
import sys

import pytest
import torch

from bigkern import backends
from bigkern.ops import grad_norm


def test_table_is_the_dispatchers():
    for op, by_backend in backends.table().items():
        for backend, devices in by_backend.items():
            name = f"{backends.NAMESPACES[backend]}::{op}"
            for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
                has = torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
                assert has == (device in devices), name
    assert "cpu" in backends.table()["adam_"]["native"]


def test_use_forces_and_restores():
    with backends.use("native"):
        assert backends.select("adam_", "cpu") is torch.ops.bigkern
        with pytest.raises(NotImplementedError) as error, backends.use("triton"):
            grad_norm([torch.ones(2)])
        assert str(error.value) == "grad_norm has no triton backend on cpu; available: ['native']"
        assert backends.select("adam_", "cpu") is torch.ops.bigkern
    assert grad_norm([torch.ones(4)]).item() == 2


def test_device_without_any_backend():
    with pytest.raises(NotImplementedError, match="adam_ has no backend on mps; available: "):
        backends.select("adam_", "mps")


def test_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match=r"name must be one of \['native', 'triton'\], got 'cuda'"),
        backends.use("cuda"),
    ):
        pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("triton", "grad_norm has no triton backend on cpu; available: ['native']"),
        ("x", "BIGKERN_BACKEND must be one of ['native', 'triton'], got 'x'"),
        ("native", None),
    ],
)
def test_environment_variable(value, message):
    code = "import torch; from bigkern.ops import grad_norm; grad_norm([torch.ones(2)])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"BIGKERN_BACKEND": value},
        capture_output=True,
        text=True,
    )
    assert (result.returncode == 0) == (message is None)
    assert message is None or message in result.stderr


def test_a_backend_of_others_is_there_as_long_as_it_is_registered():
    library = torch.library.Library("bigkern_others", "DEF")
    schema = torch.ops.bigkern.grad_norm.default._schema
    library.define(str(schema).removeprefix("bigkern::"))
    library.impl("grad_norm", lambda *args, **options: torch.tensor(7.0), "CPU")
    for _ in range(2):
        with backends.registered("others", "bigkern_others"):
            assert backends.available("grad_norm", "cpu") == ["native", "others"]
            assert backends.available("adam_", "cpu") == ["native"]
            assert grad_norm([torch.ones(4)]).item() == 2  # the first choice
            with backends.use("others"):
                assert grad_norm([torch.ones(4)]).item() == 7
                compiled = torch.compile(grad_norm, fullgraph=True, backend="eager")
                assert compiled([torch.ones(4)]).item() == 7  # by the op's fake
        assert "others" not in backends.NAMESPACES
        assert backends.available("grad_norm", "cpu") == ["native"]


def test_a_forced_backend_may_lack_an_op():
    assert backends.has("pack_weight", "cpu")
    assert not backends.has("pack_weight", "meta")
    with backends.use("triton"):
        assert not backends.has("pack_weight", "cpu")
