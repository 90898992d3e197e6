"""Run folders: atomic checkpoints, their manifests, and what is left when bytes are not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import zoo.train.runs as runs
from zoo.errors import UserError
from zoo.train.config import TrainConfig
from zoo.train.runs import (
    CorruptCheckpointError,
    load_checkpoint,
    load_run,
    lock_run,
    newest_intact,
    restore_config,
    save_checkpoint,
    write_atomic,
    write_config,
)


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


def _trained(run: Path, config: TrainConfig | None = None) -> Path:
    """A run folder with a configuration and one checkpoint that was made with it."""
    cfg = config or TrainConfig()
    cfg.model.name, cfg.data.name, cfg.run_dir = "nat_mini", "digits", str(run)
    run.mkdir(exist_ok=True)
    write_config(run, cfg)
    state = {"step": 1, "config": OmegaConf.to_container(OmegaConf.structured(cfg))}
    save_checkpoint(run / "checkpoints" / "last.pt", state)
    return run


def _opened(run: Path) -> tuple[dict[str, Any] | None, str]:
    """The configuration of a run, or why it is refused."""
    try:
        return load_run(run).config, ""
    except UserError as error:
        return None, str(error)


def test_every_changed_byte_of_a_configuration_is_found_or_means_nothing(tmp_path: Path) -> None:
    run = _trained(tmp_path / "run")
    file = run / "config.yaml"
    data, expected = file.read_bytes(), load_run(run).config
    for offset in range(0, len(data), 7):
        for bit in (1 << offset % 7,):
            changed = bytearray(data)
            changed[offset] ^= bit
            file.write_bytes(changed)
            found, problem = _opened(run)
            if found is None:
                assert "\n" not in problem
                assert "config.yaml" in problem
            else:
                assert {**found, "run_dir": None, "resume": None} == {**expected, "run_dir": None, "resume": None}


def test_every_truncation_of_a_configuration_is_found(tmp_path: Path) -> None:
    run = _trained(tmp_path / "run")
    file = run / "config.yaml"
    data, expected = file.read_bytes(), load_run(run).config
    settings = data.index(b"# sha256")
    for size in range(0, len(data), 13):
        file.write_bytes(data[:size])
        found, problem = _opened(run)
        if found is None:
            assert "config.yaml" in problem
            assert size < settings  # more than the checksum is cut
        else:
            assert found == expected
            assert size > settings - len("name: null\n")  # nothing that is not null is cut


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("lr: 0.001", "lr: 0.003", ("optim.lr is 0.003 there and 0.001 in the checkpoint",)),
        ("epochs: 20", "epochs: 29", ("epochs is 29 there and 20 in the checkpoint",)),
        ("  name: nat_mini", "  name: nat_tiny", ("model.name is 'nat_tiny'",)),
        ("seed: 0\n", "", ("seed is absent there and 0",)),
        ("seed: 0\n", "seed: 0\nsede: 1\n", ("sede is 1 there and absent",)),
        ("enabled: false", "enabled: true", ("ema.enabled is True",)),
    ],
)
def test_changed_keys_are_named(tmp_path: Path, old: str, new: str, words: tuple[str, ...]) -> None:
    run = _trained(tmp_path / "run")
    file = run / "config.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_run(run)
    assert all(word in str(caught.value) for word in (*words, "last.pt", "restore_config"))
    restore_config(run)
    assert file.read_text() == text


def test_a_lost_or_foreign_configuration(tmp_path: Path) -> None:
    run = _trained(tmp_path / "run")
    other = TrainConfig()
    other.seed = 4
    (run / "config.yaml").write_bytes((_trained(tmp_path / "other", other) / "config.yaml").read_bytes())
    with pytest.raises(UserError, match="seed is 4 there and 0 in the checkpoint"):
        load_run(run)
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"lost its config\.yaml; .*restore_config"):
        load_run(run)
    (run / "config.yaml").mkdir()
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_run(run)


def test_what_a_resume_may_have_changed_is_no_damage(tmp_path: Path) -> None:
    """A resume that was killed before its first checkpoint has left another configuration than the checkpoint's."""
    run = _trained(tmp_path / "run")
    cfg = TrainConfig()
    cfg.model.name, cfg.data.name, cfg.epochs, cfg.logger.wandb.mode = "nat_mini", "digits", 40, "offline"
    write_config(run, cfg)
    assert load_run(run).config["epochs"] == 40


