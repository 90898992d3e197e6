"""The run folder of `zoo detect`, as a hook of mmengine's Runner."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmcv
import mmdet
import mmengine
import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from zoo.errors import UserError
from zoo.train.config import model_label
from zoo.train.images import PixelRanges
from zoo.train.loggers import rate_text
from zoo.train.plot import Panel
from zoo.train.recorder import Figures, Recorder, versions
from zoo.train.state import World, rng_state
from zoo.train.stop import Interrupted, Signals, TrainingFailed

from .config import DetectConfig
from .loops import TrainLoop, unreadable_images
from .pictures import DPI, Gallery

__all__ = ["RunFolderHook", "packages", "plain_model"]

FORMAT = 1
_WATCHED = re.compile(r"^(backbone|neck)$|(^|\.)\w*_head(\.\d+)?$")  # the parts of a detector that give maps or scores
FIGURES = Figures(
    (
        "epoch", "step", "lr", "train_loss", "bbox_mAP", "bbox_mAP_50", "bbox_mAP_75", "segm_mAP", "segm_mAP_50",
        "segm_mAP_75", "images_per_second", "seconds",
    ),
    (
        Panel("training loss", (("train_loss", "all losses"),)),
        Panel(
            "average precision",
            (
                ("bbox_mAP", "box AP"), ("bbox_mAP_50", "box AP50"), ("segm_mAP", "mask AP"),
                ("segm_mAP_50", "mask AP50"),
            ),
            limits=(0, 1),
        ),
    ),
    DPI,
)  # fmt: skip


def plain_model(runner: Runner) -> torch.nn.Module:
    """The detector without the wrapper of a distributed run."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _refuse_nan(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    """A module's hook. A detector leaves out what has no score, so that NaN looks like an image without objects."""
    pending = [output]
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise TrainingFailed(
                    f"the detector's {type(module).__name__} gives values that are no numbers, so that no precision "
                    "can be measured; train with a lower schedule.lr, schedule.clip_norm, or amp=bf16"
                )
        elif isinstance(value, list | tuple):
            pending.extend(value)


