"""Run folders and checkpoint files: what is written is whole and verified, whatever kills the writer.

A checkpoint `NAME.pt` is a PyTorch file of plain containers and tensors (it loads with `weights_only=True`) beside its
manifest `NAME.manifest.json`, which holds the SHA-256 of the file. The manifest is replaced before the file and accepts
the hash of the file it is about to replace too, so a crash between the two leaves a verifiable pair.

What a run was trained with is the configuration inside its checkpoints. config.yaml is a readable copy, which ends with
its own SHA-256: one that is as it was written may differ from the checkpoint in what a resume may change (RESUMABLE),
for the resume may not have reached its first checkpoint; one that was changed since may not differ at all.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch
import yaml
from omegaconf import OmegaConf

from zoo.errors import UserError, first_line
from zoo.models.checkpoints import load_plain
from zoo.train.config import model_label
from zoo.train.state import World, join_world
from zoo.train.stop import Interrupted

__all__ = [
    "CHECKPOINTS",
    "FOLDER_KEYS",
    "RESUMABLE",
    "CorruptCheckpointError",
    "Run",
    "changeable",
    "check_writable",
    "claim_folder",
    "json_text",
    "load_checkpoint",
    "is_run",
    "load_run",
    "lock_run",
    "newest_intact",
    "restore_config",
    "save_checkpoint",
    "select_weights",
    "write_atomic",
    "write_config",
]

CHECKPOINTS = ("last", "previous", "best")
# What a resume of some kind of run may change: nothing that what was already computed depends on.
RESUMABLE = (
    "epochs", "max_steps", "device", "debug", "profile", "log_every", "eval_every", "val_batch_size", "pictures",
    "run_root", "data.root", "data.num_workers", "data.pin_memory", "data.max_bad", "checkpoint.", "logger.",
)  # fmt: skip
FOLDER_KEYS = ("run_dir", "resume")  # of the start that wrote the file; a run that is taken up again sets them anew
_SEAL = "# sha256 of what stands above: "
_MAX_TEXT = 4 * 2**20  # bytes of a configuration, a manifest or a summary; ours have a few thousand


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


def json_text(value: Any) -> str:
    """A value as JSON of every parser's kind: a float that is no number is null."""
    return json.dumps(_without_nan(value), indent=2, allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _without_nan(v) for k, v in value.items()}
    return [_without_nan(v) for v in value] if isinstance(value, list | tuple) else value


def check_writable(out: Path, key: str = "out") -> None:
    """Raise UserError where a file cannot be written, before an evaluation whose result it is to take.

    Args:
        out: the file; its folder is made.
        key: the argument that names it, for the message.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if out.exists() and not out.is_file():
            raise OSError(errno.EINVAL, "it is no regular file")
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(f"{key}={out} cannot be written: {error.strerror}; give another file") from error


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a small file so that a reader, or the next start after a crash, sees the old content or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _create(temporary) as file:
            file.write(content.encode() if isinstance(content, str) else content)
        _replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _create(temporary: Path) -> BinaryIO:
    """Open a new file; what another one left under its name, a link even, is removed and not followed."""
    temporary.unlink(missing_ok=True)
    return open(temporary, "xb")


def _manifest_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.manifest.json")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_text(path: Path) -> str:
    """A small regular file; a pipe or a device is not waited for.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is no regular file of text of a sensible size.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")
        if found.st_size > _MAX_TEXT:
            raise ValueError(f"{found.st_size} bytes are too many")
        return file.read().decode()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_read_text(_manifest_path(path)))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _manifest_step(path: Path) -> int:
    step = _read_manifest(path).get("step")
    return step if isinstance(step, int) else -1


