"""`zoo train` and `zoo eval`: from the arguments to an exit code.

Exit codes: 0 done; 1 an internal error or a failed training; 2 a mistake that the message names; 75 stopped by SIGTERM
or SIGINT after the state was saved (`zoo train resume=RUN_FOLDER` continues); 130 interrupted before there was a state.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.errors import UserError
from zoo.runs import Run, load_run, lock_run, write_atomic
from zoo.train.compose import SCHEMAS, compose_config, forbid_targets, from_container, normalize, prepare, typed
from zoo.train.config import EvalConfig, TrainConfig

__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_USER", "main"]

EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED, EXIT_KILLED = 1, 2, 75, 130

# What may change when a run is continued: nothing that the updates already made depend on.
RESUME_KEYS = (
    "epochs", "max_steps", "device", "debug", "log_every", "eval_every", "val_batch_size",
    "data.root", "data.num_workers", "data.pin_memory",
)  # fmt: skip
RESUME_SECTIONS = ("checkpoint.", "logger.")


@dataclass
class _Arguments:
    overrides: list[str]
    search_path: list[str]
    show: bool
    multirun: bool
    help: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help says more")


def _parse(command: str, argv: Sequence[str]) -> _Arguments:
    parser = _Parser(prog=f"zoo {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    parser.add_argument("--cfg", "-c", choices=("job",))
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    found = parser.parse_intermixed_args(list(argv))
    return _Arguments(found.overrides, found.config_dir, found.cfg is not None, found.multirun, found.help)


def _help(command: str, config_name: str) -> str:
    groups = []
    for folder in sorted(files("zoo.configs").iterdir(), key=lambda p: p.name):
        if folder.is_dir() and not folder.name.startswith("_"):
            names = sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))
            if names and (command == "train" or folder.name in ("model", "data")):
                groups.append(f"  {folder.name:<11} {', '.join(names)}")
    defaults = OmegaConf.to_yaml(compose_config(config_name, []))
    multirun = (
        "  --multirun, -m         sweep: every combination of the values in key=a,b\n" if command == "train" else ""
    )
    return (
        f"usage: zoo {command} [--config-dir DIR] [--cfg job] [key=value ...]\n\n"
        "  --config-dir, -cd DIR  a folder of configurations of your own beside the built-in ones\n"
        "  --cfg, -c job          print the configuration and stop\n"
        f"{multirun}"
        f"\nchoices, GROUP=NAME (model= also takes every name that `zoo list` and timm know):\n"
        + "\n".join(groups)
        + "\n\n"
        f"keys, KEY=VALUE, with their defaults:\n{defaults}"
    )


def _new_run_folder(cfg: TrainConfig) -> Path:
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


def _parsed(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    parser = OverridesParser.create()
    pairs = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
            pairs.append((override.key_or_group, override.value()))
        except (HydraException, ValueError) as error:
            raise UserError(f"cannot read the override {text!r}; overrides are key=value, lists key=[a,b]") from error
    return pairs


def _update(config: DictConfig, key: str, value: Any, schema: type[Any]) -> DictConfig:
    changed = OmegaConf.create(OmegaConf.to_container(config))
    OmegaConf.update(changed, key, value, force_add=True)
    return typed(changed, schema)


def _resumed_config(run: Run, overrides: Sequence[str], search_path: Sequence[str]) -> DictConfig:
    """The run's own configuration with the overrides that may change on the way.

    Raises:
        UserError: an override conflicts with what the run was started with.
    """
    forbid_targets(run.config)
    prepare(search_path, overrides)
    config = typed(run.config, TrainConfig)
    for text, (key, value) in zip(overrides, _parsed(overrides), strict=True):
        key = key.replace("/", ".")
        if key == "resume":
            continue
        if key in RESUME_KEYS or key.startswith(RESUME_SECTIONS):
            config = _update(config, key, value, TrainConfig)
            continue
        if key == "logger":
            config = _update(config, key, compose_config("train", [f"logger={value}"], search_path).logger, TrainConfig)
            continue
        current = None
        with suppress(OmegaConfBaseException):
            current = OmegaConf.select(config, key)
        if isinstance(current, DictConfig) and isinstance(value, str):
            current = current.get("name")  # a group's choice, such as model=nat_mini
        if OmegaConf.is_config(current):
            current = OmegaConf.to_container(current)
        if current != value:
            raise UserError(
                f"{text} conflicts with the run's {key}={current}; a resumed run keeps it "
                f"(what may change: {', '.join(RESUME_KEYS)}, checkpoint.*, logger.*); start a new run instead"
            )
    config.resume = None
    return config


def _train_one(config: Any, run: Run | None = None) -> dict[str, Any]:
    """Train in this process, from a composed configuration; returns the summary."""
    cfg = from_container(config, TrainConfig)
    from zoo.train.engine import Interrupted, Trainer
    from zoo.train.report import last_line
    from zoo.train.state import join_world

    world = join_world(cfg.device)
    folder: Path | None = None
    lock = None
    try:
        if world.is_primary:
            folder = run.path if run is not None else _new_run_folder(cfg)
            lock = lock_run(folder)
            cfg.run_dir = str(folder)
            write_atomic(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(cfg), resolve=True))
        folder = Path(world.from_primary(str(folder)))
        cfg.run_dir = str(folder)
        try:
            summary = Trainer(cfg, folder, world).fit()
        except Interrupted:
            if world.is_primary:
                print(f"interrupted; the state is saved; `zoo train resume={folder}` continues", flush=True)
            raise
        except UserError:
            if world.is_primary and run is None:
                _discard(folder)
            raise
        if world.is_primary:
            print(last_line(summary, folder), flush=True)
        return summary
    finally:
        if lock is not None:
            lock.close()
        world.leave()


def _discard(folder: Path) -> None:
    """Remove a run folder in which nothing was trained."""
    if not (folder / "checkpoints").exists():
        for name in ("config.yaml", "metrics.csv", ".lock"):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def _check_sweeper(settings: Any) -> None:
    """Raise UserError where a configuration file would have Hydra run code that is no plugin of its own."""
    for part in ("sweeper", "launcher"):
        target = str(settings[part].get("_target_"))
        if not target.startswith(("hydra._internal.core_plugins.", "hydra_plugins.")):
            raise UserError(f"hydra.{part}._target_={target}: a configuration cannot name code to run; name a plugin")
    for part, found in (("callbacks", settings.callbacks), ("job_logging", settings.job_logging.get("handlers"))):
        if found:
            raise UserError(f"hydra.{part} is not open to configurations; remove it")


def _sweep(overrides: Sequence[str], search_path: Sequence[str]) -> None:
    """Hydra's own multirun over the same configuration."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_automatic_config_search_path
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    # composing each job's values first finds wrong keys, and registers models that have no file, before anything runs
    prepared = prepare(search_path, overrides)
    plain = OverridesParser.create()
    fixed: list[str] = []
    for text, override in zip(prepared, plain.parse_overrides(prepared), strict=True):
        if override.is_sweep_override():
            if override.is_choice_sweep() or override.is_range_sweep():
                for value in override.sweep_string_iterator():
                    compose_config("train", [f"{str(override.input_line).split('=', 1)[0]}={value}"], search_path)
        elif not override.key_or_group.startswith("hydra"):
            fixed.append(text)
    compose_config("train", fixed, search_path)

    def task(config: DictConfig) -> float:
        OmegaConf.set_struct(config, False)
        if config.run_dir is None:
            config.run_dir = HydraConfig.get().runtime.output_dir
        return float(_train_one(config)["top1"])

    GlobalHydra.instance().clear()
    search = create_automatic_config_search_path(
        calling_file=None, calling_module=None, config_path="pkg://zoo.configs"
    )
    hydra = Hydra.create_main_hydra2(task_name="zoo", config_search_path=search)
    try:
        _check_sweeper(hydra.config_loader.load_configuration("train", list(prepared), RunMode.MULTIRUN).hydra)
        hydra.multirun(config_name="train", task_function=task, overrides=list(prepared), with_log_configuration=False)
    except HydraException as error:
        raise UserError(f"sweep: {str(error).splitlines()[0]}; `zoo train --help` lists keys and choices") from error
    finally:
        GlobalHydra.instance().clear()


