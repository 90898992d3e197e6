"""What is printed where there is no terminal: a line at least every 30 s, and rates that say something."""

import pytest

from zoo.train.loggers import Console, Heartbeat, rate_text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(1234.5, "1234 images/s"), (12.34, "12 images/s"), (9.96, "10 images/s"), (3.14, "3.1 images/s"),
     (1.0, "1.0 images/s"), (0.25, "4.0 s/image"), (0.004, "250.0 s/image"), (0.0, "0.0 images/s")],
)  # fmt: skip
def test_rates(rate: float, text: str) -> None:
    assert rate_text(rate) == text


def test_a_line_every_30_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    console = Console(1000, 0, every=500)
    console.heart = Heartbeat(clock=lambda: now[0])
    for second in range(1, 101):
        now[0] = float(second)
        assert console.quiet == (second % 30 == 0)
        console.step("1/1", 0.5, 0.5, 1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("step ")[1].split("/")[0] for line in lines] == ["30", "60", "90"]
    assert all("2.0 s/image" in line for line in lines)
    console.remark("evaluating: 64 images")
    assert capsys.readouterr().out == "", "a line was printed 10 seconds ago"
    now[0] = 121.0
    console.remark("evaluating: 64 images")
    assert capsys.readouterr().out == "evaluating: 64 images\n"


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(1000, 0, every=1, enabled=False)
    console.heart = Heartbeat(seconds=0.0)
    assert not console.quiet
    console.step("1/1", 0.5, 0.5, 1e-3)
    console.remark("x")
    assert capsys.readouterr().out == ""
