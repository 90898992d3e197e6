"""From the configuration of `zoo detect` to a config of mmdet's: mmdet's own model files with the backbone swapped."""

import os
import pprint
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmdet
import timm
import torch
from mmengine.config import Config

from zoo.errors import UserError, first_line
from zoo.registry import model_class, require_model
from zoo.train.images import PixelRanges

from .backbone import feature_levels
from .closed import check_closed, check_overrides
from .coco_data import MIN_SIDE, CocoFiles
from .config import BackboneConfig, DetectConfig

__all__ = ["MASKED", "PlainConfig", "compose_mmdet", "detector_config"]

_FILES = {
    "retinanet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "faster_rcnn": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "mask_rcnn": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "cascade_mask_rcnn": "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
    "atss": "atss/atss_r50_fpn_1x_coco.py",
    "dino": "dino/dino-4scale_r50_8xb2-12e_coco.py",
}
MASKED = ("mask_rcnn", "cascade_mask_rcnn")  # the detectors that predict masks
_SHORT_SIDES = tuple(range(480, 801, 32))
# What the published recipes exempt from weight decay beside norms: position tables, here by the names that are timm's.
_POSITIONS = ("relative_position_bias_table", "pos_embed")


class PlainConfig(Config):
    """A config whose text comes from pprint: mmengine's takes seconds of yapf each of the many times it is asked."""

    @property
    def pretty_text(self) -> str:
        """The config as Python that `Config.fromfile` reads."""
        items = self.to_dict().items()
        return "\n".join(f"{key} = {pprint.pformat(value, width=110, sort_dicts=False)}" for key, value in items) + "\n"


def compose_mmdet(cfg: DetectConfig, data: CocoFiles, run_dir: Path) -> PlainConfig:
    """A complete config for mmengine's Runner and mmdet's tools; all paths in it are absolute.

    Raises:
        UserError: the model is unknown or has no levels that a detector can use.
    """
    model = detector_config(cfg, len(data.classes))
    masks = cfg.detector.name in MASKED
    train, test = _pipelines(cfg, masks, data.ranges)
    meta = {"classes": data.classes}
    common = {"type": "CocoDataset", "metainfo": meta}
    report = str(run_dir / "unreadable_images.jsonl")
    loader = {"num_workers": cfg.data.num_workers, "persistent_workers": False}
    train_set = {
        **common,
        "ann_file": data.train_annotations,
        "data_prefix": {"img": data.train_images},
        "filter_cfg": {"filter_empty_gt": not cfg.data.keep_empty, "min_size": MIN_SIDE},
        "pipeline": train,
    }
    val_set = {
        **common,
        "ann_file": data.val_annotations,
        "data_prefix": {"img": data.val_images},
        "test_mode": True,
        "pipeline": test,
    }
    val_loader = {
        **loader,
        "batch_size": cfg.val_batch_size,
        "drop_last": False,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": {"type": "zoo.SeededDataset", "dataset": val_set, "seed": cfg.seed, "report": report},
    }
    evaluator = {
        "type": "zoo.CocoMetric",
        "ann_file": data.val_annotations,
        "metric": ["bbox", "segm"] if masks else ["bbox"],
        "outfile_prefix": str(run_dir / "predictions"),
    }
    config = PlainConfig(
        {
            "default_scope": "mmdet",
            "custom_imports": {"imports": ["zoo.train.mmdet"], "allow_failed_imports": False},
            "model": model,
            "train_dataloader": {
                **loader,
                "batch_sampler": {"type": "zoo.EpochBatchSampler", "batch_size": cfg.batch_size},
                "sampler": {"type": "DefaultSampler", "shuffle": True},
                "dataset": {"type": "zoo.SeededDataset", "dataset": train_set, "seed": cfg.seed, "report": report},
            },
            "val_dataloader": val_loader,
            "test_dataloader": val_loader,
            "val_evaluator": evaluator,
            "test_evaluator": evaluator,
            "train_cfg": {
                "type": "zoo.TrainLoop",
                "max_epochs": cfg.schedule.epochs,
                "val_interval": cfg.eval_every,
                "max_steps": 1 if cfg.dry_run else cfg.max_steps,
            },
            "val_cfg": {"type": "ValLoop"},
            "test_cfg": {"type": "TestLoop"},
            "optim_wrapper": _optimizer(cfg),
            "param_scheduler": _schedule(cfg),
            "default_hooks": {
                "timer": {"type": "IterTimerHook"},
                "logger": {"type": "LoggerHook", "interval": 50},
                "checkpoint": {"type": "CheckpointHook", "interval": 1},
                "runtime_info": {"type": "RuntimeInfoHook"},
                "param_scheduler": {"type": "ParamSchedulerHook"},
                "sampler_seed": {"type": "DistSamplerSeedHook"},
            },
            "env_cfg": {
                "cudnn_benchmark": False,
                "mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0},
                "dist_cfg": {"backend": "nccl"},
            },
            "model_wrapper_cfg": {
                "type": "MMDistributedDataParallel",
                "find_unused_parameters": True,
                "broadcast_buffers": False,
                "device_ids": None,  # each process has one device, and CPUs refuse the default
            },
            "visualizer": {"type": "Visualizer", "vis_backends": []},
            "randomness": {"seed": cfg.seed},
            "log_level": "INFO",
            "work_dir": str(run_dir / "mmengine"),
            "load_from": None,
            "resume": False,
        }
    )
    check_closed(config.to_dict())
    return config


