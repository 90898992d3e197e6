"""What a run says of itself at its end: the line of an epoch, summary.json, the last line."""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from zoo._version import __version__
from zoo.runs import write_atomic
from zoo.train.config import TrainConfig
from zoo.train.state import World

__all__ = ["describe", "last_line", "unreadable_note", "write_summary"]


def describe(row: Mapping[str, Any], epochs: int, eta: str) -> str:
    """One line on an epoch."""
    parts = [f"epoch {row['epoch']}/{epochs}", f"train loss {row['train_loss']:.4f}"]
    if row.get("val_loss") is not None:
        parts += [f"held-out loss {row['val_loss']:.4f}", f"top-1 {row['top1']:.2f} %"]
    if row.get("unreadable"):
        parts.append(f"{row['unreadable']} held-out images unreadable")
    if row.get("ema_top1") is not None:
        parts.append(f"EMA top-1 {row['ema_top1']:.2f} %")
    if row.get("images_per_second"):
        parts.append(f"{row['images_per_second']:.0f} images/s")
    return "  ".join([*parts, f"ETA {eta}"])


def unreadable_note(count: int) -> str:
    """What follows a number of images where some could not be read."""
    return f", {count} of them unreadable and counted as wrong" if count else ""


def _git_revision() -> str | None:
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


def write_summary(
    run_dir: Path, cfg: TrainConfig, progress: Any, history: Sequence[Mapping[str, Any]], parameters: int, world: World
) -> dict[str, Any]:
    """Write summary.json in the first process and return it.

    top1 and top5 are those of the last evaluation, of the averaged weights where the run keeps them.
    """
    final: Mapping[str, Any] = next((row for row in reversed(history) if row.get("top1") is not None), {})
    kind = "ema_" if final.get("ema_top1") is not None else ""
    summary = {
        "model": cfg.model.name,
        "data": cfg.data.name,
        "parameters": parameters,
        "top1": final.get(f"{kind}top1"),
        "top5": final.get(f"{kind}top5"),
        "loss": final.get("ema_loss" if kind else "val_loss"),
        "weights": "ema" if kind else "raw",
        "held_out": final.get("held_out"),
        "unreadable": final.get("unreadable", 0),
        "best_top1": progress.best,
        "best_epoch": progress.best_epoch,
        "epochs": history[-1]["epoch"] if history else 0,
        "steps": progress.step,
        "seconds": round(progress.seconds, 3),
        "images_per_second": round(progress.images / progress.seconds, 2) if progress.seconds else None,
        "dry_run": cfg.dry_run,
        "seed": cfg.seed,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "git_revision": _git_revision(),
        "versions": {
            "zoo": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
        },
    }
    if world.is_primary:
        write_atomic(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def last_line(summary: Mapping[str, Any], run_dir: Path) -> str:
    """The last line that a run prints."""
    dry = "dry run passed: one step, saved, loaded, evaluated; " if summary["dry_run"] else ""
    bad = unreadable_note(summary.get("unreadable", 0))
    return f"{dry}top-1 {summary['top1']:.2f} % on {summary['held_out']} held-out images{bad}; run folder: {run_dir}"
