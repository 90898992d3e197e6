"""From a variant's name to a model with weights: timm's builder behind a strict loader for published checkpoints.

Every family builds through `build_model`, describes its checkpoints with `published_cfg`, and hands over a
`checkpoint_filter_fn(state_dict, model)` that renames the original repository's keys to ours. The filter sees a flat
state_dict (wrappers and `module.` prefixes are already gone) and must leave a state_dict in our own names unchanged.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm.models
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, clean_state_dict
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from timm.models._helpers import _torch_load
from timm.models._hub import download_cached_file
from torch import Tensor, nn

__all__ = ["build_model", "published_cfg", "published_figures", "read_checkpoint", "unwrap_checkpoint"]

StateDict = dict[str, Tensor]
FilterFn = Callable[[StateDict, nn.Module], StateDict]

# timm's own files keep raw and averaged weights side by side and mean the averaged ones; the original repositories
# that store `model_ema` beside `model` (MaxViT, STViT) evaluate `model`.
_WRAPPERS = ("state_dict_ema", "state_dict", "model", "model_ema", "module", "net", "weights")
_HEAD_KEYS = ("head.fc.weight", "head.weight", "fc.weight", "classifier.weight")


class CheckpointedFeatures(FeatureGetterNet):
    """timm's wrapper for features_only=True, with the gradient checkpointing of the model inside."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)  # type: ignore[operator]