def _described(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The files that a manifest accepts: the one it was written for, and the one that this one was to replace."""
    replaced = manifest.get("replaces")
    entries = [manifest, replaced] if isinstance(replaced, dict) else [manifest]
    return [entry for entry in entries if isinstance(entry.get("sha256"), str) and entry["sha256"]]


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
        with _create(temporary) as file:
            torch.save(dict(state), file)
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
    except (OSError, RuntimeError) as error:
        if not path.exists():  # a manifest alone would say that a checkpoint is gone
            _manifest_path(path).unlink(missing_ok=True)
        raise _as_disk_error(error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def _as_disk_error(error: OSError | RuntimeError) -> OSError | RuntimeError:
    """The disk's own error, where torch's archive writer has hidden it behind one of its closing."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        return OSError(errno.ENOSPC, "the disk does not take the whole file")
    return error


def load_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU after comparing it with its manifest.

    Args:
        path: the file.
        mmap: leave the tensors on the disk, where only the rest is wanted.

    Raises:
        CorruptCheckpointError: the file or its manifest is missing, or the hashes differ.
    """
    path = Path(path)
    if not path.is_file():
        raise CorruptCheckpointError(f"no checkpoint at {path}")
    manifest = _read_manifest(path)
    if not isinstance(manifest.get("sha256"), str) or not manifest["sha256"]:
        raise CorruptCheckpointError(f"checkpoint {path} has no readable manifest {_manifest_path(path).name}")
    try:
        digest = _digest(path)
    except OSError as error:
        raise CorruptCheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if digest not in [entry["sha256"] for entry in _described(manifest)]:
        size, expected = path.stat().st_size, manifest.get("bytes")
        detail = f"{size} bytes instead of {expected}" if size != expected else "its SHA-256 is not the manifest's"
        raise CorruptCheckpointError(f"checkpoint {path} is damaged: {detail}")
    try:
        state = load_plain(path, mmap=mmap)
    except Exception as error:
        raise CorruptCheckpointError(f"checkpoint {path} cannot be read: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise CorruptCheckpointError(f"checkpoint {path} holds a {type(state).__name__}, not the state of a run")
    return state


def newest_intact(run_folder: str | Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest checkpoint of a run that is whole: its path, its state, and what was wrong with newer ones.

    None when the run has written no checkpoint yet.

    Raises:
        CorruptCheckpointError: there are checkpoints and all are damaged, or there were some and all are gone.
    """
    folder = Path(run_folder) / "checkpoints"
    candidates = _candidates(folder)
    if not any(p.exists() for p in candidates):
        _forbid_lost_checkpoints(Path(run_folder), candidates)
        return None
    problems: list[str] = []
    for path in candidates:
        try:
            return path, load_checkpoint(path), problems
        except CorruptCheckpointError as error:
            problems.append(str(error))
    raise CorruptCheckpointError(f"no intact checkpoint in {folder}: {'; '.join(problems)}; start a new run")


def _candidates(folder: Path) -> list[Path]:
    """The checkpoints that are or should be there: first `last`, then who trained longest by its manifest."""
    paths = [folder / f"{name}.pt" for name in CHECKPOINTS]
    others = sorted(paths[1:], key=lambda p: -_manifest_step(p))
    return [p for p in [paths[0], *others] if p.exists() or _manifest_path(p).exists()]


def _forbid_lost_checkpoints(run_folder: Path, described: Sequence[Path]) -> None:
    """Raise CorruptCheckpointError where a run had checkpoints and has none: to begin anew would be no resume."""
    # a writer that was killed before its first checkpoint got its name leaves the manifest and a temporary file
    begun = [p for p in described if not list(p.parent.glob(f".{p.name}.*.tmp"))]
    if not begun and not (run_folder / "summary.json").exists() and not _has_rows(run_folder / "metrics.csv"):
        return
    raise CorruptCheckpointError(
        f"run {run_folder} was trained and its checkpoints are gone: there is no .pt file in {run_folder}/checkpoints; "
        "restore them, or start a new run"
    )


def _has_rows(table: Path) -> bool:
    with suppress(OSError, ValueError):
        return len(_read_text(table).splitlines()) > 1
    return False


@dataclass(frozen=True)
class Run:
    """A run folder that was written by `zoo train`."""

    path: Path
    config: dict[str, Any]  # the resolved configuration
    sealed: bool = True  # whether config.yaml is as it was written

    @property
    def summary(self) -> dict[str, Any] | None:
        """The finished run's summary.json; None while there is none.

        Raises:
            UserError: it is damaged.
        """
        file = self.path / "summary.json"
        try:
            found = json.loads(_read_text(file))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} is not readable JSON ({first_line(error)}); restore or remove it") from error
        if not isinstance(found, dict):
            raise UserError(f"{file} is no summary of a run; restore or remove it")
        return found

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
            resume = f"`zoo train {shlex.quote(f'resume={self.path}')}` continues it"
            raise UserError(f"run {self.path} has no checkpoint {name!r} yet; {resume}")
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


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, which configurations of ours never have and which let a small file grow without bounds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


def _seal(text: str) -> str:
    return f"{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def _is_sealed(text: str) -> bool:
    start = text.rfind(_SEAL)
    return start >= 0 and text[start:] == _seal(text[:start])


def _remedy(folder: Path) -> str:
    code = f"from zoo.train.runs import restore_config; restore_config({str(folder)!r})"
    return f"`python -c {shlex.quote(code)}` writes the checkpoint's configuration back"


def is_run(model: str) -> bool:
    """Whether `model=` names a run folder; a name that timm knows is a folder only where a run lies in it."""
    if ":" in model and not os.path.isdir(model):
        return False
    return os.path.isfile(os.path.join(model, "config.yaml")) or (
        not timm.is_model(model) and (os.path.isdir(model) or os.sep in model)
    )


