"""The text that a language model learns, as bytes."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bigkern.train.errors import UserError

# Modules of one file each that every Python from 3.10 on has.
MODULES = """
    abc base64 bdb bisect calendar cmd code codecs codeop compileall contextlib copy csv dis
    filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext glob
    graphlib gzip hashlib heapq hmac io linecache lzma mimetypes netrc ntpath numbers operator
    os pkgutil platform plistlib poplib posixpath pprint pstats py_compile pyclbr queue quopri
    random reprlib runpy sched selectors shelve shlex socket socketserver stat symtable tabnanny
    tempfile textwrap timeit tokenize trace traceback tracemalloc types urllib/parse uuid
    warnings wave weakref webbrowser zipapp zipimport
"""
HELD_OUT = 11  # every so many modules, one is for validation
HELD_OUT_SHARE = 0.1  # of a single file: its end


@dataclass
class Text:
    train: Tensor  # [N] uint8
    validation: Tensor  # [M] uint8
    digest: str  # tells this text from others

    def __len__(self) -> int:
        return len(self.train) + len(self.validation)


def load_text(path: str | None, context: int) -> Text:
    """The file at `path`, or the source of Python's standard library, for sequences of `context`.

    Raises UserError for a file that is missing, empty, no UTF-8 or too short.
    """
    train, validation = read_library() if path is None else read_file(Path(path))
    if context >= len(validation):
        raise UserError(
            f"context must be shorter than the text, {len(train):,} bytes to train on and "
            f"{len(validation):,} held out, got {context:,}"
        )
    digest = hashlib.sha256(train + b"\0" + validation).hexdigest()
    return Text(*(to_tokens(part) for part in (train, validation)), digest)


def to_tokens(text: bytes) -> Tensor:
    """[len(text)] uint8."""
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())


def read_library() -> tuple[bytes, bytes]:
    """The modules, one after another, split by file."""
    folder = Path(sysconfig.get_path("stdlib"))
    try:
        files = [read(folder / f"{module}.py") for module in sorted(MODULES.split())]
    except UserError as error:
        raise UserError(f"{error}; name a text by --text FILE") from error
    held_out = files[::HELD_OUT]
    del files[::HELD_OUT]
    return b"".join(files), b"".join(held_out)


def read_file(path: Path) -> tuple[bytes, bytes]:
    """The text up to its last tenth, and this."""
    text = read(path)
    size = int(len(text) * (1 - HELD_OUT_SHARE))
    return text[:size], text[size:]


def read(path: Path) -> bytes:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not text:
        raise UserError(f"{path} is empty")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    return text