def published_cfg(
    url: str = "",
    *,
    top1: float | None = None,
    params: str | None = None,
    flops: str | None = None,
    head_from_file: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """A pretrained configuration in timm's form, with timm's defaults for ImageNet at 224.

    Args:
        url: address of the published checkpoint, empty when none was published.
        top1: published ImageNet-1k top-1 accuracy in per cent.
        params: published parameter count, e.g. "28M".
        flops: published multiply-adds at the native input size, e.g. "4.3G".
        head_from_file: the published head's size is not known beforehand, so the model's head takes the file's size
            unless `num_classes` is asked for.
        kwargs: any other field of timm's PretrainedCfg.
    """
    figures = {"top1": top1, "params": params, "flops": flops, "head": "from file" if head_from_file else None}
    notes = tuple(f"{k}: {v}" for k, v in figures.items() if v is not None)
    defaults: dict[str, Any] = {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "notes": notes + tuple(kwargs.pop("notes", ())),
    }
    return {**defaults, **kwargs}


def published_figures(cfg: Mapping[str, Any]) -> dict[str, str]:
    """The figures that `published_cfg` wrote into a configuration: keys among top1, params, flops, head."""
    pairs = (note.split(": ", 1) for note in cfg.get("notes") or () if ": " in note)
    return {k: v for k, v in pairs if k in ("top1", "params", "flops", "head")}


def unwrap_checkpoint(checkpoint: Any, source: str = "checkpoint") -> StateDict:
    """The flat state_dict inside a checkpoint: without wrapper (`model`, `state_dict`, `*_ema`) and `module.` prefix.

    Raises:
        RuntimeError: there is no state_dict in it.
    """
    while isinstance(checkpoint, Mapping):
        tensors = {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}
        inner = next((checkpoint[k] for k in _WRAPPERS if isinstance(checkpoint.get(k), Mapping)), None)
        if inner is not None and not any("." in k for k in tensors):
            checkpoint = inner
        elif tensors:
            return clean_state_dict(tensors)
        else:
            break
    found = sorted(map(str, checkpoint)) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
    raise RuntimeError(f"{source} holds no state_dict; found {found}; expected tensors, bare or under {_WRAPPERS}")


def read_checkpoint(path: str | Path) -> StateDict:
    """Read a checkpoint file (`.pth`, `.pt`, `.bin`, `.tar`, `.safetensors`) as a flat state_dict.

    Pickles are read with weights_only, so a file cannot run code.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file cannot be read as a checkpoint, or holds no state_dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return unwrap_checkpoint(load_file(path), str(path))
        except SafetensorError as error:
            raise RuntimeError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        checkpoint = _torch_load(str(path), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise RuntimeError(f"{path} is not a readable PyTorch checkpoint: {error}") from error
    return unwrap_checkpoint(checkpoint, str(path))


def build_model(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool = False,
    *,
    filter_fn: FilterFn | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    out_indices: tuple[int, ...] | int | None = None,
    features_only: bool = False,
    feature_cfg: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a variant through timm, loading a checkpoint strictly when `pretrained`.

    A checkpoint's head of another size than the configuration's is an error that names both sizes; with `num_classes`
    given, the head is loaded where the sizes agree and fresh where they do not.

    Raises:
        FileNotFoundError: the checkpoint file does not exist.
        RuntimeError: the checkpoint's keys or shapes do not fit the model; the first ones of both sides are listed.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    checkpoint: StateDict | None = None
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay).to_dict()
        checkpoint = _read_source(cfg)
        if checkpoint is not None:
            overlay["num_classes"] = _head_size(variant, cfg, checkpoint, kwargs.get("num_classes"), features_only)
            overlay["state_dict"] = {"": torch.empty(0)}  # timm then calls the filter, which has the real one

    def strict_filter(state_dict: StateDict, model: nn.Module) -> StateDict:
        state_dict = checkpoint if checkpoint is not None else unwrap_checkpoint(state_dict)
        if filter_fn is not None:
            state_dict = filter_fn(state_dict, model)
        _check_keys(variant, state_dict, model)
        return state_dict

    if features_only:
        kwargs["features_only"] = True
        if out_indices is not None:
            kwargs["out_indices"] = out_indices
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=strict_filter,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": CheckpointedFeatures, **(feature_cfg or {})},
        **kwargs,
    )
    for owner in (model, getattr(model, "model", None)):
        own_cfg = getattr(owner, "pretrained_cfg", None)
        if isinstance(own_cfg, dict):
            own_cfg.pop("state_dict", None)
    return model


def _read_source(cfg: dict[str, Any]) -> StateDict | None:
    """The checkpoint that a configuration names as a file or address; None where timm reads the source itself."""
    if cfg.get("state_dict") or cfg.get("source") in ("hf-hub", "local-dir"):
        return None
    if cfg.get("file"):
        return read_checkpoint(cfg["file"])
    if cfg.get("url") and not cfg.get("hf_hub_id"):
        if "/folders/" in cfg["url"]:
            raise RuntimeError(
                f"{cfg.get('architecture')}: the checkpoint was published in a folder that only a browser opens, "
                f"{cfg['url']}; fetch it there and pass pretrained_cfg_overlay={{'file': PATH}}"
            )
        return read_checkpoint(download_cached_file(cfg["url"]))
    return None


def _head_size(variant: str, cfg: dict[str, Any], state_dict: StateDict, asked: int | None, features_only: bool) -> int:
    """The class count that timm shall take for the checkpoint's own."""
    classifier = cfg.get("classifier")
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    keys = [f"{n}.weight" for n in names] + list(_HEAD_KEYS)
    found = next((state_dict[k].shape[0] for k in keys if k in state_dict), None)
    expected: int = cfg["num_classes"]
    if found is None:
        return expected
    follows = published_figures(cfg).get("head") == "from file"
    if found != expected and asked is None and not features_only and not follows:
        raise RuntimeError(
            f"{variant}: the checkpoint's head has {found} classes, the model's {expected}; "
            f"pass num_classes={found} to load that head, or another num_classes for a fresh one"
        )
    return found


def _check_keys(variant: str, state_dict: StateDict, model: nn.Module) -> None:
    """Raise unless the state_dict has exactly the model's keys and shapes, the classifier and input stem apart."""
    own = model.state_dict()
    cfg = getattr(model, "pretrained_cfg", {})
    free = cfg.get("classifier") or ()
    free = tuple(f"{n}." for n in ((free,) if isinstance(free, str) else free))
    stems = cfg.get("first_conv") or ()
    stems = tuple(f"{n}.weight" for n in ((stems,) if isinstance(stems, str) else stems))

    # PyTorch itself loads batch norm without its counter, which files older than PyTorch 0.4.1 do not have.
    missing = [k for k in own if k not in state_dict and not k.startswith(free) and "num_batches_tracked" not in k]
    unexpected = [k for k in state_dict if k not in own and not k.startswith(free)]
    shapes = [
        f"{k}: {tuple(v.shape)} in the file, {tuple(own[k].shape)} in the model"
        for k, v in state_dict.items()
        if k in own and v.shape != own[k].shape and not k.startswith(free) and k not in stems
    ]
    problems = [
        f"{len(items)} {what}, the first: " + "; ".join(items[:4])
        for what, items in (
            ("keys of the model are not in the file", missing),
            ("keys of the file are not in the model", unexpected),
            ("tensors have another shape", shapes),
        )
        if items
    ]
    if problems:
        raise RuntimeError(f"{variant}: the checkpoint does not fit.\n  " + "\n  ".join(problems))


def register_notrace(*functions: Callable[..., Any]) -> None:
    """Keep FX from tracing into op functions, whose control flow depends on sizes."""
    for function in functions:
        timm.models.register_notrace_function(function)
