"""The configuration of `zoo detect`: every key, its type and its default, and what is checked before a start."""

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from zoo.errors import UserError
from zoo.train.config import (
    AMP,
    WANDB_MODES,
    CheckpointConfig,
    LoggerConfig,
    Schema,
    check_value_range,
    choose,
    require,
)

__all__ = ["DETECT", "DetectConfig", "validate_detect"]

DETECTORS = ("retinanet", "faster_rcnn", "mask_rcnn", "cascade_mask_rcnn", "atss", "dino")
AUGMENTATIONS = ("none", "flip", "multiscale", "detr")
OPTIMIZERS = ("AdamW", "SGD")
_OWN_MODEL_KEYS = (
    "pretrained",
    "drop_path_rate",
    "out_indices",
    "frozen_stages",
    "norm_eval",
    "out_norms",
    "num_classes",
)
# Arguments of timm's builder and of mmdet's modules, of which some read files and addresses.
_CLOSED_MODEL_KEYS = (
    "type", "name", "with_cp", "init_cfg", "out_norm_eps", "features_only", "feature_cls", "feature_cfg",
    "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn", "checkpoint_path",
    "cache_dir", "scriptable", "exportable", "no_jit", "device", "dtype",
)  # fmt: skip


@dataclass
class BackboneConfig:
    """The arguments of zoo.Backbone."""

    name: str = MISSING
    label: Optional[str] = None  # how folders and pictures call it; of models that are reduced by their kwargs
    pretrained: Any = False  # false, true (the published weights), a checkpoint file, or a run folder
    out_indices: Optional[list[int]] = None  # the levels of stride 4 to 32 when null
    frozen_stages: int = -1
    drop_path_rate: Optional[float] = None
    norm_eval: bool = False
    out_norms: Any = "auto"
    grad_checkpointing: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of the model's own


@dataclass
class DetectorConfig:
    """Which of mmdet's detectors, and its sizes."""

    name: str = MISSING
    channels: int = 256  # of neck and convolutional heads; DINO's is fixed
    fc_channels: int = 1024  # of the box heads of two-stage detectors
    anchor_scale: Optional[float] = None  # side of the square anchor in strides, where there are anchors; null: mmdet's
    proposals: Optional[int] = None  # per image, of two-stage detectors, or DINO's queries; null: mmdet's
    roi_samples: int = 512  # per image in training
    overrides: dict[str, Any] = field(default_factory=dict)  # merged into mmdet's model config before sizes are set


@dataclass
class DetectDataConfig:
    """Which images: `digits_coco`, or any data set in COCO's format."""

    name: str = MISSING
    root: Optional[str] = None
    train_annotations: str = "annotations/instances_train2017.json"
    val_annotations: str = "annotations/instances_val2017.json"
    train_images: str = "train2017"
    val_images: str = "val2017"
    scale: list[int] = field(default_factory=lambda: [1333, 800])  # longest and shortest side
    augment: str = "flip"
    keep_empty: bool = False  # train on images without objects too
    pad_divisor: int = 32
    num_workers: int = 2
    value_range: Optional[list[float]] = None  # [black, white] of images with more than 8 bits a pixel
    canvas: int = 128  # this and the rest: of digits_coco alone
    train_count: int = 600
    val_count: int = 100


@dataclass
class DetectScheduleConfig:
    """Length and optimizer. The learning rate is that of `base_batch` images, and scaled to the real batch."""

    epochs: int = 12
    milestones: list[int] = field(default_factory=lambda: [8, 11])  # epochs after which the rate falls to a tenth
    cosine: bool = False  # a cosine to 1 % of the rate instead
    warmup_steps: int = 500
    optimizer: str = "AdamW"
    lr: float = 1e-4
    base_batch: Optional[int] = None  # null: the rate is as it stands
    weight_decay: float = 0.05
    layer_decay: Optional[float] = None
    backbone_lr: float = 1.0  # factor on the backbone's rate
    clip_norm: Optional[float] = None
    accumulate: int = 1  # batches per update


