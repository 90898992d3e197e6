"""From a variant's name to a model with weights: timm's builder behind a strict loader for published checkpoints.

Every family builds through `build_model`, describes its checkpoints with `published_cfg`, states in DIALECTS how other
programs name its parameters, and hands over a `checkpoint_filter_fn(state_dict, model)`, which brings a state_dict of
any of these dialects to our names and its tensors to the model's shapes, and leaves one in our names unchanged.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from timm.models._features_fx import FeatureGraphNet
from timm.models._hub import download_cached_file
from torch import nn

from ._pyramid import Pyramid, quarters
from .checkpoints import CheckpointError, StateDict, check_state_dict, published_figures, read_source
from .dialects import Match, dialects_of, fit_pointwise, recognise

__all__ = ["build_isotropic", "build_model", "published_cfg"]

ModelT = TypeVar("ModelT", bound=nn.Module)
FilterFn = Callable[[StateDict, nn.Module], StateDict]


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

    The checkpoint may be in any of the family's dialects (`zoo.models.dialects`). A checkpoint's head of another size
    than the configuration's is an error that names both sizes; with `num_classes` given, the head is loaded where the
    sizes agree and fresh where they do not. With `features_only` it may be a backbone alone.

    Of timm's arguments, `output_stride` must be the model's own unless the class is one of timm's, which dilate; with
    `features_only` a `feature_cls` that watches modules ("hook", "fx", "list", "dict") gives and declares the layout
    in which the stages work.

    Raises:
        ValueError: the model has another output_stride, or norms on its features, which only "getter" applies.
        FileNotFoundError: the checkpoint file does not exist.
        CheckpointError: the checkpoint's keys or shapes do not fit the model; one line with the first of both sides.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    match: Match | None = None

    def recognised(checkpoint: Any) -> Match:
        probe = build_model_with_cfg(
            model_cls,
            variant,
            False,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay={k: v for k, v in overlay.items() if k != "state_dict"},
            **{
                **{k: v for k, v in kwargs.items() if k != "feature_cls"},
                "num_classes": kwargs.get("num_classes") or cfg["num_classes"] or 1000,
                "device": "meta",
            },
        )
        return _recognise(variant, cfg, checkpoint, probe, features_only)

    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay).to_dict()
        checkpoint = _read_source(cfg)
        if checkpoint is not None:
            match = recognised(checkpoint)
            overlay["num_classes"] = _head_size(variant, cfg, match, kwargs.get("num_classes"), features_only)
            overlay["state_dict"] = {"": torch.empty(0)}  # timm then calls the filter, which has the real one

    def strict_filter(state_dict: StateDict, model: nn.Module) -> StateDict:
        found = match or recognised(state_dict)
        state = found.state() if filter_fn is None else filter_fn(found.state(), model)
        own = model.state_dict()
        fresh = [*found.initial, *found.missing]  # what may be missing, or `recognised` had refused it
        state = fit_pointwise({**{name: own[name] for name in fresh if name in own}, **state}, own)
        _check_keys(variant, state, model)
        return state

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


def build_isotropic(model_cls: Callable[..., ModelT], variant: str, pretrained: bool = False, **kwargs: Any) -> ModelT:
    """`build_model` of a model of one resolution, `depth` blocks deep (12), whose features come after every quarter."""
    kwargs = {"depth": 12, **kwargs}
    return build_model(model_cls, variant, pretrained, feature_cfg={"out_indices": quarters(kwargs["depth"])}, **kwargs)


def _watches_modules(feature_cls: Any) -> bool:
    """Whether timm takes features from the modules that feature_info names, not from `forward_intermediates`."""
    if isinstance(feature_cls, str):
        return feature_cls.lower() != "getter"
    watching = (FeatureDictNet, FeatureHookNet, FeatureGraphNet)
    return isinstance(feature_cls, type) and issubclass(feature_cls, watching)


def _read_source(cfg: dict[str, Any]) -> Any:
    """The checkpoint that a configuration names as a file or address; None where timm reads the source itself."""
    if cfg.get("state_dict"):
        return cfg["state_dict"]
    if cfg.get("source") in ("hf-hub", "local-dir"):
        return None
    if cfg.get("file"):
        return read_source(cfg["file"])
    if cfg.get("url") and not cfg.get("hf_hub_id"):
        if "/folders/" in cfg["url"]:
            raise RuntimeError(
                f"{cfg.get('architecture')}: the checkpoint was published in a folder that only a browser opens, "
                f"{cfg['url']}; fetch it there and pass pretrained_cfg_overlay={{'file': PATH}}"
            )
        return read_source(download_cached_file(cfg["url"]))
    return None


def _names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _recognise(variant: str, cfg: Mapping[str, Any], checkpoint: Any, probe: nn.Module, features_only: bool) -> Match:
    """The checkpoint's reading as this model, which a probe on the meta device stands for."""
    classifier = tuple(f"{name}." for name in _names(cfg.get("classifier")))
    own = probe.state_dict()
    dense = any(".out_norm." in name for name in own)
    match = recognise(
        checkpoint,
        own,
        dialects_of(probe),
        f"{variant}: the checkpoint does not fit;",
        optional=lambda name: name.startswith((*classifier, "norm.", "head.") if features_only else classifier),
        droppable=lambda name: features_only or dense and name.startswith(("norm.", "head.")),
    )
    head = {name: match.shape(name) for name in match.sources if name.startswith(classifier)}
    classes = {shape[:1] for shape in head.values()}
    wrong = [name for name, shape in head.items() if len(classes) > 1 or shape[1:] != own[name].shape[1:2]]
    if wrong:
        raise CheckpointError(
            f"{variant}: the checkpoint does not fit; its classifier has another shape, "
            + "; ".join(f"{name}: {head[name]} in the file, {tuple(own[name].shape)} in the model" for name in wrong)
        )
    return match


def _head_size(variant: str, cfg: dict[str, Any], match: Match, asked: int | None, features_only: bool) -> int:
    """The class count that timm shall take for the checkpoint's own."""
    expected: int = cfg["num_classes"]
    state = match.place.flat
    keys = [match.sources[f"{n}.weight"][0] for n in _names(cfg.get("classifier")) if f"{n}.weight" in match.sources]
    if not keys:
        if asked is None and expected and not features_only:
            raise CheckpointError(
                f"{variant}: the checkpoint has no classifier; pass num_classes=0 for a model without one, or "
                "num_classes=N for a fresh one"
            )
        return asked if asked is not None else expected
    found = state[keys[0]].shape[0]
    follows = published_figures(cfg).get("head") == "from file"
    if found != expected and asked is None and not features_only and not follows:
        raise CheckpointError(
            f"{variant}: the checkpoint's head has {found} classes, the model's {expected}; "
            f"pass num_classes={found} to load that head, or another num_classes for a fresh one"
        )
    return found


def _check_keys(variant: str, state_dict: StateDict, model: nn.Module) -> None:
    """Raise unless the state_dict has exactly the model's keys and shapes, the classifier and input stem apart."""
    cfg = getattr(model, "pretrained_cfg", {})
    check_state_dict(
        f"{variant}: the checkpoint does not fit;",
        state_dict,
        model.state_dict(),
        free=[f"{name}." for name in _names(cfg.get("classifier"))],
        any_channels=[f"{name}.weight" for name in _names(cfg.get("first_conv"))],
    )