class RunFolderHook(Hook):
    """Writes a run folder and resumes from it to the same bits; stops in good order on a signal.

    Args:
        cfg: the configuration.
        run_dir: the run folder, which exists and holds config.yaml.
        world: the processes of the run.
        signals: what SIGTERM and SIGINT set.
        ranges: of the images' pixels with more than 8 bits, for the checkpoints.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        cfg: DetectConfig,
        run_dir: Path,
        world: World,
        signals: Signals,
        ranges: PixelRanges | None = None,
    ) -> None:
        self.ranges = ranges or PixelRanges()
        self.cfg, self.run_dir, self.world, self.signals = cfg, run_dir, world, signals
        self.recorder = Recorder(run_dir, cfg, world, FIGURES)
        self.metrics: dict[str, float] = {}
        self.summary: dict[str, Any] = {}  # of a run that is complete
        self.seconds = 0.0
        self.losses = [0.0, 0]  # sum and count of the epoch under way
        self.images, self.begin = 0, time.monotonic()
        self.gallery = Gallery(cfg.pictures)
        self.watches: list[Any] = []  # hooks of modules during an evaluation

    # -- beginning

    def before_train(self, runner: Runner) -> None:
        """Resume from the newest intact checkpoint and open the logs."""
        loop = self._loop(runner)
        self.recorder.resume(lambda state, path: self._restore(runner, state, path))
        self.recorder.begin(loop.last_step, loop.iter)
        self.clock = time.monotonic()

    def _loop(self, runner: Runner) -> TrainLoop:
        loop = runner.train_loop
        assert isinstance(loop, TrainLoop)
        return loop

    def _restore(self, runner: Runner, state: Mapping[str, Any], path: Path) -> str:
        """Take over a checkpoint's state; where the run then is."""
        if state.get("kind") != "detector" or state.get("format") != FORMAT:
            raise UserError(f"{path} is no checkpoint of `zoo detect`; resume a folder that it wrote")
        if len(state["rng"]) != self.world.size:
            raise UserError(
                f"the run was made by {len(state['rng'])} processes and this start has {self.world.size}; "
                f"resume it with torchrun --nproc-per-node={len(state['rng'])}"
            )
        now = self._sizes(runner)
        for split, count in (state.get("data_set") or {}).items():
            if count != now[split]:
                raise UserError(
                    f"{path} was made with {count} {split} images and there are {now[split]} now; restore them, or "
                    "start a new run"
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
        loop.evaluated_step = max([0, *(row["step"] for row in state["history"] if "bbox_mAP" in row)])
        runner.optim_wrapper.initialize_count_status(runner.model, loop.iter, loop.max_iters)
        self.recorder.restore(state)
        self.seconds, self.losses = state["seconds"], list(own["losses"])
        return f"epoch {loop.epoch + 1}, step {loop.iter}"

    def _sizes(self, runner: Runner) -> dict[str, int]:
        """The numbers of images that are trained on and held out."""
        return {
            "training": len(runner.train_loop.dataloader.dataset),
            "held-out": len(runner.val_loop.dataloader.dataset),
        }

    def _check_weights(self, runner: Runner) -> None:
        """Raise TrainingFailed where an update has left weights that are no numbers."""
        model = plain_model(runner)
        parameters = dict(model.named_parameters())
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                if name not in parameters and not bool(torch.isnan(tensor).any()):
                    continue  # a constant of the model, such as a mask
                remedy = (
                    "evaluate another checkpoint with checkpoint_name=best or previous"
                    if self.cfg.eval
                    else "lower schedule.lr, set schedule.clip_norm, or use amp=bf16; the last good checkpoint is in "
                    f"{self.recorder.checkpoints}"
                )
                raise TrainingFailed(f"the weights hold values that are no numbers (in {name}); {remedy}")

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
                f"or use amp=bf16; the last checkpoint is in {self.recorder.checkpoints}"
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
        self.recorder.step(f"{loop.epoch + 1}/{loop.max_epochs}", loop.iter, loss, lr, rate)
        if loop.iter % self.cfg.schedule.accumulate and loop.iter < loop.last_step:
            return  # gradients that are gathered are not part of a checkpoint
        if self.world.any(self.signals.received is not None):
            loop.interrupted = True
            self._save(runner)
        elif self.recorder.due(loop.iter):
            self._save(runner)

    # -- evaluation

    def before_val_epoch(self, runner: Runner) -> None:
        """Begin with an empty gallery.

        Raises:
            TrainingFailed: the weights are no numbers, so that nothing would be found.
        """
        self._check_weights(runner)
        self.gallery.clear()
        self.watches = [
            module.register_forward_hook(_refuse_nan)
            for name, module in plain_model(runner).named_modules()
            if _WATCHED.search(name)
        ]

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """Keep the first predictions for the pictures.

        Raises:
            Interrupted: a signal came; the state before the evaluation is saved.
        """
        self.gallery.add(outputs or ())
        self.recorder.remark(f"evaluating: batch {batch_idx + 1}")
        if self.recorder.begun and self.world.any(self.signals.received is not None):
            self._save(runner)
            raise Interrupted

    after_test_iter = after_val_iter
    before_test_epoch = before_val_epoch

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        """Take in the figures, which mmengine shares with all processes."""
        while self.watches:
            self.watches.pop().remove()
        self.metrics = {k.removeprefix("coco/"): float(v) for k, v in (metrics or {}).items()}

    after_test_epoch = after_val_epoch

    def after_round(self, runner: Runner) -> None:
        """Write the row of an epoch, or of the end of the run inside one, and save."""
        loop = self._loop(runner)
        sums = self.world.totals(*self.losses)
        elapsed = time.monotonic() - self.begin
        partial = loop.iter % loop.steps_per_epoch != 0
        row: dict[str, Any] = {
            "epoch": loop.epoch + partial,
            "step": loop.iter,
            "lr": max(group["lr"] for group in runner.optim_wrapper.param_groups),
            "train_loss": sums[0] / max(1, sums[1]),
            "images_per_second": self.images / max(elapsed, 1e-9),
            "seconds": self._seconds(),
            **self._figures(),
        }
        history = self.recorder.history
        if history and history[-1]["step"] == loop.iter:  # only its evaluation was still to be made
            row = {**history.pop(), **self._figures()}
        better = self.recorder.is_best(self.score(), row["epoch"])
        names = ("best", "last") if better else ("last",)
        if partial:  # a resumed run goes on inside the epoch, so its row is not yet part of the state
            self._save(runner, *names)
            self.recorder.history.append(row)
        else:
            self.recorder.history.append(row)
            self.losses = [0.0, 0]
            if better or loop.iter >= loop.last_step or self.recorder.due_after(loop.epoch):
                self._save(runner, *names)
        parts = [f"{k.replace('_mAP', ' AP').replace('_', '')} {v:.3f}" for k, v in self._figures().items()]
        line = "  ".join([f"epoch {row['epoch']}/{loop.max_epochs}", f"train loss {row['train_loss']:.4f}", *parts])
        self.recorder.publish(f"{line}  {rate_text(row['images_per_second'])}")
        self.metrics = {}

    def _figures(self) -> dict[str, float]:
        """The precisions of the last evaluation that are columns of the history."""
        return {k: v for k, v in self.metrics.items() if k in FIGURES.columns}

    def score(self) -> float:
        """What the best checkpoint is chosen by: mask AP where there are masks, else box AP."""
        return self.metrics.get("segm_mAP", self.metrics.get("bbox_mAP", -1.0))

    # -- end

    def after_train(self, runner: Runner) -> None:
        """Write summary, curves and pictures of a run that is complete.

        Raises:
            Interrupted: a signal came; the state is saved.
        """
        loop = self._loop(runner)
        if loop.interrupted:
            raise Interrupted
        self._write_results(runner, loop)

    def _write_results(self, runner: Runner, loop: TrainLoop) -> None:
        """summary.json, curves.png and predictions.png."""
        cfg, recorder = self.cfg, self.recorder
        last: dict[str, Any] = next((row for row in reversed(recorder.history) if "bbox_mAP" in row), {})
        dataset = runner.val_loop.dataloader.dataset
        facts = {
            "model": cfg.model.name,
            "label": cfg.model.label,
            "detector": cfg.detector.name,
            "data": cfg.data.name,
            "parameters": sum(p.numel() for p in plain_model(runner).parameters()),
            **{k: last.get(k) for k in FIGURES.columns if "mAP" in k},
            "best": recorder.best,
            "best_epoch": recorder.best_epoch,
            "images": len(dataset),
            "unreadable_images": unreadable_images(self.run_dir / "unreadable_images.jsonl"),
        }
        rate = recorder.history[-1]["images_per_second"] if recorder.history else None
        self.summary = recorder.write_summary(
            facts, step=loop.iter, seconds=self.seconds, rate=rate, packages=packages()
        )
        if self.world.is_primary:
            precision = f": box AP50 {last['bbox_mAP_50']:.3f}" if last else ""
            recorder.plot(f"{cfg.detector.name}, {model_label(cfg.model)} on {cfg.data.name}{precision}")
            self.gallery.write(self.run_dir / "predictions.png", dataset)

    def _seconds(self) -> float:
        now = time.monotonic()
        self.seconds += now - self.clock
        self.clock = now
        return self.seconds

    def _save(self, runner: Runner, *names: str) -> None:
        """Write the state, in the layout of mmengine's own checkpoints, under names, `last` unless others are given."""
        loop = self._loop(runner)
        self._check_weights(runner)
        self._seconds()
        pending = loop.round_pending is not None
        generators = loop.round_pending if loop.round_pending is not None else rng_state()
        everyone = self.world.gather({"generators": generators, "losses": self.losses})
        state: dict[str, Any] = {}
        if self.world.is_primary:
            state = {
                "kind": "detector",
                "format": FORMAT,
                "step": loop.iter,
                "epoch": loop.epoch,
                "meta": {
                    "epoch": loop.epoch,
                    "iter": loop.iter,
                    "seed": runner.seed,
                    "cfg": runner.cfg.pretty_text,
                    "dataset_meta": {"classes": tuple(loop.dataloader.dataset.metainfo["classes"])},
                    "mmengine_version": mmengine.__version__,
                },
                "state_dict": {k: v.cpu() for k, v in plain_model(runner).state_dict().items()},
                "optimizer": runner.optim_wrapper.state_dict(),
                "param_schedulers": [s.state_dict() for s in runner.param_schedulers],
                "message_hub": {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}},
                "rng": everyone,
                "round_pending": pending,
                "data_set": self._sizes(runner),
                "ranges": self.ranges.state(),
                "history": self.recorder.history,
                "best": self.recorder.best,
                "best_epoch": self.recorder.best_epoch,
                "seconds": self.seconds,
            }
        self.recorder.save(state, *(names or ("last",)))


def packages() -> dict[str, str]:
    """Versions of what a detector runs on."""
    return versions(mmdet, mmengine, mmcv)
