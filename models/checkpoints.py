"""Reading published checkpoints: the file, the wrapper around its state_dict, the strict comparison with a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from timm.models import clean_state_dict
from torch import Tensor, nn

from ._sources import CheckpointError, load_plain, read_source
from .dialects import WRAPPERS, nearest, unwrapped

__all__ = [
    "CheckpointError",
    "StateDict",
    "check_state_dict",
    "load_plain",
    "output_norms",
    "published_figures",
    "read_checkpoint",
    "read_source",
    "unwrap_checkpoint",
]

StateDict = dict[str, Tensor]


def published_figures(cfg: Mapping[str, Any]) -> dict[str, str]:
    """The figures that `published_cfg` wrote into a configuration: keys among top1, params, flops, head."""
    pairs = (note.split(": ", 1) for note in cfg.get("notes") or () if ": " in note)
    return {k: v for k, v in pairs if k in ("top1", "params", "flops", "head")}


def unwrap_checkpoint(checkpoint: Any, source: str = "checkpoint") -> StateDict:
    """The flat state_dict inside a checkpoint: without wrapper (`model`, `state_dict`, `*_ema`) and `module.` prefix.

    Raises:
        CheckpointError: there is no state_dict in it.
    """
    state = unwrapped(checkpoint)
    if state is not None:
        return cast(StateDict, clean_state_dict(state))
    found = sorted(map(str, checkpoint))[:8] if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
    raise CheckpointError(f"{source} holds no state_dict; found {found}; expected tensors, bare or under {WRAPPERS}")


def read_checkpoint(path: str | Path) -> StateDict:
    """Read a checkpoint as a flat state_dict: a file (`.pth`, `.pt`, `.bin`, `.tar`, `.pkl`, `.safetensors`), an index
    of shards (`.index.json`), or a folder: of a run, an export, torch's distributed checkpoints, or the hub's layout.

    Pickles are read without running code.

    Raises:
        FileNotFoundError: there is nothing.
        CheckpointError: it cannot be read as a checkpoint, or holds no state_dict; one line.
    """
    return unwrap_checkpoint(read_source(path), str(path))


def output_norms(path: str | Path, model: nn.Module) -> dict[int, StateDict]:
    """weight and bias of the norm on each output of the detector's backbone that a checkpoint holds, by level.

    Raises:
        FileNotFoundError: there is nothing.
        CheckpointError: it cannot be read; one line.
    """
    match = nearest(read_source(path), model)
    return {} if match is None else match.output_norms()


def check_state_dict(
    headline: str,
    state_dict: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    *,
    part: str = "model",
    free: Sequence[str] = (),
    any_channels: Sequence[str] = (),
) -> None:
    """Raise unless a state_dict has exactly the keys and shapes of a module's own.

    Args:
        headline: what the message begins with.
        state_dict: what was read, in the module's names.
        own: the module's state_dict.
        part: what the message calls the module.
        free: prefixes of keys that may be missing, superfluous or of another shape.
        any_channels: weights of convolutions that may be of three channels, which timm adapts to the module's.

    Raises:
        CheckpointError: they differ; one line with the first keys of each kind.
    """
    free = tuple(free)
    # PyTorch itself loads batch norm without its counter, which files older than PyTorch 0.4.1 do not have.
    missing = [k for k in own if k not in state_dict and not k.startswith(free) and "num_batches_tracked" not in k]
    unexpected = [k for k in state_dict if k not in own and not k.startswith(free)]
    shapes = [
        f"{k}: {tuple(v.shape)} in the file, {tuple(own[k].shape)} in the model"
        for k, v in state_dict.items()
        if k in own
        and v.shape != own[k].shape
        and not k.startswith(free)
        and not (k in any_channels and v.shape == (own[k].shape[0], 3, *own[k].shape[2:]))
    ]
    problems = [
        f"{len(items)} {what}, the first: " + "; ".join(items[:4])
        for what, items in (
            (f"keys of the {part} are not in the file", missing),
            (f"keys of the file are not in the {part}", unexpected),
            ("tensors have another shape", shapes),
        )
        if items
    ]
    if problems:
        raise CheckpointError(f"{headline} {'; '.join(problems)}")
