"""What the compiled CUDA kernels allow, without a GPU: resources, occupancy, instructions, bytes
moved, and from these the most of a card's peak that each can reach.

python benchmarks/static_report.py [--all] [--json] [--no-emulator]

The bound. A main loop (cubins.py) takes at least the cycles of its busiest unit, with every warp
in it and all latencies hidden. Each quarter of an SM issues one instruction of a warp a cycle; a
product m16n8k16 of half precision, or m16n8k32 of int8, takes 8 cycles of a quarter's tensor core
on an A100 and 4 on an H100 (1024 and 2048 multiply-adds a cycle and SM: NVIDIA's whitepapers of
both), but mma.sync reaches only about 63 % of that on an H100 (Luo et al., arXiv:2402.13499);
shared memory moves 128 bytes a cycle for all four quarters; 16 exponentials, 64 integer or
logical operations and comparisons, and 64 (A100) or 128 (H100) float32 operations are started a
cycle and SM (CUDA C++ Programming Guide, arithmetic throughput). So

    share of the tensor cores' peak <= cycles of the products at peak / cycles of the busiest unit

of one pass of the loop; what isn't done in every pass, masks and dropout, is left out. A call
(traffic.py) besides takes at least the time for which L2 serves the sectors that the emulator saw
its warps ask for (5120 bytes a cycle: the A100's whitepaper, taken for the H100 too), and DRAM
the bytes that it must read and write. Its bound is a share of the roofline: of the tensor cores'
peak or of DRAM's bandwidth, whichever is nearer.
"""

import argparse
import ctypes
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from cubins import Instruction, Kernel, NoToolError, find_in_toolkit, read_kernels, run
from generated import table
from traffic import NoCompilerError, emulate_all

from bigkern import libraries

KB = 1024
ISSUE = "issue"
TENSOR = "tensor cores"


@dataclass(frozen=True)
class Card:
    name: str
    arch: str  # whose machine code runs on it
    capability: tuple[int, int]
    threads_per_sm: int
    smem_per_sm: int
    smem_per_block: int


@dataclass(frozen=True)
class Peak:
    """Of a card's tensor cores and memory: `flops` of half precision; int8 has twice as many."""

    flops: float
    dram: float  # bytes a second
    l2: float
    mma_share: float  # of the tensor cores' peak by mma.sync
    fp32_cycles: int  # of a quarter of an SM, for a warp


CARDS = (
    Card("A100", "sm_80", (8, 0), 2048, 164 * KB, 163 * KB),
    Card("RTX 4090", "sm_80", (8, 9), 1536, 100 * KB, 99 * KB),
    Card("H100", "sm_90a", (9, 0), 2048, 228 * KB, 227 * KB),
)
PEAKS = {
    "A100": Peak(312e12, 2.039e12, 5120 * 1.41e9, 1.0, 2),
    "H100": Peak(989e12, 3.35e12, 5120 * 1.755e9, 0.63, 1),
}
# Cycles of a quarter of an SM of an A100 at its peak; half of it on an H100.
PRODUCT_CYCLES = {
    r"HMMA\.16816": 8,
    r"HMMA\.1688\.F32\.TF32": 8,
    r"HMMA\.1688": 4,
    r"HMMA\.1684": 4,
    r"IMMA\.16832": 8,
    r"IMMA\.16816": 4,
}
INTEGER = r"IADD3|VIADD|IABS|LOP3|SHF|LEA|PRMT|I?SEL|FSEL|[IF]SETP|V?IMNMX|FMNMX"
FLOAT = r"FFMA|FMUL|FADD|IMAD"


def product_cycles(instruction: Instruction, card: str) -> float:
    """At the tensor cores' peak."""
    for pattern, cycles in PRODUCT_CYCLES.items():
        if re.match(pattern, instruction.opcode):
            return cycles / (2 if card == "H100" else 1)
    raise ValueError(f"{instruction.opcode} isn't in PRODUCT_CYCLES")


def shared_memory_cycles(opcode: str) -> int:
    """Of a warp, four times those of the SM. LDS and STS may be of one address for all lanes."""
    name, *modifiers = opcode.split(".")
    if name == "LDSM":
        return 4 * int(modifiers[-1] if modifiers[-1].isdigit() else 1)
    if name == "LDGSTS":
        return 16 if "128" in modifiers else 8 if "64" in modifiers else 4
    return 4 if name in ("LDS", "STS", "ATOMS") else 0


