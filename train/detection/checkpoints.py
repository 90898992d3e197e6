"""Published detector checkpoints (mmdet 2.x files of NAT, DiNAT, DaViT, BiFormer, LITv2) in our backbone's names.

`zoo.Backbone` renames foreign keys whenever a state_dict is loaded into a detector, so `load_from=FILE` of a config,
mmdet's tools and `zoo detect eval=true` all take the published files. The other parts of mmdet's detectors kept their
names from 2.x to 3.x.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.models.checkpoints import read_checkpoint

__all__ = ["adapt_backbone_keys", "checkpoint_classes", "read_detector_checkpoint"]

# BiFormer calls its output norms extra_norms.0 ..., the others norm0 ...
_OUT_NORM = re.compile(r"^(?:norm|extra_norms\.)(\d)\.(weight|bias)$")


def read_detector_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The flat state_dict of a detector checkpoint, from mmdet of any version or from a `zoo detect` run.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it cannot be read, or holds no detector (no key begins with `backbone.`).
    """
    state_dict = read_checkpoint(path)
    if not any(k.startswith("backbone.") for k in state_dict):
        raise RuntimeError(f"{path} holds no detector: none of its {len(state_dict)} keys begins with `backbone.`")
    return state_dict


def checkpoint_classes(path: str | Path) -> tuple[str, ...] | None:
    """The class names that a detector checkpoint holds, as mmdet 2.x or 3.x writes them; None where it holds none."""
    try:
        meta = torch.load(path, map_location="cpu", weights_only=True).get("meta") or {}
        found = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES")
    except Exception:  # of another program; reading its weights says what is wrong with it
        return None
    if isinstance(found, str):
        found = [found]
    return tuple(str(name) for name in found) if isinstance(found, list | tuple) and found else None


def adapt_backbone_keys(backbone: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Rename, in place, the keys under `prefix` from the original repository's names to those of `backbone`.

    A state_dict that already has our names is left alone.

    Raises:
        RuntimeError: keys or shapes do not fit the backbone; the first ones are listed.
    """
    given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    if not given or any(k.startswith("body.") for k in given):
        return
    norms = {}
    body = {}
    for key, value in given.items():
        match = _OUT_NORM.match(key)
        if match and hasattr(backbone, f"norm{match[1]}"):
            norms[f"norm{match[1]}.{match[2]}"] = value
        else:
            body[key] = value
    model = backbone.get_submodule("body")
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        body = convert(body, model)
    renamed = {**{f"body.{k}": v for k, v in body.items()}, **norms}
    _check(backbone, renamed, prefix)
    for key in given:
        del state_dict[prefix + key]
    state_dict.update({prefix + k: v for k, v in renamed.items()})


def _check(backbone: nn.Module, renamed: Mapping[str, Any], prefix: str) -> None:
    own = backbone.state_dict()
    missing = [k for k in own if k not in renamed and "num_batches_tracked" not in k]
    unexpected = [k for k in renamed if k not in own]
    shapes = [
        f"{k}: {tuple(v.shape)} in the file, {tuple(own[k].shape)} in the model"
        for k, v in renamed.items()
        if k in own and own[k].shape != v.shape
    ]
    problems = [
        f"{len(items)} {what}, the first: {'; '.join(items[:4])}"
        for what, items in (
            ("keys of the backbone are not in the file", missing),
            ("keys of the file are not in the backbone", unexpected),
            ("tensors have another shape", shapes),
        )
        if items
    ]
    if problems:
        raise RuntimeError(f"{prefix}* does not fit {getattr(backbone, 'name', 'it')}.\n  " + "\n  ".join(problems))
