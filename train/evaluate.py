"""Accuracy over held-out images, and `zoo eval`."""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.task import ClassificationEvaluator
from torch import nn

from zoo.errors import UserError
from zoo.train.build import build_model, load_weights
from zoo.train.config import EvalConfig
from zoo.train.data import FOLDERS, EvalLoader, class_count, open_dataset, resolve_transform
from zoo.train.runs import load_run, select_weights, write_atomic
from zoo.train.state import World, join_world

__all__ = ["Evaluation", "autocast", "check_targets", "evaluate", "evaluate_command"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Evaluation:
    """What held-out images say: mean cross-entropy, accuracies in per cent, images, images per second."""

    loss: float
    top1: float
    top5: float
    images: int
    images_per_second: float


def autocast(device: torch.device, amp: str) -> Callable[[], AbstractContextManager[Any]]:
    """A maker of autocast contexts; of empty ones when amp is "none"."""
    if amp == "none":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=_DTYPES[amp])


def check_targets(targets: torch.Tensor, num_classes: int) -> None:
    """Raise UserError where a class is outside the model's head; the targets are still on the CPU."""
    if targets.numel() and (int(targets.max()) >= num_classes or int(targets.min()) < 0):
        wrong = int(targets.max()) if int(targets.max()) >= num_classes else int(targets.min())
        raise UserError(
            f"the data have an image of class {wrong}, the model's head has classes 0 to {num_classes - 1}; "
            "set data.num_classes (and model.num_classes) to what the data hold"
        )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    world: World,
    *,
    num_classes: int,
    amp: str = "none",
    channels_last: bool = False,
    max_batches: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate over all processes; None when `stop` asked to end early (looked at in single-process runs)."""
    was_training = model.training
    model.eval()
    evaluator = ClassificationEvaluator(device=world.device)
    precision = autocast(world.device, amp)
    begin = time.perf_counter()
    try:
        for count, (images, targets) in enumerate(loader):
            if max_batches is not None and count >= max_batches:
                break
            if not world.distributed and stop():
                return None
            check_targets(targets, num_classes)
            images = images.to(world.device, non_blocking=True)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with precision():
                output = model(images)
            evaluator.update(output, targets.to(world.device, non_blocking=True))
    finally:
        model.train(was_training)
    result = evaluator.compute(distributed=world.distributed)
    images_seen = int(world.sum(evaluator.counts[:1])[0])
    if images_seen == 0:
        raise UserError("there are no held-out images; check data.root and data.val_split")
    seconds = max(time.perf_counter() - begin, 1e-9)
    return Evaluation(result["loss"], result["top1"], result["top5"], images_seen, images_seen / seconds)


def _from_run(cfg: EvalConfig) -> tuple[Any, dict[str, Any]]:
    run = load_run(str(cfg.run))
    path, state = run.checkpoint(cfg.checkpoint)
    weights, kind = select_weights(state, cfg.weights)
    model: Any = build_model(cfg.model, int(state["num_classes"]), cfg.data.img_size, pretrained=False)
    load_weights(model, weights, f"checkpoint {path}")
    return model, {"run": str(run.path), "checkpoint": str(path), "weights": kind, "step": state["step"]}


def _from_model(cfg: EvalConfig, expected: int | None) -> tuple[Any, dict[str, Any]]:
    source = cfg.model.pretrained if cfg.pretrained is None else cfg.pretrained
    if not isinstance(source, bool | str):
        raise UserError(f"pretrained={source!r} is no choice; give true or the path of a checkpoint file")
    if not source:
        raise UserError(
            f"model {cfg.model.name} has no weights to evaluate; give run=FOLDER, pretrained=true or pretrained=FILE"
        )
    model: Any = build_model(cfg.model, cfg.model.num_classes, cfg.data.img_size, pretrained=source)
    if expected is not None and model.num_classes < expected:
        raise UserError(
            f"the checkpoint's head has {model.num_classes} classes, the data have {expected}; "
            "evaluate it on the data it was trained for, or train a new head with `zoo train model.pretrained=...`"
        )
    if expected is not None and model.num_classes > expected:
        raise UserError(
            f"too many classes: the checkpoint's head has {model.num_classes}, the data have {expected}; "
            f"evaluate it on its own data, or say data.num_classes={model.num_classes} if they are numbered alike"
        )
    return model, {"weights": source if isinstance(source, str) else "published"}


def evaluate_command(cfg: EvalConfig) -> Evaluation:
    """Run `zoo eval`: print the result and write it as JSON where `out` says.

    Raises:
        UserError: a run, a checkpoint or the data are missing, or the classes do not agree.
    """
    world = join_world(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    training = None
    if cfg.data.name in FOLDERS:  # classes are numbered by the training images where they are there
        try:
            training = open_dataset(cfg.data, True, cfg.model.in_chans).reader.class_to_idx
        except UserError:
            training = None
    dataset = open_dataset(cfg.data, False, cfg.model.in_chans, class_map=training, batch_size=cfg.batch_size)
    expected = class_count(cfg.data, dataset)
    model, source = _from_run(cfg) if cfg.run is not None else _from_model(cfg, expected)
    if cfg.run is not None and expected is not None and expected > model.num_classes:
        raise UserError(
            f"the run's head has {model.num_classes} classes, the data have {expected}; evaluate it on its own data"
        )
    shape = resolve_transform(cfg.data, model, cfg.model.in_chans)
    model = model.to(world.device)
    if cfg.channels_last:
        model = model.to(memory_format=torch.channels_last)
    num_classes = model.num_classes
    if cfg.compile:
        model = torch.compile(model)
    loader = EvalLoader(dataset, cfg.data, shape, cfg.batch_size, world)
    try:
        result = evaluate(model, loader, world, num_classes=num_classes, amp=cfg.amp, channels_last=cfg.channels_last)
    finally:
        loader.close()
    assert result is not None
    if world.is_primary:
        record = {
            "model": cfg.model.name,
            **source,
            "data": cfg.data.name,
            "images": result.images,
            "loss": result.loss,
            "top1": result.top1,
            "top5": result.top5,
            "images_per_second": result.images_per_second,
            "device": str(world.device),
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
        }
        if cfg.out is not None:
            target = Path(cfg.out)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, json.dumps(record, indent=2) + "\n")
        print(
            f"top-1 {result.top1:.2f} %  top-5 {result.top5:.2f} %  loss {result.loss:.4f}  {result.images} images, "
            f"{result.images_per_second:.0f} images/s  ({cfg.model.name}, {source['weights']} weights)"
        )
    world.leave()
    return result