@pytest.mark.parametrize(
    "text",
    [
        "model: &a {name: nat_mini}\nx: *a\n",
        "model: " + "[" * 20000,
        "model: !!python/object/apply:os.system [true]",
        "model: \x00",
        "model: nat_mini",
        "- 1",
        "",
    ],
)
def test_hostile_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_run(tmp_path)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    run = _trained(tmp_path / "run")
    for name in ("config.yaml", "summary.json", "checkpoints/last.manifest.json", "checkpoints/last.pt"):
        path = run / name
        saved = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        with pytest.raises(UserError):
            (load_run(run).summary, load_run(run).checkpoint())
        path.unlink()
        if saved is not None:
            path.write_bytes(saved)
    assert load_run(run).checkpoint()[1]["step"] == 1


def test_lost_checkpoints_are_no_fresh_start(tmp_path: Path) -> None:
    path = _write(tmp_path, 2)
    for file in path.parent.glob("*.pt"):
        file.unlink()
    with pytest.raises(CorruptCheckpointError, match=r"gone: there is no \.pt file"):
        newest_intact(tmp_path)
    for file in path.parent.iterdir():
        file.unlink()
    assert newest_intact(tmp_path) is None
    (tmp_path / "metrics.csv").write_text("epoch,step\n")  # as a start leaves it
    assert newest_intact(tmp_path) is None
    (tmp_path / "metrics.csv").write_text("epoch,step\n1,11\n")
    path.parent.rmdir()
    with pytest.raises(CorruptCheckpointError, match="start a new run"):
        newest_intact(tmp_path)


def test_a_first_checkpoint_that_was_never_written_is_a_fresh_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoints" / "last.pt"
    real = runs._replace

    def full(temporary: Path, target: Path) -> None:
        if target == path:
            raise OSError(28, "No space left on device")
        real(temporary, target)

    monkeypatch.setattr(runs, "_replace", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {"step": 1})
    assert newest_intact(tmp_path) is None
    # one that was killed cleans nothing up
    path.with_name("last.manifest.json").write_text('{"sha256": "0"}')
    path.with_name(".last.pt.7.tmp").write_bytes(b"half")
    assert newest_intact(tmp_path) is None


def test_links_are_not_followed(tmp_path: Path) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    mine.write_text("keep me")
    (run / ".lock").symlink_to(mine)
    with pytest.raises(UserError, match=r"\.lock is a link"):
        lock_run(run)
    (run / ".lock").unlink()
    os.link(mine, run / ".lock")
    lock_run(run).close()
    for path in (run / f".summary.json.{os.getpid()}.tmp", run / f".last.pt.{os.getpid()}.tmp"):
        path.symlink_to(mine)
    write_atomic(run / "summary.json", "{}")
    save_checkpoint(run / "last.pt", {"step": 1})
    assert mine.read_text() == "keep me"
    assert not (run / "summary.json").is_symlink()
    assert not (run / "last.pt").is_symlink()
    (run / ".lock").unlink()
    os.mkfifo(run / ".lock")
    with pytest.raises(UserError, match="no regular file"):
        lock_run(run)


def test_full_disk_under_the_archive_writer(tmp_path: Path) -> None:
    """What torch's writer makes of a file that may not grow: the disk's own error, the old checkpoint still there."""
    path = _write(tmp_path, 1)
    code = (
        "import resource, signal, sys, torch\n"
        "from zoo.train.runs import save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "try:\n"
        "    save_checkpoint(sys.argv[1], {'w': torch.ones(200000), 'step': 2}, previous='previous.pt')\n"
        "except OSError as error:\n"
        "    print('OSError', error)\n"
    )
    for size in (0, 1, 1000, 100_000, 799_000):
        argv = [sys.executable, "-c", code, str(path), str(size)]
        result = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.stdout.startswith("OSError"), result.stderr[-300:]
        assert load_checkpoint(path)["step"] == 1
        assert not list(path.parent.glob(".*"))
