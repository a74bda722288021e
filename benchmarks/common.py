"""How benchmarks measure: contenders take turns in one process; medians; ratios; shares of the
machine's limit.

A sample is as many calls as last `SAMPLE_SECONDS`, so that a call of microseconds is measured as
well as one of a second. pytest-benchmark runs the rounds, and writes the result file with the
machine and the commit.
"""

import argparse
import functools
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gpu_results
import pytest
import torch

import bigkern
from bigkern import backends

SAMPLE_SECONDS = 0.03
ROUNDS = {"cpu": 21, "cuda": 9}  # a GPU's times hardly vary
RESULTS = gpu_results.RESULTS


def sample(call: Callable[[], object], calls: int, device: str) -> float:
    """Seconds per call, over so many of them."""
    if device == "cuda":
        return cuda_sample(call, calls)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def cuda_sample(call: Callable[[], object], calls: int) -> float:
    """The median, by CUDA events, of calls that find nothing of theirs in L2. Before each the host
    runs ahead while it is flushed."""
    flush = flush_buffer(torch.cuda.current_device())
    events = []
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


@functools.cache
def flush_buffer(index: int) -> torch.Tensor:
    size = 4 * torch.cuda.get_device_properties(index).L2_cache_size
    with torch.inference_mode(False):  # it is written outside of it too
        return torch.empty(size, dtype=torch.uint8, device="cuda")


def alternate(
    benchmark, contenders: dict[str, Callable[[], object]], device: str, rounds: int | None = None
) -> None:
    """Times the contenders in turn; leaves their quartiles in ms in extra_info.

    On a GPU others than "bigkern" that can't run the case are left out, with what they say of it.
    """
    calls, missing = {}, {}
    for name, call in contenders.items():
        try:
            sample(call, 1, device)  # warm-up
        except Exception as error:
            if device != "cuda" or name == "bigkern":
                raise
            missing[name] = str(error).partition("\n")[0] or type(error).__name__
            continue
        first = sample(call, 1, device)
        calls[name] = 1
        if first < SAMPLE_SECONDS:
            sample(call, 2, device)
            calls[name] = max(1, round(SAMPLE_SECONDS / sample(call, 2, device)))
    times = {name: [] for name in calls}

    def one_round() -> None:
        for name in calls:
            times[name].append(1e3 * sample(contenders[name], calls[name], device))

    benchmark.pedantic(one_round, rounds=rounds or ROUNDS[device])
    benchmark.extra_info["quartiles_ms"] = {
        name: statistics.quantiles(values, n=4) for name, values in times.items()
    }
    benchmark.extra_info["missing"] = missing


def with_triton(
    contenders: dict[str, Callable[[], object]], device: str
) -> dict[str, Callable[[], object]]:
    """And on a GPU what "bigkern" does once more, by the Triton kernels."""
    native = contenders["bigkern"]

    def call() -> object:
        with backends.use("triton"):
            return native()

    return contenders | ({"bigkern, Triton": call} if device == "cuda" else {})


def skip_without_kernels(op: str, device: str) -> None:
    if not backends.available(op, device):
        pytest.skip(f"{op} has no kernels for {device}")


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


def product_rate(dtype: torch.dtype, side: int, device: str) -> float:
    """FLOP/s of a large matrix product: what the machine's arithmetic gives in practice."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(sample(lambda: a @ b, 1, device) for _ in range(9))


def gpu_roofs() -> dict[str, float]:
    """In bytes/s and FLOP/s. INT8 products are twice as fast as those of bfloat16 on every card."""
    product = product_rate(torch.bfloat16, 8192, "cuda")
    return {
        "copy": 1e9 * copy_bandwidth("cuda"),
        "bfloat16 product": product,
        "2 x bfloat16 product": 2 * product,
    }


def machine(device: str) -> str:
    if device == "cuda":
        where = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
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
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none; see `bigkern info`")
    name = Path(file).stem
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmarks.json"
        options = "-q -rs --no-header --import-mode=prepend -p no:cacheprovider --benchmark-quiet"
        options = [*options.split(), "--benchmark-disable-gc", f"--benchmark-json={path}"]
        code = pytest.main([file, "-k", args.k, *options], plugins=[_Plugin(args.device)])
        if code:
            return int(code)
        if not path.exists():
            print("nothing was measured: every benchmark was skipped")
            return 0
        benchmarks = json.loads(path.read_text())["benchmarks"]
        if args.device == "cuda":
            report_gpu(name.removeprefix("bench_"), benchmarks, args.save)
            return 0
        text = f"bigkern {bigkern.__version__}; {machine('cpu')}\n{tables(benchmarks, 'cpu')}"
        print(f"\n{text}")
        if args.save:
            saved = RESULTS / f"{name}_cpu_{torch.ops.bigkern.cpu_isa()}.json"
            shutil.copy(path, saved)
            saved.with_suffix(".md").write_text(f"{text}\n")
            gpu_results.README.write_text(gpu_results.readme())
    return 0


def report_gpu(name: str, benchmarks: list[dict], save: bool) -> None:
    rows = gpu_results.rows(name, benchmarks, gpu_roofs(), gpu_results.environment())
    if not rows:
        return
    print(f"\n{rows[0]['card']}: {gpu_results.state(rows[0])}\n\n{gpu_results.result_table(rows)}")
    for row in rows:
        for contender, why in row["missing"].items():
            print(f"{row['case']}: without {contender}: {why}")
    if save:
        print(f"saved in {gpu_results.save(rows)}")


class _Plugin:
    """The `device` of all benchmarks as a fixture, and the machine in the result file."""

    def __init__(self, device: str) -> None:
        self.name = device

    @pytest.fixture(scope="session")
    def device(self) -> str:
        return self.name

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parameters that a module has in BY_DEVICE: name -> device -> values."""
        for name, values in getattr(metafunc.module, "BY_DEVICE", {}).items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values[self.name], ids=str)

    def pytest_benchmark_update_machine_info(self, machine_info: dict) -> None:
        del machine_info["node"]
        machine_info["description"] = machine(self.name)
