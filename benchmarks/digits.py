"""Does every family learn? A small member of each, trained on handwritten digits by the command that users type.

    python -m benchmarks.digits                              # every configs/model/*_digits.yaml, one after the other
    python -m benchmarks.digits --config van_digits          # these alone; the rows of the others are kept
    python -m benchmarks.digits --seed 1 --out /tmp/digits_seed1.json

Writes a JSON file and, beside it, the same as a table. CPU seconds are those of the whole process, with the start of
Python, the evaluation after each epoch and the writing of checkpoints; they say what a run costs on a machine that is
shared, wall seconds do not. The exit status is 1 where a family stays below the goal.
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.environment import command_line, environment

GOAL = 95.0  # % top-1 on the 359 held-out digits
CONFIGS = tuple(sorted(path.stem for path in (ROOT / "configs/model").glob("*_digits.yaml")))


def train(config: str, seed: int) -> dict[str, Any]:
    """Train one configuration in a process of its own and return its row.

    Raises:
        subprocess.CalledProcessError: the training failed.
    """
    overrides = [f"model={config}", *([f"seed={seed}"] if seed else [])]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "zoo", "train", *overrides, "device=cpu", f"run_dir={run}"],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        summary = json.loads((run / "summary.json").read_text())
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    found = environment(torch.device("cpu"), summary["threads"], "")
    return {
        "family": config.removesuffix("_digits"),
        "config": config,
        "model": summary["model"],
        "parameters": summary["parameters"],
        "top1": summary["top1"],
        "held_out": summary["held_out"],
        "epochs": summary["epochs"],
        "cpu_seconds": round(cpu, 1),
        "wall_seconds": round(wall, 1),
        "load_average": load,
        "command": shlex.join(["zoo", "train", *overrides]),
        "environment": {k: v for k, v in found.items() if k not in ("command", "load_average")},
    }


def table(rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """The rows as Markdown."""
    lines = [
        "# Every family learns the digits",
        "",
        f"scikit-learn's handwritten digits at 32 x 32, {rows[0]['held_out']} of 1797 held out; the goal for each is "
        f"{GOAL:.0f} % top-1.",
        f"Written by `{command}`. CPU seconds are those of the whole process, with start and evaluations; wall seconds",
        "depend on what else the machine was doing (the load average is in the JSON file).",
        "",
        "| family | configuration | model | parameters | top-1 % | epochs | CPU s | wall s | command |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['family']} | {row['config']} | {row['model']} | {row['parameters'] / 1e6:.2f} M "
            f"| {row['top1']:.2f} | {row['epochs']} | {row['cpu_seconds']:.0f} | {row['wall_seconds']:.0f} "
            f"| `{row['command']}` |"
        )
    lines.append("")
    lines += dict.fromkeys(_machine(row["environment"]) for row in rows)
    return "\n".join(lines) + "\n"


def _machine(found: Mapping[str, Any]) -> str:
    revision = str(found["git_revision"])[:12] + (" with changes" if found["git_dirty"] else "")
    return (
        f"Machine: {found['cpu']}, {found['cpu_capability']}, {found['threads']} thread; Python {found['python']}, "
        f"torch {found['torch']}, timm {found['timm']}; revision {revision}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.digits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", action="append", choices=CONFIGS, help="repeatable; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/digits.json")
    args = parser.parse_args(arguments)

    chosen = tuple(args.config or CONFIGS)
    old = json.loads(args.out.read_text())["results"] if args.config and args.out.exists() else []
    rows = {row["config"]: row for row in old if row["config"] in CONFIGS}
    command = command_line("digits", [f"--seed={args.seed}"] if args.seed else [])
    for config in chosen:
        row = rows[config] = train(config, args.seed)
        print(
            f"{config:<22} top-1 {row['top1']:6.2f} %  {row['parameters'] / 1e6:.2f} M  {row['epochs']} epochs  "
            f"{row['cpu_seconds']:.0f} CPU s  {row['wall_seconds']:.0f} s",
            flush=True,
        )
        ordered = [rows[name] for name in CONFIGS if name in rows]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"goal": GOAL, "command": command, "results": ordered}, indent=2) + "\n")
        args.out.with_suffix(".md").write_text(table(ordered, command))
    below = [name for name in chosen if rows[name]["top1"] < GOAL]
    if below:
        print(f"below {GOAL:.0f} %: {', '.join(below)}", file=sys.stderr)
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
