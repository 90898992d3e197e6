"""From the arguments of a configured command to its exit code: parsing, help, multirun, and errors in one line.

Exit codes: 0 done; 1 an internal error or a failed training; 2 a mistake that the message names; 75 stopped by SIGTERM
or SIGINT after the state was saved (`resume=RUN_FOLDER` continues); 130 interrupted before there was a state.
"""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from zoo.errors import UserError, first_line, unbroken_output
from zoo.train.compose import VettedLoader, compose_config, own_hydra_section, prepare
from zoo.train.config import Schema
from zoo.train.loggers import write_csv
from zoo.train.stop import Interrupted, TrainingFailed

__all__ = [
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_KILLED",
    "EXIT_USER",
    "Arguments",
    "Command",
    "group_choices",
    "run_command",
    "show_sweep",
    "sweep",
]

EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED, EXIT_KILLED = 1, 2, 75, 130


@dataclass(frozen=True)
class Arguments:
    """What a command line says."""

    overrides: list[str]
    search_path: list[str]  # folders of configurations
    show: bool  # print the configuration and stop
    multirun: bool
    help: bool


@dataclass(frozen=True)
class Command:
    """A command that Hydra configures: `zoo NAME`.

    name: as it is typed.
    schema: what it composes.
    run: does it; raises UserError for a mistake, Interrupted after a signal.
    choices: group -> names, for the help.
    examples: lines for the help.
    multirun: whether --multirun sweeps.
    """

    name: str
    schema: Schema[Any]
    run: Callable[[Arguments], None]
    choices: Callable[[], Mapping[str, Sequence[str]]]
    examples: tuple[str, ...] = ()
    multirun: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help says more")


def _parse(command: Command, argv: Sequence[str]) -> Arguments:
    parser = _Parser(prog=f"zoo {command.name}", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    parser.add_argument("--cfg", "-c", choices=("job",))
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    found = parser.parse_intermixed_args(list(argv))
    if found.multirun and not command.multirun:
        raise UserError(f"zoo {command.name} has no --multirun; call it once per run")
    return Arguments(found.overrides, found.config_dir, found.cfg is not None, found.multirun, found.help)


def group_choices(package: str, groups: Sequence[str] | None = None) -> dict[str, list[str]]:
    """The names in the groups of a package of configurations; all groups unless some are named."""
    found = {}
    for folder in sorted(files(package).iterdir(), key=lambda p: p.name):
        if folder.is_dir() and (groups is None or folder.name in groups):
            names = sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))
            if names:
                found[folder.name] = names
    return found


def _help(command: Command) -> str:
    lines = [f"usage: zoo {command.name} [--config-dir DIR] [--cfg job] [key=value ...]", ""]
    if command.examples:
        lines += [*(f"  {example}" for example in command.examples), ""]
    lines.append("  --config-dir, -cd DIR  a folder of configurations of your own beside the built-in ones")
    lines.append("  --cfg, -c job          print the configuration and stop")
    if command.multirun:
        lines.append("  --multirun, -m         sweep: every combination of the values in key=a,b")
    lines += ["", "choices, GROUP=NAME (model= also takes every name that `zoo list` and timm know):"]
    lines += [f"  {group:<11} {', '.join(names)}" for group, names in sorted(command.choices().items())]
    lines += ["", "keys, KEY=VALUE, with their defaults:", OmegaConf.to_yaml(compose_config(command.schema, []))]
    return "\n".join(lines)


