"""Adam: bigkern against torch.optim's fused, foreach and plain loop.

python benchmarks/bench_adam.py [--device cuda] [--save]
"""

import functools
import math
import sys

import torch
from common import alternate, copy_bandwidth, main, with_triton

import bigkern

SETS = {
    "16M": [(2**24,)],
    "Transformer": [(512, 512)] * 48 + [(512, 2048)] * 24 + [(512,)] * 100,
    "2000 x 256": [(256,)] * 2000,
    "SimpleCNN": [p.shape for p in bigkern.models.SimpleCNN().parameters()],
}
GPU_SETS = {"256M": [(2**28,)]}  # the host's share of a step is small
BY_DEVICE = {"name": {"cpu": [*SETS], "cuda": [*GPU_SETS, *SETS]}}
# float32: parameter, gradient and two moments are read, all but the gradient written.
BYTES_PER_ELEMENT = 28


def make(shapes, optimizer_type, device, **options):
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    params = [draw(s).requires_grad_() for s in shapes]
    for p in params:
        p.grad = 1e-3 * draw(p.shape)
    return params, optimizer_type(params, **options)


def test_step(benchmark, name, device):
    shapes = (GPU_SETS | SETS)[name]
    contenders = {
        "bigkern": make(shapes, bigkern.optim.Adam, device)[1].step,
        "torch fused": make(shapes, torch.optim.Adam, device, fused=True)[1].step,
        "torch foreach": make(shapes, torch.optim.Adam, device, foreach=True)[1].step,
        "torch loop": make(shapes, torch.optim.Adam, device, foreach=False)[1].step,
    }
    alternate(benchmark, with_triton(contenders, device), device)
    elements = sum(math.prod(shape) for shape in shapes)
    benchmark.extra_info |= {
        "set": name,
        "elements": elements,
        "bytes": BYTES_PER_ELEMENT * elements,
        "roof": "copy",
    }


def test_scaler_clip_step(benchmark, name, device):
    """unscale, check for inf, clip the global norm to 1, step, update the scale."""
    shapes = (GPU_SETS | SETS)[name]
    params, optimizer = make(shapes, torch.optim.Adam, device, fused=True)
    _, ours = make(shapes, bigkern.optim.Adam, device, max_grad_norm=1.0)
    scaler, our_scaler, stock_scaler = (
        cls(
            device, init_scale=1.0
        )  # torch's way unscales the gradients for good: by 1, time and again
        for cls in (torch.amp.GradScaler, bigkern.amp.GradScaler, torch.amp.GradScaler)
    )
    for each in (scaler, our_scaler, stock_scaler):
        each.scale(torch.ones(1, device=device))  # makes its tensors

    def torch_step():
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()

    def bigkern_step(scaler):
        scaler.step(ours)
        scaler.update()

    contenders = {
        "bigkern": lambda: bigkern_step(our_scaler),
        "torch fused": torch_step,
        "bigkern, torch's GradScaler": lambda: bigkern_step(stock_scaler),
    }
    alternate(benchmark, with_triton(contenders, device), device)
    benchmark.extra_info |= {"set": name}


def tables(benchmarks, device):
    limit = copy_bandwidth(device)
    lines = [
        f"copy bandwidth {limit:.1f} GB/s (read + written)\n",
        "| step | | ms (quartiles) | GB/s | of copy | torch fused / this |",
        "|---|---|---|---|---|---|",
    ]
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        kind = "" if "elements" in info else "GradScaler + clip + step, "
        fused = info["quartiles_ms"]["torch fused"][1]
        for contender, (low, median, high) in info["quartiles_ms"].items():
            speed = BYTES_PER_ELEMENT * info.get("elements", 0) / median / 1e6
            bandwidth = f"{speed:.1f} | {speed / limit:.0%}" if speed else "- | -"
            times = f"{median:.3f} ({low:.3f}..{high:.3f})"
            row = (kind + info["set"], contender, times, bandwidth, f"{fused / median:.2f}")
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(__file__, tables))
