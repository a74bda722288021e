"""UserError, and two helpers that turn common failures into one."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

PIP_NAME = {"sklearn": "scikit-learn", "PIL": "pillow"}


class UserError(Exception):
    """What the user can put right. The command line prints it without a traceback."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block (a full disk, no permission) into a UserError naming `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def require(module: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or raise a UserError saying what to install for `purpose`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        package = PIP_NAME.get(package, package)
        raise UserError(f"{purpose} needs {package}: pip install {package} ({error})") from error
