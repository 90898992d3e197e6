"""Reading published checkpoints: the file, the wrapper around its state_dict, the strict comparison with a model."""

import argparse
import pathlib
import pickle
import re
import struct
import tarfile
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import clean_state_dict
from torch import Tensor

__all__ = ["StateDict", "check_state_dict", "load_plain", "published_figures", "read_checkpoint", "unwrap_checkpoint"]

StateDict = dict[str, Tensor]

# timm's own files keep raw and averaged weights side by side and mean the averaged ones; the original repositories
# that store `model_ema` beside `model` (MaxViT, STViT) evaluate `model`.
_WRAPPERS = ("state_dict_ema", "state_dict", "model", "model_ema", "module", "net", "weights")
_LARGE = 2**28  # bytes that an expanded tensor may have beyond what the file holds of it


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


def _numpy_scalar(dtype: np.dtype[Any], data: bytes | None = None) -> Any:
    """What pickle calls for a scalar of NumPy's, for numbers and text alone."""
    if dtype.kind not in "biufcSU" or not isinstance(data, bytes):
        raise pickle.UnpicklingError(f"a NumPy scalar of type {dtype}")
    return np.frombuffer(data, dtype, 1)[0]


def _harmless() -> list[type | Callable[..., Any] | tuple[Any, str]]:
    """What training scripts put beside weights, none of which runs code: arguments, paths, numbers of NumPy's."""
    reconstruct: Any = np.empty(0).__reduce__()[0]
    names = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128"
    dtypes = {type(np.dtype(name)) for name in [*names.split(), "S1", "U1"]}
    found: list[Any] = [argparse.Namespace, types.SimpleNamespace, np.ndarray, np.dtype, *dtypes]
    for kind in (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.PureWindowsPath):
        found += [kind, (kind, f"pathlib._local.{kind.__name__}"), (kind, f"pathlib.{kind.__name__}")]
    # Windows' paths do not exist elsewhere
    found += [(pathlib.PureWindowsPath, f"pathlib{part}.WindowsPath") for part in ("", "._local")]
    for core in ("core", "_core"):  # NumPy 2 renamed the module
        found += [(reconstruct, f"numpy.{core}.multiarray._reconstruct")]
        found += [(_numpy_scalar, f"numpy.{core}.multiarray.scalar")]
    return found


def _wrong_kind(path: Path) -> str | None:
    """What a file is that is no checkpoint; None where it may be one."""
    with open(path, "rb") as file:
        head = file.read(1024)
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")) or b"<html" in text:
        return "it is an HTML page: what was downloaded is not the file; download it again"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")):
        return "it is a compressed archive; unpack it and give the checkpoint inside"
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= path.stat().st_size:
        return None if path.suffix == ".safetensors" else "it is a safetensors file; rename it to end in .safetensors"
    if tarfile.is_tarfile(path):
        return "it is a tar archive; unpack it, or save its weights anew with torch.save"
    if all(32 <= byte < 127 or byte in b"\t\r\n\f" or byte >= 128 for byte in head) and _is_text(head):
        return f"it is a text file, which begins {head[:40].decode(errors='replace').split(chr(10))[0].strip()!r}"
    return None


def _is_text(head: bytes) -> bool:
    try:
        head[:-4].decode() if len(head) == 1024 else head.decode()
    except UnicodeDecodeError:
        return False
    return True


def _check_archive(path: Path) -> None:
    """Raise RuntimeError where an archive says that it holds more than it is long, or names files outside itself."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise RuntimeError("its entries are declared larger than the file")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise RuntimeError("its entries are compressed, which torch.save never does")
        if member.filename.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.filename):
            raise RuntimeError(f"it has an entry outside itself, {member.filename!r}")


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple) and depth < 32:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, depth + 1)


def _check_sizes(value: Any) -> None:
    """Raise RuntimeError for a tensor that is declared far larger than what is stored of it."""
    for tensor in _tensors(value):
        stored = tensor.untyped_storage().nbytes() if tensor.layout == torch.strided and not tensor.is_meta else 0
        if tensor.numel() * tensor.element_size() > max(stored, _LARGE):
            raise RuntimeError(f"it declares a tensor of shape {tuple(tensor.shape)}, and holds {stored} bytes of it")


def load_plain(path: str | Path, *, mmap: bool = False) -> Any:
    """torch.load of containers, numbers, text and tensors, onto the CPU, without running code.

    Args:
        path: the file.
        mmap: leave the tensors on the disk.

    Raises:
        RuntimeError: it is no such file, or holds objects of other kinds; the message is one line.
        OSError: it cannot be read.
    """
    path = Path(path)
    problem = _wrong_kind(path)
    if problem is not None:
        raise RuntimeError(problem)
    _check_archive(path)
    known = set(torch.serialization.get_safe_globals())  # leaving the block would take away what others have allowed
    try:
        with torch.serialization.safe_globals([name for name in _harmless() if name not in known]):
            value = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:
        raise RuntimeError(_reason(error)) from error
    _check_sizes(value)
    return value


def _reason(error: Exception) -> str:
    """Why torch.load failed, without its advice to load the file unsafely."""
    text = " ".join(str(error).split())
    found = re.search(r"(?:GLOBAL|[Uu]nsupported (?:global|class):?(?: GLOBAL)?) ([\w.]+\.\w+)", text)
    if found:
        return f"it holds a Python object, {found[1]}, which may run code and is not loaded; save the state_dict alone"
    if "PytorchStreamReader" in text or "EOF" in text:
        return "it is damaged or cut off"
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text or not text:
        return "it is damaged, or no checkpoint of PyTorch's"
    return text if len(text) <= 300 else f"{text[:297]}..."


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
    safetensors = path.suffix == ".safetensors"
    kind = "safetensors file" if safetensors else "PyTorch checkpoint"
    try:
        checkpoint = _load_safetensors(path) if safetensors else load_plain(path)
    except Exception as error:  # whatever the bytes lead the readers to
        reason = str(error) or type(error).__name__
        raise RuntimeError(f"{path} is not a readable {kind}: {reason}") from error
    return unwrap_checkpoint(checkpoint, str(path))


def _load_safetensors(path: Path) -> StateDict:
    from safetensors.torch import load_file

    problem = _wrong_kind(path)
    if problem is not None:
        raise RuntimeError(problem)
    return load_file(path)


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
