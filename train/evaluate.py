"""Accuracy over held-out images, and `zoo eval`."""

import json
import math
import sys
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
from zoo.models.checkpoints import load_plain, read_checkpoint, read_source
from zoo.train.build import build_model, load_weights
from zoo.train.config import EvalConfig, model_label
from zoo.train.data import FOLDERS, EvalLoader, class_count, open_dataset, resolve_transform
from zoo.train.images import PixelRanges
from zoo.train.labels import data_notes, label_names, match_labels
from zoo.train.loggers import Console, rate_text
from zoo.train.report import Outcomes
from zoo.train.runs import check_writable, json_text, load_run, select_weights, write_atomic
from zoo.train.state import World, join_world
from zoo.train.stop import TrainingFailed

__all__ = [
    "Evaluation",
    "Source",
    "autocast",
    "check_head",
    "check_targets",
    "evaluate",
    "evaluate_command",
    "file_labels",
    "open_source",
    "unreadable_note",
]

_SHOWN = 20  # unreadable images that are printed; the record holds all
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Evaluation:
    """What held-out images say: mean cross-entropy, accuracies in per cent, images, images per second.

    An unreadable image counts as missed in the accuracies; the loss is that of the readable ones.
    """

    loss: float
    top1: float
    top5: float | None  # None where there are five classes or fewer, of which it would say nothing
    images: int
    images_per_second: float
    unreadable: int = 0  # of the images


def unreadable_note(count: int) -> str:
    """What follows a number of images where some could not be read."""
    return f", {count} of them unreadable and counted as wrong" if count else ""


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
    outcomes: Outcomes | None = None,
    remark: Callable[[int], None] = lambda images: None,
) -> Evaluation | None:
    """Evaluate over all processes; None when `stop` asked to end early (looked at in single-process runs).

    `outcomes` collects what was predicted for every image; `remark` is told after every batch how many images this
    process has seen.
    """
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
            if outcomes is not None:
                outcomes.add(output, targets, loader.places)
            remark(evaluator.num_samples)
    finally:
        model.train(was_training)
    result = evaluator.compute(distributed=world.distributed)
    images_seen = int(world.sum(evaluator.counts[:1])[0])
    unreadable = int(world.sum(torch.tensor(len(loader.unreadable), device=world.device)))
    if images_seen == 0 and unreadable:
        such = f" (such as {': '.join(loader.unreadable[0])})" if loader.unreadable else ""
        raise UserError(f"none of the {unreadable} held-out images can be read{such}; check data.root")
    if images_seen == 0:
        raise UserError("there are no held-out images; check data.root and data.val_split")
    seconds = max(time.perf_counter() - begin, 1e-9)
    total = images_seen + unreadable
    share = images_seen / total if unreadable else 1.0
    top1, top5 = result["top1"] * share, result["top5"] * share if num_classes > 5 else None
    return Evaluation(result["loss"], top1, top5, total, images_seen / seconds, unreadable)


@dataclass(frozen=True)
class Source:
    """A model with weights and what they say of the data that they were trained on."""

    model: Any
    facts: dict[str, Any]  # for the record
    names: list[str] | None = None  # of the classes
    known_as: str = ""  # whose classes they are
    ranges: PixelRanges | None = None


def _from_run(cfg: EvalConfig) -> Source:
    run = load_run(str(cfg.run))
    path, state = run.checkpoint(cfg.checkpoint)
    weights, kind = select_weights(state, cfg.weights)
    model: Any = build_model(cfg.model, int(state["num_classes"]), cfg.data.img_size, pretrained=False)
    load_weights(model, weights, f"checkpoint {path}")
    facts = {"run": str(run.path), "checkpoint": str(path), "weights": kind, "step": state["step"]}
    found = (state.get("data_set") or {}).get("ranges")
    ranges = PixelRanges.from_state(found) if found else None
    return Source(model, facts, state.get("label_names"), "the run's training images", ranges)


