"""The stand-in for hypothesis, which the tests of ops run with on a machine that lacks it."""

import os
import subprocess
import sys

from cuda_compiler import ROOT

TESTS = """
from hypothesis import given, settings
from hypothesis import strategies as st

seen = []

@st.composite
def pairs(draw, low):
    first = draw(st.integers(low, 9))
    return first, draw(st.one_of(st.just(first), st.integers(first, 9)))

@settings(settings(max_examples=3), max_examples=7)
@given(pair=pairs(2), word=st.sampled_from("abc"))
def test_draws(request, pair, word):
    assert request.node.name == "test_draws" and 2 <= pair[0] <= pair[1] <= 9
    seen.append((pair, word))

def test_number():
    assert len(seen) == 7 and len(set(seen)) > 2

@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=3), st.tuples(st.integers(0, 1)))
def test_fails(flags, number):
    assert not (len(flags) == 2 and all(flags))
"""


def test_draws_the_same_cases_and_shows_what_fails(tmp_path):
    (tmp_path / "test_drawn.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:hypothesispytest", "-p"]
    command += ["no:cacheprovider", "test_drawn.py"]
    runs = [
        subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT / "tests/stand_ins")},
            capture_output=True,
            text=True,
        ).stdout
        for _ in range(2)
    ]
    assert "1 failed, 2 passed" in runs[0], runs[0]
    failures = [line for line in "".join(runs).splitlines() if line.startswith("failing case")]
    assert len(failures) == 2
    assert failures[0] == failures[1]
    assert "'flags': [True, True]" in failures[0]
