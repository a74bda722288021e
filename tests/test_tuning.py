"""The tables of tile sizes that ship, and which row is taken."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from bigkern.kernels import tuning
from bigkern.kernels.tuning import calls
from bigkern.kernels.tuning.calls import call_of

from bigkern import backends, triton_ops, tune
from bigkern.cli import main


@pytest.mark.parametrize(
    ("architecture", "table"),
    [
        *((a, a) for a in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")),
        ("sm_75", "sm_80"),
        ("sm_86", "sm_120"),
        ("sm_89", "sm_120"),
        ("sm_87", "sm_80"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("gfx950", "gfx942"),
    ],
)
def test_each_architecture_has_a_table(architecture, table):
    assert tuning.table_for(architecture) == table


@pytest.mark.parametrize("architecture", tuning.ARCHITECTURES)
def test_rows_are_complete(architecture):
    for row in tuning.rows(architecture):
        assert row.keys() == {"op", "dtype", "shape", "config", "source"}
        assert row["op"] in calls._CALLS
        assert isinstance(getattr(torch, row["dtype"]), torch.dtype)
        assert all(isinstance(n, int) for n in (*row["shape"].values(), *row["config"].values()))
        assert row["config"].keys() >= {"num_warps", "num_stages"}
        assert row["source"] == "model" or {"card", "date", "commit"} <= row["source"].keys()


def row(op, dtype, config, **shape):
    return {"op": op, "dtype": dtype, "shape": shape, "config": {"BLOCK": config}}


@pytest.fixture
def users_table(tmp_path, monkeypatch):
    """Sets the user's rows for sm_90, which is the current device."""
    monkeypatch.setattr(tuning, "architecture", lambda: "sm_90")

    def set_rows(*rows, name="table"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"sm_90": rows}))
        monkeypatch.setenv("BIGKERN_TUNING", str(path))

    return set_rows


def test_the_nearest_row_is_taken(users_table):
    users_table(
        row("foo", "float16", 1, E=64),
        row("foo", "float16", 2, E=128),
        row("foo", "float32", 3, E=64),
        row("foo", "float16", 4, E=128),
    )
    chosen = {
        (torch.float16, 64): 1,
        (torch.float16, 80): 1,
        (torch.float16, 96): 2,
        (torch.float16, 1): 1,
        (torch.bfloat16, 200): 2,  # of the same width
        (torch.float32, 200): 3,
        (torch.int32, 128): 3,
        (torch.float64, 128): 2,  # any, if none has the width
    }
    for (dtype, E), config in chosen.items():
        assert tuning.lookup("foo", dtype, E=E) == {"BLOCK": config}
    with pytest.raises(KeyError, match=r"no row of bar in .*sm_90\.json"):
        tuning.lookup("bar", torch.float16)


def test_the_users_rows_come_first_and_only_where_they_are_as_near(users_table):
    shipped = tuning.lookup("adam_", torch.float32)
    users_table(row("adam_", "float64", 7), name="other")
    assert tuning.lookup("adam_", torch.float32) == shipped
    users_table(row("adam_", "float32", 8))
    config = tuning.lookup("adam_", torch.float32)
    assert config == {"BLOCK": 8}
    config["BLOCK"] = 9  # the caller's own
    assert tuning.lookup("adam_", torch.float32) == {"BLOCK": 8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "BIGKERN_TUNING must name a table of tile sizes, got .*No such file"),
        ("{", "BIGKERN_TUNING must name a table of tile sizes, got .*Expecting property name"),
        ("[]", "BIGKERN_TUNING must name a table of tile sizes, got .*'list' object"),
        ('{"sm_90": [{"op": "x"}]}', "BIGKERN_TUNING: rows need op, dtype, shape and config, got"),
    ],
)
def test_a_bad_table_is_named(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "architecture", lambda: "sm_90")
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("BIGKERN_TUNING", str(path))
    with pytest.raises(ValueError, match=message):
        tuning.lookup("adam_", torch.float32)


