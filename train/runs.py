"""Run folders and checkpoint files: what is written is whole and verified, whatever kills the writer.

A checkpoint `NAME.pt` is a PyTorch file of plain containers and tensors (it loads with `weights_only=True`) beside its
manifest `NAME.manifest.json`, which holds the SHA-256 of the file. The manifest is replaced before the file and accepts
the hash of the file it is about to replace too, so a crash between the two leaves a verifiable pair.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf

from zoo.errors import UserError, first_line
from zoo.train.state import World, join_world
from zoo.train.stop import Interrupted

__all__ = [
    "CHECKPOINTS",
    "CorruptCheckpointError",
    "Run",
    "claim_folder",
    "load_checkpoint",
    "load_run",
    "lock_run",
    "newest_intact",
    "save_checkpoint",
    "select_weights",
    "write_atomic",
    "write_config",
]

CHECKPOINTS = ("last", "previous", "best")


class CorruptCheckpointError(UserError):
    """A checkpoint is missing, truncated, or is not the file that its manifest describes."""


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(temporary: Path, path: Path) -> None:
    """Flush a finished temporary file to the disk and give it its name."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a small file so that a reader, or the next start after a crash, sees the old content or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    _replace(temporary, path)


def _manifest_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.manifest.json")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_manifest_path(path).read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _described(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The files that a manifest accepts: the one it was written for, and the one that this one was to replace."""
    replaced = manifest.get("replaces")
    entries = [manifest, replaced] if isinstance(replaced, dict) else [manifest]
    return [entry for entry in entries if entry.get("sha256")]


def _present(path: Path) -> dict[str, Any] | None:
    """What the manifest says of the file that is there now; None where there is none or it is damaged."""
    entries = _described(_read_manifest(path))
    if not entries or not path.is_file():
        return None
    digest = _digest(path)
    found = next((entry for entry in entries if entry["sha256"] == digest), None)
    return None if found is None else {k: found[k] for k in ("sha256", "bytes", "step", "epoch") if k in found}


def _keep(path: Path, name: str, present: Mapping[str, Any]) -> None:
    """Give the current file a second name, under which it stays when its own name is given to a newer one."""
    kept = path.with_name(name)
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    manifest = {"file": name, **present, "replaces": _present(kept)}
    write_atomic(_manifest_path(kept), json.dumps(manifest, indent=1))
    _replace(temporary, kept)


def save_checkpoint(path: str | Path, state: Mapping[str, Any], *, previous: str | None = None) -> str:
    """Write a checkpoint and its manifest atomically and return the file's SHA-256.

    Args:
        path: the file, `FOLDER/NAME.pt`; the folder is made.
        state: plain containers, numbers, strings and tensors.
        previous: a file name under which the file that is replaced stays, if it is intact, as the fallback of
            `newest_intact`.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old checkpoint is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(dict(state), temporary)
        digest = _digest(temporary)
        # by its own hash: the manifest may be that of a file whose writer died before it got its name
        present = _present(path)
        if previous is not None and present is not None:  # a damaged file must not push out its fallback
            _keep(path, previous, present)
        manifest = {
            "file": path.name,
            "sha256": digest,
            "bytes": temporary.stat().st_size,
            "replaces": present,
            **{k: state[k] for k in ("step", "epoch") if k in state},
        }
        write_atomic(_manifest_path(path), json.dumps(manifest, indent=1))
        _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU after comparing it with its manifest.

    Raises:
        CorruptCheckpointError: the file or its manifest is missing, or the hashes differ.
    """
    path = Path(path)
    if not path.is_file():
        raise CorruptCheckpointError(f"no checkpoint at {path}")
    manifest = _read_manifest(path)
    if not manifest.get("sha256"):
        raise CorruptCheckpointError(f"checkpoint {path} has no readable manifest {_manifest_path(path).name}")
    if _digest(path) not in [entry["sha256"] for entry in _described(manifest)]:
        size, expected = path.stat().st_size, manifest.get("bytes")
        detail = f"{size} bytes instead of {expected}" if size != expected else "its SHA-256 is not the manifest's"
        raise CorruptCheckpointError(f"checkpoint {path} is damaged: {detail}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CorruptCheckpointError(f"checkpoint {path} cannot be read: {first_line(error)}") from error


def newest_intact(run_folder: str | Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest checkpoint of a run that is whole: its path, its state, and what was wrong with newer ones.

    None when the run has written no checkpoint yet.

    Raises:
        CorruptCheckpointError: there are checkpoints, and all are damaged.
    """
    folder = Path(run_folder) / "checkpoints"
    paths = [folder / f"{name}.pt" for name in CHECKPOINTS]
    # `last` leads whatever its manifest says; of the others the one that trained longest
    others = sorted(paths[1:], key=lambda p: -int(_read_manifest(p).get("step", -1)))
    candidates = [p for p in [paths[0], *others] if p.exists() or _manifest_path(p).exists()]
    if not candidates or not any(p.exists() for p in candidates):
        return None
    problems: list[str] = []
    for path in candidates:
        try:
            return path, load_checkpoint(path), problems
        except CorruptCheckpointError as error:
            problems.append(str(error))
    raise CorruptCheckpointError(f"no intact checkpoint in {folder}: {'; '.join(problems)}; start a new run")


@dataclass(frozen=True)
class Run:
    """A run folder that was written by `zoo train`."""

    path: Path
    config: dict[str, Any]  # the resolved configuration

    @property
    def summary(self) -> dict[str, Any] | None:
        """The finished run's summary.json; None while there is none."""
        file = self.path / "summary.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def checkpoint(self, name: str = "last") -> tuple[Path, dict[str, Any]]:
        """Path and verified state of a checkpoint: "last", "best" or "previous".

        Raises:
            UserError: there is no checkpoint of that name.
            CorruptCheckpointError: it is damaged.
        """
        if name not in CHECKPOINTS:
            raise UserError(f"no checkpoint {name!r}; the names are {', '.join(CHECKPOINTS)}")
        path = self.path / "checkpoints" / f"{name}.pt"
        if not path.is_file():
            raise UserError(
                f"run {self.path} has no checkpoint {name!r} yet; `zoo train resume={self.path}` continues it"
            )
        try:
            return path, load_checkpoint(path)
        except CorruptCheckpointError as error:
            intact = [n for n in CHECKPOINTS if n != name and self._is_intact(n)]
            hint = f"intact: {', '.join(f'checkpoint={n}' for n in intact)}" if intact else "no other one is intact"
            raise CorruptCheckpointError(f"{error}; {hint}") from error

    def _is_intact(self, name: str) -> bool:
        try:
            load_checkpoint(self.path / "checkpoints" / f"{name}.pt")
        except CorruptCheckpointError:
            return False
        return True


def load_run(run_folder: str | Path) -> Run:
    """Open a run folder.

    Raises:
        UserError: the folder does not exist or holds no run.
    """
    path = Path(run_folder)
    if not path.is_dir():
        raise UserError(f"no run folder at {path}; `zoo train` prints the folder it writes, by default under runs/")
    file = path / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path} is not a run folder: it has no config.yaml; give a folder that `zoo train` wrote"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not readable YAML ({first_line(error)}); restore it") from error
    if not isinstance(config, dict) or "model" not in config:
        raise UserError(f"{file} is not the configuration of a training run; give a folder that `zoo train` wrote")
    return Run(path, config)


