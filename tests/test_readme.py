"""README's generated tables: up to date, and complete."""

import sys

import features
import pytest
import torch
from cuda_compiler import ROOT

from bigkern import libraries, triton_ops

sys.path.append(str(ROOT / "tools"))
import readme

TEXT = readme.README.read_text()


def test_features_are_up_to_date():
    assert readme.with_features(TEXT) == TEXT, "run `make readme`"


def test_ops_are_up_to_date():
    if libraries.problems["_C_cuda"]:
        pytest.skip(libraries.problems["_C_cuda"])
    if not triton_ops.is_installed():
        pytest.skip("torch for CPUs comes without Triton")
    assert readme.with_ops(TEXT) == TEXT, "run `make readme`"


@pytest.mark.parametrize("name", features.TABLES)
def test_each_argument_of_an_op_belongs_to_a_feature(name):
    wanted = features.TABLES[name]
    schemas = [getattr(torch.ops.bigkern, op).default._schema for op in wanted.ops.split()]
    arguments = {argument.name for schema in schemas for argument in schema.arguments}
    assert {a for feature in wanted.features for a in feature.arguments.split()} == arguments


def test_a_backend_has_what_a_test_runs_over_it(monkeypatch):
    rows = [
        features.Feature("all", "test_a::test_1", "yes"),
        features.Feature("one of two", "test_a::test_2 test_a::test_1"),
        features.Feature("refused", "test_a::test_1", nobody=True),
        features.Feature("on the CPU", "test_a::test_2"),
    ]
    monkeypatch.setitem(features.TABLES, "x", features.Table("", "torch", rows))
    devices = {"test_a::test_1": {"cpu", "emulated", "triton"}, "test_a::test_2": {"cpu"}}
    assert readme.feature_table("x", devices).splitlines()[2:] == [
        "| all | yes | yes | yes | yes |",
        "| one of two | yes | yes | yes | - |",
        "| refused | - | - | - | - |",
        "| on the CPU | yes | - | - | - |",
    ]


def test_a_feature_without_its_test_is_named(monkeypatch):
    row = features.Feature("x", "test_adam::test_that_is_not_there")
    monkeypatch.setattr(features, "TABLES", {"x": features.Table("", "", [row])})
    with pytest.raises(LookupError, match=r"aren't there: .'test_adam::test_that_is_not_there'"):
        readme.collect()
