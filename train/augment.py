"""What is done to images between the decoder and the model: timm's transforms, with arguments that Pillow takes."""

import re
from collections.abc import Iterator
from typing import Any

import timm.data
from PIL import Image, ImageOps
from timm.data import Mixup
from timm.data.auto_augment import AugmentOp

from zoo.errors import UserError
from zoo.train.config import AugmentConfig, DataConfig

__all__ = ["create_mixup", "eval_transform", "resolve_transform", "train_transform"]

POLICIES = ("v0", "v0r", "original", "originalr", "3a")
_OPTIONS = {  # the options of timm's spellings, NAME followed by a number
    "rand": ("mstd", "mmax", "inc", "m", "n", "p"),
    "augmix": ("mstd", "m", "w", "d", "a", "b"),
    "auto": ("mstd",),
}
_RESIZE_ONLY = (Image.Resampling.LANCZOS, Image.Resampling.BOX, Image.Resampling.HAMMING)  # not for shear and rotation
_TRANSFORM_SETS = ("weights", "3aw", "3a")


def resolve_transform(cfg: DataConfig, model: Any, in_chans: int) -> dict[str, Any]:
    """Size, statistics, interpolation and crop: the configuration's, and where it is silent the model's own.

    Grey images take the average of colour statistics.

    Raises:
        UserError: data.mean or data.std has the wrong number of values.
    """
    asked = {"in_chans": in_chans, "img_size": cfg.img_size}
    asked |= {k: getattr(cfg, k) for k in ("interpolation", "crop_pct")}
    found = timm.data.resolve_data_config(asked, pretrained_cfg=model.pretrained_cfg)
    found["input_size"] = (in_chans, *found["input_size"][-2:])
    for key in ("mean", "std"):
        given = getattr(cfg, key)
        if given is not None and len(given) != in_chans and not (in_chans == 1 and len(given) == 3):
            raise UserError(
                f"data.{key}={list(given)} has {len(given)} values and the images have {in_chans} channels; "
                f"give {in_chans}"
            )
        values = list(given or found[key])
        found[key] = tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans
    found["input_size"] = tuple(found["input_size"])
    return found


def _check_policy(text: str) -> str:
    """The policy in a spelling that timm reads whole; timm itself passes over sections that it does not know."""
    first, *sections = text.split("-")
    kind = first if first in ("rand", "augmix") else "auto"

    def refuse(what: str) -> UserError:
        return UserError(
            f"augment.auto_augment={text!r}: {what}; write rand-m9-mstd0.5-inc1, augmix-m3-w3, or one of "
            f"{', '.join(POLICIES)}"
        )

    if kind == "auto" and first not in POLICIES:
        raise refuse(f"{first!r} is no policy of timm's")
    for index, section in enumerate(sections):
        if kind == "rand" and section.startswith("t"):
            if section[1:] not in _TRANSFORM_SETS:
                raise refuse(f"{section!r} names no set of transforms (t followed by {', '.join(_TRANSFORM_SETS)})")
            continue
        found = re.fullmatch(r"([a-z]+)(\d+(?:\.\d*)?|inf)", section)
        if found is None or found[1] not in _OPTIONS[kind]:
            raise refuse(f"{section!r} is no option of {first} ({', '.join(_OPTIONS[kind])}, each with a number)")
        if found[2] == "inf":
            if found[1] != "mstd":
                raise refuse(f"{section!r} must be a finite number")
            sections[index] = "mstd1e999"  # timm reads numbers by their first digit
        elif "." in found[2] and found[1] not in ("mstd", "p", "a"):
            raise refuse(f"{section!r} must be a whole number")
        elif kind == "augmix" and found[1] in ("w", "a") and float(found[2]) == 0:
            raise refuse(f"{section!r} must be positive")
    return "-".join([first, *sections])


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep 1 bit where the policy's magnitude asks for none or fewer, which Pillow refuses since 13."""
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, max(1, bits_to_keep))


def _operations(transform: Any) -> Iterator[AugmentOp]:
    for step in getattr(transform, "transforms", ()):
        for item in getattr(step, "ops", getattr(step, "policy", ())):
            yield from item if isinstance(item, list) else [item]


def _clamp(transform: Any, channels: int) -> Any:
    """Give the operations of this transform, and of no other, arguments that Pillow takes."""
    for operation in _operations(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
        fill = tuple(max(0, min(255, v)) for v in operation.kwargs["fillcolor"])
        operation.kwargs["fillcolor"] = fill[0] if channels == 1 else fill
        if operation.kwargs["resample"] in _RESIZE_ONLY:
            operation.kwargs["resample"] = Image.Resampling.BICUBIC
    return transform


def train_transform(shape: dict[str, Any], augment: AugmentConfig) -> Any:
    """From an image of Pillow's to a normalized tensor [C, H, W], as the configuration augments.

    Raises:
        UserError: augment.auto_augment is no policy of timm's.
    """
    common = {k: shape[k] for k in ("input_size", "mean", "std", "interpolation")}
    common["interpolation"] = augment.interpolation or common["interpolation"]
    if not augment.enabled:
        return timm.data.create_transform(**common, is_training=True, no_aug=True)
    policy = _check_policy(augment.auto_augment) if augment.auto_augment else None
    try:
        transform = timm.data.create_transform(
            **common,
            is_training=True,
            train_crop_mode=augment.crop_mode,
            scale=(augment.scale[0], augment.scale[1]),
            ratio=(augment.ratio[0], augment.ratio[1]),
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter or 0.0,
            auto_augment=policy,
            re_prob=augment.random_erasing,
            re_mode=augment.erase_mode,
            re_count=augment.erase_count,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"augment.auto_augment={augment.auto_augment!r} is not timm's ({error}); write rand-m9-mstd0.5-inc1"
        ) from error
    _clamp(transform, shape["input_size"][0])
    for step in getattr(transform, "transforms", ()):
        layers, weights = getattr(step, "num_layers", 0), getattr(step, "choice_weights", None)
        if weights is not None and layers > len(weights):  # drawn without replacement
            raise UserError(
                f"augment.auto_augment={augment.auto_augment!r} draws {layers} of {len(weights)} weighted "
                f"transforms; give n{len(weights)} or fewer"
            )
    return transform


def eval_transform(shape: dict[str, Any]) -> Any:
    """From an image of Pillow's to a normalized tensor [C, H, W], the same each time."""
    options = {k: shape[k] for k in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    if options["interpolation"] == "random":  # a choice for training only
        options["interpolation"] = "bilinear"
    return timm.data.create_transform(**options, is_training=False)


def create_mixup(augment: AugmentConfig, num_classes: int, smoothing: float) -> Mixup | None:
    """timm's Mixup for the training batches, or None where nothing is mixed."""
    if not augment.enabled or (augment.mixup <= 0 and augment.cutmix <= 0):
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        mode=augment.mix_mode,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )
