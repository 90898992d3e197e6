"""Jobs in processes of their own: messages arrive, and neither a crash nor a hang takes others along."""

import time

import jobs

from zoo.processes import Job, run


def test_endings() -> None:
    heard: list[tuple[int, object]] = []
    todo = [Job(jobs.answer, ("a", {"b": 1})), Job(jobs.fail), Job(jobs.crash), Job(jobs.leave), Job(jobs.hang, (), 8)]
    endings = run([*todo, Job(jobs.answer, (2,))], received=lambda *x: heard.append(x))
    assert [e.failure for e in endings] == [
        None,
        "ValueError: too large",
        "the process was ended by SIGKILL",
        "the process ended with exit code 3",
        "stopped after 8 s",
        None,
    ]
    assert [e.messages for e in endings] == [["a", {"b": 1}], ["before"], ["before"], [], ["before"], [2]]
    assert heard == [(i, message) for i, e in enumerate(endings) for message in e.messages]
    assert "second line" in (endings[1].details or "")
    assert all(e.begun for e in endings)
    assert endings[4].seconds >= 8


def test_side_by_side_until_the_end() -> None:
    """Two hang until the end and are stopped there; the third never begins, because no worker is free before."""
    start = time.monotonic()
    endings = run([Job(jobs.hang)] * 3, workers=2, deadline=start + 3, end=start + 4)
    assert time.monotonic() - start < 60
    assert [e.begun for e in endings] == [True, True, False]
    assert [e.failure is not None and e.failure.startswith("stopped") for e in endings] == [True, True, False]
    assert endings[2].failure == "the time was up"


def test_nothing_begins_after_the_deadline() -> None:
    (ending,) = run([Job(jobs.answer, (1,))], deadline=time.monotonic() - 1)
    assert not ending.begun
    assert ending.messages == []