def _train(arguments: _Arguments) -> None:
    resume = [o.split("=", 1)[1].strip("'\"") for o in arguments.overrides if o.lstrip("+").startswith("resume=")]
    run = load_run(resume[-1]) if resume and resume[-1] not in ("", "null") else None
    if arguments.multirun:
        if run is not None:
            raise UserError("resume continues one run and --multirun starts several; leave one out")
        _sweep(arguments.overrides, arguments.search_path)
        return
    if run is not None:
        config = _resumed_config(run, arguments.overrides, arguments.search_path)
    else:
        config = compose_config("train", arguments.overrides, arguments.search_path)
    if arguments.show:
        print(OmegaConf.to_yaml(config), end="")
        return
    _train_one(config, run)


def _eval_config(arguments: _Arguments) -> EvalConfig:
    config = compose_config("eval", arguments.overrides, arguments.search_path)
    if config.run is None:
        return from_container(config, EvalConfig)
    run = load_run(config.run)
    merged: Any = OmegaConf.to_container(config)
    composed_data, changes = merged["data"], _parsed(normalize(arguments.overrides))
    merged |= {"model": run.config["model"], "data": run.config["data"]}
    if any(key == "data" for key, _ in changes):
        merged["data"] = {**composed_data, "img_size": composed_data["img_size"] or run.config["data"]["img_size"]}
    result = typed(merged, EvalConfig)
    for key, value in changes:
        if key == "model" or key.startswith("model.") or key == "pretrained":
            raise UserError(
                f"{key}={value} conflicts with run={config.run}, which brings its model and weights; leave one out"
            )
        if key.startswith("data."):
            result = _update(result, key, value, EvalConfig)
    return from_container(result, EvalConfig)