def test_the_namespace_has_the_ops_that_the_kernels_have():
    pytest.importorskip("triton", reason="torch for CPUs comes without Triton")
    import importlib

    for op, module in triton_ops.OPS.items():
        assert callable(getattr(importlib.import_module(f"bigkern.kernels.{module}"), op)), op
        schema = getattr(torch.ops.bigkern_triton, op).default._schema
        native = getattr(torch.ops.bigkern, op).default._schema
        assert str(schema).replace("bigkern_triton::", "bigkern::") == str(native)
    assert {op for op, by in backends.table().items() if "triton" in by} <= set(triton_ops.OPS)


# ---- bigkern tune-kernels ----


def test_the_search_goes_on_while_it_gains():
    asked = []

    def measure(config):
        asked.append(config)
        if config["num_warps"] == 16:
            return math.inf
        return abs(config["BLOCK"] - 1000) + 10 * config["num_stages"] + 100 / config["num_warps"]

    start = {"BLOCK": 256, "num_warps": 4, "num_stages": 2}
    old, best, new = tune.search(start, measure)
    assert best == {"BLOCK": 1024, "num_warps": 8, "num_stages": 1}
    assert (old, new) == (measure(start), measure(best))
    assert len(asked) - 2 == len({tuple(config.items()) for config in asked})


def test_a_gain_within_the_noise_is_none():
    old, best, new = tune.search({"BLOCK": 8}, lambda config: 1.0 if config["BLOCK"] == 8 else 0.99)
    assert (old, best, new) == (1.0, {"BLOCK": 8}, 1.0)


def test_tuning_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune-kernels", "--op", "adam_"]) == 1
    assert "tune-kernels needs Triton and a GPU; see `bigkern info`" in capsys.readouterr().err


def test_what_is_measured_is_taken_where_the_table_is_named(monkeypatch, tmp_path, capsys):
    triton_static = pytest.importorskip("triton_static", reason="torch for CPUs has no Triton")
    import triton.testing

    times = iter([1.0, 0.5])
    blocks = []

    def do_bench(call, return_mode):
        if len(blocks) < 2:
            call()
        blocks.append(tuning.lookup("adam_", torch.float32)["BLOCK"])
        return next(times, 1.0)

    small = lambda row, device, is_large: call_of(row, "cpu", is_large=False)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(calls, "call_of", small)
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    out, card = tmp_path / "table.json", triton_static.Compiler("sm_80")
    with triton_static.backend_of(card):
        shipped = tuning.lookup("adam_", torch.float32)
        assert main(["tune-kernels", "--op", "adam_", "--out", str(out)]) == 0
        assert sum(kernel.name == "_adam" for kernel in card.kernels) == 2
        assert blocks[:2] == [shipped["BLOCK"], shipped["BLOCK"] // 2]
        rows = json.loads(out.read_text())["sm_80"]
        assert [row["dtype"] for row in rows] == ["float32", "bfloat16", "float64"]
        assert rows[0]["config"] == shipped | {"BLOCK": shipped["BLOCK"] // 2}
        assert rows[0]["source"]["card"] == "NVIDIA A100"
        checkout = Path(__file__).parents[1]
        if (checkout / ".git").exists():
            head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True)
            assert head.startswith(rows[0]["source"]["commit"].rstrip("+"))
        old_and_new = (
            "num_stages 1 | 1.0000 | BLOCK 1024, num_warps 8, num_stages 1 | 0.5000 | 2.00"
        )
        assert old_and_new in capsys.readouterr().out

        assert tuning.lookup("adam_", torch.float32) == shipped
        monkeypatch.setenv("BIGKERN_TUNING", str(out))
        assert tuning.lookup("adam_", torch.float32) == rows[0]["config"]
        assert main(["tune-kernels", "--op", "foo", "--out", str(out)]) == 1
        assert "--op must be one of adam_" in capsys.readouterr().err
