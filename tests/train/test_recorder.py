"""The record of a run, and what its configuration becomes when it is taken up again."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from zoo.errors import UserError
from zoo.train.config import TRAIN, CheckpointConfig, LoggerConfig, TrainConfig
from zoo.train.plot import Panel
from zoo.train.recorder import Figures, Recorder, versions
from zoo.train.resume import Changes, resumed_config
from zoo.train.runs import Run, load_checkpoint
from zoo.train.state import World

FIGURES = Figures(("epoch", "step", "loss", "score"), (Panel("loss", (("loss", "training"),), limits=(0, 1)),))
CHANGES = Changes("a resumed run", ("epochs",), ("logger.", "data."), "start a new run instead")


@dataclass
class Recorded:
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(2, 3, None))
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    log_every: int = 1
    dry_run: bool = False
    seed: int = 7


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path, Recorded(), World(torch.device("cpu")), FIGURES)


def test_when_a_checkpoint_is_due(recorder: Recorder) -> None:
    recorder.begin(10, 0)
    assert [step for step in range(1, 10) if recorder.due(step)] == [3, 6, 9]
    assert [epoch for epoch in range(1, 6) if recorder.due_after(epoch)] == [2, 4]
    recorder.cfg.checkpoint.every_seconds = 0.0
    assert recorder.due(1)


def test_best_epoch(recorder: Recorder) -> None:
    scores = [0.2, 0.1, float("nan"), 0.2, 0.3]
    assert [recorder.is_best(score, epoch) for epoch, score in enumerate(scores, 1)] == [
        True,
        False,
        False,
        False,
        True,
    ]
    assert (recorder.best, recorder.best_epoch) == (0.3, 5)


def test_files(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    recorder.begin(2, 0)
    for epoch in (1, 2):
        recorder.history.append({"epoch": epoch, "step": epoch, "loss": 0.5 / epoch, "not a column": 1})
        recorder.publish(f"epoch {epoch}")
    recorder.close()
    assert capsys.readouterr().out.startswith("epoch 1  ETA ")
    with open(recorder.run_dir / "metrics.csv") as file:
        assert list(csv.DictReader(file)) == [
            {"epoch": "1", "step": "1", "loss": "0.5", "score": ""},
            {"epoch": "2", "step": "2", "loss": "0.25", "score": ""},
        ]
    written = recorder.write_summary({"model": "m"}, step=2, seconds=1.23456, rate=None, packages=versions(csv))
    assert written == json.loads((recorder.run_dir / "summary.json").read_text())
    assert list(written)[:4] == ["model", "epochs", "steps", "seconds"]
    assert (written["epochs"], written["seconds"], written["seed"]) == (2, 1.235, 7)
    assert {"zoo", "torch", "timm", "csv"} <= written["versions"].keys()
    recorder.plot("title")
    assert (recorder.run_dir / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_best_is_written_before_the_last(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies between the two goes on from an older `last` and writes the best again."""
    order = []
    monkeypatch.setattr("zoo.train.recorder.save_checkpoint", lambda path, state, previous: order.append(path.stem))
    recorder.save({"step": 1}, "best", "last")
    assert order == ["best", "last"]


def test_a_full_disk_is_one_line(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zoo.train.recorder.save_checkpoint", full)
    with pytest.raises(UserError, match=r"No space left on device; make room and resume"):
        recorder.save({"step": 1}, "last")


def test_resume_tells_of_damage(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    recorder.resume(lambda state, path: pytest.fail("there is no checkpoint"))
    for step in (1, 2):
        recorder.save({"step": step, "history": [{"epoch": step}], "best": 0.5, "best_epoch": step}, "last")
    (recorder.checkpoints / "last.pt").write_bytes(b"damaged")

    def restore(state: dict[str, Any], path: Path) -> str:
        recorder.restore(state)
        assert path.name == "previous.pt"
        return "step 1"

    recorder.resume(restore)
    warning, line = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: checkpoint ")
    assert line.startswith("resuming from the newest intact checkpoint, ")
    assert line.endswith("previous.pt: step 1")
    assert (recorder.history, recorder.best, recorder.best_epoch) == ([{"epoch": 1}], 0.5, 1)
    assert load_checkpoint(recorder.checkpoints / "previous.pt")["step"] == 1


@pytest.fixture
def run(tmp_path: Path) -> Run:
    cfg = TrainConfig()
    cfg.model.name, cfg.data.name, cfg.data.root = "nat_mini", "imagefolder", "here"
    return Run(tmp_path, OmegaConf.to_container(OmegaConf.structured(cfg)))  # type: ignore[arg-type]


def test_what_may_change_when_a_run_is_resumed(run: Run) -> None:
    config = resumed_config(run, TRAIN, CHANGES, ["logger.wandb.mode=offline", "logger=tensorboard", "epochs=3"])
    assert (config.epochs, config.resume, config.data.root) == (3, None, "here")
    assert (config.logger.tensorboard, config.logger.wandb.mode) == (True, "offline")  # a choice, then keys inside it
    config = resumed_config(run, TRAIN, CHANGES, [f"resume={run.path}", "seed=0", "model=nat_mini", "data=imagefolder"])
    assert config == OmegaConf.create(run.config)
    assert resumed_config(run, TRAIN, CHANGES, ["data.root=there"]).data.root == "there"


@pytest.mark.parametrize("override", ["seed=1", "model=nat_tiny", "data=digits", "optim.lr=3", "made.up=1"])
def test_what_may_not(run: Run, override: str) -> None:
    with pytest.raises(UserError, match="a resumed run keeps it .what may change: epochs, logger.., data..") as caught:
        resumed_config(run, TRAIN, CHANGES, [override])
    assert override in str(caught.value)
    assert str(caught.value).endswith("start a new run instead")
