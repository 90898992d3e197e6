"""The training loop: timm's task, optimizer, schedule and mixing, from any checkpoint on, to the same bits."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf import OmegaConf
from timm.task import ClassificationTask, TrainingTask
from timm.utils import NativeScaler, dispatch_clip_grad, distribute_bn, random_seed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from zoo.errors import UserError
from zoo.train.build import build_model, build_optimizer, build_schedule, loss_options
from zoo.train.config import TrainConfig, model_label
from zoo.train.data import FOLDERS, EvalLoader, TrainLoader, class_count, create_mixup, open_dataset, resolve_transform
from zoo.train.distill import DistilledTask, open_teacher
from zoo.train.evaluate import Evaluation, autocast, check_targets, evaluate
from zoo.train.freeze import freeze
from zoo.train.images import BadImages
from zoo.train.labels import check_same_data, data_notes, describe_data, label_names, match_labels
from zoo.train.loggers import rate_text
from zoo.train.plot import Panel
from zoo.train.profiling import UpdateProfiler, part
from zoo.train.recorder import Figures, Recorder, versions
from zoo.train.runs import load_checkpoint
from zoo.train.samples import draw_samples
from zoo.train.state import World, determinism, isolated_rng, restore_rng, rng_state
from zoo.train.stop import Interrupted, Signals, TrainingFailed

__all__ = ["Progress", "Trainer"]

FORMAT = 1
_DRAWN = 16  # training images in augmented.png
_WAITED = 20.0  # percent of the time of training from which on waiting for data is said
_NEAR_INITIAL = 0.05  # the share of the first weights in the averaged ones from which on the user is warned
FIGURES = Figures(
    (
        "epoch", "step", "lr", "train_loss", "val_loss", "top1", "top5", "ema_loss", "ema_top1", "ema_top5",
        "images_per_second", "data_wait", "seconds",
    ),
    (
        Panel(
            "cross-entropy",
            (("train_loss", "training"), ("val_loss", "held out"), ("ema_loss", "held out, EMA")),
        ),
        Panel("accuracy (%)", (("top1", "top-1"), ("top5", "top-5"), ("ema_top1", "top-1, EMA"))),
    ),
)  # fmt: skip


@dataclass
class Progress:
    """Where a run stands: what a checkpoint restores besides weights and generators."""

    epoch: int = 0  # the epoch under way, from 0
    batch: int = 0  # its micro-batches already used
    step: int = 0  # updates of the run
    images: int = 0  # training images seen, over all processes
    seconds: float = 0.0  # training time, evaluation included
    loss_sum: float = 0.0  # of the epoch under way, over its micro-batches, in this process


class Trainer:
    """One run of `zoo train`, in one of its processes.

    Args:
        cfg: the validated configuration.
        run_dir: the run folder, which exists and holds config.yaml.
        world: the processes of the run.

    Raises:
        UserError: data, weights or checkpoint do not fit the configuration.
    """

    def __init__(self, cfg: TrainConfig, run_dir: Path, world: World) -> None:
        self.cfg, self.world = cfg, world
        self.recorder = Recorder(run_dir, cfg, world, FIGURES)
        self.signals = Signals()
        self.progress = Progress()
        self.profiler: UpdateProfiler | None = None
        self.rate = self.waited = 0.0  # images and seconds of waiting for them, of the epoch
        self.wait_share: float | None = None  # percent of the epoch's training
        if cfg.threads is not None:
            torch.set_num_threads(cfg.threads)
        self._open_data()
        self._build()

    def _open_data(self) -> None:
        cfg = self.cfg
        hints: dict[str, Any] = {"batch_size": cfg.batch_size, "seed": cfg.seed}
        self.train_set = open_dataset(cfg.data, True, cfg.model.in_chans, **hints)
        class_map = getattr(getattr(self.train_set, "reader", None), "class_to_idx", None)
        folder = class_map if cfg.data.name in FOLDERS else None
        ranges = getattr(self.train_set, "ranges", None)
        self.val_set = open_dataset(cfg.data, False, cfg.model.in_chans, class_map=folder, ranges=ranges, **hints)
        names = label_names(self.train_set)
        if names is not None:
            self.val_set = match_labels(self.val_set, names, "the training images")
            if len(names) == 1:
                raise UserError(f"{cfg.data.name} has a single class, {names[0]}; there is nothing to tell apart")
        self.data_facts = describe_data(self.train_set, self.val_set)
        if self.world.is_primary:
            for line in dict.fromkeys([*data_notes(self.train_set), *data_notes(self.val_set)]):
                print(line, flush=True)
        found = class_count(cfg.data, self.train_set)
        wanted = cfg.model.num_classes
        if found is None and wanted is None:
            raise UserError(f"{cfg.data.name} does not say how many classes it has; set data.num_classes")
        if found is not None and wanted is not None and wanted < found:
            raise UserError(
                f"model.num_classes={wanted}, but the data have {found} classes; leave it out or set {found}"
            )
        self.num_classes = wanted or int(found or 0)

    def _build(self) -> None:
        cfg, world = self.cfg, self.world
        random_seed(cfg.seed, 0)  # the same weights in every process
        model = build_model(cfg.model, self.num_classes, cfg.data.img_size)
        self.frozen = freeze(model, cfg.model.freeze, cfg.model.name)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.shape = shape = resolve_transform(cfg.data, model, cfg.model.in_chans)
        self.loader = TrainLoader(self.train_set, cfg.data, cfg.augment, shape, cfg.batch_size, cfg.seed, world)
        self.loader.bad = BadImages.read(self.recorder.run_dir / "bad_images.csv")
        if cfg.data.root is not None:
            self.loader.bad.forget_mended(Path(cfg.data.root))
        self.val_loader = EvalLoader(self.val_set, cfg.data, shape, cfg.val_batch_size or cfg.batch_size, world)
        self.updates_per_epoch = math.ceil(self.loader.batches / cfg.grad_accum)
        self.epochs = cfg.epochs + cfg.schedule.cooldown_epochs
        self.total_steps = min(self.epochs * self.updates_per_epoch, cfg.max_steps or sys.maxsize)
        if cfg.dry_run:
            self.total_steps = 1
        model = model.to(world.device)
        if cfg.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.mixup = create_mixup(cfg.augment, self.num_classes, cfg.loss.smoothing)
        self.task = self._build_task(model)
        self.optimizer = build_optimizer(cfg.optim, model)
        if cfg.ema.enabled:
            self.task.setup_ema(decay=cfg.ema.decay, use_warmup=cfg.ema.warmup)
        if cfg.compile:
            self.task.compile()
        if world.distributed:
            self.task.prepare_distributed(device_ids=[world.local_rank] if world.device.type == "cuda" else None)
        self.schedule = build_schedule(cfg.schedule, self.optimizer, cfg.epochs, self.updates_per_epoch)
        self.schedule.step_update(0)
        self.autocast = autocast(world.device, cfg.amp)
        self.scaler = NativeScaler(device=world.device.type) if cfg.amp == "fp16" else None
        random_seed(cfg.seed, world.rank)  # drop path differs between processes

    def _build_task(self, model: Any) -> TrainingTask:
        """The model with its loss, and with a teacher where there is one."""
        cfg, device = self.cfg, self.world.device
        options = loss_options(cfg.loss, self.mixup is not None)
        if cfg.distill.teacher is None:
            return ClassificationTask(model, criterion_kwargs=options, device=device, verbose=False)
        teacher = open_teacher(cfg.distill, self.shape, self.num_classes, self.data_facts["label_names"], device)
        return DistilledTask(model, teacher, cfg.distill, self.shape, options, device)

    def _state(self) -> dict[str, Any]:
        """The checkpoint; every process takes part."""
        generators = self.world.gather({**rng_state(), "loss_sum": self.progress.loss_sum})
        state = {
            "format": FORMAT,
            "model": self.cfg.model.name,
            "num_classes": self.num_classes,
            **self.data_facts,
            **vars(self.progress),
            "best": self.recorder.best,
            "best_epoch": self.recorder.best_epoch,
            "history": self.recorder.history,
            "config": OmegaConf.to_container(OmegaConf.structured(self.cfg)),
            "world_size": self.world.size,
            "rng": generators,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            **self.task.get_checkpoint_state(),
        }
        if self.task.has_ema():
            state |= self.task.get_checkpoint_state(ema=True)
        return state

    def save(self, *names: str, state: dict[str, Any] | None = None) -> None:
        """Write the state under names, `last` unless others are given; every process takes part.

        Args:
            names: of checkpoints.
            state: of an earlier moment; the present one when None.

        Raises:
            UserError: the disk refuses.
            TrainingFailed: a weight is no number; what was saved before stays.
        """
        self._check_weights()
        for rows in self.world.gather(self.loader.bad.listed()):
            self.loader.bad.merge(rows)
        self._list_bad()
        self.recorder.save(self._state() if state is None else state, *(names or ("last",)))
        self.loader.check_bad()

    def _check_weights(self) -> None:
        """Raise TrainingFailed where an update has left a weight that is no number, before it is saved as good."""
        for ema in (False, True) if self.task.has_ema() else (False,):
            trained: Any = self.task.get_trainable_module(ema=ema)
            weights = trained.state_dict()
            sums = [
                value.detach().abs().max() for value in weights.values() if value.is_floating_point() and value.numel()
            ]
            finite = torch.stack([torch.isfinite(v) for v in sums]).all() if sums else torch.tensor(True)
            if self.world.any(not finite.item()):
                self._fail(f"a weight is no number after step {self.progress.step}")

    def _fail(self, what: str) -> NoReturn:
        saved = (self.recorder.checkpoints / "last.pt").exists()
        where = f"the last good checkpoint is in {self.recorder.checkpoints}" if saved else "no checkpoint was written"
        raise TrainingFailed(f"{what}; lower optim.lr or set optim.clip_grad; {where}")

    def _list_bad(self) -> None:
        """Write bad_images.csv, if there are any."""
        if self.world.is_primary:
            self.loader.bad.write(self.recorder.run_dir / "bad_images.csv")

    def restore(self, state: dict[str, Any], source: Path) -> str:
        """Continue from a checkpoint; returns where the run then is.

        Raises:
            UserError: it is of another number of processes, another model, or another data set size.
        """
        if state.get("format") != FORMAT:
            raise UserError(
                f"{source} has checkpoint format {state.get('format')}, this version reads {FORMAT}; start a new run"
            )
        check_same_data(state, self.data_facts, source)
        if state["world_size"] != self.world.size:
            raise UserError(
                f"the run was made by {state['world_size']} processes and this start has {self.world.size}; "
                f"resume it with torchrun --nproc-per-node={state['world_size']}"
            )
        if state["batch"] > self.loader.batches:
            raise UserError(
                f"{source} is in batch {state['batch']} of an epoch of {self.loader.batches}; the data have changed"
            )
        before = state["config"]
        changed = (before["epochs"], before["max_steps"]) != (self.cfg.epochs, self.cfg.max_steps)
        if changed and self.total_steps < state["step"] and not self.cfg.dry_run:
            raise UserError(
                f"epochs={self.cfg.epochs} and max_steps={self.cfg.max_steps} end the run after {self.total_steps} "
                f"updates, and {source} has {state['step']}; give more, or leave them out"
            )
        unwrapped = self.task.get_checkpoint_state()["state_dict"]
        if set(unwrapped) != set(state["state_dict"]):
            raise UserError(f"{source} belongs to another model than {self.cfg.model.name}")
        self.task.load_checkpoint_state(state["state_dict"])
        if self.task.has_ema():
            self.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
        self.optimizer.load_state_dict(state["optimizer"])
        if state["config"]["epochs"] == self.cfg.epochs:
            self.schedule.load_state_dict(state["scheduler"])
        else:  # the schedule was stretched
            self.schedule.step_update(state["step"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        own = state["rng"][self.world.rank]
        self.progress = Progress(**{k: state[k] for k in vars(self.progress)})
        self.progress.loss_sum = own["loss_sum"]
        self.recorder.restore(state)
        restore_rng(own)
        return f"epoch {self.progress.epoch + 1}, step {self.progress.step}"

    def _mix(self, images: Tensor, targets: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        off = self.cfg.augment.mix_off_epoch
        if self.mixup is None:
            return images, targets
        self.mixup.mixup_enabled = off is None or self.progress.epoch < off
        # draws from NumPy's global generator
        with isolated_rng(self.cfg.seed, 5, self.progress.epoch, batch, self.world.rank):
            return self.mixup(images, targets)

    def _backward(self, loss: Tensor, update: bool) -> None:
        optim = self.cfg.optim
        parameters = self.task.get_clip_parameters(exclude_head=optim.clip_mode == "agc")
        second_order = getattr(self.optimizer, "is_second_order", False)
        if self.scaler is not None:
            with part("backward and optimizer"):
                self.scaler(
                    loss, self.optimizer, clip_grad=optim.clip_grad, clip_mode=optim.clip_mode, parameters=parameters,
                    create_graph=second_order, need_update=update,
                )  # fmt: skip
            return
        with part("backward"):
            loss.backward(create_graph=second_order)
        if update:
            with part("optimizer"):
                if optim.clip_grad is not None:
                    dispatch_clip_grad(parameters, optim.clip_grad, mode=optim.clip_mode)
                self.optimizer.step()

    def _prepare(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A micro-batch as the model gets it: on the device, mixed, in the wanted layout."""
        check_targets(targets, self.num_classes)
        images = images.to(self.world.device, non_blocking=True)
        targets = targets.to(self.world.device, non_blocking=True)
        images, targets = self._mix(images, targets, self.progress.batch)
        if self.cfg.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, targets

    def _micro_step(self, images: Tensor, targets: Tensor, batch: int) -> tuple[Tensor, bool]:
        """Forward and backward of one micro-batch; returns its loss and whether it completed an update."""
        cfg = self.cfg
        first = batch // cfg.grad_accum * cfg.grad_accum
        group = min(cfg.grad_accum, self.loader.batches - first)
        update = batch - first == group - 1
        with nullcontext() if update else self.task.no_sync():
            with self.autocast(), part("forward"):
                loss = self.task(images, targets)["loss"]
            self._backward(loss / group, update)
        return loss.detach(), update

    def _train_epoch(self) -> None:
        """Train to the end of the epoch, or to the end of the run inside it (max_steps, dry_run)."""
        cfg, progress, world = self.cfg, self.progress, self.world
        if progress.batch >= self.loader.batches or progress.step >= self.total_steps:
            return
        self.task.train()
        self.frozen.hold()
        label = f"{progress.epoch + 1}/{self.epochs}"
        pending: list[Tensor] = []  # losses not yet read from the device
        clock, images_seen = time.perf_counter(), 0
        begin = clock
        self.optimizer.zero_grad(set_to_none=True)
        self.waited = 0.0
        for images, targets in self._batches():
            with part("preparation"):
                images, targets = self._prepare(images, targets)
            if world.is_primary and progress.images == 0:
                drawing = time.perf_counter()
                self._draw_samples(images, targets)
                drawing = time.perf_counter() - drawing
                clock, begin = clock + drawing, begin + drawing
            loss, update = self._micro_step(images, targets, progress.batch)
            pending.append(loss)
            progress.batch += 1
            count = len(images) * world.size
            progress.images += count
            images_seen += count
            if not update:
                continue
            self.optimizer.zero_grad(set_to_none=True)
            progress.step += 1
            self.task.update_ema(step=progress.step)
            self.schedule.step_update(progress.step)
            end = progress.step >= self.total_steps
            due = self.recorder.due(progress.step)
            stop = world.any(self.signals.received is not None or self.loader.too_many_bad())
            read = world.device.type == "cpu" or progress.step % cfg.log_every == 0 or end or due or stop
            read = read or self.recorder.quiet
            last = None
            if read:
                last = self._read(pending)
            now = time.perf_counter()
            rate = images_seen / max(now - begin, 1e-9)
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            self.recorder.step(label, progress.step, last, lr, rate)
            if self.profiler is not None:
                self._profile_step()
            if stop or due or end:
                progress.seconds += now - clock
                clock = now
            if stop:
                self._stop()
            if end:
                break
            if due:
                self.save()
        else:
            progress.batch = self.loader.batches  # a stream may end a little before its announced length
        if pending:
            self._read(pending)
        elapsed = max(time.perf_counter() - begin, 1e-9)
        self.rate, self.wait_share = images_seen / elapsed, 100 * self.waited / elapsed
        progress.seconds += time.perf_counter() - clock

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What is left of the epoch; how long was waited for it is kept."""
        batches = iter(self.loader.epoch(self.progress.epoch, self.progress.batch))
        while True:
            before = time.perf_counter()
            with part("data"):
                batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def _profile_step(self) -> None:
        assert self.profiler is not None
        line = self.profiler.step()
        if line is not None:
            self.profiler = None
            print(line, flush=True)

    def _read(self, pending: list[Tensor]) -> float:
        values = torch.stack(pending).cpu().double().tolist()
        pending.clear()
        for value in values:
            if not math.isfinite(value):
                self._fail(f"the loss is {value} near step {self.progress.step}")
            self.progress.loss_sum += value
        return values[-1]

    def _stop(self) -> NoReturn:
        self.save()
        raise Interrupted

    def _evaluate(self, ema: bool) -> Evaluation:
        model: Any = self.task.get_eval_model(ema=ema)
        if not ema and isinstance(model, DistributedDataParallel):
            model = model.module
        if self.world.distributed:  # batch norm's averages are those of the first process, which are the ones saved
            distribute_bn(model, self.world.size, reduce=False)
        result = evaluate(
            model,
            self.val_loader,
            self.world,
            num_classes=self.num_classes,
            amp=self.cfg.amp,
            channels_last=self.cfg.channels_last,
            max_batches=1 if self.cfg.dry_run else None,
            stop=lambda: self.signals.received is not None,
            remark=lambda images: self.recorder.remark(f"evaluating: {images} images"),
        )
        if result is None:
            raise Interrupted
        self.loader.bad.merge(("held-out", name, reason) for name, reason in self.val_loader.unreadable)
        return result

    def _figures(self) -> tuple[dict[str, Any], float]:
        """What the held-out images say, as columns of the history, and the score for the best checkpoint.

        Raises:
            TrainingFailed: their loss is no number, and so the accuracies say nothing.
        """
        try:
            raw = self._evaluate(ema=False)
            averaged = self._evaluate(ema=True) if self.task.has_ema() else None
        except Interrupted:
            self._stop()
        for name, found in (("", raw), (" of the averaged weights", averaged)):
            if found is not None and not math.isfinite(found.loss):
                self._fail(f"the loss{name} on the held-out images is {found.loss} after step {self.progress.step}")
        row = {"val_loss": raw.loss, "top1": raw.top1, "top5": raw.top5, "held_out": raw.images}
        if raw.unreadable:
            row["unreadable"] = raw.unreadable
        if averaged is not None:
            row |= {"ema_loss": averaged.loss, "ema_top1": averaged.top1, "ema_top5": averaged.top5}
        return row, (averaged or raw).top1

    def _end_epoch(self, final: bool) -> None:
        """Evaluate, log and save after an epoch, or where the run ends inside one."""
        progress, recorder = self.progress, self.recorder
        clock = time.perf_counter()
        epoch = progress.epoch + 1
        row: dict[str, Any] = {"epoch": epoch, "step": progress.step}
        row["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        loss, batches = self.world.totals(progress.loss_sum, progress.batch)
        row["train_loss"] = loss / batches
        partial = progress.batch < self.loader.batches
        # a resumed run goes on inside the epoch, so what follows is no part of its state
        before = self._state() if partial else None
        better = False
        if final or epoch % self.cfg.eval_every == 0:
            figures, score = self._figures()
            if partial:
                self.save(state=before)
            row |= figures
            better = recorder.is_best(score, epoch)
        progress.seconds += time.perf_counter() - clock
        row |= {"images_per_second": self.rate or None, "data_wait": self.wait_share, "seconds": progress.seconds}
        recorder.history.append(row)
        if partial:
            if better:
                self.save("best")
        else:
            progress.epoch, progress.batch, progress.loss_sum = epoch, 0, 0.0
            if better:
                self.save("best", "last")
            elif final or recorder.due_after(epoch):
                self.save()
        recorder.publish(self._describe(row))

    def _describe(self, row: dict[str, Any]) -> str:
        """One line on an epoch."""
        parts = [f"epoch {row['epoch']}/{self.epochs}", f"train loss {row['train_loss']:.4f}"]
        if row.get("val_loss") is not None:
            parts += [f"held-out loss {row['val_loss']:.4f}", f"top-1 {row['top1']:.2f} %"]
        if row.get("unreadable"):
            parts.append(f"{row['unreadable']} held-out images unreadable")
        if row.get("ema_top1") is not None:
            parts.append(f"EMA top-1 {row['ema_top1']:.2f} %")
        if row.get("images_per_second"):
            parts.append(rate_text(row["images_per_second"]))
        if (row.get("data_wait") or 0.0) >= _WAITED:
            parts.append(f"{row['data_wait']:.0f} % of it waiting for data")
        return "  ".join(parts)

    def _verify_dry_run(self) -> None:
        """Load what was saved, compare it with what is in memory, and go on from it."""
        path = self.recorder.checkpoints / "last.pt"
        state = load_checkpoint(path)
        for ema in (False, True) if self.task.has_ema() else (False,):
            key = "state_dict_ema" if ema else "state_dict"
            for name, value in self.task.get_checkpoint_state(ema=ema)[key].items():
                if not torch.equal(value.cpu(), state[key][name]):
                    raise TrainingFailed(f"dry run: {name} of {key} came back from {path} with other values")
        self.restore(state, path)

    def fit(self) -> dict[str, Any]:
        """Train from the newest intact checkpoint, or from the start, to the end; return the summary.

        Raises:
            Interrupted: a signal came; the state is saved.
            TrainingFailed: the loss is no longer a number.
        """
        try:
            with self.signals.installed(), determinism(self.cfg.deterministic):
                return self._fit()
        finally:
            if self.recorder.begun:
                self._list_bad()
            self.loader.close()
            self.val_loader.close()

    def _draw_samples(self, images: Tensor, targets: Tensor) -> None:
        """augmented.png: images and classes of the first batch as the model gets them."""
        path = self.recorder.run_dir / "augmented.png"
        draw_samples(path, images[:_DRAWN], targets[:_DRAWN], self.data_facts["label_names"], self.shape)

    def _label_note(self) -> str | None:
        """A line where the model is not the one that its name promises."""
        model = self.cfg.model
        if model.label is None:
            return None
        return (
            f"model: {model.label}, a {model.name} reduced to {self.parameters / 1e6:.2f} M parameters (model.kwargs)"
        )

    def _freeze_note(self) -> str | None:
        """A line on what is trained where something is frozen."""
        model = self.cfg.model
        if self.trainable == self.parameters:
            return None
        random = "; the frozen ones are random, for model.pretrained is false" if not model.pretrained else ""
        return f"model.freeze={model.freeze}: {self.trainable:,} of {self.parameters:,} parameters are trained{random}"

    def _ema_note(self) -> str | None:
        """A line where the run is too short for the decay of its averaged weights; None where it is not."""
        average: Any = self.task.get_trainable_module(ema=True) if self.task.has_ema() else None
        if average is None or self.cfg.dry_run:
            return None
        decay, steps = self.cfg.ema.decay, self.total_steps
        reached = average.get_decay(steps)
        if self.cfg.ema.warmup:
            if reached >= decay:
                return None
            return f"note: ema.decay={decay:g} is not reached in {steps} updates; its warm-up ends at {reached:.4g}"
        first = decay ** (steps - 1)  # the share of the weights after the first update
        if first < _NEAR_INITIAL:
            return None
        return (
            f"warning: {steps} updates are few for ema.decay={decay:g} without a warm-up: the averaged weights, which "
            f"are reported and exported, are {100 * first:.0f} % the first ones; set ema.warmup=true or a lower decay"
        )

    def _fit(self) -> dict[str, Any]:
        recorder = self.recorder
        recorder.resume(self.restore)
        if self.cfg.profile and self.world.is_primary:
            self.profiler = UpdateProfiler(recorder.run_dir / "profile", self.world.device)
        recorder.begin(self.total_steps, self.progress.step)
        for note in (self._label_note(), self._freeze_note(), self._ema_note()):
            if note is not None and self.world.is_primary:
                print(note, flush=True)
        try:
            if self.world.any(self.signals.received is not None):
                self._stop()
            while self.progress.step < self.total_steps or self.progress.batch > 0:
                self._train_epoch()
                if self.cfg.dry_run:
                    self.save()
                    if self.world.is_primary:
                        self._verify_dry_run()
                final = self.progress.step >= self.total_steps
                self._end_epoch(final)
                if final:
                    break
        finally:
            recorder.close()
            line = self.profiler.close() if self.profiler is not None else None
        if self.profiler is not None:
            print(line or "profile: the run ended before its third update; nothing was written", flush=True)
        return self._finish()

    def _finish(self) -> dict[str, Any]:
        """Write summary and curves; their accuracy is the last one, of the averaged weights where there are any."""
        cfg, progress, recorder = self.cfg, self.progress, self.recorder
        last: dict[str, Any] = next((row for row in reversed(recorder.history) if row.get("top1") is not None), {})
        kind = "ema_" if last.get("ema_top1") is not None else ""
        facts = {
            "model": cfg.model.name,
            "label": cfg.model.label,
            "data": cfg.data.name,
            "parameters": self.parameters,
            "trainable": self.trainable,
            "top1": last.get(f"{kind}top1"),
            "top5": last.get(f"{kind}top5"),
            "loss": last.get("ema_loss" if kind else "val_loss"),
            "weights": "ema" if kind else "raw",
            "held_out": last.get("held_out"),
            "unreadable": last.get("unreadable", 0),
            "best_top1": recorder.best,
            "best_epoch": recorder.best_epoch,
        }
        rate = round(progress.images / progress.seconds, 2) if progress.seconds else None
        summary = recorder.write_summary(
            facts, step=progress.step, seconds=progress.seconds, rate=rate, packages=versions()
        )
        if self.world.is_primary and recorder.history:
            recorder.plot(
                f"{model_label(cfg.model)} on {cfg.data.name or 'imagefolder'}: top-1 {summary['top1']:.2f} %"
            )
        return summary