def load_run(run_folder: str | Path) -> Run:
    """Open a run folder.

    Raises:
        UserError: the folder does not exist or holds no run, or its configuration is not the one it was trained with.
    """
    path = Path(run_folder)
    if not path.is_dir():
        raise UserError(f"no run folder at {path}; `zoo train` prints the folder it writes, by default under runs/")
    file = path / "config.yaml"
    trained = _trained_config(path)
    restore = _remedy(path) if trained is not None else "restore it"
    try:
        text = _read_text(file)
        config = yaml.load(text, _PlainLoader)
    except FileNotFoundError:
        if trained is not None:
            raise UserError(f"run {path} has lost its config.yaml; {restore}") from None
        raise UserError(
            f"{path} is not a run folder: it has no config.yaml; give a folder that `zoo train` wrote"
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; {restore}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable YAML ({first_line(error)}); {restore}") from error
    sealed = _is_sealed(text)
    if trained is not None:
        _compare(file, config, sealed, *trained)
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise UserError(f"{file} is not the configuration of a training run; give a folder that `zoo train` wrote")
    return Run(path, config, sealed)


def restore_config(run_folder: str | Path) -> None:
    """Write config.yaml anew from the newest intact checkpoint.

    Raises:
        UserError: there is none.
    """
    found = _trained_config(Path(run_folder))
    if found is None:
        raise UserError(f"{run_folder} has no intact checkpoint with a configuration; start a new run")
    _write_sealed(Path(run_folder), OmegaConf.to_yaml(OmegaConf.create(found[1])))


def _trained_config(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint and the configuration inside it; None where there is none."""
    for path in _candidates(folder / "checkpoints"):
        with suppress(CorruptCheckpointError):
            config = load_checkpoint(path, mmap=True).get("config")
            return (path, config) if isinstance(config, dict) else None
    return None


def changeable(key: str, keys: Sequence[str]) -> bool:
    """Whether a dotted key is one of `keys`, or in one of the sections among them, which end with a dot."""
    return any(key == known or (known.endswith(".") and f"{key}.".startswith(known)) for known in keys)


def _compare(file: Path, config: Any, sealed: bool, checkpoint: Path, trained: Mapping[str, Any]) -> None:
    """Raise UserError where config.yaml differs from the checkpoint's configuration, and no resume explains it."""
    free = (*FOLDER_KEYS, *RESUMABLE) if sealed else FOLDER_KEYS
    written = yaml.safe_load(OmegaConf.to_yaml(OmegaConf.create(dict(trained))))  # as YAML gives the values back
    found = [d for d in _differences(config, written, "") if not changeable(d[0], free)]
    if not found:
        return
    parts = [f"{key} is {_shown(own)} there and {_shown(then)} in the checkpoint" for key, own, then in found[:4]]
    more = f", and {len(found) - 4} more keys differ" if len(found) > 4 else ""
    raise UserError(
        f"{file} is not what {checkpoint.name} was trained with: {', '.join(parts)}{more}; put it back, or "
        f"{_remedy(file.parent)}"
    )


_ABSENT = object()


def _differences(a: Any, b: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """The dotted keys, with both values, in which two configurations differ."""
    if isinstance(a, dict) and isinstance(b, dict) and (a or b):
        for name in [*b, *(n for n in a if n not in b)]:
            yield from _differences(a.get(name, _ABSENT), b.get(name, _ABSENT), f"{key}.{name}" if key else str(name))
    elif repr(a) != repr(b) and (a != b or isinstance(a, bool) != isinstance(b, bool)):
        yield key or "everything", a, b


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


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
    kind = "ema" if averaged is not None and weights != "raw" else "raw"
    found = averaged if kind == "ema" else state.get("state_dict")
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"the checkpoint's {kind} weights are no state_dict; give the folder of a run of `zoo train`")
    return dict(found), kind


def lock_run(run_folder: str | Path) -> Any:
    """Take a run folder for this process until it ends or the returned file is closed.

    A POSIX record lock: forked loader workers that outlive a killed trainer do not hold it.

    Raises:
        UserError: another process writes to the folder, or it cannot be written.
    """
    path = Path(run_folder) / ".lock"
    try:  # a link would have its target opened, and a file is never emptied: either may be someone else's
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        what = "is a link" if path.is_symlink() else f"cannot be opened: {error.strerror}"
        raise UserError(f"{path} {what}; remove it, or give another folder") from error
    file = open(descriptor, "rb+", buffering=0)  # noqa: SIM115  held open for as long as the lock is wanted
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise UserError(f"{path} is no regular file; remove it, or give another folder")
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
    _write_sealed(run_folder, OmegaConf.to_yaml(OmegaConf.structured(cfg)))


def _write_sealed(run_folder: Path, text: str) -> None:
    write_atomic(run_folder / "config.yaml", f"{text}{_seal(text)}")


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
            resume = shlex.quote(f"resume={folder}")
            print(f"interrupted; the state is saved; `zoo {command} {resume}` continues", flush=True)
        raise
    except (UserError, KeyboardInterrupt):
        if lock is not None and own is None and not _holds_results(folder):
            _discard(folder, ("config.yaml", "metrics.csv", "augmented.png", ".lock", *leftovers))
        raise
    finally:
        if lock is not None:
            lock.close()
        world.leave()


def _new_folder(cfg: Any) -> Path:
    if cfg.run_dir is not None:
        folder = Path(cfg.run_dir)
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(
                f"run_dir={folder} is not empty; continue it with "
                f"{shlex.quote(f'resume={folder}')}, or give another folder"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir={folder} cannot be made: {error.strerror}; give another folder") from error
        return folder
    data = cfg.data.name.replace("/", "_") or "imagefolder"
    base = Path(cfg.run_root) / f"{model_label(cfg.model)}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"
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
