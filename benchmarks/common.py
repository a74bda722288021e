"""How benchmarks measure: contenders take turns in one process; medians; ratios; shares of the
machine's limit.

A sample is as many calls as last `SAMPLE_SECONDS`, so that a call of microseconds is measured as
well as one of a second. pytest-benchmark runs the rounds, and writes the result file with the
machine and the commit.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bigkern

SAMPLE_SECONDS = 0.03
ROUNDS = 21
RESULTS = Path(__file__).parent / "results"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def sample(call: Callable[[], object], calls: int, device: str) -> float:
    """Seconds per call, over so many of them."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def alternate(
    benchmark, contenders: dict[str, Callable[[], object]], device: str, rounds: int = ROUNDS
) -> None:
    """Times the contenders in turn; leaves their quartiles in ms in extra_info."""
    calls = {}
    for name, call in contenders.items():
        sample(call, 1, device)  # warm-up
        first = sample(call, 1, device)
        calls[name] = 1
        if first < SAMPLE_SECONDS:
            sample(call, 2, device)
            calls[name] = max(1, round(SAMPLE_SECONDS / sample(call, 2, device)))
    times = {name: [] for name in contenders}

    def one_round() -> None:
        for name, call in contenders.items():
            times[name].append(1e3 * sample(call, calls[name], device))

    benchmark.pedantic(one_round, rounds=rounds)
    benchmark.extra_info["quartiles_ms"] = {
        name: statistics.quantiles(values, n=4) for name, values in times.items()
    }


def skip_slow_bfloat16(device: str) -> None:
    """Skips a benchmark of a whole model in bfloat16, where torch takes minutes for it."""
    if device == "cpu" and not torch.ops.bigkern.best_cpu_isa().startswith("avx512"):
        pytest.skip("without AVX-512 torch takes a minute for a step in bfloat16")


def copy_bandwidth(device: str) -> float:
    """GB/s of a copy of 256 MiB, bytes read plus bytes written: the machine's limit for streams."""
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    times = [sample(lambda: target.copy_(source), 4, device) for _ in range(9)]
    return 2 * source.nbytes / statistics.median(times) / 1e9


def machine(device: str) -> str:
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        where = f"{gpu.name}, CUDA {torch.version.cuda}"
    else:
        with open("/proc/cpuinfo") as file:
            models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        isa = torch.ops.bigkern.cpu_isa()
        where = f"{models[0]}, {torch.get_num_threads()} threads, {isa}"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}"


def main(file: str, tables: Callable[[list[dict], str], str]) -> int:
    """Runs the benchmarks in `file` by pytest-benchmark, and prints their tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--save", action="store_true", help=f"write .json and .md to {RESULTS}")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="only benchmarks that match")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = args.device if args.device == "cuda" else f"cpu_{torch.ops.bigkern.cpu_isa()}"
        path = (RESULTS if args.save else Path(folder)) / f"{Path(file).stem}_{where}.json"
        options = "-q --no-header --import-mode=prepend -p no:cacheprovider --benchmark-quiet"
        options = [*options.split(), "--benchmark-disable-gc", f"--benchmark-json={path}"]
        code = pytest.main([file, "-k", args.k, *options], plugins=[_Plugin(args.device)])
        if code:
            return int(code)
        benchmarks = json.loads(path.read_text())["benchmarks"]
    text = (
        f"bigkern {bigkern.__version__}; {machine(args.device)}\n{tables(benchmarks, args.device)}"
    )
    print(f"\n{text}")
    if args.save:
        path.with_suffix(".md").write_text(f"{text}\n")
    return 0


class _Plugin:
    """The `device` of all benchmarks as a fixture, and the machine in the result file."""

    def __init__(self, device: str) -> None:
        self.name = device

    @pytest.fixture(scope="session")
    def device(self) -> str:
        return self.name

    def pytest_benchmark_update_machine_info(self, machine_info: dict) -> None:
        del machine_info["node"]
        machine_info["description"] = machine(self.name)
