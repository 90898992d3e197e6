"""The configuration: every key, its type and its default; the closed lists of names; what is checked before a start."""

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, Optional, TypeVar

from omegaconf import MISSING

from zoo.errors import UserError

__all__ = [
    "EVAL",
    "TRAIN",
    "AugmentConfig",
    "DataConfig",
    "DistillConfig",
    "EvalConfig",
    "LoggerConfig",
    "ModelConfig",
    "Schema",
    "TrainConfig",
    "check_value_range",
    "choose",
    "model_label",
    "parse_freeze",
    "require",
    "validate",
]

Config = TypeVar("Config")


@dataclass(frozen=True)
class Schema(Generic[Config]):
    """What a command composes: configs/NAME.yaml, on a dataclass that has its keys, types and defaults."""

    name: str
    config: type[Config]
    validate: Callable[[Config], None]  # raises UserError for values that types do not catch
    free: tuple[str, ...] = ("model.kwargs", "optim.kwargs")  # sections that take new keys without Hydra's `+`
    packages: tuple[str, ...] = ()  # further homes of configuration groups, searched after zoo.configs


SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "constant")
_ENDS_AT_MIN_LR = ("cosine", "tanh", "poly", "wsd")
_MAX_BATCH, _MAX_THREADS = 2**20, 1024
LOSSES = ("ce", "bce", "poly")
CLIP_MODES = ("norm", "value", "agc")
AMP = ("none", "bf16", "fp16")
ERASE_MODES = ("const", "rand", "pixel")
MIX_MODES = ("batch", "pair", "elem")
CROPS = ("rrc", "rkrc", "rkrr")
WANDB_MODES = ("disabled", "offline", "online")
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest", "random")
# what the configuration sets by a key of its own and so may not also come through model.kwargs
_OWN_MODEL_KEYS = ("num_classes", "in_chans", "drop_rate", "drop_path_rate", "pretrained")
# by which timm would read another file than model.pretrained says, or another configuration of the model
_CLOSED_MODEL_KEYS = ("pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


@dataclass
class ModelConfig:
    """Which model; `name` is any name that timm knows once zoo is imported."""

    name: str = MISSING
    label: Optional[str] = None  # how folders and pictures call it; of models that are reduced by their kwargs
    pretrained: Any = False  # false, true (the published weights), or the path of a checkpoint file
    num_classes: Optional[int] = None  # the data's when null
    in_chans: int = 3  # 1 reads the images as grey ones
    drop_rate: Optional[float] = None
    drop_path_rate: Optional[float] = None
    grad_checkpointing: bool = False
    freeze: Any = (
        None  # what is not trained: backbone, norms, "N stages" (with the stem), or several as [2 stages,norms]
    )
    kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of the model's own


@dataclass
class DataConfig:
    """Which images. Null statistics are the model's own."""

    name: str = MISSING  # digits, imagefolder, or a scheme of timm's: hfds/..., wds/..., torch/...
    root: Optional[str] = None
    train_split: str = "train"
    val_split: str = "validation"
    val_fraction: Optional[float] = None  # of a folder without a split: the share of every class that is held out
    num_classes: Optional[int] = None  # found out where the data say it
    img_size: Optional[int] = None
    mean: Optional[list[float]] = None
    std: Optional[list[float]] = None
    interpolation: Optional[str] = None
    crop_pct: Optional[float] = None
    num_workers: int = 0
    pin_memory: bool = False
    download: bool = False
    max_bad: float = 0.1  # unreadable training images that are passed over: below 1 their share, else their number
    value_range: Optional[list[float]] = None  # [black, white] of images with more than 8 bits a pixel


@dataclass
class OptimConfig:
    """timm's optimizers; biases and norms are not decayed."""

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    layer_decay: Optional[float] = None
    clip_grad: Optional[float] = None
    clip_mode: str = "norm"
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the optimizer: betas, eps, ...


@dataclass
class ScheduleConfig:
    """timm's schedules, stepped at every update; lengths in epochs."""

    name: str = "cosine"
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    cooldown_epochs: int = 0  # further epochs at the last rate
    decay_epochs: Optional[float] = None
    decay_rate: float = 0.1
    decay_milestones: list[int] = field(default_factory=lambda: [90, 180, 270])


@dataclass
class AugmentConfig:
    """timm's augmentation of training images."""

    enabled: bool = True
    crop_mode: Optional[str] = None
    interpolation: Optional[str] = None  # for training images; random picks one each time
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333])
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: Optional[float] = 0.4
    auto_augment: Optional[str] = None  # timm's spelling, rand-m9-mstd0.5-inc1
    random_erasing: float = 0.0
    erase_mode: str = "pixel"
    erase_count: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    mix_mode: str = "batch"
    mix_off_epoch: Optional[int] = None  # no mixing from this epoch on
    repeats: int = 1  # repeated augmentation: copies of an image per epoch of the same length


