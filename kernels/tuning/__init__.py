"""Tile sizes of the Triton kernels: a table for each architecture, nothing is timed at run time.

A row of ``<arch>.json`` says which tiles an `op` has for a `dtype` and a class of `shape`, and
where it comes from: ``"model"``, chosen by occupancy and what the compiler reports, or the card,
date and commit of a measurement. ``bigkern tune-kernels`` measures the card at hand; what it writes
is used where ``BIGKERN_TUNING`` names the file.
"""

import contextlib
import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

_FOLDER = Path(__file__).parent
ARCHITECTURES = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))
# Those whose blocks have 99 KiB of shared memory, as on sm_120; on sm_80 they have 163.
_LIKE = {"sm_86": "sm_120", "sm_89": "sm_120"}


def table_for(architecture: str) -> str:
    """The table that serves `architecture`: its own, or that of the nearest."""
    if architecture in ARCHITECTURES:
        return architecture
    if architecture in _LIKE or not architecture.startswith("sm_"):
        return _LIKE.get(architecture, "gfx942")
    older = [a for a in ARCHITECTURES if a.startswith("sm_") and _number(a) < _number(architecture)]
    return max(older, key=_number, default="sm_80")


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm_"))


def architecture() -> str:
    """Of the current device, such as ``sm_90``; in Triton's interpreter ``sm_80``."""
    from triton import knobs
    from triton.runtime import driver

    return "sm_80" if knobs.runtime.interpret else _architecture(driver.active.get_current_device())


@functools.cache
def _architecture(device: Any) -> str:
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def num_sms() -> int:
    """Multiprocessors of the current device; in Triton's interpreter an A100's."""
    from triton import knobs
    from triton.runtime import driver

    return 108 if knobs.runtime.interpret else _num_sms(driver.active.get_current_device())


@functools.cache  # the driver takes a millisecond, for the clocks
def _num_sms(device: Any) -> int:
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def lookup(op: str, dtype: torch.dtype, **shape_class: int) -> dict[str, int]:
    """Tile sizes, num_warps and num_stages of the nearest row for the current device.

    Near are rows of the same dtype, or else of the same width, whose `shape` differs by the fewest
    doublings; of equally near ones the first, the user's before the package's.

    >>> lookup("attention", torch.bfloat16, E=80)
    {'BLOCK_Q': 128, 'BLOCK_KV': 64, 'num_warps': 8, 'num_stages': 3}
    """
    if op == _tried[0]:
        return dict(_tried[1])
    shape = tuple(sorted(shape_class.items()))
    return dict(_lookup(architecture(), users_table(), op, dtype, shape))


_tried: tuple[str, Any] = ("", ())


@contextlib.contextmanager
def tried(op: str, config: dict[str, int]) -> Iterator[None]:
    """All lookups of `op` give `config`."""
    global _tried
    previous, _tried = _tried, (op, tuple(config.items()))
    try:
        yield
    finally:
        _tried = previous


def state() -> tuple:
    """What lookups depend on."""
    return architecture(), users_table(), _tried


@functools.cache
def _lookup(
    architecture: str, users: str, op: str, dtype: torch.dtype, shape: tuple[tuple[str, int], ...]
) -> dict[str, int]:
    candidates = [row for row in rows(architecture, users) if row["op"] == op]
    if not candidates:
        raise KeyError(f"no row of {op} in {_FOLDER / table_for(architecture)}.json")
    return min(candidates, key=lambda row: _distance(row, dtype, dict(shape)))["config"]


def _distance(row: Row, dtype: torch.dtype, shape: dict[str, int]) -> tuple[float, float]:
    other = getattr(torch, row["dtype"])
    of_dtype = 0 if other == dtype else 1 if other.itemsize == dtype.itemsize else 2
    sizes = ((n, shape.get(key, n)) for key, n in row["shape"].items())
    doublings = (abs(math.log2(max(n, 1) / max(other_n, 1))) for n, other_n in sizes)
    return of_dtype, sum(doublings)


def users_table() -> str:
    """The file, if there is one."""
    return os.environ.get("BIGKERN_TUNING", "")


def rows(architecture: str, users: str = "") -> list[Row]:
    """Those of the table for `architecture`; first the ones of the file `users`, which holds
    ``{architecture: [row, ...]}``."""
    shipped = json.loads((_FOLDER / f"{table_for(architecture)}.json").read_text())
    return [*(_users_rows(users, architecture) if users else []), *shipped]


def _users_rows(file: str, architecture: str) -> list[Row]:
    try:
        found = json.loads(Path(file).read_text()).get(architecture, [])
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"BIGKERN_TUNING must name a table of tile sizes, got {file}: {error}"
        ) from None
    for row in found:
        if not (isinstance(row, dict) and {"op", "dtype", "shape", "config"} <= row.keys()):
            raise ValueError(
                f"BIGKERN_TUNING: rows need op, dtype, shape and config, got {row} in {file}"
            )
    return found
