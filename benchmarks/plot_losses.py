"""Draws the loss curves of runs of `bigkern train`: python benchmarks/plot_losses.py DIR... PNG"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMOOTHING = 20  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="the --out of a run")
    parser.add_argument("picture", type=Path, metavar="PNG", help="what to write")
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for run in args.runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines]
        starts = [max(0, i - SMOOTHING) for i in range(len(losses))]
        smooth = [statistics.fmean(losses[start : i + 1]) for i, start in enumerate(starts)]
        (curve,) = axes.plot(smooth, label=f"{run.name}: training, mean of {SMOOTHING} steps")
        held_out = {x["step"]: x["validation_loss"] for x in lines if "validation_loss" in x}
        steps, scores = list(held_out), list(held_out.values())
        axes.plot(steps, scores, "o--", color=curve.get_color(), label=f"{run.name}: held out")
    axes.set(xlabel="step", ylabel="loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