@dataclass
class LossConfig:
    name: str = "ce"
    smoothing: float = 0.0
    bce_sum: bool = False
    bce_target_thresh: Optional[float] = None


@dataclass
class DistillConfig:
    """A teacher whose answers are learned beside the labels: weight * KL(teacher, student) + task_weight * loss."""

    teacher: Optional[str] = None  # a run folder, or any name that timm knows; none where it is null
    pretrained: Any = True  # of a name: the published weights, or the path of a checkpoint file
    weight: float = 1.0
    task_weight: float = 1.0
    temperature: float = 1.0


@dataclass
class EmaConfig:
    enabled: bool = False
    decay: float = 0.9999
    warmup: bool = True  # the decay grows with the updates, so that short runs do not average their first weights


@dataclass
class CheckpointConfig:
    """When `last` is written besides the end of the run."""

    every_epochs: int = 1
    every_steps: Optional[int] = None
    every_seconds: Optional[float] = 600.0


@dataclass
class WandbConfig:
    mode: str = "disabled"
    project: str = "zoo"
    entity: Optional[str] = None
    name: Optional[str] = None


@dataclass
class LoggerConfig:
    """metrics.csv is always written."""

    tensorboard: bool = False
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class TrainConfig:
    """`zoo train`."""

    epochs: int = 20  # without schedule.cooldown_epochs
    batch_size: int = 64  # per process
    val_batch_size: Optional[int] = None
    grad_accum: int = 1
    max_steps: Optional[int] = None  # stop after so many updates; the schedule still spans `epochs`
    eval_every: int = 1  # epochs
    log_every: int = 50  # updates between lines where there is no terminal
    seed: int = 0
    device: str = "auto"
    threads: Optional[int] = None
    amp: str = "none"
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = True
    run_root: str = "runs"
    run_dir: Optional[str] = None
    resume: Optional[str] = None
    dry_run: bool = False
    profile: bool = False  # a trace and a table of five updates, in the run folder
    debug: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class EvalConfig:
    """`zoo eval`: a run, or a model with weights."""

    run: Optional[str] = None
    checkpoint: str = "last"  # of a run: last, best, previous
    weights: str = "auto"  # of a run: ema, raw; auto is ema where the run kept it
    pretrained: Any = None  # of a model: true (the published weights), or the path of a checkpoint file
    out: Optional[str] = None  # a JSON file for the result
    report: Optional[str] = None  # a folder for per_class.csv, confusion.csv and confusion.png
    per_image: bool = False  # per_image.csv too: what was predicted for every image
    batch_size: int = 64
    device: str = "auto"
    threads: Optional[int] = None
    amp: str = "none"
    channels_last: bool = False
    compile: bool = False
    debug: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)


def model_label(model: Any) -> str:
    """What a model is called where it must not be taken for the published one: its label, or else its name.

    Args:
        model: a model section.
    """
    return str(model.label or model.name)


def choose(key: str, value: str, known: Iterable[str]) -> str:
    """Return the value if it is one of the known names; else raise UserError with the nearest ones."""
    known = list(known)
    if value in known:
        return value
    near = difflib.get_close_matches(str(value), known, n=3, cutoff=0.5)
    hint = f"the nearest names are {', '.join(near)}" if near else f"choose from {', '.join(known[:12])}"
    raise UserError(f"{key}={value!r} is not known; {hint}")


def require(condition: bool, key: str, value: Any, wanted: str) -> None:
    """Raise UserError, naming the key and the remedy, unless the condition holds."""
    if not condition:
        raise UserError(f"{key}={value} is out of range; give {wanted}")


def check_value_range(pair: list[float] | None) -> None:
    """Raise UserError unless data.value_range is null or rises from black to white."""
    if pair is not None:
        ordered = len(pair) == 2 and math.isfinite(pair[0]) and math.isfinite(pair[1]) and pair[0] < pair[1]
        require(ordered, "data.value_range", pair, "[black,white] with black < white, such as [0,4095]")


def parse_freeze(value: Any) -> list[str]:
    """The parts that model.freeze names: "backbone", "norms", or a number of stages as digits; none where it is null.

    Raises:
        UserError: it names something else.
    """
    parts = []
    for item in value if isinstance(value, list | tuple) else [value]:
        text = "" if item is None or isinstance(item, bool) else str(item).strip()
        stages = re.fullmatch(r"(\d+)( stages?)?", text)
        if text in ("backbone", "norms"):
            parts.append(text)
        elif stages and int(stages[1]) > 0:
            parts.append(stages[1])
        elif item is not None:
            raise UserError(
                f"model.freeze={item!r} is not known; choose backbone, norms, 'N stages' such as '2 stages', or a list "
                "of them"
            )
    return parts


