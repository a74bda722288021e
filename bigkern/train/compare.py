"""What is shown of a run, and of two runs side by side."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from bigkern.train.checkpoint import write_json
from bigkern.train.config import TrainConfig

CURVE_POINTS = 8


@dataclass
class Summary:
    """What is shown of a run. Plain numbers, so that a process can hand it to another."""

    losses: list[float]
    ms_per_step: float | None
    per_second: float | None  # examples: images, or tokens
    peak_memory_mib: float

    UNIT: ClassVar[str]
    SCORES: ClassVar[list[tuple[str, str, str]]]  # title, field and format of each

    def show(self, out: Path | None) -> None:
        """Print speed and memory, and write all but the losses to `out`/summary.json."""
        if self.ms_per_step is not None:
            print(f"Time per step: {self.ms_per_step:.2f} ms", end=", ")
            print(f"{self.per_second:,.0f} {self.UNIT} per second")
        print(f"Peak memory: {self.peak_memory_mib:,.0f} MiB")
        if out and self.losses:  # else the run was finished, and has its summary
            numbers = {k: v for k, v in asdict(self).items() if k != "losses"}
            numbers[f"{self.UNIT}_per_second"] = numbers.pop("per_second")
            write_json(out / "summary.json", numbers)


def compare(
    run: Callable[[TrainConfig, Path | None], Summary],
    bigkern: TrainConfig,
    torch: TrainConfig,
    out: Path | None,
) -> None:
    """Run the same training as both configs say, and print both side by side.

    Each run has a fresh process, so that its peak memory is its own.
    """
    summaries = []
    for name, config in {"bigkern": bigkern, "torch": torch}.items():
        print(f"--- {name}", flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            future = process.submit(run, config, out / name if out else None)
            summaries.append(future.result())
    print(comparison(*summaries))


def comparison(bigkern: Summary, torch: Summary) -> str:
    """A table of two runs of the same steps."""
    rows = [
        ("time per step (ms)", "ms_per_step", "{:.2f}"),
        (f"{bigkern.UNIT} per second", "per_second", "{:,.0f}"),
        ("peak memory (MiB)", "peak_memory_mib", "{:,.0f}"),
        *bigkern.SCORES,
    ]
    lines = [f"{'':20}{'bigkern':>12}{'torch':>12}"]
    for title, field, form in rows:
        values = (getattr(summary, field) for summary in (bigkern, torch))
        cells = ("-" if value is None else form.format(value) for value in values)
        lines.append(f"{title:20}" + "".join(f"{cell:>12}" for cell in cells))
    last = len(bigkern.losses) - 1
    for step in sorted({i * last // CURVE_POINTS for i in range(CURVE_POINTS)} | {last}):
        title = "final loss" if step == last else f"loss at step {step + 1}"
        lines.append(f"{title:20}{bigkern.losses[step]:12.6f}{torch.losses[step]:12.6f}")
    gaps = [abs(a - b) for a, b in zip(bigkern.losses, torch.losses, strict=True)]
    lines.append(
        f"largest difference of the losses: {max(gaps):.2e} at step {gaps.index(max(gaps)) + 1}"
    )
    return "\n".join(lines)
