"""Checkpoint files of any origin: what is read, and the line for what is none."""

import argparse
import io
import os
import pathlib
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zoo.models.checkpoints import read_checkpoint

WEIGHTS = {"a.b": torch.zeros(3)}


def _saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(RuntimeError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert "weights_only" not in message
    return message


def test_what_training_scripts_store_beside_weights(tmp_path: Path) -> None:
    arguments = argparse.Namespace(lr=np.float32(2), out=pathlib.Path("/x"), n=np.arange(3), name=np.str_("a"))
    extras = [
        np.float64(0.5),
        np.int64(3),
        np.bool_(True),
        np.ones(2, np.float16),
        arguments,
        pathlib.PurePosixPath("y"),
    ]
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        path = tmp_path / "w.pth"
        path.write_bytes(_saved({"model": WEIGHTS, "extras": extras}, **options))
        assert torch.equal(read_checkpoint(path)["a.b"], WEIGHTS["a.b"])


class _Mine:
    pass


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_objects_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.chdir(tmp_path)
    for value, name in ((_Mine(), "_Mine"), (_Evil(), "system")):
        message = _refused(tmp_path / "w.pth", _saved({"model": WEIGHTS, "x": value}, **options))
        assert name in message
        assert "save the state_dict alone" in message
    _refused(tmp_path / "w.pth", _saved({"model": WEIGHTS, "x": np.array([_Mine()], dtype=object)}, **options))
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html>\n<html><body>404</body></html>" * 40, "HTML page"),
        (b"\xef\xbb\xbf \n<HTML>x", "HTML page"),
        ("Entry not found: \u00e9\n".encode(), "text file, which begins 'Entry not found"),
        (b'{"error": "no"}', "text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"", "empty"),
        (b"\x1f\x8b" + bytes(50), "compressed"),
        (b"PK\x03\x04" + bytes(50), "not a readable"),
        (b"\x80\x02garbage", "not a readable"),
        (bytes(range(256)) * 9, "not a readable"),
    ],
)
def test_other_files_are_named(tmp_path: Path, suffix: str, content: bytes, words: str) -> None:
    assert words in _refused(tmp_path / f"w{suffix}", content)


def _edited(edit: Callable[[bytes], bytes], kind: int = zipfile.ZIP_STORED, more: str | None = None) -> bytes:
    """A checkpoint with another pickle in its archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved(WEIGHTS))) as source, zipfile.ZipFile(buffer, "w", kind) as target:
        for member in source.infolist():
            data = source.read(member)
            target.writestr(member.filename, edit(data) if member.filename.endswith("data.pkl") else data)
        if more is not None:
            target.writestr(more, "x")
    return buffer.getvalue()


def test_absurd_sizes_and_archives(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    assert "declares a tensor" in _refused(path, _saved({"a": torch.zeros(1).expand(10**12)}))
    assert "declares a tensor" in _refused(path, _saved({"a": torch.empty(10**12, device="meta")}))
    huge = b"J\xff\xff\xff\x7f"
    _refused(path, _edited(lambda data: data.replace(b"cpuq\x06K\x03", b"cpuq\x06" + huge)))
    _refused(path, _edited(lambda data: data.replace(b"K\x03\x85", huge + b"\x85")))
    assert "compressed" in _refused(path, _edited(lambda data: data, zipfile.ZIP_DEFLATED))
    for name in ("../../evil", "/evil", "a/../../evil", "..\\evil"):
        assert "outside itself" in _refused(path, _edited(lambda data: data, more=name))
    with tarfile.open(tmp_path / "archive", "w") as archive:
        archive.add(path, "../evil")
    assert "tar archive" in _refused(tmp_path / "w.tar", (tmp_path / "archive").read_bytes())
    save_file(WEIGHTS, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    assert "rename it" in _refused(path, good)
    for bad in (good.replace(b"[3]", b"[9]"), good[:-4], b"\xff" * 8 + good[8:], good[:12]):
        _refused(tmp_path / "w.safetensors", bad)
    path.write_bytes(_saved({"a": torch.zeros(1).expand(100)}))
    assert read_checkpoint(path)["a"].shape == (100,)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_truncations(tmp_path: Path, options: dict[str, Any]) -> None:
    data = _saved(WEIGHTS, **options)
    for size in range(1, len(data) - 1, 37):
        _refused(tmp_path / "w.pth", data[:size])


def test_what_others_allow_stays_allowed(tmp_path: Path) -> None:
    """torch's block of safe globals takes its names away at its end, also those that were allowed before it."""
    torch.save({"weight": torch.ones(2)}, tmp_path / "plain.pth")
    allowed = set(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        before = set(torch.serialization.get_safe_globals())
        assert read_checkpoint(tmp_path / "plain.pth")["weight"].shape == (2,)
        assert set(torch.serialization.get_safe_globals()) == before
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(allowed))