def file_labels(path: Path) -> list[str] | None:
    """The class names in a checkpoint of `zoo train`, or beside the weights in an exported folder."""
    try:
        folder = path if path.is_dir() else path.parent
        if path.suffix == ".safetensors" or path.is_dir() and (folder / "config.json").is_file():
            found = json.loads((folder / "config.json").read_text()).get("label_names")
        elif path.is_dir():
            found = read_source(path).get("label_names")
        else:
            found = load_plain(path, mmap=True).get("label_names")
    except Exception:  # a file of another program, which the model has taken
        return None
    return [str(name) for name in found] if isinstance(found, list | tuple) else None


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same values, in whatever shape; NaN is NaN."""
    if a.numel() != b.numel():
        return False
    a, b = a.reshape(-1).to(b.dtype), b.reshape(-1)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def check_head(model: Any, source: str | bool) -> None:
    """Raise UserError where the model's head is a fresh one, because the weights have none or one of another size."""
    if isinstance(source, str):
        stored = list(read_checkpoint(source).values()) if not source.endswith((".npz", ".npy")) else None
        found = "has no head"
    else:
        published = timm.models.get_pretrained_cfg(model.pretrained_cfg["architecture"])
        stored = None
        if published is not None and published.num_classes != model.num_classes:
            stored, found = [], f"have a head of {published.num_classes} classes, none"
    if stored is None:
        return
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        weight = getattr(head, "weight", None)
        if weight is not None and not any(_same(value, weight.detach().cpu()) for value in stored):
            origin = source if isinstance(source, str) else "the published weights"
            raise UserError(
                f"{origin} {found} of {model.num_classes} classes, and a fresh one has nothing to evaluate; set "
                "model.num_classes to the classes that it was trained with, or leave it out"
            )


def _from_model(cfg: EvalConfig) -> Source:
    source = cfg.model.pretrained if cfg.pretrained is None else cfg.pretrained
    if not isinstance(source, bool | str):
        raise UserError(f"pretrained={source!r} is no choice; give true or the path of a checkpoint file")
    if not source:
        raise UserError(
            f"model {cfg.model.name} has no weights to evaluate; give run=FOLDER, pretrained=true or pretrained=FILE"
        )
    model: Any = build_model(cfg.model, cfg.model.num_classes, cfg.data.img_size, pretrained=source)
    check_head(model, source)
    names = file_labels(Path(source)) if isinstance(source, str) else model.pretrained_cfg.get("label_names")
    if names is not None and len(names) > model.num_classes:
        names = None
    facts = {"weights": source if isinstance(source, str) else "published"}
    return Source(model, facts, names, "the checkpoint's training images")


def open_source(cfg: EvalConfig) -> Source:
    """The model that `zoo eval` and `zoo predict` name, with its weights.

    Raises:
        UserError: the run, the model or the weights are not there, or do not fit.
    """
    return _from_run(cfg) if cfg.run is not None else _from_model(cfg)


def published_labels(model: Any, names: list[str] | None) -> list[str] | None:
    """ImageNet's class names (WordNet ids) in the order of a head of that size, where the data's classes are theirs."""
    subset = timm.data.infer_imagenet_subset(model)
    if not subset or not names:
        return None
    known = timm.data.ImageNetInfo(subset).label_names()
    return known if len(known) == model.num_classes and set(names) <= set(known) else None


def _training_classes(cfg: EvalConfig) -> dict[str, int] | None:
    """How the training images of a folder number the classes; None where they are not there."""
    if cfg.data.name not in FOLDERS:
        return None
    try:
        return open_dataset(cfg.data, True, cfg.model.in_chans, ranges=PixelRanges()).reader.class_to_idx
    except UserError:
        return None


def _check_count(cfg: EvalConfig, model: Any, expected: int | None) -> None:
    """Where no names can be compared, the numbers of classes must agree."""
    if expected is None or model.num_classes == expected:
        return
    if cfg.run is not None:
        if expected > model.num_classes:
            raise UserError(
                f"the run's head has {model.num_classes} classes, the data have {expected}; evaluate it on its own data"
            )
        return
    if model.num_classes < expected:
        raise UserError(
            f"the checkpoint's head has {model.num_classes} classes, the data have {expected}; "
            "evaluate it on the data it was trained for, or train a new head with `zoo train model.pretrained=...`"
        )
    raise UserError(
        f"too many classes: the checkpoint's head has {model.num_classes}, the data have {expected}; "
        f"evaluate it on its own data, or say data.num_classes={model.num_classes} if they are numbered alike"
    )


