"""What a configuration may name: mmdet's own parts by their registered names, and nothing that is code or elsewhere.

mmengine builds whatever `type` says: a name that no registry knows is imported and called, some names are passed to
`eval`, and a few of mmdet's classes read configurations, weights or language models from where their arguments point.
A configuration is data, also that of a run folder from elsewhere, so the composed one is checked as a whole.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from mmdet import registry as mmdet_registry
from mmdet.utils import register_all_modules
from mmengine import registry as root_registry
from mmengine.registry import Registry

from zoo.errors import UserError

__all__ = ["check_closed", "check_overrides"]

_SCOPES = ("mmdet", "mmengine", "mmcv", "zoo")
_OWNERS = ("mmdet", "mmengine", "mmcv", "torch", "zoo")
# What each part of a composed configuration may be made of.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "model": ("MODELS", "TASK_UTILS", "WEIGHT_INITIALIZERS"),
    "train_dataloader": ("DATASETS", "DATA_SAMPLERS", "TRANSFORMS"),
    "val_dataloader": ("DATASETS", "DATA_SAMPLERS", "TRANSFORMS"),
    "test_dataloader": ("DATASETS", "DATA_SAMPLERS", "TRANSFORMS"),
    "val_evaluator": ("METRICS",),
    "test_evaluator": ("METRICS",),
    "train_cfg": ("LOOPS",),
    "val_cfg": ("LOOPS",),
    "test_cfg": ("LOOPS",),
    "optim_wrapper": ("OPTIM_WRAPPERS", "OPTIMIZERS", "OPTIM_WRAPPER_CONSTRUCTORS"),
    "param_scheduler": ("PARAM_SCHEDULERS",),
    "default_hooks": ("HOOKS",),
    "env_cfg": (),
    "model_wrapper_cfg": ("MODEL_WRAPPERS",),
    "visualizer": ("VISUALIZERS", "VISBACKENDS"),
}
# Parts of a detector that mmdet finds by another name than a registry's.
_FUNCTIONS = frozenset({"nms", "soft_nms", "RoIAlign", "RoIPool", "CrossAttention"})
# Modules whose classes follow paths and addresses, evaluate text, or are no part of a detector of images.
_OUTSIDE = (
    "mmdet.models.backbones",
    "mmdet.models.language_models",
    "mmdet.models.mot",
    "mmdet.models.reid",
    "mmdet.models.trackers",
    "mmdet.models.tracking_heads",
    "mmdet.models.task_modules.tracking",
    "mmdet.models.vis",
    "mmdet.models.detectors.d2_wrapper",
    "mmdet.models.detectors.glip",
    "mmdet.models.detectors.grounding_dino",
    "mmdet.models.detectors.kd_one_stage",
    "mmdet.models.detectors.lad",
    "mmdet.models.detectors.semi_base",
    "mmdet.models.detectors.soft_teacher",
    "mmdet.models.dense_heads.atss_vlfusion_head",
    "mmdet.models.dense_heads.grounding_dino_head",
)
# Keys under which mmengine and mmdet import, read or fetch something.
_KEYS = frozenset(
    (
        "custom_imports", "custom_hooks", "backend_args", "file_client_args", "checkpoint", "pretrained", "load_from",
        "teacher_config", "teacher_ckpt", "lang_model_name", "language_model", "ann_file", "warp_mode", "collate_fn",
        "worker_init_fn", "map_location", "class_weight_file",
    )
)  # fmt: skip


def check_closed(config: Mapping[str, Any]) -> None:
    """Check a composed configuration of mmdet's.

    Raises:
        UserError: it names something else than a part of mmdet's, mmengine's or this package's, or reaches elsewhere.
    """
    for section, registries in _PARTS.items():
        for path, key, value in _entries(config.get(section), section):
            _check_entry(section, path, key, value, registries)
    unknown = {k for k, v in config.items() if isinstance(v, dict | list) and k not in _PARTS} - {
        "custom_imports",  # this package, by the composition
        "randomness",
    }
    if config["model"]["backbone"]["type"] != "zoo.Backbone":
        raise UserError(
            f"model.kwargs.type={config['model']['backbone']['type']}: the backbone is zoo.Backbone; remove it"
        )
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))}: no part of a detector's configuration; remove it")


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Check what is to be merged into the detector's configuration, so that a fault is named by the user's own key.

    Raises:
        UserError: as `check_closed`.
    """
    if "backbone" in overrides:
        raise UserError("detector.overrides.backbone: the backbone is model.name, with its arguments in model.kwargs")
    for path, key, value in _entries(overrides, "detector.overrides"):
        _check_entry("model", path, key, value, _PARTS["model"])


def _entries(node: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Path, key and value of everything below a node; the key of an item of a list is None."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{path}.{key}", key, value
            yield from _entries(value, f"{path}.{key}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield f"{path}.{index}", None, value
            yield from _entries(value, f"{path}.{index}")


def _check_entry(section: str, path: str, key: Any, value: Any, registries: tuple[str, ...]) -> None:
    shown = f"{path}={str(value)[:60]}"
    if isinstance(key, str) and key.startswith("_"):
        raise UserError(f"{shown}: {key} has a meaning of its own for mmengine and is not open; remove it")
    ours = path.startswith("model.backbone.") or section != "model"  # zoo.Backbone and what the composition writes
    if key in _KEYS and value is not None and not ours:
        raise UserError(
            f"{shown}: a configuration cannot name files, addresses or code for the detector; give weights with "
            "weights=FILE or model.pretrained"
        )
    if isinstance(value, str) and not ours and any(mark in value for mark in ("://", "{{", "/", "\\")):
        raise UserError(f"{shown}: the parts of a detector take no paths, addresses or templates; remove it")
    if key == "type" or (key == "constructor" and section == "optim_wrapper"):
        nested = path.startswith("model.backbone.") and path != "model.backbone.type"
        misplaced = value == "zoo.Backbone" and path != "model.backbone.type"
        if not nested and (misplaced or not isinstance(value, str) or value not in _names(registries)):
            raise UserError(
                f"{shown}: not among the registered parts of mmdet, mmengine and this package that may stand here; "
                "name one of them"
            )
    if not isinstance(value, dict | list | tuple | str | int | float | bool | None):
        raise UserError(f"{shown}: no plain value; give numbers, text, lists or mappings")


@cache
def _names(registries: tuple[str, ...]) -> frozenset[str]:
    """The names, with and without their scope, under which registries hold these packages' own classes."""
    register_all_modules(init_default_scope=False)
    names = set(_FUNCTIONS) if "MODELS" in registries else set()
    for name in registries:
        parent = getattr(root_registry, name)
        for registry in (parent, getattr(mmdet_registry, name, parent), *parent.children.values()):
            names |= _registered(registry)
    return frozenset(names)


def _registered(registry: Registry) -> set[str]:
    if registry.scope not in _SCOPES:
        return set()
    registry.import_from_location()
    found = set()
    for name, item in registry.module_dict.items():
        module = getattr(item, "__module__", "") or ""
        inside = module.split(".")[0] in _OWNERS and not module.startswith(_OUTSIDE)
        if inside and item is not torch.nn.Module:
            found |= {name, f"{registry.scope}.{name}"}
    return found
