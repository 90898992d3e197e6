"""`zoo train` and `zoo eval`. Exit codes: see shell.py."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from zoo.errors import UserError
from zoo.train.compose import (
    compose_config,
    from_container,
    normalize,
    override_value,
    parse_overrides,
    typed,
    updated,
)
from zoo.train.config import EVAL, TRAIN, EvalConfig
from zoo.train.resume import Changes, resumed_config
from zoo.train.runs import Run, claim_folder, load_run, write_config
from zoo.train.shell import Arguments, Command, group_choices, run_command, show_sweep, sweep

__all__ = ["COMMANDS", "main"]

_RESUMED = Changes(
    "a resumed run",
    (
        "epochs", "max_steps", "device", "debug", "log_every", "eval_every", "val_batch_size",
        "data.root", "data.num_workers", "data.pin_memory", "data.max_bad",
    ),
    ("checkpoint.", "logger."),
    "start a new run instead",
)  # fmt: skip


def _train_one(config: DictConfig, run: Run | None = None) -> dict[str, Any]:
    """Train in this process, from a composed configuration; returns the summary."""
    cfg = from_container(config, TRAIN)
    from zoo.train.engine import Trainer
    from zoo.train.evaluate import unreadable_note

    with claim_folder(cfg, run.path if run is not None else None, cfg.device, "train") as (world, folder):
        if world.is_primary and run is None:  # that of a resumed run is written when all checks have passed
            write_config(folder, cfg)
        summary = Trainer(cfg, folder, world).fit()
        if world.is_primary:
            dry = "dry run passed: one step, saved, loaded, evaluated; " if cfg.dry_run else ""
            bad = unreadable_note(summary["unreadable"])
            accuracy = f"top-1 {summary['top1']:.2f} % on {summary['held_out']} held-out images{bad}"
            print(f"{dry}{accuracy}; run folder: {folder}", flush=True)
        return summary


def _train(arguments: Arguments) -> None:
    resume = override_value(arguments.overrides, "resume")
    run = load_run(resume) if resume is not None else None
    if arguments.multirun:
        if run is not None:
            raise UserError("resume continues one run and --multirun starts several; leave one out")
        if arguments.show:
            show_sweep(TRAIN, arguments)
            return
        sweep(TRAIN, arguments, lambda config: float(_train_one(config)["top1"]), "top1")
        return
    if run is not None:
        config = resumed_config(run, TRAIN, _RESUMED, arguments.overrides, arguments.search_path)
    else:
        config = compose_config(TRAIN, arguments.overrides, arguments.search_path)
    if arguments.show:
        print(OmegaConf.to_yaml(config), end="")
        return
    _train_one(config, run)


def _eval_config(arguments: Arguments) -> EvalConfig:
    config = compose_config(EVAL, arguments.overrides, arguments.search_path)
    if config.run is None:
        return from_container(config, EVAL)
    run = load_run(config.run)
    merged: Any = OmegaConf.to_container(config)
    composed_data, changes = merged["data"], parse_overrides(normalize(EVAL, arguments.overrides))
    merged |= {"model": run.config["model"], "data": run.config["data"]}
    if any(key == "data" for key, _ in changes):
        merged["data"] = {**composed_data, "img_size": composed_data["img_size"] or run.config["data"]["img_size"]}
    result = typed(merged, EVAL)
    for key, value in changes:
        if key == "model" or key.startswith("model.") or key == "pretrained":
            raise UserError(
                f"{key}={value} conflicts with run={config.run}, which brings its model and weights; leave one out"
            )
        if key.startswith("data."):
            result = updated(result, EVAL, key, value)
    return from_container(result, EVAL)


def _eval(arguments: Arguments) -> None:
    if arguments.show:
        print(OmegaConf.to_yaml(compose_config(EVAL, arguments.overrides, arguments.search_path)), end="")
        return
    from zoo.train.evaluate import evaluate_command

    evaluate_command(_eval_config(arguments))


COMMANDS = {
    "train": Command("train", TRAIN, _train, lambda: group_choices("zoo.configs"), multirun=True),
    "eval": Command("eval", EVAL, _eval, lambda: group_choices("zoo.configs", ("model", "data"))),
}


def main(command: str, argv: Sequence[str]) -> int:
    """Run `zoo train` or `zoo eval` and return the exit code; errors become one line on stderr.

    Args:
        command: "train" or "eval".
        argv: the arguments after the command; `debug=true` among them shows tracebacks.
    """
    return run_command(COMMANDS[command], argv)
