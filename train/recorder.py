"""What a run writes down as it goes on: checkpoints, metrics.csv, the logs, and at its end summary.json and curves.png.

Classification and detection record alike. What differs is the state that a checkpoint holds, which they make
themselves, and the figures that they measure.
"""

import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import timm
import torch
from omegaconf import OmegaConf

from zoo import __version__
from zoo.errors import UserError
from zoo.train.config import CheckpointConfig, LoggerConfig
from zoo.train.loggers import Console, Loggers, write_csv
from zoo.train.plot import Panel, plot_curves
from zoo.train.runs import FOLDER_KEYS, json_text, newest_intact, save_checkpoint, write_atomic, write_config
from zoo.train.state import World

__all__ = ["Figures", "Recorder", "git_revision", "versions"]


class RecordedConfig(Protocol):
    """The keys that all configurations of runs have."""

    checkpoint: CheckpointConfig
    logger: LoggerConfig
    log_every: int
    dry_run: bool
    seed: int


@dataclass(frozen=True)
class Figures:
    """What a kind of run measures: the columns of metrics.csv and the panels of curves.png."""

    columns: tuple[str, ...]
    panels: tuple[Panel, ...]
    dpi: int = 120


class Recorder:
    """The record of a run, in one of its processes, of which the first one writes.

    Args:
        run_dir: the run folder, which exists.
        cfg: the configuration of the run.
        world: the processes of the run.
        figures: what the rows of its history hold; a row has `epoch` and `step`.
    """

    def __init__(self, run_dir: Path, cfg: RecordedConfig, world: World, figures: Figures) -> None:
        self.run_dir, self.cfg, self.world, self.figures = run_dir, cfg, world, figures
        self.checkpoints = run_dir / "checkpoints"
        self.history: list[dict[str, Any]] = []  # one row per epoch
        self.best, self.best_epoch = -1.0, 0
        self.console: Console | None = None  # None until the record begins
        self.loggers: Loggers | None = None

    # -- beginning

    def resume(self, restore: Callable[[dict[str, Any], Path], str]) -> None:
        """Go on from the newest intact checkpoint, if there is one.

        Args:
            restore: takes its state and path, and says where the run then is.

        Raises:
            UserError: there are checkpoints and none is intact, or the state does not fit.
        """
        found = newest_intact(self.run_dir)
        if found is None:
            return
        path, state, problems = found
        position = restore(state, path)
        if not self.world.is_primary:
            return
        for problem in problems:
            print(f"warning: {problem}", flush=True)
        intact = "the newest intact checkpoint, " if problems else ""
        print(f"resuming from {intact}{path}: {position}", flush=True)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the record in a checkpoint's state."""
        self.history = [dict(row) for row in state["history"]]
        self.best, self.best_epoch = state["best"], state["best_epoch"]

    def begin(self, total: int, done: int) -> None:
        """Open the logs of a run of `total` updates, of which some are done, and write down its configuration.

        Nothing is written to a resumed run before, so that a start that fails leaves it as it was.

        Raises:
            UserError: a logger refuses.
        """
        if self.world.is_primary:
            for leftover in self.checkpoints.glob(".*.tmp"):
                leftover.unlink()
            config: Any = OmegaConf.to_container(OmegaConf.structured(self.cfg))
            self.loggers = Loggers(self.cfg.logger, self.run_dir, config, done)
            write_config(self.run_dir, self.cfg)
            self._write_metrics()
        self.console = Console(total, done, self.cfg.log_every, self.world.is_primary)
        self.saved_at = time.monotonic()

    @property
    def begun(self) -> bool:
        """Whether the logs are open, or were."""
        return self.console is not None

    # -- on the way

    def step(self, epoch: str, step: int, loss: float | None, lr: float, rate: float) -> None:
        """Report an update; `loss` is None where reading it would stall the device, `rate` is in images per second."""
        if self.console is not None:
            self.console.step(epoch, loss, rate, lr)
        if self.loggers is not None and step % self.cfg.log_every == 0:
            self.loggers.log({"train/loss": loss, "train/lr": lr, "train/images_per_second": rate}, step)

    @property
    def quiet(self) -> bool:
        """Whether the loss is to be read for a line that is due where there is no terminal."""
        return self.console is not None and self.console.quiet

    def remark(self, line: str) -> None:
        """Say what is done between updates, where nothing was said for long."""
        if self.console is not None:
            self.console.remark(line)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after an update; all processes ask."""
        cfg = self.cfg.checkpoint
        if cfg.every_steps is not None and step % cfg.every_steps == 0:
            return True
        return cfg.every_seconds is not None and self.world.any(time.monotonic() - self.saved_at >= cfg.every_seconds)

    def due_after(self, epoch: int) -> bool:
        """Whether a checkpoint is due after so many epochs, were it neither the best nor the last one."""
        return epoch % self.cfg.checkpoint.every_epochs == 0

    def is_best(self, score: float, epoch: int) -> bool:
        """Take in the score of an epoch; whether it is the best so far."""
        if not score > self.best:  # a score that is no number is never the best
            return False
        self.best, self.best_epoch = score, epoch
        return True

    def save(self, state: Mapping[str, Any], *names: str) -> None:
        """Write a state under names, in this order: `best` before `last`, so that a crash between them is made good.

        Raises:
            UserError: the disk refuses.
        """
        if self.world.is_primary:
            state = {"config": self._config(), **state}
            try:
                for name in names:
                    kept = "previous.pt" if name == "last" else None
                    save_checkpoint(self.checkpoints / f"{name}.pt", state, previous=kept)
            except OSError as error:
                raise UserError(
                    f"cannot write the checkpoint in {self.checkpoints}: {error}; make room and resume"
                ) from error
        if "last" in names:
            self.saved_at = time.monotonic()

    def _config(self) -> dict[str, Any]:
        """What the run is trained with, wherever its folder is."""
        config: Any = OmegaConf.to_container(OmegaConf.structured(self.cfg))
        return {key: value for key, value in config.items() if key not in FOLDER_KEYS}

    def publish(self, line: str) -> None:
        """Write out the newest row of the history; the terminal gets a line on it."""
        row = self.history[-1]
        if self.world.is_primary:
            self._write_metrics()
        if self.loggers is not None:
            measured = [k for k in self.figures.columns if k in row and k not in ("epoch", "step")]
            self.loggers.log({f"epoch/{k}": row[k] for k in measured}, row["step"])
            self.loggers.flush()
        if self.console is not None:
            self.console.say(f"{line}  ETA {self.console.eta()}")

    def _write_metrics(self) -> None:
        write_csv(self.run_dir / "metrics.csv", self.figures.columns, self.history)

    # -- end

    def close(self) -> None:
        """Close the logs."""
        if self.console is not None:
            self.console.close()
        if self.loggers is not None:
            self.loggers.close()

    def write_summary(
        self, facts: Mapping[str, Any], *, step: int, seconds: float, rate: float | None, packages: Mapping[str, str]
    ) -> dict[str, Any]:
        """Write summary.json in the first process and return it.

        Args:
            facts: what the run is and what came of it.
            step: its updates.
            seconds: its time.
            rate: its training images per second.
            packages: versions of what it ran on.
        """
        device = self.world.device
        summary = {
            **facts,
            "epochs": self.history[-1]["epoch"] if self.history else 0,
            "steps": step,
            "seconds": round(seconds, 3),
            "images_per_second": rate,
            "dry_run": self.cfg.dry_run,
            "seed": self.cfg.seed,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": self.world.size,
            "threads": torch.get_num_threads(),
            "git_revision": git_revision(),
            "versions": dict(packages),
        }
        if self.world.is_primary:
            write_atomic(self.run_dir / "summary.json", json_text(summary))
        return summary

    def plot(self, title: str) -> None:
        """Write curves.png."""
        plot_curves(self.run_dir / "curves.png", self.history, title, self.figures.panels, self.figures.dpi)


def git_revision() -> str | None:
    """The revision of the checkout that this package runs from; None where it is installed."""
    folder = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", "__init__.py") == "":
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def versions(*modules: ModuleType) -> dict[str, str]:
    """The versions of what every run uses, and of further packages."""
    return {
        "zoo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        **{module.__name__: module.__version__ for module in modules},
    }
