"""From the configuration to a model, by name, through timm."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import timm
import torch
from torch import nn

import zoo  # noqa: F401  registers this package's models with timm
from zoo.errors import UserError
from zoo.registry import require_model
from zoo.train.config import ModelConfig

__all__ = ["build_model", "load_weights"]


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines) or type(error).__name__


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
        if not Path(source).is_file():
            raise UserError(f"no checkpoint file at {source}; give the path of a .pth, .pt or .safetensors file")
        options["pretrained_cfg_overlay"] = {"file": source}
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
