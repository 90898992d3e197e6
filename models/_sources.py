"""What lies at a path, as containers of tensors: files, shards with an index, folders. Nothing in them runs code."""

import argparse
import hashlib
import io
import json
import pathlib
import pickle
import re
import struct
import tarfile
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

__all__ = ["CheckpointError", "load_plain", "read_source"]

_LARGE = 2**28  # bytes that an expanded tensor may have beyond what the file holds of it
_TEXT = 2**26  # bytes of an index; those of the largest models have a few million
_LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch's files before 1.6 begin with
_IN_FOLDERS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that cannot be read, or does not fit: one line. A RuntimeError too, as those of torch are."""


class _Record:
    """In place of another program's object: what it was made from, and nothing that acts."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.__dict__.update(part)
        self.state = state


def _nothing(*args: Any) -> None:
    """In place of `getattr`, by which mmengine's statistics name their own methods."""


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
    found += [(_Record, "mmengine.logging.history_buffer.HistoryBuffer")]
    found += [(_nothing, f"{module}.getattr") for module in ("builtins", "__builtin__")]
    for module in ("lightning.fabric", "lightning_fabric", "lightning.pytorch", "pytorch_lightning"):
        found += [(OrderedDict, f"{module}.utilities.{part}.AttributeDict") for part in ("data", "parsing")]
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
    """A file of torch.save's or a plain pickle, of containers, numbers, text, arrays and tensors, onto the CPU.

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
    if _is_pickle(path):
        with open(path, "rb") as file:
            value = _unpickled(file, _ArrayUnpickler)
    else:
        value = _weights_only(str(path), mmap=mmap)
    _check_sizes(value)
    return value


def _weights_only(source: Any, **options: Any) -> Any:
    """torch.load of a path or stream, of containers and tensors alone."""
    allowed = torch.serialization.get_safe_globals()  # leaving the block would take away what others have allowed
    known = {name[1] if isinstance(name, tuple) else f"{name.__module__}.{name.__qualname__}" for name in allowed}
    ours = [
        name
        for name in _harmless()
        if (name[1] if isinstance(name, tuple) else f"{name.__module__}.{name.__qualname__}") not in known
    ]
    try:
        with torch.serialization.safe_globals(cast(Any, ours)):
            return torch.load(source, map_location="cpu", weights_only=True, **options)
    except OSError:
        raise
    except Exception as error:
        raise RuntimeError(_reason(error)) from error


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


def _is_pickle(path: Path) -> bool:
    """Whether a file is what pickle.dump wrote, as detectron2's are, and not torch.save."""
    with open(path, "rb") as file:
        head = file.read(32)
    return head[:1] == b"\x80" and 2 <= head[1] <= 5 and _LEGACY not in head


def _empty_array(kind: Any, shape: Any, code: Any) -> Any:
    """What pickle makes an array from before it sets its content; one with room for something is no such."""
    if kind != "ndarray" or shape != (0,):
        raise pickle.UnpicklingError("an array that NumPy does not pickle so")
    return np.ndarray((0,), "b")


def _array_from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> Any:
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biufc":
        raise pickle.UnpicklingError(f"an array of {dtype}")
    return np.frombuffer(bytes(buffer), dtype).reshape(shape, order=order)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def _stored(content: bytes) -> Any:
    """The storage of a tensor that was pickled by itself."""
    return _weights_only(io.BytesIO(content))


class _ArrayUnpickler(pickle.Unpickler):
    """Containers of the language, NumPy's arrays and torch's tensors; every other name is refused by its name."""

    _allowed: Mapping[str, Any] = {
        "collections.OrderedDict": OrderedDict,
        "_codecs.encode": _encode,
        "numpy.ndarray": "ndarray",  # the name alone, which is only ever passed on
        "numpy.dtype": np.dtype,
        **{f"numpy.{core}.multiarray._reconstruct": _empty_array for core in ("core", "_core")},
        **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")},
        **{f"numpy.{core}.numeric._frombuffer": _array_from_buffer for core in ("core", "_core")},
        "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
        "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
        "torch.storage._load_from_bytes": _stored,
        "torch.Size": tuple,
    }

    def find_class(self, module: str, name: str) -> Any:
        found = self._allowed.get(f"{module}.{name}")
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if found is None:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")
        return found


