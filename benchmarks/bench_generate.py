"""Generation: 256 tokens from a prompt of 512 by the Transformer of 6 blocks with 8 heads of 64,
with bigkern's attention to the key-value cache, also with its INT8 layers, and with torch's SDPA to
the same cache.

python benchmarks/bench_generate.py [--device cuda] [--save]
"""

import sys

import pytest
import torch
from common import alternate, main, skip_slow_bfloat16, skip_without_kernels

import bigkern
from bigkern.models import Transformer, TransformerConfig

PROMPT, NEW = 512, 256
INT8_MODES = {"bigkern, INT8 weights": "weight_only", "bigkern, INT8": "dynamic"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_generate(benchmark, device, batch_size, dtype):
    skip_without_kernels("attention", device)
    if dtype == "bfloat16":
        skip_slow_bfloat16(device)
    prompt = torch.randint(256, (batch_size, PROMPT))
    contenders = {}
    for name in ("bigkern", *INT8_MODES, "torch"):
        torch.manual_seed(0)
        config = TransformerConfig(attention="torch" if name == "torch" else "bigkern")
        model = Transformer(config).to(device, DTYPES[dtype])
        if name in INT8_MODES:
            bigkern.swap(model, linear="int8", mode=INT8_MODES[name])
        contenders[name] = lambda model=model: model.generate(prompt, NEW, temperature=0)
    alternate(benchmark, contenders, device, rounds=5)
    benchmark.extra_info |= {"batch_size": batch_size, "dtype": dtype}


def tables(benchmarks, device):
    lines = [
        f"{NEW} tokens from a prompt of {PROMPT}\n",
        "| dtype | sequences | | s (quartiles) | tokens/s | torch / this |",
        "|---|---|---|---|---|---|",
    ]
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        torch_ms = info["quartiles_ms"]["torch"][1]
        for name, quartiles in info["quartiles_ms"].items():
            low, median, high = (x / 1e3 for x in quartiles)
            cells = (
                info["dtype"],
                str(info["batch_size"]),
                name,
                f"{median:.2f} ({low:.2f}..{high:.2f})",
                f"{info['batch_size'] * NEW / median:,.0f}",
                f"{torch_ms / 1e3 / median:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(__file__, tables))
