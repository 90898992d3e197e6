"""Where checkpoints lie: pickles of arrays, shards with an index, folders; and the one line for what is damaged."""

import io
import json
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from zoo.models.checkpoints import CheckpointError, read_checkpoint, read_source
from zoo.train.runs import save_checkpoint

WEIGHTS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "a.bias": torch.ones(2, dtype=torch.bfloat16),
    "b.n": torch.tensor(4),
}


def same(found: Any, expected: dict[str, Tensor] = WEIGHTS) -> bool:
    return found.keys() == expected.keys() and all(
        v.dtype == found[k].dtype and torch.equal(v, found[k]) for k, v in expected.items()
    )


def refused(path: Path, *words: str) -> None:
    with pytest.raises((CheckpointError, FileNotFoundError)) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in (str(path), *words)), message


# pickles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_detectron2(protocol: int, tmp_path: Path) -> None:
    """Arrays as in its model zoo, tensors as its converters leave them."""
    arrays = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f": np.asfortranarray(np.eye(3)),
        "s": np.int64(3),
    }
    beside = {"__author__": "third_party", "matching_heuristics": True}
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps({"model": OrderedDict(arrays), **beside}, protocol))
    found = read_checkpoint(tmp_path / "arrays.pkl")
    assert torch.equal(found["a.weight"], WEIGHTS["a.weight"])
    assert torch.equal(found["f"], torch.eye(3, dtype=torch.float64))
    torch.save({"model": arrays}, tmp_path / "arrays.pth")
    assert read_checkpoint(tmp_path / "arrays.pth").keys() == found.keys()
    tensors = {**WEIGHTS, "p": torch.nn.Parameter(torch.ones(2)), "view": torch.arange(9.0)[2:5]}
    (tmp_path / "tensors.pkl").write_bytes(pickle.dumps({"model": tensors, **beside}, protocol))
    found = read_checkpoint(tmp_path / "tensors.pkl")
    assert same({k: found[k] for k in WEIGHTS})
    assert found["view"].tolist() == [2, 3, 4]


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch ran",)


class _Large:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return np.empty(0).__reduce__()[0], (np.ndarray, (10**13,), b"b")


class _Made:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return np.ndarray, ((10**13,),)


class _Stored:
    """A tensor's storage that is a checkpoint with an object inside."""

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        stream = io.BytesIO()
        torch.save({"x": _Evil()}, stream, _use_new_zipfile_serialization=False)
        return torch.storage._load_from_bytes, (stream.getvalue(),)


@pytest.mark.parametrize("value", [_Evil(), _Large(), _Made(), _Stored(), np.array([_Evil()], dtype=object), print])
def test_pickles_run_nothing(value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"model": {"a.b": np.ones(2)}, "x": value}))
    refused(path, "not a readable")
    assert not (tmp_path / "ran").exists()


def test_damaged_pickles(tmp_path: Path) -> None:
    whole = pickle.dumps({"model": {"a.b": np.ones(9), "c.d": torch.ones(3)}})
    for size in range(2, len(whole) - 1, 41):
        (tmp_path / "w.pkl").write_bytes(whole[:size])
        refused(tmp_path / "w.pkl", "not a readable")


