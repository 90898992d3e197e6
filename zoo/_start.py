"""Ctrl-C while a command imports what it needs: one line, whatever a half-imported extension would make of it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["importing"]


def _leave(number: int, frame: Any) -> None:
    os.write(2, b"zoo: interrupted before it began\n")
    os._exit(130)


@contextmanager
def importing() -> Iterator[None]:
    """End the process at once on SIGINT inside the block, as long as Python's own handler is in charge."""
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
