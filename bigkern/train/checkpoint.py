"""Checkpoints that survive a kill at any moment, and are refused when damaged or foreign.

A run's folder holds `config.json` and `checkpoint-<steps done>.pt`, the latest two. A checkpoint is
a file of `torch.save`, which `torch.load(path, weights_only=True)` reads, followed by its SHA-256.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from bigkern.train import distributed
from bigkern.train.config import TrainConfig
from bigkern.train.console import warn
from bigkern.train.errors import UserError, writing

FORMAT = "bigkern checkpoint 1"
SEAL = b"bigkern-sha256:"  # after torch.save's bytes, and before the digest of these in hex
SEAL_SIZE = len(SEAL) + 64

T = TypeVar("T")


class CheckpointError(UserError):
    """A checkpoint that can't be used, with its path and the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"checkpoint {path} is refused: {reason}")


@dataclass
class RunState:
    """What a checkpoint holds besides its step and the state of torch's random generators."""

    identity: dict[str, Any]  # plain values that tell this run from others
    config: TrainConfig
    parts: dict[str, Any]  # model, optimizer, scaler: what has a state_dict
    device: torch.device


class _HashingFile:
    """What torch.save writes to: passes the bytes on and digests them.

    It keeps an error for later, since torch.save would hide it behind one of its own.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` at the end of the block: whole and on disk, or not at all.

    Raises UserError where the disk is full or the folder can't be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def open_run(folder: Path, run: RunState, resume: bool) -> int:
    """Create `folder` for a new run, or restore the one in it; return the steps it has done.

    Raises UserError where a new run meets an old one, or the folder can't be written or restored.
    """
    step = 0
    if resume:
        step = restore(folder, run)
        steps = distributed.gather(step)
        if len(set(steps)) > 1:
            raise UserError(f"all processes must see {folder}, but they found the steps {steps}")
    if distributed.leads():
        if not resume and ((folder / "config.json").exists() or list_checkpoints(folder)):
            raise UserError(f"{folder} holds a run: go on with --resume {folder}, or change --out")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"task": run.identity["task"], **asdict(run.config)})
    if step == 0:
        save_checkpoint(folder, step, run)
    return step


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, latest first."""
    found = [p for p in folder.glob("checkpoint-*.pt") if re.fullmatch(r"checkpoint-\d+", p.stem)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint-"))


def save_checkpoint(folder: Path, step: int, run: RunState) -> None:
    """Save `run` after `step` steps, keep the checkpoint before it, and delete all others.

    All processes call it, and the leader saves the random generators of all.
    """
    rng, *rng_of_others = distributed.gather(rng_state(run.device))
    if not distributed.leads():
        return
    path = folder / f"checkpoint-{step:08d}.pt"
    state = {
        "format": FORMAT,
        "step": step,
        "identity": run.identity,
        "config": asdict(run.config),
        "rng": rng,
        "rng_of_others": rng_of_others,
        **{name: part.state_dict() for name, part in run.parts.items()},
    }
    with atomic_file(path) as file:
        hashing = _HashingFile(file)
        torch.save(state, hashing)
        if hashing.error:
            raise hashing.error
        file.write(SEAL + hashing.sha256.hexdigest().encode())
    saved = list_checkpoints(folder)
    before = [p for p in saved if _step_of(p) < step]
    halves = folder.glob("checkpoint-*.pt.tmp")  # left by a kill
    for stale in {*saved, *halves} - {path, *before[:1]}:
        stale.unlink()


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """That of torch's generators, of the CPU's and the device's."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def restore(folder: Path, run: RunState) -> int:
    """Load the latest usable checkpoint into `run`, and torch's generators; return its step.

    A run that was killed before its first checkpoint is at step 0. Raises UserError where no
    checkpoint can be used.
    """

    def use(path: Path, state: dict[str, Any]) -> int:
        # A run that was saved before an option existed has its default.
        found = {field.name: field.default for field in fields(run.config)} | state["identity"]
        for name, value in run.identity.items():
            if found.get(name) != value:
                raise CheckpointError(
                    path, f"it is of another run: its {name} is {found.get(name)}, not {value}"
                )
        try:
            for name, part in run.parts.items():
                part.load_state_dict(state[name])
            rng = [state["rng"], *state.get("rng_of_others", [])]
            if distributed.rank() < len(rng):  # else there are more processes than before
                set_rng_state(rng[distributed.rank()], run.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(path, f"its state doesn't fit ({error})") from error
        return state["step"]

    return load_latest(folder, use) if list_checkpoints(folder) else 0


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU. Raises CheckpointError for one that is damaged or foreign."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size - SEAL_SIZE
            sha256 = hashlib.sha256()
            for start in range(0, size, 1 << 20):
                sha256.update(file.read(min(1 << 20, size - start)))
            seal = file.read(SEAL_SIZE)
            if not seal.startswith(SEAL):
                raise CheckpointError(path, "it is cut short, or bigkern didn't write it")
            if seal != SEAL + sha256.hexdigest().encode():
                raise CheckpointError(path, "it is damaged: its SHA-256 is not the one at its end")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(path, f"it can't be read ({error.strerror or error})") from error
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(path, f"torch can't load it ({error})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(path, f"its format is not {FORMAT!r}")
    return state


def load_latest(folder: Path, use: Callable[[Path, dict[str, Any]], T]) -> T:
    """Return `use(path, state)` for the latest checkpoint in `folder` that isn't refused.

    A CheckpointError, of loading or of `use`, is printed, and the checkpoint before it tried.
    Raises UserError where none is left.
    """
    paths = list_checkpoints(folder)
    if not paths:
        raise UserError(f"there is no checkpoint in {folder}")
    for path in paths:
        try:
            result = use(path, load_checkpoint(path))
        except CheckpointError as error:
            warn(str(error))
            continue
        if path != paths[0]:
            warn(f"going on with the one before it, {path}")
        return result
    raise UserError(f"no usable checkpoint is left in {folder}")