def select_weights(state: Mapping[str, Any], weights: str = "auto") -> tuple[dict[str, torch.Tensor], str]:
    """The model's state_dict in a checkpoint and its kind: "ema" or "raw"; "auto" takes the averaged ones if kept.

    Raises:
        UserError: averaged weights were asked for and the run kept none, or the kind is unknown.
    """
    if weights not in ("auto", "ema", "raw"):
        raise UserError(f"weights={weights!r} is not known; choose auto, ema or raw")
    averaged = state.get("state_dict_ema")
    if weights == "ema" and averaged is None:
        raise UserError("this run kept no averaged weights (ema.enabled was false); choose weights=raw")
    if averaged is not None and weights != "raw":
        return dict(averaged), "ema"
    return dict(state["state_dict"]), "raw"


def lock_run(run_folder: str | Path) -> Any:
    """Take a run folder for this process until it ends or the returned file is closed.

    A POSIX record lock: forked loader workers that outlive a killed trainer do not hold it.

    Raises:
        UserError: another process writes to the folder.
    """
    file = open(Path(run_folder) / ".lock", "w")  # noqa: SIM115  held open for as long as the lock is wanted
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(
            f"run {run_folder} is being written by another process; wait for it or stop it first"
        ) from error
    return file


def write_config(run_folder: Path, cfg: Any) -> None:
    """Write config.yaml, from which the run is taken up again."""
    write_atomic(run_folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(cfg), resolve=True))


@contextmanager
def claim_folder(
    cfg: Any, own: Path | None, device: str, command: str, *, leftovers: Sequence[str] = ()
) -> Iterator[tuple[World, Path]]:
    """Join the processes of a run and hold its folder, an old one or a new one, which `cfg` then names.

    A new folder in which nothing was trained goes away with a UserError.

    Args:
        cfg: a configuration with run_dir, run_root, model.name and data.name; its run_dir is set.
        own: the folder of the run that goes on; None makes a new one.
        device: as in `device=`.
        command: the command that continues an interrupted run, as in `zoo train`.
        leftovers: what the command may have written into a new folder beside config.yaml and metrics.csv.

    Raises:
        UserError: the device is not there, or the folder cannot be made or is in use.
    """
    world = join_world(device)
    folder, lock = Path(), None
    try:
        if world.is_primary:
            folder = own or _new_folder(cfg)
            folder.mkdir(exist_ok=True)
            lock = lock_run(folder)
        folder = Path(world.from_primary(str(folder)))
        cfg.run_dir = str(folder)
        yield world, folder
    except Interrupted:
        if world.is_primary:
            print(f"interrupted; the state is saved; `zoo {command} resume={folder}` continues", flush=True)
        raise
    except UserError:
        if lock is not None and own is None and not _holds_results(folder):
            _discard(folder, ("config.yaml", "metrics.csv", ".lock", *leftovers))
        raise
    finally:
        if lock is not None:
            lock.close()
        world.leave()


def _new_folder(cfg: Any) -> Path:
    if cfg.run_dir is not None:
        folder = Path(cfg.run_dir)
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"run_dir={folder} is not empty; continue it with resume={folder}, or give another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir={folder} cannot be made: {error.strerror}; give another folder") from error
        return folder
    data = cfg.data.name.replace("/", "_") or "imagefolder"
    base = Path(cfg.run_root) / f"{cfg.model.name}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"
    for count in range(1, 1000):
        folder = base if count == 1 else base.with_name(f"{base.name}-{count}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"run_root={cfg.run_root} cannot be written: {error.strerror}; give another folder"
            ) from error
    raise UserError(f"{base} and its numbered names are all taken; give run_dir=FOLDER")


def _holds_results(folder: Path) -> bool:
    return (folder / "checkpoints").exists() or (folder / "bad_images.csv").exists()


def _discard(folder: Path, names: Sequence[str]) -> None:
    """Remove what a start wrote into a folder, and the folder if nothing else is in it."""
    for path in (folder / name for name in names):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