def _check_model(model: ModelConfig) -> None:
    parse_freeze(model.freeze)
    for key in _OWN_MODEL_KEYS:
        if key in model.kwargs:
            raise UserError(f"model.kwargs.{key} is set by model.{key}; use `model.{key}={model.kwargs[key]}`")
    for key in _CLOSED_MODEL_KEYS:
        if key in model.kwargs:
            raise UserError(f"model.kwargs.{key} is not open; use model.pretrained=FILE")
    if not isinstance(model.pretrained, bool | str):
        raise UserError(f"model.pretrained={model.pretrained!r} is no choice; give true, false or a checkpoint's path")
    require(
        model.in_chans in (1, 3),
        "model.in_chans",
        model.in_chans,
        "3 (colour) or 1 (grey); images of other bands are not read",
    )
    for key in ("drop_rate", "drop_path_rate"):
        rate = getattr(model, key)
        require(rate is None or 0 <= rate < 1, f"model.{key}", rate, "a rate from 0 to below 1")
    require(model.num_classes is None or model.num_classes > 1, "model.num_classes", model.num_classes, "at least 2")


def _check_data(data: DataConfig) -> None:
    require(data.img_size is None or data.img_size > 0, "data.img_size", data.img_size, "a size in pixels")
    require(0 <= data.num_workers <= 1024, "data.num_workers", data.num_workers, "0 to 1024 processes")
    require(data.num_classes is None or data.num_classes > 1, "data.num_classes", data.num_classes, "at least 2")
    share = data.val_fraction
    require(share is None or 0 < share < 1, "data.val_fraction", share, "a share between 0 and 1, such as 0.2")
    require(data.max_bad >= 0, "data.max_bad", data.max_bad, "a share below 1, or a number of images")
    for key, low, wanted in (("mean", 0.0, "values from 0 to 1"), ("std", 1e-6, "values above 0 up to 1")):
        values = getattr(data, key)
        if values is not None:
            require(len(values) > 0, f"data.{key}", values, "one value per channel, or null")
            require(all(low <= v <= 1 for v in values), f"data.{key}", values, f"{wanted}: pixels go from 0 to 1")
    check_value_range(data.value_range)
    require(data.crop_pct is None or 0 < data.crop_pct <= 1.5, "data.crop_pct", data.crop_pct, "a share such as 0.875")
    if data.interpolation is not None:
        choose("data.interpolation", data.interpolation, INTERPOLATIONS)


def _check_augment(cfg: TrainConfig) -> None:
    augment = cfg.augment
    for key in ("hflip", "vflip", "random_erasing", "mix_prob", "mix_switch_prob"):
        value = getattr(augment, key)
        require(0 <= value <= 1, f"augment.{key}", value, "a probability from 0 to 1")
    for key in ("mixup", "cutmix"):
        require(0 <= getattr(augment, key) < math.inf, f"augment.{key}", getattr(augment, key), "0 (off) or an alpha")
    jitter = augment.color_jitter
    require(
        jitter is None or 0 <= jitter < math.inf, "augment.color_jitter", jitter, "a strength of 0 or more, or null"
    )
    for key in ("scale", "ratio"):
        pair = getattr(augment, key)
        require(
            len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf,
            f"augment.{key}",
            pair,
            "[low,high] with 0 < low <= high",
        )
    require(augment.repeats >= 1, "augment.repeats", augment.repeats, "at least 1")
    require(augment.erase_count >= 1, "augment.erase_count", augment.erase_count, "at least 1")
    choose("augment.erase_mode", augment.erase_mode, ERASE_MODES)
    choose("augment.mix_mode", augment.mix_mode, MIX_MODES)
    if augment.interpolation is not None:
        choose("augment.interpolation", augment.interpolation, INTERPOLATIONS)
    if augment.crop_mode is not None:
        choose("augment.crop_mode", augment.crop_mode, CROPS)
    if (augment.mixup > 0 or augment.cutmix > 0) and cfg.batch_size % 2:
        raise UserError(f"batch_size={cfg.batch_size} is odd, and mixup and cutmix pair images; give an even one")


def _check_distill(distill: DistillConfig) -> None:
    if distill.teacher is None:
        for key, value in vars(DistillConfig()).items():
            if getattr(distill, key) != value:
                raise UserError(f"distill.{key} has no effect without a teacher; give distill.teacher=NAME|RUN_FOLDER")
        return
    if not isinstance(distill.pretrained, bool | str):
        raise UserError(f"distill.pretrained={distill.pretrained!r} is no choice; give true or a checkpoint's path")
    require(0 < distill.weight < math.inf, "distill.weight", distill.weight, "a positive factor")
    require(0 <= distill.task_weight < math.inf, "distill.task_weight", distill.task_weight, "a factor of 0 or more")
    require(0 < distill.temperature < math.inf, "distill.temperature", distill.temperature, "a positive temperature")


