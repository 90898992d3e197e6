"""Jobs in processes of their own: one that hangs, crashes or ruins its GPU context ends alone, and within its time."""

import contextlib
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["Ending", "Job", "run"]


@dataclass(frozen=True)
class Job:
    """`function(report, *arguments)`; what it hands to `report` reaches the caller at once.

    function: importable by name in a fresh process.
    limit: seconds after which the process is killed.
    """

    function: Callable[..., None]
    arguments: tuple[Any, ...] = ()
    limit: float = math.inf


@dataclass
class Ending:
    """How a job ended: failure is None where it returned; begun is False where the deadline came first."""

    failure: str | None = "the time was up"
    begun: bool = False
    details: str | None = None
    seconds: float = 0.0
    messages: list[Any] = field(default_factory=list)


def run(
    jobs: Sequence[Job],
    *,
    workers: int = 1,
    method: str = "forkserver",
    deadline: float = math.inf,
    end: float = math.inf,
    preload: Sequence[str] = (),
    received: Callable[[int, Any], None] | None = None,
) -> list[Ending]:
    """Run the jobs in order, `workers` at a time, each in a process forked from a server without a GPU context.

    Args:
        method: "spawn" imports everything anew for every job, where forking is ruled out.
        deadline, end: time.monotonic() after which no job is begun, and at which those that still run are killed.
        preload: modules that the server imports once for all; "__main__" among them.
        received: is called with a job's number and each of its messages; an Ending keeps them as well.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that asks CUDA itself cannot be forked
    context: Any = multiprocessing.get_context(method)
    context.set_forkserver_preload([*preload, __name__])
    waiting, endings = deque(range(len(jobs))), [Ending() for _ in jobs]
    running: dict[Connection, _Running] = {}
    try:
        while True:
            while waiting and len(running) < workers and time.monotonic() < deadline:
                number = waiting.popleft()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_child, args=(theirs, jobs[number].function, jobs[number].arguments), daemon=True
                )
                process.start()
                theirs.close()
                now = time.monotonic()
                running[ours] = _Running(number, process, now, min(end, now + jobs[number].limit))
                endings[number] = Ending("it ended without a word", begun=True)
            if not running:
                return endings
            _listen(running, endings, received)
    finally:
        for job in running.values():
            job.process.kill()


@dataclass(frozen=True)
class _Running:
    number: int
    process: Any
    start: float
    end: float


def _listen(
    running: dict[Connection, _Running], endings: list[Ending], received: Callable[[int, Any], None] | None
) -> None:
    """Take messages until one job ends, or the first one's time is up."""
    first = min(job.end for job in running.values())
    for connection in wait(list(running), None if first == math.inf else max(0.0, first - time.monotonic())):
        assert isinstance(connection, Connection)
        job = running[connection]
        ending = endings[job.number]
        try:
            kind, body = connection.recv()
        except (EOFError, OSError):
            job.process.join(5)
            kind, body = "end", (_died(job.process.exitcode), None)
        if kind == "message":
            ending.messages.append(body)
            if received is not None:
                received(job.number, body)
        else:
            ending.failure, ending.details = body
            _stop(connection, running, ending)
    for connection, job in list(running.items()):
        if time.monotonic() >= job.end:
            endings[job.number].failure = f"stopped after {job.end - job.start:.0f} s"
            _stop(connection, running, endings[job.number])


def _stop(connection: Connection, running: dict[Connection, _Running], ending: Ending) -> None:
    """All that counts was said: a process that still tears its GPU context down is not waited for."""
    job = running.pop(connection)
    ending.seconds = time.monotonic() - job.start
    connection.close()
    job.process.kill()
    job.process.join(5)


def _died(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def _child(connection: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    def report(message: Any) -> None:
        connection.send(("message", message))

    failure = details = None
    try:
        function(report, *arguments)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        failure, details = f"{type(error).__name__}: {lines[0]}".removesuffix(": "), traceback.format_exc()
    connection.send(("end", (failure, details)))