def unit_cycles(loop: Iterable[Instruction], card: str) -> dict[str, float]:
    """For one warp's pass of the loop, cycles of each unit of its quarter of an SM."""
    peak = PEAKS[card]
    cycles = dict.fromkeys(
        (ISSUE, TENSOR, "shared memory", "exponentials", "integers", "float32"), 0.0
    )
    for instruction in loop:
        name = instruction.opcode.split(".")[0]
        cycles[ISSUE] += 1
        if instruction.is_matrix_product:
            cycles[TENSOR] += product_cycles(instruction, card) / peak.mma_share
        cycles["shared memory"] += shared_memory_cycles(instruction.opcode)
        cycles["exponentials"] += 8 * (name == "MUFU")
        cycles["integers"] += 2 * bool(re.fullmatch(INTEGER, name))
        cycles["float32"] += peak.fp32_cycles * bool(re.fullmatch(FLOAT, name))
    return cycles


@dataclass(frozen=True)
class Bound:
    share: float
    limit: str  # the busiest unit


def loop_bound(kernel: Kernel, card: str) -> Bound | None:
    """The most of the tensor cores' peak that the main loop allows; None without products."""
    loop = kernel.main_loop
    at_peak = sum(product_cycles(i, card) for i in loop if i.is_matrix_product)
    if not at_peak:
        return None
    units = unit_cycles(loop, card)
    limit = max(units, key=units.get)
    return Bound(at_peak / units[limit], limit)


class Occupancy:
    """Blocks per SM by the toolkit's cuda_occupancy.h, compiled here."""

    def __init__(self) -> None:
        header = find_in_toolkit("include/cuda_occupancy.h")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "occupancy.so"
            source = Path(__file__).with_name("occupancy.cpp")
            run("c++", "-O1", "-fPIC", "-shared", f"-I{header.parent}", source, "-o", library)
            self._function = ctypes.CDLL(str(library)).blocks_per_sm

    def __call__(self, kernel: Kernel, card: Card, dynamic_smem: int = 0) -> int:
        """0 where the card can't launch it."""
        return self._function(
            *card.capability,
            card.threads_per_sm,
            card.smem_per_sm,
            card.smem_per_block,
            kernel.registers,
            kernel.max_threads,
            kernel.static_smem,
            dynamic_smem,
            kernel.max_threads,
        )


def row(kernel: Kernel, dynamic_smem: int | None, occupancy: Occupancy) -> dict:
    """All about one kernel. `dynamic_smem` is None where no call in the emulator used it."""
    loop = kernel.main_loop
    products = sum(i.is_matrix_product for i in loop)
    cards = [card for card in CARDS if card.arch == kernel.arch]
    bounds = {c.name: loop_bound(kernel, c.name) for c in cards if c.name in PEAKS}
    return {
        "kernel": kernel.name,
        "arch": kernel.arch,
        "registers": kernel.registers,
        "spills": kernel.spills,
        "stack_bytes": kernel.stack_bytes,
        "threads": kernel.max_threads,
        "static_smem": kernel.static_smem,
        "dynamic_smem": dynamic_smem,
        "blocks_per_sm": {c.name: occupancy(kernel, c, dynamic_smem or 0) for c in cards},
        **{name: kernel.count(name) for name in ("HMMA", "IMMA", "LDSM", "LDGSTS")},
        "loop_products": products,
        "loop_instructions": len(loop) if products else 0,
        "bounds": {name: asdict(bound) for name, bound in bounds.items() if bound},
    }


HEADER = (
    "kernel", "arch", "registers", "spills", "threads", "shared memory", "blocks per SM", "HMMA",
    "IMMA", "LDSM", "LDGSTS", "products in the main loop", "at most of peak",
)  # fmt: skip


