"""The error that a command reports in one line, the line of another's error, and a reader that has gone away."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["UserError", "first_line", "unbroken_output"]


class UserError(Exception):
    """Something that the user can mend: the message names the thing and the remedy; commands exit with code 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Unbroken:
    """A stream whose reader may go away, as `head` does: what nobody reads is let go."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except BrokenPipeError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._let_go()

    def _let_go(self) -> None:
        """Let the descriptor lead nowhere, also for what the interpreter flushes at its end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def unbroken_output() -> Iterator[None]:
    """Go on inside the block when nobody reads the output any more: a training is not lost to `| head`."""
    stream = sys.stdout
    guard = _Unbroken(stream)
    sys.stdout = guard
    try:
        yield
    finally:
        guard.flush()
        if sys.stdout is guard:
            sys.stdout = stream
