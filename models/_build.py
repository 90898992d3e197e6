"""From a variant's name to a model with weights: timm's builder behind a strict loader for published checkpoints.

Every family builds through `build_model`, describes its checkpoints with `published_cfg`, and hands over a
`checkpoint_filter_fn(state_dict, model)` that renames the original repository's keys to ours. The filter sees a flat
state_dict (wrappers and `module.` prefixes are already gone) and must leave a state_dict in our own names unchanged.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from timm.models._features_fx import FeatureGraphNet
from timm.models._hub import download_cached_file
from torch import Tensor, nn

from ._pyramid import Pyramid
from .checkpoints import StateDict, check_state_dict, published_figures, read_checkpoint, unwrap_checkpoint

__all__ = ["build_model", "fit_pointwise", "moved_by", "published_cfg", "rename_keys"]

ModelT = TypeVar("ModelT", bound=nn.Module)
FilterFn = Callable[[StateDict, nn.Module], StateDict]
Replacement = str | Callable[[re.Match[str]], str]

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


def rename_keys(state_dict: Mapping[str, Tensor], rules: Sequence[tuple[str, Replacement]]) -> StateDict:
    """A state_dict whose keys went through `re.sub` of every rule (pattern, replacement), in that order.

    Raises:
        RuntimeError: two keys end up with one name.
    """
    renamed: StateDict = {}
    origin: dict[str, str] = {}
    for key, value in state_dict.items():
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise RuntimeError(f"the checkpoint's keys {origin[name]} and {key} both mean {name}")
        renamed[name], origin[name] = value, key
    return renamed


def fit_pointwise(state_dict: Mapping[str, Tensor], model: nn.Module) -> StateDict:
    """A state_dict whose weights of 1x1 convolutions and Linear layers have the shape that the model has for them."""
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    fitted: StateDict = {}
    for key, value in state_dict.items():
        shape = shapes.get(key, value.shape)
        matrix = {len(shape), value.ndim} == {2, 4} and shape[:2] == value.shape[:2]
        fitted[key] = value.reshape(shape) if matrix and shape.numel() == value.numel() else value
    return fitted


def moved_by(step: int, template: str) -> Callable[[re.Match[str]], str]:
    """A replacement for `rename_keys`: the template with the number that the pattern's group found, moved by `step`."""
    return lambda match: template.format(int(match[1]) + step)


def build_model(
    model_cls: Callable[..., ModelT],
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
) -> ModelT:
    """Build a variant through timm, loading a checkpoint strictly when `pretrained`.

    A checkpoint's head of another size than the configuration's is an error that names both sizes; with `num_classes`
    given, the head is loaded where the sizes agree and fresh where they do not.

    Of timm's arguments, `output_stride` must be the model's own unless the class is one of timm's, which dilate; with
    `features_only` a `feature_cls` that watches modules ("hook", "fx", "list", "dict") gives and declares the layout
    in which the stages work.

    Raises:
        ValueError: the model has another output_stride, or norms on its features, which only "getter" applies.
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
        state_dict = fit_pointwise(state_dict, model)  # a classifier of pixels is a convolution
        _check_keys(variant, state_dict, model)
        return state_dict

    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": CheckpointedFeatures, **(feature_cfg or {})}
    if features_only:
        kwargs["features_only"] = True
        if out_indices is not None:
            kwargs["out_indices"] = out_indices
    output_stride = kwargs.get("output_stride")
    if isinstance(model_cls, type) and issubclass(model_cls, Pyramid):
        kwargs.pop("output_stride", None)
        if features_only and _watches_modules(kwargs.get("feature_cls", feature_cfg["feature_cls"])):
            feature_cfg["output_fmt"] = "NHWC" if model_cls.channels_last else "NCHW"
            feature_cfg["flatten_sequential"] = True

    def construct(**arguments: Any) -> ModelT:
        model = model_cls(**arguments)
        own = cast(Any, model).feature_info[-1]["reduction"]
        if output_stride not in (None, own):
            raise ValueError(f"{variant}: output_stride {output_stride} is not available, the model's is {own}")
        if "output_fmt" in feature_cfg and any(".out_norm." in name for name in model.state_dict()):
            raise ValueError(f"{variant}: only feature_cls 'getter', the default, applies the norms of the features")
        return model

    model = build_model_with_cfg(
        construct,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=strict_filter,
        feature_cfg=feature_cfg,
        **kwargs,
    )
    for owner in (model, getattr(model, "model", None)):
        own_cfg = getattr(owner, "pretrained_cfg", None)
        if isinstance(own_cfg, dict):
            own_cfg.pop("state_dict", None)
    return cast(ModelT, model)  # or, with features_only, its wrapper


def _watches_modules(feature_cls: Any) -> bool:
    """Whether timm takes features from the modules that feature_info names, not from `forward_intermediates`."""
    if isinstance(feature_cls, str):
        return feature_cls.lower() != "getter"
    watching = (FeatureDictNet, FeatureHookNet, FeatureGraphNet)
    return isinstance(feature_cls, type) and issubclass(feature_cls, watching)


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
    cfg = getattr(model, "pretrained_cfg", {})
    free = cfg.get("classifier") or ()
    free = tuple(f"{n}." for n in ((free,) if isinstance(free, str) else free))
    stems = cfg.get("first_conv") or ()
    stems = tuple(f"{n}.weight" for n in ((stems,) if isinstance(stems, str) else stems))
    headline = f"{variant}: the checkpoint does not fit."
    check_state_dict(headline, state_dict, model.state_dict(), free=free, any_shape=stems)
