"""Jobs for `zoo.processes`, as a fresh process imports them."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

Report = Callable[[Any], None]


def answer(report: Report, *words: Any) -> None:
    for word in words:
        report(word)


def fail(report: Report) -> None:
    report("before")
    raise ValueError("too large\nsecond line")


def crash(report: Report) -> None:
    report("before")
    os.kill(os.getpid(), signal.SIGKILL)


def leave(report: Report) -> None:
    os._exit(3)


def hang(report: Report) -> None:
    report("before")
    time.sleep(600)
