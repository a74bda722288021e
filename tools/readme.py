"""Writes what is generated in README.md and benchmarks/README.md.

README's tables of features are made of tests/features.py and of what pytest collects: a backend
has a feature if one of the feature's tests runs over it: on a GPU, or emulated.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
import features  # noqa: E402
import gpu_results  # noqa: E402
from generated import replace_generated, table  # noqa: E402

from bigkern import info  # noqa: E402

README = ROOT / "README.md"
BACKENDS = {  # by the tests' names of devices
    "CPU": {"cpu"},
    "CUDA": {"cuda", "emulated"},
    "Triton": {"triton", "triton sm_90", "cuda triton"},
}
DEVICES = set.union(*BACKENDS.values())


def collect() -> dict[str, set[str]]:
    """Test (file::function) -> the devices that it runs over; one without any runs on the CPU."""
    tests = " ".join(f.tests for t in features.TABLES.values() for f in t.features).split()
    files = sorted({f"tests/{test.partition('::')[0]}.py" for test in tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    devices = defaultdict(set)
    for file, function, parameters in re.findall(
        r"^tests/(\w+)\.py::(\w+)(?:\[(.*)\])?$", run.stdout, re.MULTILINE
    ):
        found = DEVICES & set(re.split(r"[-/]", parameters))
        devices[f"{file}::{function}"] |= found or {"cpu"}
    missing = [test for test in tests if test not in devices]
    if missing:
        raise LookupError(f"features.py names tests that aren't there: {missing}\n{run.stdout}")
    return devices


def feature_table(name: str, devices: dict[str, set[str]]) -> str:
    wanted = features.TABLES[name]
    rows = []
    for feature in wanted.features:
        found = set.union(*(devices[test] for test in feature.tests.split()))
        has = [
            "yes" if found & names and not feature.nobody else "-" for names in BACKENDS.values()
        ]
        rows.append((feature.text, *has, feature.torch))
    return table([name, *(f"bigkern, {b}" for b in BACKENDS), wanted.torch], rows)


def with_features(text: str) -> str:
    devices = collect()
    tables = [feature_table(name, devices) for name in features.TABLES]
    return replace_generated(text, "features", "\n\n".join(tables))


def with_ops(text: str) -> str:
    """As this build has them."""
    return replace_generated(text, "ops", info.op_table())


def main() -> None:
    README.write_text(with_ops(with_features(README.read_text())))
    gpu_results.README.write_text(gpu_results.readme())


if __name__ == "__main__":
    main()