def _merge(base: dict[str, Any], extra: Mapping[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _replace(node: Any, table: Mapping[str, Mapping[Any, Any]]) -> None:
    """Replace values by key throughout a config: table[key][old] = new."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in table and not isinstance(value, (dict, list)) and value in table[key]:
                node[key] = table[key][value]
            else:
                _replace(value, table)
    elif isinstance(node, list):
        for value in node:
            _replace(value, table)


def _backbone(cfg: DetectConfig) -> tuple[dict[str, Any], list[int], list[int]]:
    """The backbone's config, channels and strides."""
    model = cfg.model
    require_model(model.name)
    options = dict(model.kwargs)
    try:
        levels = feature_levels(model.name, **options)
    except TypeError as error:
        raise UserError(f"model {model.name} refuses an argument: {error}; see model.kwargs") from error
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        raise UserError(f"model {model.name} gives no feature maps: {first_line(error)}") from error
    chosen = model.out_indices
    if chosen is None:
        chosen = [i for i, (_, stride) in enumerate(levels) if 4 <= stride <= 32]
        if cfg.detector.name == "dino":
            chosen = [i for i in chosen if levels[i][1] >= 8]
    count = len(levels)
    fits = bool(chosen) and all(-count <= i < count for i in chosen)
    strides = [levels[i][1] for i in chosen] if fits else []
    if not fits or sorted(set(strides)) != strides:
        raise UserError(
            f"model.out_indices={chosen} does not fit {model.name}, whose levels have strides "
            f"{[stride for _, stride in levels]}; a detector takes levels of different strides, the finest first"
        )
    chosen = [i % count for i in chosen]
    backbone: dict[str, Any] = {
        "type": "zoo.Backbone",
        "name": model.name,
        "out_indices": tuple(chosen),
        "pretrained": os.path.abspath(model.pretrained)
        if isinstance(model.pretrained, str) and "://" not in model.pretrained
        else model.pretrained,
        "frozen_stages": model.frozen_stages,
        "norm_eval": model.norm_eval,
        "out_norms": model.out_norms,
        "with_cp": model.grad_checkpointing,
        **options,
    }
    if model.drop_path_rate is not None:
        backbone["drop_path_rate"] = model.drop_path_rate
    return backbone, [levels[i][0] for i in chosen], strides


def detector_config(cfg: DetectConfig, num_classes: int) -> dict[str, Any]:
    """The detector: mmdet's own, on our backbone and fitted to its levels.

    Raises:
        UserError: the model is unknown or has no levels that a detector can use.
    """
    detector = cfg.detector
    folder = Path(mmdet.__file__).parent / ".mim/configs"
    model: dict[str, Any] = Config.fromfile(folder / _FILES[detector.name]).model.to_dict()
    check_overrides(detector.overrides)
    _merge(model, detector.overrides)
    model["backbone"], channels, strides = _backbone(cfg)
    neck = model["neck"]
    neck["in_channels"] = channels
    if detector.name == "dino":
        model["num_feature_levels"] = neck["num_outs"]
        _fit_transformer(model, cfg)
    else:
        _fit_pyramid(model, strides, detector.anchor_scale)
        sizes = {"in_channels", "out_channels", "feat_channels", "conv_out_channels"}
        table: dict[str, dict[Any, Any]] = {k: {256: detector.channels} for k in sizes}
        table["fc_out_channels"] = {1024: detector.fc_channels}
        in_channels = neck.pop("in_channels")
        _replace(model, table)
        neck["in_channels"] = in_channels
    _replace(model, {"num_classes": {80: num_classes}})
    cfg_of = timm.models.get_pretrained_cfg(cfg.model.name)
    if cfg_of is not None:
        model["data_preprocessor"]["mean"] = [round(255 * v, 3) for v in cfg_of.mean]
        model["data_preprocessor"]["std"] = [round(255 * v, 3) for v in cfg_of.std]
    model["data_preprocessor"]["pad_size_divisor"] = cfg.data.pad_divisor
    if "rcnn" in detector.name:
        _fit_proposals(model, cfg)
    if not torch.cuda.is_available():
        _replace(model, {"type": {"SyncBN": "BN"}})  # synchronized batch norm has no CPU kernels
    return model


def _fit_pyramid(model: dict[str, Any], strides: list[int], scale: float | None) -> None:
    """Let neck, anchors and RoI extractors follow the strides of the backbone."""
    neck = model["neck"]
    start = neck.get("start_level", 0)
    if start >= len(strides):
        raise UserError(f"the backbone has levels of strides {strides} alone; this detector begins at level {start}")
    if "rpn_head" in model:
        neck["num_outs"] = len(strides) + 1
        for name in ("bbox_roi_extractor", "mask_roi_extractor"):
            if name in model["roi_head"]:
                model["roi_head"][name]["featmap_strides"] = list(strides)
    levels = strides[start:]
    while len(levels) < neck["num_outs"]:
        levels.append(2 * levels[-1])
    head = model.get("rpn_head") or model["bbox_head"]
    head["anchor_generator"]["strides"] = levels
    if scale is not None:
        anchors = head["anchor_generator"]
        if "octave_base_scale" in anchors:
            anchors["octave_base_scale"] = scale
        else:
            anchors["scales"] = [scale]


def _fit_transformer(model: dict[str, Any], cfg: DetectConfig) -> None:
    """Let DINO's queries follow detector.proposals; its width is 256, which mmdet's positional encoding fixes."""
    if cfg.detector.proposals is not None:
        model["num_queries"] = cfg.detector.proposals
        model["test_cfg"]["max_per_img"] = min(model["test_cfg"]["max_per_img"], cfg.detector.proposals)


def _fit_proposals(model: dict[str, Any], cfg: DetectConfig) -> None:
    detector = cfg.detector
    heads = [model["train_cfg"]["rcnn"]]
    heads = heads[0] if isinstance(heads[0], list) else heads  # Cascade R-CNN has one of each per stage
    for head in heads:
        head["sampler"]["num"] = detector.roi_samples
    if detector.proposals is not None:
        for part in (model["train_cfg"]["rpn_proposal"], model["test_cfg"]["rpn"]):
            part["nms_pre"] = part["max_per_img"] = detector.proposals


def _pipelines(
    cfg: DetectConfig, masks: bool, ranges: PixelRanges
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and evaluation transforms."""
    long, short = cfg.data.scale
    keep: dict[str, Any] = {"keep_ratio": True}
    sides = [(side, long) for side in _SHORT_SIDES]
    choose = {"type": "RandomChoiceResize", "scales": sides, **keep}
    crop = [
        {"type": "RandomChoiceResize", "scales": [(400, 4200), (500, 4200), (600, 4200)], **keep},
        {"type": "RandomCrop", "crop_type": "absolute_range", "crop_size": (384, 600), "allow_negative_crop": True},
        choose,
    ]
    load = {"type": "LoadAnnotations", "with_bbox": True, "with_mask": masks}
    resize = {"type": "Resize", "scale": (long, short), **keep}
    flip = {"type": "RandomFlip", "prob": 0.5}
    policies: dict[str, list[dict[str, Any]]] = {
        "none": [resize],
        "flip": [resize, flip],
        "multiscale": [choose, flip],
        "detr": [flip, {"type": "RandomChoice", "transforms": [[choose], crop]}],
    }
    steps = policies[cfg.data.augment]
    pack = {"type": "PackDetInputs"}
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    image = {"type": "zoo.LoadImage", "ranges": ranges.state() if ranges.by_mode else None}
    return [image, load, *steps, pack], [image, resize, load, {**pack, "meta_keys": keys}]


def _tables(model: BackboneConfig) -> list[str]:
    """The names that the family exempts from weight decay, of tables: layers and layer scales keep it here."""
    parts: tuple[str, ...] = getattr(model_class(model.name), "no_decay", ())
    if not parts:
        return []
    built = timm.create_model(model.name, device="meta", **model.kwargs)
    tables = [n for n, p in built.named_parameters() if p.ndim > 1 and not n.endswith((".weight", ".bias"))]
    return [part for part in parts if any(part in name for name in tables)]


def _optimizer(cfg: DetectConfig) -> dict[str, Any]:
    schedule = cfg.schedule
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch = cfg.batch_size * schedule.accumulate * world
    lr = schedule.lr * (batch / schedule.base_batch if schedule.base_batch else 1)
    optimizer: dict[str, Any] = {"type": schedule.optimizer, "lr": lr, "weight_decay": schedule.weight_decay}
    optimizer |= {"betas": (0.9, 0.999)} if schedule.optimizer == "AdamW" else {"momentum": 0.9}
    wrapper: dict[str, Any] = {
        "type": "OptimWrapper",
        "optimizer": optimizer,
        "accumulative_counts": schedule.accumulate,
    }
    if cfg.amp != "none":
        wrapper |= {"type": "AmpOptimWrapper", "dtype": {"fp16": "float16", "bf16": "bfloat16"}[cfg.amp]}
        if cfg.amp == "bf16":
            wrapper["loss_scale"] = {"enabled": False}
    if schedule.clip_norm is not None:
        wrapper["clip_grad"] = {"max_norm": schedule.clip_norm, "norm_type": 2}
    if schedule.layer_decay is not None:
        wrapper["constructor"] = "zoo.LayerDecayOptimWrapperConstructor"
        wrapper["paramwise_cfg"] = {"layer_decay": schedule.layer_decay}
    else:
        keys: dict[str, Any] = {key: {"decay_mult": 0.0} for key in (*_POSITIONS, *_tables(cfg.model))}
        slow: dict[str, float] = getattr(model_class(cfg.model.name), "slow_parameters", {})
        keys |= {part: {"lr_mult": factor} for part, factor in slow.items()}
        if schedule.backbone_lr != 1:
            for value in keys.values():
                value["lr_mult"] = value.get("lr_mult", 1.0) * schedule.backbone_lr
            keys["backbone"] = {"lr_mult": schedule.backbone_lr}
        wrapper["paramwise_cfg"] = {"norm_decay_mult": 0.0, "custom_keys": keys}
    return wrapper


def _schedule(cfg: DetectConfig) -> list[dict[str, Any]]:
    schedule = cfg.schedule
    steps: list[dict[str, Any]] = []
    if schedule.warmup_steps:
        steps.append(
            {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": schedule.warmup_steps}
        )
    if schedule.cosine:
        steps.append(
            {
                "type": "CosineAnnealingLR",
                "eta_min_ratio": 0.01,
                "begin": 0,
                "end": schedule.epochs,
                "T_max": schedule.epochs,
                "by_epoch": True,
                "convert_to_iter_based": True,
            }
        )
    else:
        steps.append(
            {
                "type": "MultiStepLR",
                "begin": 0,
                "end": schedule.epochs,
                "by_epoch": True,
                "milestones": list(schedule.milestones),
                "gamma": 0.1,
            }
        )
    return steps
