"""How a run ends early: by a signal, after its state is saved, or because it cannot go on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Interrupted", "Signals", "TrainingFailed"]


class Interrupted(BaseException):
    """A signal stopped the run after its state was saved. No Exception, so that a sweep stops with its job."""


class TrainingFailed(Exception):
    """The run cannot go on, such as after a loss that is no number."""


class Signals:
    """SIGTERM and SIGINT ask once for an orderly stop; the second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle both signals inside the block."""
        previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