def validate(cfg: TrainConfig | EvalConfig) -> None:
    """Check values that types do not catch.

    Raises:
        UserError: a name is unknown or a value out of range; the message names the key and the remedy.
    """
    _check_model(cfg.model)
    _check_data(cfg.data)
    require(0 < cfg.batch_size <= _MAX_BATCH, "batch_size", cfg.batch_size, f"1 to {_MAX_BATCH}")
    require(cfg.threads is None or 0 < cfg.threads <= _MAX_THREADS, "threads", cfg.threads, f"1 to {_MAX_THREADS}")
    choose("amp", cfg.amp, AMP)
    if not isinstance(cfg, TrainConfig):
        choose("checkpoint", cfg.checkpoint, ("last", "best", "previous"))
        choose("weights", cfg.weights, ("auto", "ema", "raw"))
        if cfg.per_image and cfg.report is None:
            raise UserError("per_image=true writes per_image.csv into a report; give report=FOLDER with it")
        return
    from timm.optim import list_optimizers

    for key in ("epochs", "grad_accum", "eval_every", "log_every"):
        require(getattr(cfg, key) >= 1, key, getattr(cfg, key), "at least 1")
    require(cfg.max_steps is None or cfg.max_steps > 0, "max_steps", cfg.max_steps, "at least 1, or null")
    size = cfg.val_batch_size
    require(size is None or 0 < size <= _MAX_BATCH, "val_batch_size", size, f"1 to {_MAX_BATCH}, or null")
    require(cfg.grad_accum <= _MAX_BATCH, "grad_accum", cfg.grad_accum, f"1 to {_MAX_BATCH}")
    require(0 <= cfg.seed < 2**31, "seed", cfg.seed, "a whole number from 0 to below 2**31")
    choose("optim.name", cfg.optim.name, map(str, list_optimizers()))
    choose("optim.clip_mode", cfg.optim.clip_mode, CLIP_MODES)
    choose("schedule.name", cfg.schedule.name, SCHEDULES)
    choose("loss.name", cfg.loss.name, LOSSES)
    choose("logger.wandb.mode", cfg.logger.wandb.mode, WANDB_MODES)
    require(0 < cfg.optim.lr < math.inf, "optim.lr", cfg.optim.lr, "a positive learning rate")
    require(0 <= cfg.optim.weight_decay < math.inf, "optim.weight_decay", cfg.optim.weight_decay, "0 or more")
    require(0 <= cfg.optim.momentum < 1, "optim.momentum", cfg.optim.momentum, "a factor from 0 to below 1")
    clip, decay = cfg.optim.clip_grad, cfg.optim.layer_decay
    require(clip is None or clip > 0, "optim.clip_grad", clip, "a positive bound, or null")
    require(decay is None or 0 < decay <= 1, "optim.layer_decay", decay, "a factor above 0 up to 1, or null")
    warmup = cfg.schedule.warmup_epochs
    require(0 <= warmup <= cfg.epochs, "schedule.warmup_epochs", warmup, f"0 up to epochs={cfg.epochs}")
    rates = {"min_lr": cfg.schedule.name in _ENDS_AT_MIN_LR, "warmup_lr": warmup > 0}
    for key, used in rates.items():
        rate = getattr(cfg.schedule, key)
        wanted = f"0 up to optim.lr={cfg.optim.lr}"
        require(not used or 0 <= rate <= cfg.optim.lr, f"schedule.{key}", rate, wanted)
    require(cfg.schedule.cooldown_epochs >= 0, "schedule.cooldown_epochs", cfg.schedule.cooldown_epochs, "0 or more")
    require(0 <= cfg.loss.smoothing < 1, "loss.smoothing", cfg.loss.smoothing, "a share from 0 to below 1")
    _check_distill(cfg.distill)
    require(0 <= cfg.ema.decay < 1, "ema.decay", cfg.ema.decay, "a factor from 0 to below 1")
    for key in ("every_epochs", "every_steps", "every_seconds"):
        value = getattr(cfg.checkpoint, key)
        require(value is None or value > 0, f"checkpoint.{key}", value, "more than 0, or null")
    _check_augment(cfg)


TRAIN: Schema[TrainConfig] = Schema("train", TrainConfig, validate)
EVAL: Schema[EvalConfig] = Schema("eval", EvalConfig, validate)
