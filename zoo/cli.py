"""The command line: `zoo COMMAND ...`. Commands that are configured by Hydra take its overrides, `key=value`.

This is the top of the dependency order: it may import everything, and does so inside the command that needs it.
"""

import argparse
import difflib
import fnmatch
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NoReturn

from zoo._start import importing
from zoo._version import __version__
from zoo.errors import UserError, unbroken_output
from zoo.names import NAMES, nearest_names

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` says more")


def _train(argv: Sequence[str]) -> int:
    """train a classifier: zoo train model=nat_tiny data=imagenet data.root=PATH"""
    with importing():
        from zoo.train.app import main as run

    return run("train", list(argv))


def _eval(argv: Sequence[str]) -> int:
    """evaluate a run or a checkpoint: zoo eval run=runs/NAME"""
    with importing():
        from zoo.train.app import main as run

    return run("eval", list(argv))


def _predict(argv: Sequence[str]) -> int:
    """name the classes of images: zoo predict model=runs/NAME image=FOLDER"""
    with importing():
        from zoo.train.predict import main as run

    return run(list(argv))


def _detect(argv: Sequence[str]) -> int:
    """train or evaluate a detector: zoo detect model=nat_tiny detector=mask_rcnn data=coco data.root=PATH"""
    try:
        with importing():
            from zoo.train.detection.app import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("zoo"):
            raise
        raise UserError(f'the package {error.name} is missing; pip install "attention-zoo[detection]"') from error
    return run(list(argv))


def _export(argv: Sequence[str]) -> int:
    """write a run's weights out: zoo export run=runs/NAME format=timm out=DIR"""
    with importing():
        from zoo.train.export import main as run

    return run(list(argv))


def _convert(argv: Sequence[str]) -> int:
    """write any known checkpoint in this package's format: zoo convert FILE out=X.safetensors"""
    from zoo.convert import main as run

    return run(list(argv))


def _list(argv: Sequence[str]) -> int:
    """list models: zoo list 'nat*' 'van_b?'"""
    parser = _Parser(prog="zoo list", description="List the models that zoo registers with timm.")
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="wildcards, quoted: 'biformer*'")
    parser.add_argument("--tags", action="store_true", help="list every published checkpoint, as model.tag")
    parser.add_argument("--markdown", action="store_true", help="print MODELS.md, the table of all models")
    args = parser.parse_args(argv)

    if args.markdown:
        with importing():
            import zoo.models  # noqa: F401  registers the models
            from zoo.registry import models_table, package_models

        print(models_table(_matching(package_models(), args.patterns)), end="")
        return 0
    names = _matching(list(NAMES), args.patterns)
    print("\n".join([tagged for name in names for tagged in NAMES[name]] if args.tags else names))
    return 0


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that one of the patterns matches, all where there is none.

    Raises:
        UserError: no name does.
    """
    found = [name for name in names if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not found:
        near = nearest_names(patterns[0].strip("*?"), names)
        raise UserError(f"no model matches {' '.join(patterns)!r}; the nearest names are {', '.join(near) or 'none'}")
    return found


def _info(argv: Sequence[str]) -> int:
    """what is known of a model: zoo info nat_tiny"""
    parser = _Parser(prog="zoo info", description="Print what is known of a model.")
    parser.add_argument("name", help="a model, with or without a tag: nat_tiny, dinat_large.in22k")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)

    with importing():
        import zoo.models  # noqa: F401  registers the models
        from zoo.registry import model_info

    info = model_info(args.name)
    if args.json:
        print(json.dumps(asdict(info), indent=2, default=str))
        return 0
    rows = [
        ("model", f"{info.name} ({info.family})"),
        ("parameters", f"{info.parameters / 1e6:.2f} M at {info.num_classes} classes"),
        ("FLOPs", f"{info.macs / 1e9:.2f} G multiply-adds at {info.input_size[1]} x {info.input_size[2]} (measured)"),
        ("top-1", f"{info.top1} % on ImageNet-1k (published)" if info.top1 else "none published"),
        ("sizes", info.accepted_sizes),
        ("attention", ", ".join(f"{op}: {backend}" for op, backend in info.ops.items()) or "no zoo op"),
        ("licence", info.licence or "not stated"),
        ("paper", info.paper or "-"),
        ("original", info.origin or "-"),
    ]
    for name, cfg in info.checkpoints.items():
        source = cfg.get("url") or (f"hub: {cfg['hf_hub_id']}" if cfg.get("hf_hub_id") else "no weights published")
        rows.append(("checkpoint", f"{name}: {source}"))
    for key, value in rows:
        print(f"{key:<11} {value}")
    return 0


def _doctor(argv: Sequence[str]) -> int:
    """check this machine: versions, and every op against its definition"""
    parser = _Parser(
        prog="zoo doctor", description="Print which path each op takes on this machine, checked against its definition."
    )
    parser.parse_args(argv)
    from zoo.doctor import main as run

    return run()


def _tune(argv: Sequence[str]) -> int:
    """fill the table of tile configurations of this machine's GPU: zoo tune --budget 300"""
    from zoo.tune import main as run

    return run(argv)


def _run(argv: Sequence[str]) -> int:
    """run any program with zoo's models in timm: zoo run train.py --model nat_tiny"""
    from zoo import run

    if argv[:1] in (["-h"], ["--help"]):
        print(run.USAGE)
        return 0
    run.program(argv)()
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "eval": _eval,
    "predict": _predict,
    "detect": _detect,
    "export": _export,
    "convert": _convert,
    "list": _list,
    "info": _info,
    "doctor": _doctor,
    "tune": _tune,
    "run": _run,
}


def _usage() -> str:
    lines = [f"  {name:<8} {command.__doc__}" for name, command in COMMANDS.items()]
    return "usage: zoo COMMAND ...\n\n" + "\n".join(lines) + "\n\n`zoo COMMAND --help` says more; `zoo --version`."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a mistake that the message names, or the command's own."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        with unbroken_output():
            print(_usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"zoo {__version__}")
        return 0
    command = COMMANDS.get(args[0])
    try:
        if command is None:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean `zoo {near[0]}`?" if near else f"the commands are {', '.join(COMMANDS)}"
            raise UserError(f"no command {args[0]!r}; {hint}")
        if command is _run:  # the program's output and signals are its own
            return command(args[1:])
        with unbroken_output():
            return command(args[1:])
    except UserError as error:
        print(f"zoo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if command is _run:
            raise
        print(f"zoo: interrupted before {args[0]} began", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
