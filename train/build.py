"""From the configuration to a model, its task, optimizer and schedule, through timm."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from zoo.errors import UserError
from zoo.models.checkpoints import read_checkpoint
from zoo.registry import package_models, require_model
from zoo.train.config import LossConfig, ModelConfig, OptimConfig, ScheduleConfig

__all__ = ["build_model", "build_optimizer", "build_schedule", "load_weights", "loss_options"]


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines) or type(error).__name__


def _weights_of(name: str, source: str) -> dict[str, Any]:
    """What timm is told of a checkpoint file, which is read without running code."""
    # this package's models read theirs themselves; timm has readers for models of its own
    if name.split(".")[0] in package_models() or source.endswith((".npz", ".npy")):
        return {"file": source}
    try:
        weights = read_checkpoint(source)
    except (RuntimeError, OSError) as error:
        raise UserError(f"model {name}: {source} cannot be loaded: {_one_line(error)}") from error
    published = timm.models.get_pretrained_cfg(name)
    head = published.classifier if published is not None else None
    if isinstance(head, str) and f"{head}.weight" in weights:  # else timm takes it to be of the published size
        return {"state_dict": weights, "num_classes": len(weights[f"{head}.weight"])}
    return {"state_dict": weights}


def build_model(
    cfg: ModelConfig, num_classes: int | None, img_size: int | None = None, pretrained: bool | str | None = None
) -> nn.Module:
    """Create the model that the configuration names.

    Args:
        cfg: the model section of the configuration.
        num_classes: size of the head; None keeps the model's own, which a checkpoint's head must then fit.
        img_size: image size in pixels, for models that are built for one size.
        pretrained: overrides cfg.pretrained.

    Raises:
        UserError: the name is unknown, an argument does not exist, or the weights cannot be had or do not fit.
    """
    require_model(cfg.name)
    source = cfg.pretrained if pretrained is None else pretrained
    options: dict[str, Any] = dict(cfg.kwargs)
    options["in_chans"] = cfg.in_chans
    for key in ("drop_rate", "drop_path_rate"):
        if getattr(cfg, key) is not None:
            options[key] = getattr(cfg, key)
    if num_classes is not None:
        options["num_classes"] = num_classes
    published = timm.models.get_pretrained_cfg(cfg.name)
    if img_size is not None and published is not None and published.fixed_input_size:
        options.setdefault("img_size", img_size)
    if isinstance(source, str):
        if not Path(source).exists():
            raise UserError(
                f"no checkpoint file at {source}; give the path of a .pth, .pt, .pkl or .safetensors file, an index of "
                "shards, or a folder of weights"
            )
        options["pretrained_cfg_overlay"] = _weights_of(cfg.name, source)
    try:
        model = timm.create_model(cfg.name, pretrained=bool(source), **options)
    except TypeError as error:
        raise UserError(f"model {cfg.name} refuses an argument: {_one_line(error)}; see model.kwargs") from error
    except (RuntimeError, ValueError, KeyError, AssertionError, OSError, URLError) as error:
        if not source:
            raise UserError(
                f"model {cfg.name} cannot be built: {_one_line(error)}; see model.kwargs and data.img_size"
            ) from error
        origin = source if isinstance(source, str) else "the published weights"
        raise UserError(f"model {cfg.name}: {origin} cannot be loaded: {_one_line(error)}") from error
    for known in (getattr(model, "pretrained_cfg", None), getattr(model, "default_cfg", None)):
        if isinstance(known, dict):
            known.pop("state_dict", None)  # the file's own, which the model has taken
    if cfg.grad_checkpointing:
        enable: Any = getattr(model, "set_grad_checkpointing", None)
        if enable is None:
            raise UserError(f"model {cfg.name} has no gradient checkpointing; set model.grad_checkpointing=false")
        enable(True)
    return model


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Load a run's own weights strictly.

    Raises:
        UserError: they belong to another model or to another number of classes.
    """
    own = model.state_dict()
    different = [
        f"{key}: {tuple(value.shape)} in the checkpoint, {tuple(own[key].shape)} in the model"
        for key, value in weights.items()
        if key in own and own[key].shape != value.shape
    ]
    foreign = sorted(set(own) ^ set(weights))
    if different or foreign:
        detail = "; ".join(different[:2]) if different else f"keys differ, such as {', '.join(foreign[:3])}"
        raise UserError(
            f"{source} does not fit the model ({detail}); evaluate it with the model and classes it was trained with"
        )
    model.load_state_dict(weights)


def loss_options(cfg: LossConfig, soft_targets: bool) -> dict[str, Any]:
    """Arguments of timm's loss as the configuration says; `soft_targets` where mixing makes distributions of them."""
    options: dict[str, Any] = {"loss_type": cfg.name, "smoothing": cfg.smoothing, "soft_targets": soft_targets}
    if cfg.name == "bce":
        options |= {"bce_sum": cfg.bce_sum, "bce_target_thresh": cfg.bce_target_thresh}
    return options


def build_optimizer(cfg: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Create the optimizer that the configuration names.

    Raises:
        UserError: it refuses an argument.
    """
    try:
        return create_optimizer_v2(
            model,
            opt=cfg.name,
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            momentum=cfg.momentum,
            layer_decay=cfg.layer_decay,
            **cfg.kwargs,
        )
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise UserError(f"optim.name={cfg.name} refuses its arguments: {error}; see optim.kwargs") from error


def build_schedule(cfg: ScheduleConfig, optimizer: torch.optim.Optimizer, epochs: int, updates_per_epoch: int) -> Any:
    """Create timm's schedule, which is stepped at every update; `epochs` is without the cooldown."""
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=cfg.name,
        num_epochs=epochs,
        cooldown_epochs=cfg.cooldown_epochs,
        warmup_epochs=cfg.warmup_epochs,  # type: ignore[arg-type]
        warmup_lr=cfg.warmup_lr,
        min_lr=cfg.min_lr,
        decay_epochs=cfg.decay_epochs,
        decay_rate=cfg.decay_rate,
        decay_milestones=cfg.decay_milestones,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return schedule
