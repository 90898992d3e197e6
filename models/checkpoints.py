"""Reading published checkpoints: the file, the wrapper around its state_dict, the strict comparison with a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models import clean_state_dict
from timm.models._helpers import _torch_load
from torch import Tensor

__all__ = ["StateDict", "check_state_dict", "published_figures", "read_checkpoint", "unwrap_checkpoint"]

StateDict = dict[str, Tensor]

# timm's own files keep raw and averaged weights side by side and mean the averaged ones; the original repositories
# that store `model_ema` beside `model` (MaxViT, STViT) evaluate `model`.
_WRAPPERS = ("state_dict_ema", "state_dict", "model", "model_ema", "module", "net", "weights")


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


def check_state_dict(
    headline: str,
    state_dict: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    *,
    part: str = "model",
    free: Sequence[str] = (),
    any_shape: Sequence[str] = (),
) -> None:
    """Raise unless a state_dict has exactly the keys and shapes of a module's own.

    Args:
        headline: the message's first line.
        state_dict: what was read, in the module's names.
        own: the module's state_dict.
        part: what the message calls the module.
        free: prefixes of keys that may be missing, superfluous or of another shape.
        any_shape: keys that may have another shape.

    Raises:
        RuntimeError: they differ; the first keys of each kind are listed.
    """
    free = tuple(free)
    # PyTorch itself loads batch norm without its counter, which files older than PyTorch 0.4.1 do not have.
    missing = [k for k in own if k not in state_dict and not k.startswith(free) and "num_batches_tracked" not in k]
    unexpected = [k for k in state_dict if k not in own and not k.startswith(free)]
    shapes = [
        f"{k}: {tuple(v.shape)} in the file, {tuple(own[k].shape)} in the model"
        for k, v in state_dict.items()
        if k in own and v.shape != own[k].shape and not k.startswith(free) and k not in any_shape
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
        raise RuntimeError(f"{headline}\n  " + "\n  ".join(problems))
