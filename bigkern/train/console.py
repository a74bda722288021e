"""What the training loop shows on a terminal and hears from it."""

import contextlib
import functools
import importlib.util
import signal
import sys
import threading
from collections.abc import Callable, Iterator


def warn(message: str) -> None:
    print(f"bigkern: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(done: int, total: int) -> Iterator[tuple[Callable, Callable]]:
    """Yield `say(line)` and `advance()`, which moves a bar on a terminal if tqdm is installed."""
    if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(initial=done, total=total, unit="step") as bar:
            yield bar.write, bar.update
    else:
        yield functools.partial(print, flush=True), lambda: None


@contextlib.contextmanager
def interrupt_flag() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that no step is cut in half. A second one stops at
    once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which alone receives signals
        yield flag
        return

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_interrupt(*_: object) -> None:
        flag.set()
        restore()

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, on_interrupt) for number in numbers}
    try:
        yield flag
    finally:
        restore()