def _open_for(cfg: EvalConfig, source: Source) -> Any:
    """The held-out images, their classes numbered as the model numbers them: by name wherever names are known."""
    options: dict[str, Any] = {"batch_size": cfg.batch_size, "ranges": source.ranges}
    names = source.names
    dataset = open_dataset(cfg.data, False, cfg.model.in_chans, **options) if names else None
    own = label_names(dataset)
    if names is None:
        training = _training_classes(cfg)
        dataset = open_dataset(cfg.data, False, cfg.model.in_chans, class_map=training, **options)
        own = label_names(dataset)
        names = published_labels(source.model, own) if cfg.run is None else None
    if names is not None and own is not None:
        return match_labels(dataset, names, source.known_as or "ImageNet's classes")
    _check_count(cfg, source.model, class_count(cfg.data, dataset))
    return dataset


def evaluate_command(cfg: EvalConfig) -> Evaluation:
    """Run `zoo eval`: print the result and write it as JSON where `out` says.

    Raises:
        UserError: a run, a checkpoint or the data are missing, or the classes do not agree.
        TrainingFailed: the loss is no number.
    """
    if cfg.out is not None:
        check_writable(Path(cfg.out))
    if cfg.report is not None:
        check_writable(Path(cfg.report) / "per_class.csv", "report")
    world = join_world(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    found = open_source(cfg)
    model, source = found.model, found.facts
    dataset = _open_for(cfg, found)
    if world.is_primary:
        for line in data_notes(dataset):
            print(line, flush=True)
    shape = resolve_transform(cfg.data, model, cfg.model.in_chans)
    model = model.to(world.device)
    if cfg.channels_last:
        model = model.to(memory_format=torch.channels_last)
    num_classes = model.num_classes
    if cfg.compile:
        model = torch.compile(model)
    loader = EvalLoader(dataset, cfg.data, shape, cfg.batch_size, world)
    outcomes = Outcomes() if cfg.report is not None else None
    console = Console(0, 0, 1, world.is_primary and not sys.stdout.isatty())
    options: dict[str, Any] = {"remark": lambda images: console.remark(f"evaluating: {images} images")}
    options |= {"num_classes": num_classes, "amp": cfg.amp, "channels_last": cfg.channels_last}
    try:
        result = evaluate(model, loader, world, outcomes=outcomes, **options)
    finally:
        loader.close()
    assert result is not None
    unreadable = sorted(entry for entries in world.gather(loader.unreadable) for entry in entries)
    if outcomes is not None:
        outcomes.gather(world)
    if not math.isfinite(result.loss):
        raise TrainingFailed(
            f"the loss on the held-out images is {result.loss}, and so the accuracies say nothing; the weights are "
            "of a training that diverged, or amp=fp16 is too narrow for them"
        )
    if world.is_primary:
        for name, reason in unreadable[:_SHOWN]:
            print(f"unreadable: {name}: {reason}", flush=True)
        if len(unreadable) > _SHOWN:
            print(f"unreadable: {len(unreadable) - _SHOWN} more{'; out=FILE lists all' if not cfg.out else ''}")
        record = {
            "model": cfg.model.name,
            "label": cfg.model.label,
            **source,
            "data": cfg.data.name,
            "images": result.images,
            "unreadable": result.unreadable,
            "unreadable_images": [{"image": name, "reason": reason} for name, reason in unreadable],
            "loss": result.loss,
            "top1": result.top1,
            "top5": result.top5,
            "images_per_second": result.images_per_second,
            "device": str(world.device),
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
        }
        if cfg.out is not None:
            target = Path(cfg.out)
            write_atomic(target, json_text(record))
        if outcomes is not None:
            names = found.names or label_names(dataset) or []
            names = [*names, *(str(i) for i in range(len(names), num_classes))]
            rows = [*outcomes.rows(names, dataset), *({"image": n, "error": r} for n, r in unreadable)]
            for line in outcomes.write(Path(str(cfg.report)), names, rows if cfg.per_image else None):
                print(line, flush=True)
        rate = rate_text(result.images_per_second)
        top5 = "" if result.top5 is None else f"  top-5 {result.top5:.2f} %"
        print(
            f"top-1 {result.top1:.2f} %{top5}  loss {result.loss:.4f}  {result.images} images"
            f"{unreadable_note(result.unreadable)}, {rate}  ({model_label(cfg.model)}, {source['weights']} weights)"
        )
    world.leave()
    return result