def _get_layout(name: str) -> str:
    return name


class _MetadataUnpickler(_ArrayUnpickler):
    """The index of a distributed checkpoint: torch's own classes are records, so that none of their code runs."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch.distributed.") and "." not in name:
            return type(name, (_Record,), {})
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _get_layout
        if module in ("pathlib", "pathlib._local"):
            return pathlib.PurePosixPath
        return super().find_class(module, name)


def _unpickled(file: BinaryIO, reader: type[pickle.Unpickler]) -> Any:
    try:
        return reader(file).load()
    except RuntimeError:
        raise
    except Exception as error:  # whatever the bytes lead pickle to
        raise RuntimeError(_reason(error)) from error


def _as_tensors(value: Any, depth: int = 0) -> Any:
    """The containers, with NumPy's arrays of numbers as tensors."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value)) if value.dtype.kind in "biufc" else value
    if isinstance(value, dict) and depth < 32:
        return {key: _as_tensors(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth < 32:
        return [_as_tensors(item, depth + 1) for item in value]
    return value


def read_source(path: str | Path) -> Any:
    """What a path holds, nested as it was stored: a checkpoint file, an index of shards, or a folder.

    Folders are those of a run, of an export, of weights in the layout of the hub, and of torch's distributed
    checkpoints.

    Raises:
        FileNotFoundError: there is nothing.
        CheckpointError: it cannot be read, in one line.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    shard = re.search(r"-(\d{5})-of-(\d{5})\.", path.name)
    if shard and shard[2] != "00001":
        raise CheckpointError(f"{path} is shard {int(shard[1])} of {int(shard[2])}; give the .index.json beside it")
    return _read_file(path)


def _read_file(path: Path) -> Any:
    safetensors = path.suffix == ".safetensors"
    kind = "safetensors file" if safetensors else "PyTorch checkpoint"
    try:
        return _load_safetensors(path) if safetensors else _as_tensors(load_plain(path))
    except Exception as error:  # whatever the bytes lead the readers to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path} is not a readable {kind}: {reason}") from error


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    problem = _wrong_kind(path)
    if problem is not None:
        raise RuntimeError(problem)
    return load_file(path)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that an index distributes over files beside it."""
    try:
        if index.stat().st_size > _TEXT:
            raise ValueError("it is far larger than an index")
        places = json.loads(index.read_text())["weight_map"]
        if not places or not all(isinstance(v, str) for v in places.values()):
            raise ValueError("its weight_map names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of shards: {' '.join(str(error).split())}") from error
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{index} names {name!r}, which is no file beside it")
        shard = index.parent / name
        if not shard.is_file():
            raise CheckpointError(f"{index} names the shard {name}, which is not there; fetch it, or the whole folder")
        found = _read_file(shard)
        lost = [k for k, v in places.items() if v == name and not isinstance(found.get(k), Tensor)]
        if lost:
            raise CheckpointError(f"shard {shard} does not hold {lost[0]}, which {index.name} says it does")
        state.update({k: v for k, v in found.items() if places.get(k) == name})
    return state


def _read_folder(folder: Path) -> Any:
    kept = [folder / "checkpoints" / f"{name}.pt" for name in ("best", "last", "previous")]
    if any(path.is_file() for path in kept):
        return _read_run(next(path for path in kept if path.is_file()))
    if (folder / ".metadata").is_file():
        return _read_distributed(folder)
    named = [folder / name for name in _IN_FOLDERS if (folder / name).is_file()]
    found = named or sorted(folder.glob("*.index.json")) or sorted(folder.glob("*.safetensors"))
    if not named and len(found) > 1:
        raise CheckpointError(f"{folder} holds {len(found)} checkpoints, such as {found[0].name}; give one of them")
    if not found:
        raise CheckpointError(
            f"{folder} holds no weights: it is no run, no export, no folder with {_IN_FOLDERS[0]} or its index, and no "
            "distributed checkpoint; give the file itself"
        )
    return read_source(found[0])


def _read_run(path: Path) -> Any:
    """A checkpoint of `zoo train`, compared with the hash in its manifest."""
    try:
        manifest = json.loads(path.with_suffix(".manifest.json").read_text())
        hashes = [manifest["sha256"], (manifest.get("replaces") or {}).get("sha256")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} has no readable manifest {path.stem}.manifest.json") from error
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() not in hashes:
            raise CheckpointError(f"checkpoint {path} is damaged: its SHA-256 is not the manifest's")
    return _read_file(path)


def _read_distributed(folder: Path) -> dict[str, Any]:
    """The tensors of a folder of torch.distributed.checkpoint's, nested as they were saved, without the optimizer's."""
    try:
        with open(folder / ".metadata", "rb") as file:
            index = _MetadataUnpickler(file).load()
        entries = {k: v for k, v in index.state_dict_metadata.items() if hasattr(v, "chunks")}
        paths: Mapping[str, Any] = index.planner_data or {}
        stored = [(key.fqn, key.offset, info) for key, info in index.storage_data.items() if key.fqn in entries]
        nested: dict[str, Any] = {}
        for name, entry in entries.items():
            path = [str(part) for part in paths.get(name) or (name,)]
            if path[0].startswith("optim"):
                continue
            place = nested
            for part in path[:-1]:
                place = place.setdefault(part, {})
            place[path[-1]] = _assembled(folder, name, entry, [(o, i) for n, o, i in stored if n == name])
    except CheckpointError:
        raise
    except Exception as error:  # whatever the bytes lead pickle to
        raise CheckpointError(f"{folder} is no readable distributed checkpoint: {_reason(error)}") from error
    return nested


def _assembled(folder: Path, name: str, entry: Any, chunks: list[tuple[Any, Any]]) -> Tensor:
    """A tensor from the pieces in which its owners wrote it."""
    size, pieces = tuple(entry.size), []
    for offset, info in chunks:
        file = folder / info.relative_path
        if Path(info.relative_path).name != info.relative_path:
            raise CheckpointError(f"{folder}/.metadata names {info.relative_path!r}, which is no file beside it")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{file} is compressed by an extension of torch's checkpoints; save it without")
        if not file.is_file():
            raise CheckpointError(f"{folder}/.metadata names the shard {file.name}, which is not there")
        if info.offset < 0 or info.length < 0 or info.offset + info.length > file.stat().st_size:
            raise CheckpointError(f"shard {file} is cut off: {name} ends beyond its {file.stat().st_size} bytes")
        with open(file, "rb") as stream:
            stream.seek(info.offset)
            try:
                piece = _weights_only(io.BytesIO(stream.read(info.length)))
                _check_sizes(piece)
            except RuntimeError as error:
                raise CheckpointError(f"shard {file} does not hold {name}: {error}") from error
        pieces.append((tuple(offset or (0,) * piece.dim()), piece))
    if sum(piece.numel() for _, piece in pieces) != int(np.prod(size, dtype=object)):
        raise CheckpointError(f"{folder} does not hold all of {name}")
    if len(pieces) == 1 and tuple(pieces[0][1].shape) == size:
        return cast(Tensor, pieces[0][1])
    whole = pieces[0][1].new_zeros(size)
    for offset, piece in pieces:
        whole[tuple(slice(o, o + s) for o, s in zip(offset, piece.shape, strict=True))] = piece
    return whole