def span(values: Iterable[float], form: str = "{}") -> str:
    """As one number or as low..high; `-` for none."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}..{high}"


def cells(rows: list[dict]) -> list[str]:
    """One line of the table, for kernels of one architecture."""
    first = rows[0]
    name = first["kernel"]
    if len(rows) > 1:
        name = f"{name.partition('<')[0]} ({len(rows)})"
    smem = span(r["static_smem"] for r in rows)
    dynamic = span(r["dynamic_smem"] for r in rows)
    blocks = [f"{c} {span(r['blocks_per_sm'][c] for r in rows)}" for c in first["blocks_per_sm"]]
    shares = [r["loop_products"] / r["loop_instructions"] for r in rows if r["loop_products"]]
    bounds = [
        f"{card} {span((r['bounds'][card]['share'] for r in found), '{:.0%}')} "
        f"({', '.join(sorted({r['bounds'][card]['limit'] for r in found}))})"
        for card in PEAKS
        if (found := [r for r in rows if card in r["bounds"]])
    ]
    return [
        name,
        first["arch"],
        *(span(r[key] for r in rows) for key in ("registers", "spills", "threads")),
        smem if dynamic == "-" else f"{smem} + {dynamic}",
        ", ".join(blocks),
        *(span(r[key] for r in rows) for key in ("HMMA", "IMMA", "LDSM", "LDGSTS")),
        span(shares, "{:.0%}"),
        ", ".join(bounds) or "-",
    ]


def kernel_table(rows: list[dict], groups: bool) -> str:
    def key(r: dict) -> tuple[str, str]:
        name = r["kernel"].partition("<")[0] if groups else r["kernel"]
        return name, r["arch"]

    return table(HEADER, (cells(list(g)) for _, g in groupby(sorted(rows, key=key), key)))


def call_bound(call: dict, bounds: dict[str, float], card: str) -> Bound:
    """Of the roofline. `bounds`: the share of the tensor cores' peak by kernel."""
    peak = PEAKS[card]
    loops = [bounds[name] for name in call["kernels"] if name in bounds]
    products = call["flops"] / (peak.flops * call["rate"])
    times = {
        "main loop": products / min(loops, default=1.0),
        "DRAM": call["least"] / peak.dram,
        "L2": call["moved"] / peak.l2,
    }
    limit = max(times, key=times.get)
    return Bound(max(products, times["DRAM"]) / times[limit], limit)


def call_table(calls: list[dict], rows: list[dict]) -> str:
    lines = []
    for call in calls:
        bounds = []
        for card in (c for c in CARDS if c.name in PEAKS):
            loops = {
                r["kernel"]: r["bounds"][card.name]["share"]
                for r in rows
                if r["arch"] == card.arch and card.name in r["bounds"]
            }
            bound = call_bound(call, loops, card.name)
            bounds.append(f"{bound.share:.0%} ({bound.limit})")
        moved = call["emulated_read"] + call["emulated_written"]
        lines.append(
            [
                f"{call['call']}, {tuple(call['emulated_size'])}",
                ", ".join(dict.fromkeys(name.partition("<")[0] for name in call["kernels"])),
                f"{call['emulated_read']:,} + {call['emulated_written']:,}",
                f"{call['emulated_least']:,}",
                f"{moved / call['emulated_least']:.2f}",
                str(tuple(call["size"])),
                *bounds,
            ]
        )
    header = [
        "emulated call",
        "kernels",
        "bytes read + written",
        "at least",
        "ratio",
        "larger call",
    ]
    return table([*header, *(f"at most of an {card}'s roofline" for card in PEAKS)], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--all", action="store_true", help="every kernel on a line of its own")
    parser.add_argument("--json", action="store_true", help="all as JSON")
    parser.add_argument("--no-emulator", action="store_true", help="leave out what calls move")
    args = parser.parse_args()
    if problem := libraries.problems["_C_cuda"]:
        print(problem, file=sys.stderr)
        return 1
    try:
        calls, dynamic_smem = ([], {}) if args.no_emulator else emulate_all()
        occupancy = Occupancy()
        kernels = read_kernels(libraries.path("_C_cuda"))
    except (NoToolError, NoCompilerError) as obstacle:
        print(obstacle, file=sys.stderr)
        return 1
    rows = [row(kernel, dynamic_smem.get(kernel.name), occupancy) for kernel in kernels]
    if args.json:
        print(json.dumps({"kernels": rows, "calls": calls}, indent=1))
        return 0
    print(kernel_table(rows, groups=not args.all))
    if calls:
        print(f"\n{call_table(calls, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