@dataclass
class DetectConfig:
    """`zoo detect`."""

    eval: bool = False  # evaluate only: a run, or a checkpoint
    run: Optional[str] = None  # the run folder to evaluate
    checkpoint_name: str = "last"  # of a run: last, best, previous
    weights: Optional[str] = None  # a detector checkpoint to start from or to evaluate, published ones included
    out: Optional[str] = None  # a JSON file for the result of an evaluation
    batch_size: int = 2  # per process
    val_batch_size: int = 1
    eval_every: int = 1  # epochs
    max_steps: Optional[int] = None
    log_every: int = 50
    pictures: int = 8  # validation images drawn with predictions
    seed: int = 0
    threads: Optional[int] = None
    amp: str = "none"
    deterministic: bool = True
    run_root: str = "runs"
    run_dir: Optional[str] = None
    resume: Optional[str] = None
    dry_run: bool = False
    debug: bool = False
    model: BackboneConfig = field(default_factory=BackboneConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    data: DetectDataConfig = field(default_factory=DetectDataConfig)
    schedule: DetectScheduleConfig = field(default_factory=DetectScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    notes: dict[str, Any] = field(default_factory=dict)  # of an experiment: expected AP, source, cost


def validate_detect(cfg: DetectConfig) -> None:
    """Check values that types do not catch.

    Raises:
        UserError: a name is unknown or a value out of range; the message names the key and the remedy.
    """
    choose("detector.name", cfg.detector.name, DETECTORS)
    choose("data.augment", cfg.data.augment, AUGMENTATIONS)
    choose("schedule.optimizer", cfg.schedule.optimizer, OPTIMIZERS)
    choose("amp", cfg.amp, AMP)
    choose("logger.wandb.mode", cfg.logger.wandb.mode, WANDB_MODES)
    choose("checkpoint_name", cfg.checkpoint_name, ("last", "best", "previous"))
    for key in _OWN_MODEL_KEYS:
        if key in cfg.model.kwargs:
            raise UserError(f"model.kwargs.{key} is set by model.{key}; use `model.{key}={cfg.model.kwargs[key]}`")
    for key in _CLOSED_MODEL_KEYS:
        if key in cfg.model.kwargs:
            raise UserError(f"model.kwargs.{key}: no argument of a model's own; remove it (weights: model.pretrained)")
    if not isinstance(cfg.model.pretrained, bool | str):
        raise UserError(
            f"model.pretrained={cfg.model.pretrained!r} is no choice; give true, false, a file or a run folder"
        )
    rate = cfg.model.drop_path_rate
    require(rate is None or 0 <= rate < 1, "model.drop_path_rate", rate, "a rate from 0 to below 1")
    for key in ("batch_size", "val_batch_size", "eval_every", "log_every"):
        require(getattr(cfg, key) >= 1, key, getattr(cfg, key), "at least 1")
    require(cfg.max_steps is None or cfg.max_steps > 0, "max_steps", cfg.max_steps, "at least 1, or null")
    require(cfg.threads is None or cfg.threads > 0, "threads", cfg.threads, "at least 1")
    require(0 <= cfg.seed < 2**31, "seed", cfg.seed, "a whole number from 0 to below 2**31")
    require(cfg.pictures >= 0, "pictures", cfg.pictures, "0 or more")
    schedule, data, detector = cfg.schedule, cfg.data, cfg.detector
    for key in ("epochs", "accumulate"):
        require(getattr(schedule, key) >= 1, f"schedule.{key}", getattr(schedule, key), "at least 1")
    require(schedule.lr > 0, "schedule.lr", schedule.lr, "a positive learning rate")
    require(schedule.weight_decay >= 0, "schedule.weight_decay", schedule.weight_decay, "0 or more")
    require(schedule.warmup_steps >= 0, "schedule.warmup_steps", schedule.warmup_steps, "0 or more")
    require(
        sorted(set(schedule.milestones)) == schedule.milestones,
        "schedule.milestones",
        schedule.milestones,
        "rising epochs",
    )
    decay, clip = schedule.layer_decay, schedule.clip_norm
    require(decay is None or 0 < decay <= 1, "schedule.layer_decay", decay, "a factor above 0 up to 1, or null")
    require(clip is None or clip > 0, "schedule.clip_norm", clip, "a positive bound, or null")
    if decay is not None and schedule.backbone_lr != 1:
        raise UserError("schedule.layer_decay and schedule.backbone_lr both set the backbone's rates; keep one")
    require(
        len(data.scale) == 2 and min(data.scale) >= 32, "data.scale", data.scale, "[longest,shortest] of at least 32"
    )
    check_value_range(data.value_range)
    require(data.num_workers >= 0, "data.num_workers", data.num_workers, "0 or more")
    require(data.pad_divisor >= 1, "data.pad_divisor", data.pad_divisor, "at least 1")
    for key in ("channels", "fc_channels", "roi_samples"):
        require(getattr(detector, key) >= 8, f"detector.{key}", getattr(detector, key), "at least 8")


DETECT: Schema[DetectConfig] = Schema(
    "detect",
    DetectConfig,
    validate_detect,
    free=("model.kwargs", "detector.overrides", "notes"),
    packages=("zoo.configs.detection",),  # groups of zoo detect alone, apart from those of zoo train
)
