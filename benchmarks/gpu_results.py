"""Results of GPUs: results/<gpu>.json has one row a case, with the card and its state. The tables
in README.md are made of it.
"""

import json
import re
import subprocess
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path

import torch
from generated import replace_generated, table

import bigkern

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
README = FOLDER / "README.md"

# Our name of a value -> that of nvidia-smi.
SMI = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
}


def output_of(*command: str) -> str | None:
    """None where the program isn't there, or fails."""
    try:
        run = subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def parse_smi(line: str | None) -> dict[str, str | float | None]:
    """Values of nvidia-smi, None for what it doesn't tell."""
    values = line.split(", ") if line else [None] * len(SMI)
    known = [None if value is None or value.startswith("[") else value for value in values]
    return {
        name: value if name == "driver" or value is None else float(value)
        for name, value in zip(SMI, known, strict=True)
    }


def commit() -> str | None:
    """With `+` where files differ from it."""
    return output_of("git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")


def environment() -> dict[str, str | float | None]:
    """The current card, asked while it works, and the software."""
    busy = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(1000):  # more than a second, so that nvidia-smi sees it
        busy @ busy
    index = torch.cuda.current_device()
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    query = f"--query-gpu={','.join(SMI.values())}"
    smi = output_of("nvidia-smi", "-i", uuid, query, "--format=csv,noheader,nounits")
    torch.cuda.synchronize()
    return {
        "card": torch.cuda.get_device_name(index),
        **parse_smi(smi),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "bigkern": bigkern.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def rows(
    name: str, benchmarks: list[dict], roofs: dict[str, float], where: dict[str, object]
) -> list[dict]:
    """Of pytest-benchmark's results of bench_<name>.py; roofs in FLOP/s and bytes/s."""
    found = []
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if "quartiles_ms" not in info:
            continue
        work = benchmark["name"].partition("[")[0].removeprefix("test_").replace("_", " ")
        parameters = (benchmark["params"] or {}).values()
        texts = [str(tuple(v)) if isinstance(v, list) else str(v) for v in parameters]
        found.append(
            {
                "benchmark": name,
                "case": ", ".join([work, *texts]),
                "quartiles_ms": info["quartiles_ms"],
                "missing": info.get("missing", {}),
                "flops": info.get("flops"),
                "bytes": info.get("bytes"),
                "roof": info.get("roof"),
                "roofs": roofs,
                **where,
            }
        )
    return found


def file_of(card: str) -> Path:
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '_', card.lower()).strip('_')}.json"


def save(new: list[dict]) -> Path:
    """Puts the rows, of one card, into its file: in place of those of the same benchmarks."""
    path = file_of(new[0]["card"])
    names = {row["benchmark"] for row in new}
    old = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in old if row["benchmark"] not in names]
    path.write_text(json.dumps([*kept, *new], indent=1) + "\n")
    README.write_text(readme())
    return path


def of_roof(row: dict) -> tuple[str, str]:
    """What bigkern reaches in a row, and its share of the roof."""
    seconds = row["quartiles_ms"]["bigkern"][1] / 1e3
    if not row["roof"]:
        return "-", "-"
    is_product = row["flops"] is not None
    reached = (row["flops"] if is_product else row["bytes"]) / seconds
    text = f"{reached / 1e12:.0f} TFLOP/s" if is_product else f"{reached / 1e9:.0f} GB/s"
    return text, f"{reached / row['roofs'][row['roof']]:.0%}"


def result_table(rows: list[dict]) -> str:
    """Of one benchmark. A ratio is the other's time over bigkern's."""
    others = list(dict.fromkeys(name for row in rows for name in row["quartiles_ms"]))
    others.remove("bigkern")
    lines = []
    for row in rows:
        low, ours, high = row["quartiles_ms"]["bigkern"]
        cells = []
        for name in others:
            times = row["quartiles_ms"].get(name)
            cells.append(f"{times[1]:.3f} ({times[1] / ours:.2f})" if times else "-")
        lines.append((row["case"], f"{ours:.3f} ({low:.3f}..{high:.3f})", *of_roof(row), *cells))
    header = ["", "bigkern, ms (quartiles)", "reached", "of roof"]
    return table([*header, *(f"{name}, ms (ratio)" for name in others)], lines)


def state(row: dict) -> str:
    """Card and software in a line."""
    known = {
        "driver {}": row["driver"],
        "limit {:.0f} W": row["power_limit_w"],
        "SMs at {:.0f} MHz": row["sm_clock_mhz"],
        "of {:.0f} at most": row["sm_clock_max_mhz"],
        "memory at {:.0f} MHz": row["memory_clock_mhz"],
        "torch {}": row["torch"],
        "bigkern {}": row["bigkern"],
        "commit {}": row["commit"],
        "{}": row["date"],
    }
    roofs = ", ".join(
        f"{name} {value / 1e9:.0f} GB/s" if name == "copy" else f"{name} {value / 1e12:.0f} TFLOP/s"
        for name, value in row["roofs"].items()
    )
    parts = [text.format(value) for text, value in known.items() if value is not None]
    return f"{', '.join(parts)}. Roofs, measured in the same run: {roofs}."


def gpu_sections(files: list[Path]) -> list[str]:
    parts = []
    for file in files:
        rows = json.loads(file.read_text())
        parts.append(f"## {rows[0]['card']}")
        for name, group in groupby(rows, lambda row: row["benchmark"]):
            group = list(group)
            parts += [f"### {name}", state(group[0]), result_table(group)]
    return parts or ["No GPU has been measured yet: `make gpu-bench` does it."]


def cpu_section(files: list[Path]) -> str:
    lines = [f"- [{f.stem}](results/{f.name}): {f.read_text().splitlines()[0]}" for f in files]
    return "\n".join(["## CPUs", "", *lines])


def readme(results: Path | None = None) -> str:
    """README.md with the tables of these results, RESULTS by default."""
    results = results or RESULTS
    on_cpus = sorted(results.glob("*_cpu_*.md"))
    on_gpus = [file for file in sorted(results.glob("*.json")) if "_cpu_" not in file.name]
    content = "\n\n".join([*gpu_sections(on_gpus), cpu_section(on_cpus)])
    return replace_generated(README.read_text(), "results", content)
