"""Run folders: atomic checkpoints, their manifests, and what is left when bytes are not."""

import json
import os
from pathlib import Path

import pytest
import torch

import zoo.train.runs as runs
from zoo.errors import UserError
from zoo.train.runs import CorruptCheckpointError, load_checkpoint, load_run, lock_run, newest_intact, save_checkpoint


def _write(run: Path, steps: int) -> Path:
    path = run / "checkpoints" / "last.pt"
    for step in range(1, steps + 1):
        save_checkpoint(path, {"step": step, "w": torch.full((1000,), float(step))}, previous="previous.pt")
    return path


def _flip(path: Path, offset: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if offset is None else offset] ^= 1
    path.unlink()  # `previous` may share the bytes
    path.write_bytes(data)


def test_round_trip(tmp_path: Path) -> None:
    path = _write(tmp_path, 3)
    assert load_checkpoint(path)["step"] == 3
    assert load_checkpoint(path.with_name("previous.pt"))["step"] == 2
    manifest = json.loads(path.with_name("last.manifest.json").read_text())
    assert manifest["bytes"] == path.stat().st_size
    assert manifest["step"] == 3
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "last.manifest.json", "last.pt", "previous.manifest.json", "previous.pt",
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_flipped_byte_falls_back(tmp_path: Path, where: str) -> None:
    path = _write(tmp_path, 3)
    _flip(path, {"start": 0, "middle": None, "end": path.stat().st_size - 1}[where])
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        load_checkpoint(path)
    found = newest_intact(tmp_path)
    assert found is not None
    assert found[0].name == "previous.pt"
    assert found[1]["step"] == 2
    assert "last.pt is damaged" in found[2][0]


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_truncated_file_falls_back(tmp_path: Path, size: int) -> None:
    path = _write(tmp_path, 2)
    data = path.read_bytes()[:size]
    path.unlink()
    path.write_bytes(data)
    found = newest_intact(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1
    assert f"{size} bytes instead of" in found[2][0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sha256": ""}'])
def test_broken_manifest_falls_back(tmp_path: Path, content: str) -> None:
    path = _write(tmp_path, 2)
    path.with_name("last.manifest.json").write_text(content)
    found = newest_intact(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1


def test_best_is_the_last_resort(tmp_path: Path) -> None:
    path = _write(tmp_path, 2)
    save_checkpoint(path.with_name("best.pt"), {"step": 1})
    _flip(path)
    _flip(path.with_name("previous.pt"))
    found = newest_intact(tmp_path)
    assert found is not None
    assert found[0].name == "best.pt"
    assert len(found[2]) == 2


def test_nothing_intact(tmp_path: Path) -> None:
    assert newest_intact(tmp_path) is None
    path = _write(tmp_path, 1)
    _flip(path)
    with pytest.raises(CorruptCheckpointError, match="no intact checkpoint"):
        newest_intact(tmp_path)


@pytest.mark.parametrize("crash_at", range(20))
def test_crash_at_any_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int) -> None:
    """Whichever rename the writer dies before, the newest intact checkpoint is the old one or the new one."""
    path = _write(tmp_path, 2)
    real, count = os.replace, 0

    class Killed(BaseException):
        pass

    def dying(source: str, target: str) -> None:
        nonlocal count
        if count == crash_at:
            raise Killed
        count += 1
        real(source, target)

    monkeypatch.setattr(runs.os, "replace", dying)
    state = {"step": 3, "w": torch.zeros(5)}
    try:
        save_checkpoint(path, state, previous="previous.pt")
        finished = True
    except Killed:
        finished = False
    monkeypatch.setattr(runs.os, "replace", real)
    found = newest_intact(tmp_path)
    assert found is not None
    assert not found[2]
    assert found[1]["step"] == (3 if finished else 2)
    assert finished == (crash_at >= 4)
    _flip(path)
    fallback = newest_intact(tmp_path)
    assert fallback is not None
    assert fallback[1]["step"] in ((2,) if finished else (1, 2))


@pytest.mark.parametrize("kills", [1, 2, 3, 6])
@pytest.mark.parametrize("crash_at", range(4))
def test_killed_at_the_same_rename_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int, kills: int
) -> None:
    """Writers that die one after the other, such as between manifest and file, leave what was there verifiable."""
    path = _write(tmp_path, 2)
    real = os.replace

    class Killed(BaseException):
        pass

    for attempt in range(kills):
        left = crash_at

        def dying(source: str, target: str) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            real(source, target)

        monkeypatch.setattr(runs.os, "replace", dying)
        with pytest.raises(Killed):
            save_checkpoint(path, {"step": 3, "w": torch.full((7,), float(attempt))}, previous="previous.pt")
        monkeypatch.setattr(runs.os, "replace", real)
        found = newest_intact(tmp_path)
        assert found is not None
        assert found[0] == path
        assert found[1]["step"] == 2
        assert not found[2]
        assert load_checkpoint(path.with_name("previous.pt"))["step"] == (2 if crash_at >= 2 else 1)
    save_checkpoint(path, {"step": 3}, previous="previous.pt")
    assert load_checkpoint(path)["step"] == 3
    assert load_checkpoint(path.with_name("previous.pt"))["step"] == 2


def test_damaged_file_does_not_push_out_its_fallback(tmp_path: Path) -> None:
    path = _write(tmp_path, 3)
    _flip(path)
    save_checkpoint(path, {"step": 3}, previous="previous.pt")
    assert load_checkpoint(path.with_name("previous.pt"))["step"] == 2


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, 1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"step": 2}, previous="previous.pt")
    assert load_checkpoint(path)["step"] == 1
    assert not list(path.parent.glob(".*"))


def test_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    save_checkpoint(path, {"step": 1, "x": Evil()})
    with pytest.raises(CorruptCheckpointError, match="cannot be read"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_load_run_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder at"):
        load_run(tmp_path / "none")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not readable YAML"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {name: nat_mini}")
    run = load_run(tmp_path)
    assert run.config == {"model": {"name": "nat_mini"}}
    assert run.summary is None
    with pytest.raises(UserError, match="has no checkpoint 'last' yet"):
        run.checkpoint()
    with pytest.raises(UserError, match="no checkpoint 'lst'"):
        run.checkpoint("lst")
    _write(tmp_path, 2)
    assert run.checkpoint()[1]["step"] == 2
    _flip(tmp_path / "checkpoints" / "last.pt")
    with pytest.raises(CorruptCheckpointError, match="checkpoint=previous"):
        run.checkpoint()


def test_lock_is_exclusive_between_processes(tmp_path: Path) -> None:
    lock = lock_run(tmp_path)
    child = os.fork()
    if child == 0:  # a record lock belongs to the process, not to its file descriptors
        try:
            lock_run(tmp_path)
            os._exit(0)
        except UserError:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    lock.close()
    lock_run(tmp_path).close()
