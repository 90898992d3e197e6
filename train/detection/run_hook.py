"""The run folder of `zoo detect`: checkpoints, metrics, curves and the summary, as a hook of mmengine's Runner."""

import csv
import io
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmdet
import mmengine
import numpy as np
import timm
import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from omegaconf import OmegaConf

from zoo._version import __version__
from zoo.errors import UserError
from zoo.train.loggers import Console, Loggers
from zoo.train.report import git_revision
from zoo.train.runs import newest_intact, save_checkpoint, write_atomic
from zoo.train.state import World, rng_state
from zoo.train.stop import Interrupted, Signals, TrainingFailed

from .config import DetectConfig
from .loops import TrainLoop, unreadable_images
from .pictures import Gallery, plot_detection_curves

__all__ = ["FIELDS", "RunFolderHook"]

FIELDS = (
    "epoch", "step", "lr", "train_loss", "bbox_mAP", "bbox_mAP_50", "bbox_mAP_75", "segm_mAP", "segm_mAP_50",
    "segm_mAP_75", "images_per_second", "seconds",
)  # fmt: skip
FORMAT = 1


def plain_model(runner: Runner) -> torch.nn.Module:
    """The detector without the wrapper of a distributed run."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


class RunFolderHook(Hook):
    """Writes a run folder and resumes from it to the same bits; stops in good order on a signal.

    Args:
        cfg: the configuration.
        run_dir: the run folder, which exists and holds config.yaml.
        world: the processes of the run.
        signals: what SIGTERM and SIGINT set.
    """

    priority = "VERY_LOW"

    def __init__(self, cfg: DetectConfig, run_dir: Path, world: World, signals: Signals) -> None:
        self.cfg, self.run_dir, self.world, self.signals = cfg, run_dir, world, signals
        self.checkpoints = run_dir / "checkpoints"
        self.history: list[dict[str, Any]] = []
        self.metrics: dict[str, float] = {}
        self.best, self.best_epoch = -1.0, 0
        self.seconds = 0.0
        self.losses = [0.0, 0]  # sum and count of the epoch under way
        self.images, self.begin = 0, time.monotonic()
        self.gallery = Gallery(cfg.pictures)
        self.console: Any = None
        self.loggers: Any = None

    # -- beginning

    def before_train(self, runner: Runner) -> None:
        """Resume from the newest intact checkpoint and open the logs."""
        loop = self._loop(runner)
        found = newest_intact(self.run_dir)
        if found is not None:
            path, state, problems = found
            self._restore(runner, state, path)
            for problem in problems if self.world.is_primary else []:
                print(f"warning: {problem}", flush=True)
            if self.world.is_primary:
                print(f"resuming from {path}: epoch {loop.epoch + 1}, step {loop.iter}", flush=True)
        if self.world.is_primary:
            for leftover in self.checkpoints.glob(".*.tmp"):
                leftover.unlink()
            self._write_metrics()
            config: Any = OmegaConf.to_container(OmegaConf.structured(self.cfg), resolve=True)
            self.loggers = Loggers(self.cfg.logger, self.run_dir, config, loop.iter)
        self.console = Console(loop.last_step, loop.iter, self.cfg.log_every, self.world.is_primary)
        self.clock = self.saved_at = time.monotonic()

    def _loop(self, runner: Runner) -> TrainLoop:
        loop = runner.train_loop
        assert isinstance(loop, TrainLoop)
        return loop

    def _restore(self, runner: Runner, state: Mapping[str, Any], path: Path) -> None:
        if state.get("kind") != "detector" or state.get("format") != FORMAT:
            raise UserError(f"{path} is no checkpoint of `zoo detect`; resume a folder that it wrote")
        if len(state["rng"]) != self.world.size:
            raise UserError(
                f"the run was made by {len(state['rng'])} processes and this start has {self.world.size}; "
                f"resume it with torchrun --nproc-per-node={len(state['rng'])}"
            )
        try:
            plain_model(runner).load_state_dict(state["state_dict"])
        except RuntimeError as error:
            raise UserError(f"{path} belongs to another detector: {str(error).splitlines()[1].strip()}") from error
        runner.optim_wrapper.load_state_dict(state["optimizer"])
        for scheduler, saved in zip(runner.param_schedulers, state["param_schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        loop = self._loop(runner)
        own = state["rng"][self.world.rank]
        loop.resume_at(state["meta"]["epoch"], state["meta"]["iter"], own["generators"], state["round_pending"])
        runner.optim_wrapper.initialize_count_status(runner.model, loop.iter, loop.max_iters)
        self.history = [dict(row) for row in state["history"]]
        self.best, self.best_epoch, self.seconds = state["best"], state["best_epoch"], state["seconds"]
        self.losses = list(own["losses"])

    # -- during an epoch

    def before_train_epoch(self, runner: Runner) -> None:
        """Start the clock of the epoch's images per second."""
        self.images, self.begin = 0, time.monotonic()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        """Take in the losses of a step.

        Raises:
            TrainingFailed: the loss is no number.
        """
        assert outputs is not None
        assert data_batch is not None
        loss = outputs["loss"].item()
        if not math.isfinite(loss):
            parts = ", ".join(f"{k} {v.item():.3g}" for k, v in outputs.items() if "loss" in k)
            raise TrainingFailed(
                f"the loss is {loss} in step {runner.iter + 1} ({parts}); lower schedule.lr, set schedule.clip_norm, "
                f"or use amp=bf16; the last checkpoint is in {self.checkpoints}"
            )
        self.losses[0] += loss
        self.losses[1] += 1
        self.images += len(data_batch["inputs"]) * self.world.size

    def after_step(self, runner: Runner) -> None:
        """Report a complete step; save where it is due; stop where a signal came."""
        loop = self._loop(runner)
        rate = self.images / max(time.monotonic() - self.begin, 1e-9)
        loss = self.losses[0] / max(1, self.losses[1])
        lr = max(group["lr"] for group in runner.optim_wrapper.param_groups)
        self.console.step(f"{loop.epoch + 1}/{loop.max_epochs}", loss, rate, lr)
        if self.loggers is not None and loop.iter % self.cfg.log_every == 0:
            self.loggers.log({"train/loss": loss, "train/lr": lr, "train/images_per_second": rate}, loop.iter)
        if loop.iter % self.cfg.schedule.accumulate and loop.iter < loop.last_step:
            return  # gradients that are gathered are not part of a checkpoint
        if self.world.any(self.signals.received is not None):
            loop.interrupted = True
            self._save(runner)
        elif self._due(loop.iter):
            self._save(runner)

    def _due(self, step: int) -> bool:
        cfg = self.cfg.checkpoint
        if cfg.every_steps is not None and step % cfg.every_steps == 0:
            return True
        return cfg.every_seconds is not None and self.world.any(time.monotonic() - self.saved_at >= cfg.every_seconds)

    # -- evaluation

    def before_val_epoch(self, runner: Runner) -> None:
        """Begin with an empty gallery."""
        self.gallery.clear()

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """Keep the first predictions for the pictures.

        Raises:
            Interrupted: a signal came; the state before the evaluation is saved.
        """
        self.gallery.add(outputs or ())
        if self.console is not None and self.world.any(self.signals.received is not None):
            self._save(runner)
            raise Interrupted

    after_test_iter = after_val_iter
    before_test_epoch = before_val_epoch

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        """Take in the figures, which mmengine shares with all processes."""
        self.metrics = {k.removeprefix("coco/"): float(v) for k, v in (metrics or {}).items()}

    after_test_epoch = after_val_epoch

    def after_round(self, runner: Runner) -> None:
        """Write the row of an epoch, or of the end of the run inside one, and save."""
        loop = self._loop(runner)
        sums = self.world.sum(torch.tensor(self.losses, dtype=torch.float64, device=self.world.device)).tolist()
        elapsed = time.monotonic() - self.begin
        partial = loop.iter % loop.steps_per_epoch != 0
        row: dict[str, Any] = {
            "epoch": loop.epoch + partial,
            "step": loop.iter,
            "lr": max(group["lr"] for group in runner.optim_wrapper.param_groups),
            "train_loss": sums[0] / max(1, sums[1]),
            "images_per_second": self.images / max(elapsed, 1e-9),
            "seconds": self._seconds(),
            **{k: v for k, v in self.metrics.items() if k in FIELDS},
        }
        better = bool(self.metrics) and self.score() > self.best
        if better:
            self.best, self.best_epoch = self.score(), row["epoch"]
        if partial:  # a resumed run goes on inside the epoch, so its row is not yet part of the state
            self._save(runner, best=better)
            self.history.append(row)
        else:
            self.history.append(row)
            self.losses = [0.0, 0]
            final = loop.iter >= loop.last_step
            if final or better or loop.epoch % self.cfg.checkpoint.every_epochs == 0:
                self._save(runner, best=better)
        if self.world.is_primary:
            self._write_metrics()
            self.loggers.log({f"epoch/{k}": v for k, v in row.items() if k not in ("epoch", "step")}, loop.iter)
            self.loggers.flush()
        parts = [f"{k.replace('_mAP', ' AP').replace('_', '')} {v:.3f}" for k, v in self.metrics.items() if k in FIELDS]
        line = "  ".join([f"epoch {row['epoch']}/{loop.max_epochs}", f"train loss {row['train_loss']:.4f}", *parts])
        self.console.say(f"{line}  {row['images_per_second']:.1f} images/s  ETA {self.console.eta()}")
        self.metrics = {}

    def score(self) -> float:
        """What the best checkpoint is chosen by: mask AP where there are masks, else box AP."""
        return self.metrics.get("segm_mAP", self.metrics.get("bbox_mAP", -1.0))

    # -- end

    def after_train(self, runner: Runner) -> None:
        """Close the logs; write summary, curves and pictures of a run that is complete."""
        self.console.close()
        loop = self._loop(runner)
        if self.world.is_primary:
            if not loop.interrupted:
                self.write_results(runner, loop)
            self.loggers.close()
        if loop.interrupted:
            raise Interrupted

    def write_results(self, runner: Runner, loop: TrainLoop) -> None:
        """summary.json, curves.png and predictions.png."""
        last: dict[str, Any] = next((row for row in reversed(self.history) if "bbox_mAP" in row), {})
        unreadable = unreadable_images(self.run_dir / "unreadable_images.jsonl")
        summary = {
            "model": self.cfg.model.name,
            "detector": self.cfg.detector.name,
            "data": self.cfg.data.name,
            "parameters": sum(p.numel() for p in plain_model(runner).parameters()),
            **{k: last.get(k) for k in FIELDS if "mAP" in k},
            "best": self.best,
            "best_epoch": self.best_epoch,
            "images": len(runner.val_loop.dataloader.dataset),
            "unreadable_images": unreadable,
            "epochs": self.history[-1]["epoch"] if self.history else 0,
            "steps": loop.iter,
            "seconds": round(self.seconds, 3),
            "images_per_second": self.history[-1]["images_per_second"] if self.history else None,
            "dry_run": self.cfg.dry_run,
            "seed": self.cfg.seed,
            "device": torch.cuda.get_device_name(self.world.device) if self.world.device.type == "cuda" else "cpu",
            "processes": self.world.size,
            "threads": torch.get_num_threads(),
            "git_revision": git_revision(),
            "versions": versions(),
        }
        write_atomic(self.run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        title = f"{self.cfg.detector.name}, {self.cfg.model.name} on {self.cfg.data.name}"
        title += f": box AP50 {last['bbox_mAP_50']:.3f}" if last else ""
        plot_detection_curves(self.run_dir / "curves.png", self.history, title)
        self.gallery.write(self.run_dir / "predictions.png", runner.val_loop.dataloader.dataset)

    def _seconds(self) -> float:
        now = time.monotonic()
        self.seconds += now - self.clock
        self.clock = now
        return self.seconds

    def _write_metrics(self) -> None:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: row.get(k) for k in FIELDS} for row in self.history)
        write_atomic(self.run_dir / "metrics.csv", buffer.getvalue())

    def _save(self, runner: Runner, best: bool = False) -> None:
        """Write checkpoints/last.pt, in the layout of mmengine's own, and best.pt where it is the best."""
        loop = self._loop(runner)
        self._seconds()
        pending = loop.round_pending is not None
        generators = loop.round_pending if loop.round_pending is not None else rng_state()
        everyone = self.world.gather({"generators": generators, "losses": self.losses})
        if self.world.is_primary:
            meta = {
                "epoch": loop.epoch,
                "iter": loop.iter,
                "seed": runner.seed,
                "cfg": runner.cfg.pretty_text,
                "dataset_meta": {"classes": tuple(loop.dataloader.dataset.metainfo["classes"])},
                "mmengine_version": mmengine.__version__,
            }
            state = {
                "kind": "detector",
                "format": FORMAT,
                "step": loop.iter,
                "epoch": loop.epoch,
                "meta": meta,
                "state_dict": {k: v.cpu() for k, v in plain_model(runner).state_dict().items()},
                "optimizer": runner.optim_wrapper.state_dict(),
                "param_schedulers": [s.state_dict() for s in runner.param_schedulers],
                "message_hub": {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}},
                "rng": everyone,
                "round_pending": pending,
                "history": self.history,
                "best": self.best,
                "best_epoch": self.best_epoch,
                "seconds": self.seconds,
            }
            save_checkpoint(self.checkpoints / "last.pt", state, previous="previous.pt")
            if best:
                save_checkpoint(self.checkpoints / "best.pt", state)
        self.saved_at = time.monotonic()


def versions() -> dict[str, str]:
    """What the run ran on."""
    import mmcv

    return {
        "zoo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "mmdet": mmdet.__version__,
        "mmengine": mmengine.__version__,
        "mmcv": mmcv.__version__,
    }