def show_sweep(schema: Schema[Any], arguments: Arguments) -> None:
    """Print the configuration of every job of a sweep over listed values; one document of YAML each."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    prepared = prepare(schema, arguments.overrides, arguments.search_path, sweep=True)
    parsed = [o for o in OverridesParser.create().parse_overrides(prepared) if not o.key_or_group.startswith("hydra")]
    try:
        jobs = BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException as error:
        raise UserError(f"sweep: {first_line(error)}; --cfg job shows sweeps over listed values") from error
    for number, job in enumerate(jobs):
        config = compose_config(schema, job, arguments.search_path)
        print(f"---\n# job {number}: {' '.join(job)}\n{OmegaConf.to_yaml(config)}", end="")


def _is_swept(override: str, fixed: Sequence[str]) -> bool:
    """Whether an override of a job is its own, and not one of all jobs."""
    return override not in fixed and override.lstrip("+") not in {text.lstrip("+") for text in fixed}


def sweep(schema: Schema[Any], arguments: Arguments, job: Callable[[DictConfig], float], score: str = "score") -> None:
    """Hydra's own multirun: a job for every combination of the values; a sweeper optimizes what the job returns.

    A table sweep.csv of overrides and scores is written into the sweep's folder, by the jobs of this process.

    Args:
        schema: what is composed.
        arguments: the command line.
        job: trains; returns its score.
        score: the column of the table that takes it.

    Raises:
        UserError: a key, a value or a choice of any job is wrong, before the first one starts.
    """
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_automatic_config_search_path
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    # composing each job's values first finds wrong keys, and registers models that have no file, before anything runs
    prepared = prepare(schema, arguments.overrides, arguments.search_path, sweep=True)
    fixed: list[str] = []
    for text, override in zip(prepared, OverridesParser.create().parse_overrides(prepared), strict=True):
        if override.is_sweep_override():
            if override.is_choice_sweep() or override.is_range_sweep():
                for value in override.sweep_string_iterator():
                    one = f"{str(override.input_line).split('=', 1)[0]}={value}"
                    compose_config(schema, [one], arguments.search_path)
        elif not override.key_or_group.startswith("hydra"):
            fixed.append(text)
    compose_config(schema, fixed, arguments.search_path)

    rows: list[dict[str, Any]] = []
    table: Path | None = None

    def task(config: DictConfig) -> float:
        nonlocal table
        OmegaConf.set_struct(config, False)
        hydra = HydraConfig.get()
        if config.run_dir is None:
            config.run_dir = hydra.runtime.output_dir
        row: dict[str, Any] = {"job": hydra.job.num, "run": config.run_dir}
        row |= dict(text.split("=", 1) for text in hydra.overrides.task if _is_swept(text, fixed))
        rows.append(row)
        try:
            row[score] = job(config)
        except BaseException as error:
            row["error"] = first_line(error)
            raise
        finally:  # after every job, so that a sweep that is cut short has a table of what is done
            known = list(dict.fromkeys(key for found in rows for key in found))
            columns = [*(key for key in known if key not in (score, "error")), score, "error"]
            table = Path(hydra.sweep.dir) / "sweep.csv"
            write_csv(table, columns, rows)
        return float(row[score])

    GlobalHydra.instance().clear()
    search = create_automatic_config_search_path(
        calling_file=None, calling_module=None, config_path="pkg://zoo.configs"
    )
    own = own_hydra_section(schema, prepared)
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2(task_name="zoo", config_search_path=search)
    hydra.config_loader = VettedLoader(search, own)
    try:
        hydra.multirun(schema.name, task_function=task, overrides=list(prepared), with_log_configuration=False)
    except HydraException as error:
        raise UserError(f"sweep: {first_line(error)}; `zoo train --help` lists keys and choices") from error
    finally:
        GlobalHydra.instance().clear()
        if rows and table is not None:
            scored = [row for row in rows if row.get(score) is not None]
            best = max(scored, key=lambda row: row[score]) if scored else None
            words = f", the best {score} {best[score]:.2f} in {best['run']}" if best is not None else ""
            print(f"sweep: {len(rows)} jobs{words}; all in {table}", flush=True)


def run_command(command: Command, argv: Sequence[str]) -> int:
    """Run a command and return the exit code; errors become one line on stderr.

    Args:
        command: what to run.
        argv: the arguments after its name; `debug=true` among them shows tracebacks.
    """
    debug = any(o.lstrip("+").lower() == "debug=true" for o in argv)

    def report(message: str, code: int) -> int:
        if debug:
            traceback.print_exc()
        if os.environ.get("RANK", "0") == "0" or code == EXIT_FAILED:
            print(f"zoo {command.name}: {message}", file=sys.stderr, flush=True)
        return code

    try:
        with unbroken_output():
            arguments = _parse(command, argv)
            if arguments.help:
                print(_help(command))
                return 0
            command.run(arguments)
            return 0
    except UserError as error:
        return report(" ".join(str(error).split()), EXIT_USER)
    except Interrupted:
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return report("interrupted before there was anything to save", EXIT_KILLED)
    except TrainingFailed as error:
        return report(" ".join(str(error).split()), EXIT_FAILED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            return report(
                f"{type(error).__name__}: {' '.join(str(error).split())}; debug=true shows where", EXIT_FAILED
            )
        where = f" {error.filename}" if error.filename else ""
        return report(f"cannot write{where}: {error.strerror}; make room and resume", EXIT_USER)
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            return report(
                f"out of memory ({text[:200] or 'MemoryError'}); lower batch_size or data.img_size", EXIT_USER
            )
        return report(f"{type(error).__name__}: {text[:400]}; debug=true shows where", EXIT_FAILED)
    except Exception as error:
        first = " ".join(str(error).split()) or "no message"
        return report(f"{type(error).__name__}: {first[:400]}; debug=true shows where", EXIT_FAILED)
