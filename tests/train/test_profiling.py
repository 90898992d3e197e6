"""profile=true, and the share of time that a run waits for data."""

import csv
import json
import time
from pathlib import Path

import pytest
from training import TINY, assert_same_run, train

from zoo.train.app import main
from zoo.train.loaders import TrainLoader


def test_where_the_time_goes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run", *TINY, "epochs=1", "profile=true", "max_steps=7")
    out, _ = capfd.readouterr()
    (line,) = [line for line in out.splitlines() if line.startswith("profile: ")]
    assert line.startswith("profile: 5 updates of ")
    shares = dict(part.strip().rsplit(" ", 2)[:2] for part in line.split(": ", 2)[2].split(";")[0].split(","))
    assert set(shares) == {"data", "preparation", "forward", "backward", "optimizer", "the rest"}
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=0.5)
    assert float(shares["backward"]) > float(shares["optimizer"])
    events = json.loads((run / "profile" / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "zoo: forward" for event in events) == 5
    assert "neighborhood_attention" in (run / "profile" / "table.txt").read_text()


def test_a_run_is_the_same_with_it(tmp_path: Path) -> None:
    assert_same_run(train(tmp_path / "a", *TINY, "epochs=1", "profile=true"), train(tmp_path / "b", *TINY, "epochs=1"))


def test_too_short_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run", *TINY, "epochs=1", "profile=true", "max_steps=2")
    assert "ended before its third update; nothing was written" in capsys.readouterr().out
    assert not (run / "profile").exists()
    assert main("train", [f"resume={run}", "max_steps=6", "profile=true"]) == 0
    assert "profile: 2 updates of " in capsys.readouterr().out
    assert (run / "profile" / "table.txt").exists()


@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_waiting_for_data(
    tmp_path: Path, pause: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(self: TrainLoader, epoch: int, start: int = 0) -> object:
        for batch in original(self, epoch, start):
            time.sleep(pause)
            yield batch

    original = TrainLoader.epoch
    monkeypatch.setattr(TrainLoader, "epoch", slow)
    run = train(tmp_path / "run", *TINY, "epochs=1", "max_steps=4")
    with open(run / "metrics.csv") as file:
        share = float(list(csv.DictReader(file))[-1]["data_wait"])
    assert 0 < share < 100
    said = f"{share:.0f} % of it waiting for data" in capsys.readouterr().out
    assert said == (share >= 20)
    if pause:
        assert share > 50
