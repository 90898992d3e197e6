"""Distillation: a teacher whose answers a model learns beside the labels, by timm's LogitDistillationTask."""

import os
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.task import LogitDistillationTask
from timm.task.distillation import DistillationTeacher
from torch import nn

from zoo.errors import UserError, first_line
from zoo.train.augment import resolve_transform
from zoo.train.compose import from_container
from zoo.train.config import EVAL, DistillConfig
from zoo.train.evaluate import Source, open_source, published_labels
from zoo.train.runs import is_run, load_run

__all__ = ["DistilledTask", "open_teacher"]


class DistilledTask(LogitDistillationTask):
    """timm's task, of which the teacher is no part of a checkpoint and sees its own normalization of the images.

    Args:
        model: the student.
        teacher: see `open_teacher`.
        cfg: weights of both losses, and the temperature.
        shape: with the mean and std by which the images were normalized.
        criterion: arguments of timm's classification loss.
        device: where both are.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: DistillationTeacher,
        cfg: DistillConfig,
        shape: dict[str, Any],
        criterion: dict[str, Any],
        device: torch.device,
    ) -> None:
        super().__init__(
            model, teacher, criterion_kwargs=criterion, distill_loss_weight=cfg.weight,
            task_loss_weight=cfg.task_weight, temperature=cfg.temperature, device=device, verbose=False,
        )  # fmt: skip
        self.student_mean, self.student_std = (_as_map(shape[key], device) for key in ("mean", "std"))


def _as_map(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def open_teacher(
    cfg: DistillConfig, shape: dict[str, Any], num_classes: int, names: list[str] | None, device: torch.device
) -> DistillationTeacher:
    """The teacher with its weights, on the device, frozen.

    Args:
        cfg: names it: a run folder, or a name that timm knows with its published weights or those of a file.
        shape: size and statistics of the images that the student is trained on.
        num_classes: the student's classes.
        names: their names, where the data have them.
        device: for the teacher.

    Raises:
        UserError: the run, the model or the weights are not there; its classes are not the student's; it does not take
            images of that size.
    """
    channels, height, width = shape["input_size"]
    source, own = _open(cfg, shape, num_classes)
    model = source.model.to(device).eval().requires_grad_(False)
    _check_classes(cfg, source, num_classes, names)
    with torch.no_grad():
        try:
            answers = model(torch.zeros(1, channels, height, width, device=device))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(
                f"distill.teacher={cfg.teacher} does not take images of {height} x {width}: {first_line(error)}; give "
                "another teacher or data.img_size"
            ) from error
    if tuple(answers.shape) != (1, num_classes):
        raise UserError(
            f"distill.teacher={cfg.teacher} gives {tuple(answers.shape)} where (1, {num_classes}) are wanted; give a "
            "classifier"
        )
    teacher = DistillationTeacher(model, device=device)
    teacher.mean_kd, teacher.std_kd = (_as_map(own[key], device) for key in ("mean", "std"))
    return teacher


def _open(cfg: DistillConfig, shape: dict[str, Any], num_classes: int) -> tuple[Source, dict[str, Any]]:
    """The teacher, and how its images are normalized."""
    in_chans, size, _ = shape["input_size"]
    name = str(cfg.teacher)
    container: dict[str, Any] = {"data": {"name": "imagefolder"}}
    if is_run(name):
        if cfg.pretrained is not True:
            raise UserError("distill.pretrained conflicts with a run, which has its weights; leave it out")
        run = load_run(name)
        if "detector" in run.config:
            raise UserError(f"distill.teacher={name} is the run of a detector; give a classifier")
        container |= {"run": name, "model": run.config["model"], "data": dict(run.config["data"])}
    else:
        if not cfg.pretrained:
            raise UserError(
                "distill.pretrained=false is a teacher that knows nothing; give true or a checkpoint's path"
            )
        if not timm.is_model(name) and (os.sep in name or os.path.isdir(name)):
            raise UserError(
                f"distill.teacher={name} is no run folder; give one that `zoo train` wrote, or a model's name"
            )
        classes = num_classes if isinstance(cfg.pretrained, str) else None
        model = {"name": name, "in_chans": in_chans, "num_classes": classes}
        container |= {"model": model, "pretrained": cfg.pretrained}
    container["data"]["img_size"] = size
    config = from_container(container, EVAL)
    if config.model.in_chans != in_chans:
        raise UserError(
            f"distill.teacher={name} takes {config.model.in_chans} channels and the images have {in_chans}; give a "
            f"teacher of model.in_chans={in_chans}"
        )
    source = open_source(config)
    return source, resolve_transform(config.data, source.model, in_chans)


def _check_classes(cfg: DistillConfig, source: Source, num_classes: int, names: list[str] | None) -> None:
    count = source.model.num_classes
    if count != num_classes:
        raise UserError(
            f"distill.teacher={cfg.teacher} has {count} classes and the student {num_classes}; give a teacher of the "
            "same classes"
        )
    known = source.names or published_labels(source.model, names)
    if known is None or names is None:
        return
    for index, (theirs, ours) in enumerate(zip(known, names, strict=False)):
        if str(theirs) != str(ours):
            raise UserError(
                f"class {index} is {theirs!r} for distill.teacher={cfg.teacher} and {ours!r} in the data; give a "
                "teacher of the same classes in the same order"
            )
