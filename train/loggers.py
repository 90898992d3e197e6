"""Where a run's figures go: tables, TensorBoard, Weights & Biases, and the terminal."""

import csv
import io
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import UserError, first_line
from zoo.train.config import LoggerConfig
from zoo.train.runs import write_atomic

__all__ = ["Console", "Heartbeat", "Loggers", "rate_text", "write_csv"]

_SILENCE = 30.0  # seconds after which a program that has no terminal says where it is


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table: one line per row, empty where it lacks a column."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, buffer.getvalue())


class _TensorBoard:
    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # on resume, what was logged after the checkpoint is taken back
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for key, value in figures.items():
            self.writer.add_scalar(key, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, cfg: LoggerConfig, run_dir: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "logger.wandb needs the package wandb; `pip install wandb`, or logger.wandb.mode=disabled"
            ) from error
        identity = run_dir / "wandb_id"
        if not identity.is_file():
            write_atomic(identity, secrets.token_hex(8))
        try:
            self.run = wandb.init(
                mode=cfg.wandb.mode,  # type: ignore[arg-type]
                project=cfg.wandb.project,
                entity=cfg.wandb.entity,
                name=cfg.wandb.name or run_dir.name,
                id=identity.read_text(),
                resume="allow",
                dir=str(run_dir),
                config=dict(config),
                settings=wandb.Settings(silent=True),
            )
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            raise UserError(
                f"Weights & Biases refused ({first_line(error)}); `wandb login`, or logger.wandb.mode=offline"
            ) from error

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log(dict(figures), step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.run.finish()


class Loggers:
    """The loggers that the configuration asks for, behind one call."""

    def __init__(self, cfg: LoggerConfig, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        self.sinks: list[_TensorBoard | _Wandb] = []
        if cfg.wandb.mode != "disabled":  # first, for it may refuse
            self.sinks.append(_Wandb(cfg, run_dir, config))
        if cfg.tensorboard:
            self.sinks.append(_TensorBoard(run_dir, step))

    def log(self, figures: Mapping[str, float | None], step: int) -> None:
        """Log the figures of a step; None is left out."""
        known = {k: float(v) for k, v in figures.items() if v is not None}
        for sink in self.sinks:
            sink.log(known, step)

    def flush(self) -> None:
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def rate_text(rate: float) -> str:
    """A rate in images per second, in three digits; below one the seconds that an image takes."""
    if rate >= 9.95:
        return f"{rate:.0f} images/s"
    if rate >= 1 or rate <= 0:
        return f"{rate:.1f} images/s"
    return f"{1 / rate:.1f} s/image"


class Heartbeat:
    """Says whether nothing was printed for so long that a line is due.

    Args:
        seconds: how long that is.
        clock: gives seconds; for tests.
    """

    def __init__(self, seconds: float = _SILENCE, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self.last = clock()

    def due(self) -> bool:
        return self.clock() - self.last >= self.seconds

    def beat(self) -> None:
        """Something was printed."""
        self.last = self.clock()


def _width() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        return 0


class Console:
    """A progress bar on a terminal, lines elsewhere, at least every 30 s; silent in all processes but the first."""

    def __init__(self, total: int, done: int, every: int, enabled: bool = True) -> None:
        self.total, self.done, self.every, self.enabled = total, done, every, enabled
        self.started, self.first = time.perf_counter(), done
        self.heart = Heartbeat()
        self.bar: Any = None
        if enabled and sys.stdout.isatty():
            from tqdm import tqdm

            # a pseudo-terminal may have no size, and tqdm then shows nothing
            options: dict[str, Any] = {"dynamic_ncols": True} if _width() else {"ncols": 100, "nrows": 20}
            self.bar = tqdm(total=total, initial=done, unit="step", file=sys.stdout, leave=False, **options)

    def eta(self) -> str:
        """Time to the end at the pace so far."""
        from tqdm import tqdm

        pace = (time.perf_counter() - self.started) / max(1, self.done - self.first)
        return tqdm.format_interval(round(pace * (self.total - self.done)))

    def step(self, epoch: str, loss: float | None, rate: float, lr: float) -> None:
        """Count an update; `loss` is None where reading it would stall the device."""
        self.done += 1
        if not self.enabled:
            return
        if self.bar is not None:
            if loss is not None:
                self.bar.set_postfix_str(f"loss {loss:.3f}, {rate_text(rate)}", refresh=False)
                self.bar.set_description_str(f"epoch {epoch}", refresh=False)
            self.bar.update()
        elif loss is not None and (self.done % self.every == 0 or self.heart.due()):
            self.say(
                f"epoch {epoch}  step {self.done}/{self.total}  loss {loss:.4f}  lr {lr:.2e}  "
                f"{rate_text(rate)}  ETA {self.eta()}"
            )

    @property
    def quiet(self) -> bool:
        """Whether a line is due where there is no terminal, so that the loss is to be read for it."""
        return self.enabled and self.bar is None and self.heart.due()

    def remark(self, line: str) -> None:
        """Print a line if one is due: what is done between updates."""
        if self.quiet:
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        if not self.enabled:
            return
        self.heart.beat()
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