def test_what_mmengine_and_lightning_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics and hyperparameters are read as what they are, data, without the packages that wrote them."""
    history = pytest.importorskip("mmengine.logging").HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"state_dict": WEIGHTS, "message_hub": {"log_scalars": {"loss": history}}}, tmp_path / "m.pth")
    assert same(read_checkpoint(tmp_path / "m.pth"))

    class AttributeDict(dict[str, Any]):
        pass

    AttributeDict.__module__ = "pytorch_lightning.utilities.parsing"
    AttributeDict.__qualname__ = "AttributeDict"
    modules = {name: types.ModuleType(name) for name in ("pytorch_lightning", "pytorch_lightning.utilities")}
    modules["pytorch_lightning.utilities.parsing"] = types.ModuleType("pytorch_lightning.utilities.parsing")
    modules["pytorch_lightning.utilities.parsing"].AttributeDict = AttributeDict  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        torch.save({"state_dict": WEIGHTS, "hyper_parameters": AttributeDict(lr=0.1)}, tmp_path / "l.ckpt")
    assert same(read_checkpoint(tmp_path / "l.ckpt"))


# shards ---------------------------------------------------------------------------------------------------------------


def sharded(folder: Path, suffix: str = "safetensors", name: str = "model") -> Path:
    folder.mkdir(exist_ok=True)
    places = {}
    for i, part in enumerate((("a.weight",), ("a.bias", "b.n")), 1):
        shard = f"{name}-{i:05}-of-00002.{suffix}"
        tensors = {k: WEIGHTS[k] for k in part}
        if suffix == "safetensors":
            save_file(tensors, folder / shard)
        else:
            torch.save(tensors, folder / shard)
        places.update(dict.fromkeys(part, shard))
    index = folder / f"{name}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize(
    ("suffix", "name"), [("safetensors", "model"), ("bin", "pytorch_model"), ("safetensors", "other")]
)
def test_shards(suffix: str, name: str, tmp_path: Path) -> None:
    index = sharded(tmp_path / "w", suffix, name)
    assert same(read_checkpoint(index))
    assert same(read_checkpoint(index.parent))
    first = index.parent / f"{name}-00001-of-00002.{suffix}"
    with pytest.raises(CheckpointError, match=r"is shard 1 of 2; give the \.index\.json"):
        read_checkpoint(first)
    first.write_bytes(first.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.\w+ is not a readable"):
        read_checkpoint(index)
    first.unlink()
    refused(index, "names the shard", first.name, "not there")


def test_broken_indices(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    good = json.loads(index.read_text())
    secret = tmp_path.parent / "secret.safetensors"
    save_file(WEIGHTS, secret)
    for text, word in (
        ("", "no index"),
        ("[1]", "no index"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "names no files"),
        ('{"weight_map": {"a": 3}}', "names no files"),
        ('{"weight_map": 3}', "no index"),
        ("[" * 100000, "no index"),
        (json.dumps({"weight_map": {"a.weight": "../secret.safetensors"}}), "no file beside it"),
        (json.dumps({"weight_map": {"a.weight": str(secret)}}), "no file beside it"),
    ):
        index.write_text(text)
        refused(index, word)
    good["weight_map"]["c.weight"] = good["weight_map"]["a.weight"]
    index.write_text(json.dumps(good))
    with pytest.raises(CheckpointError, match=r"does not hold c\.weight, which model\.safetensors\.index\.json says"):
        read_checkpoint(index)


# folders --------------------------------------------------------------------------------------------------------------


def test_folders(tmp_path: Path) -> None:
    refused(tmp_path, "holds no weights")
    refused(tmp_path / "none", "no checkpoint file")
    save_file(WEIGHTS, tmp_path / "mine.safetensors")
    assert same(read_checkpoint(tmp_path))
    save_file(WEIGHTS, tmp_path / "other.safetensors")
    refused(tmp_path, "holds 2 checkpoints", "mine.safetensors")
    save_file({"a.b": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(read_checkpoint(tmp_path)) == ["a.b"]


def test_distributed_checkpoint(tmp_path: Path) -> None:
    state = {"model": dict(WEIGHTS), "optimizer": {"state": {"a.weight": {"exp_avg": torch.ones(3)}}}, "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "w", no_dist=True)
    found = read_source(tmp_path / "w")
    assert list(found) == ["model"]
    assert same(found["model"])
    assert same(read_checkpoint(tmp_path / "w"))
    shard = next((tmp_path / "w").glob("*.distcp"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3000])
    refused(tmp_path / "w", "cut off")
    shard.write_bytes(bytes(len(whole)))
    refused(tmp_path / "w", "does not hold")
    shard.unlink()
    refused(tmp_path / "w", "names the shard", "not there")


def test_distributed_pieces(tmp_path: Path) -> None:
    """A tensor that several processes wrote, each its rows."""
    whole = torch.arange(12.0).view(4, 3)
    entries, stored = [], {}
    for rank, (start, stop) in enumerate(((0, 3), (3, 4))):
        torch.save(whole[start:stop].clone(), tmp_path / f"__{rank}_0.distcp")
        size = (tmp_path / f"__{rank}_0.distcp").stat().st_size
        info = torch.distributed.checkpoint.filesystem._StorageInfo(f"__{rank}_0.distcp", 0, size)
        stored[MetadataIndex("w.a", [start, 0], rank)] = info
        entries.append(ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([stop - start, 3])))
    entry = TensorStorageMetadata(TensorProperties(), torch.Size([4, 3]), entries)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"w.a": entry}, None, stored)))
    assert torch.equal(read_source(tmp_path)["w.a"], whole)
    del stored[MetadataIndex("w.a", [3, 0], 1)]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"w.a": entry}, None, stored)))
    refused(tmp_path, "does not hold all of w.a")


@pytest.mark.parametrize("value", [_Evil(), _Stored(), print])
def test_distributed_index_runs_nothing(value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"x": value}))
    refused(tmp_path, "no readable distributed checkpoint")
    assert not (tmp_path / "ran").exists()


def test_run_folder(tmp_path: Path) -> None:
    state = {"state_dict": {k: v * 0 for k, v in WEIGHTS.items()}, "state_dict_ema": WEIGHTS, "step": 1}
    save_checkpoint(tmp_path / "run/checkpoints/last.pt", state)
    assert same(read_checkpoint(tmp_path / "run"))
    save_checkpoint(tmp_path / "run/checkpoints/best.pt", {**state, "state_dict_ema": {"a.b": torch.ones(1)}})
    assert list(read_checkpoint(tmp_path / "run")) == ["a.b"]
    file = tmp_path / "run/checkpoints/best.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"best\.pt is damaged: its SHA-256 is not the manifest's"):
        read_checkpoint(tmp_path / "run")
    (tmp_path / "run/checkpoints/best.manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no readable manifest best\.manifest\.json"):
        read_checkpoint(tmp_path / "run")