def _eval(arguments: _Arguments) -> None:
    if arguments.multirun:
        raise UserError("zoo eval has no --multirun; call it once per run")
    if arguments.show:
        print(OmegaConf.to_yaml(compose_config("eval", arguments.overrides, arguments.search_path)), end="")
        return
    from zoo.train.evaluate import evaluate_command

    evaluate_command(_eval_config(arguments))


COMMANDS: dict[str, tuple[Callable[[_Arguments], None], str]] = {"train": (_train, "train"), "eval": (_eval, "eval")}


def main(command: str, argv: Sequence[str]) -> int:
    """Run `zoo train` or `zoo eval` and return the exit code; errors become one line on stderr.

    Args:
        command: "train" or "eval".
        argv: the arguments after the command; `debug=true` among them shows tracebacks.
    """
    run, config_name = COMMANDS[command]
    assert config_name in SCHEMAS
    debug = any(o.lstrip("+").lower() == "debug=true" for o in argv)

    def report(message: str, code: int) -> int:
        if debug:
            traceback.print_exc()
        if os.environ.get("RANK", "0") == "0" or code == EXIT_FAILED:
            print(f"zoo {command}: {message}", file=sys.stderr, flush=True)
        return code

    try:
        arguments = _parse(command, argv)
        if arguments.help:
            print(_help(command, config_name))
            return 0
        run(arguments)
        return 0
    except UserError as error:
        return report(" ".join(str(error).split()), EXIT_USER)
    except KeyboardInterrupt:
        return report("interrupted before there was anything to save", EXIT_KILLED)
    except BrokenPipeError:
        return 0
    except Exception as error:
        first = " ".join(str(error).split()) or "no message"
        return report(f"{type(error).__name__}: {first[:400]}; debug=true shows where", EXIT_FAILED)
    except BaseException as error:
        if type(error).__name__ == "Interrupted":
            return EXIT_INTERRUPTED
        raise
