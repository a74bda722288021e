"""``bigkern tune-kernels``: measures the Triton kernels' tile sizes on the card at hand."""

import datetime
import json
import math
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import bigkern
from bigkern import backends, triton_ops
from bigkern.kernels import tuning
from bigkern.kernels.tuning import Row
from bigkern.train.errors import UserError, writing

Config = dict[str, int]
LEAST_GAIN = 1.02  # less is noise
LIMITS = {"num_warps": (1, 16), "num_stages": (1, 6)}


def tune(op: str, architecture: str | None, out: Path) -> None:
    """Searches each row of `op`, and puts what is faster into the table `out`, for `architecture`
    (default: the card's)."""
    if not (triton_ops.is_installed() and torch.cuda.is_available()):
        raise UserError("tune-kernels needs Triton and a GPU; see `bigkern info`")
    from bigkern.kernels.tuning.calls import call_of

    architecture = architecture or tuning.architecture()
    shipped = [row for row in tuning.rows(architecture) if row["op"] == op]
    if not shipped:
        ops = sorted({row["op"] for row in tuning.rows(architecture)})
        raise UserError(f"--op must be one of {', '.join(ops)}, got {op}")
    found = []
    print("| op | dtype | shape | old | ms | new | ms | old / new |\n" + "|---" * 8 + "|")
    with backends.use("triton"):
        for row in shipped:
            call = call_of(row, "cuda", is_large=True)
            old, best, new = search(row["config"], lambda config, call=call: time(op, call, config))
            found.append(row | {"config": best, "source": source()})
            shape = ", ".join(f"{key} {n}" for key, n in row["shape"].items())
            cells = (op, row["dtype"], shape, text(row["config"]), f"{old:.4f}", text(best))
            print(f"| {' | '.join(cells)} | {new:.4f} | {old / new:.2f} |", flush=True)
    with writing(out):
        save(found, architecture, out)
    print(f"written to {out}; to use it, set BIGKERN_TUNING={out.resolve()}")


def time(op: str, call: Callable[[], object], config: Config) -> float:
    """Milliseconds; infinite if the card lacks the resources."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    with tuning.tried(op, config):
        try:
            return do_bench(call, return_mode="median")
        except (OutOfResources, CompilationError):
            return math.inf


def search(start: Config, measure: Callable[[Config], float]) -> tuple[float, Config, float]:
    """The time of `start`, the best of what is reached from it by steps that gain, and its time.

    Each step changes one number: far fewer configurations than all combinations, each of which
    takes a second to compile.
    """
    times = {tuple(start.items()): measure(start)}
    first = best_time = times[tuple(start.items())]
    best, is_better = start, True
    while is_better:
        is_better = False
        for config in neighbours(best):
            key = tuple(config.items())
            if key not in times:
                times[key] = measure(config)
                if times[key] * LEAST_GAIN < best_time:
                    best, best_time, is_better = config, times[key], True
    return first, best, best_time


def neighbours(config: Config) -> Iterator[Config]:
    """One number doubled or halved, or a stage more or less."""
    for key, n in config.items():
        for changed in (n - 1, n + 1) if key == "num_stages" else (n // 2, 2 * n):
            least, most = LIMITS.get(key, (1, 8192))
            if least <= changed <= most:
                yield config | {key: changed}


def source() -> dict[str, str]:
    return {
        "card": torch.cuda.get_device_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit() or bigkern.__version__,
    }


def commit() -> str | None:
    """That of the checkout which this package is in, with `+` where files differ from it."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or None


def text(config: Config) -> str:
    return ", ".join(f"{key} {n}" for key, n in config.items())


def save(found: list[Row], architecture: str, out: Path) -> None:
    """In place of the rows of the same op."""
    table = json.loads(out.read_text()) if out.exists() else {}
    ops = {row["op"] for row in found}
    kept = [row for row in table.get(architecture, []) if row["op"] not in ops]
    table[architecture] = [*kept, *found]
    out.write_text(json.dumps(table, indent=1) + "\n")
