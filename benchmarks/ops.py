"""How much faster the ops are than the textbook forms of the same computation.

    python -m benchmarks.ops --threads 2 --out benchmarks/results/ops_cpu.json
    python -m benchmarks.ops --op neighborhood --quick

The cases are those of zoo.ops.examples tagged "cpu", their peers are in benchmarks/cases. The implementations of a case
are first required to agree, outputs and gradients; then their calls are timed in turn, round after round, so that a
change of the machine's speed meets all alike, and the median of each is reported.
"""

import argparse
import fnmatch
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Goals, Peer
from benchmarks.environment import command_line, environment, synchronize
from zoo.ops.examples import select

__all__ = ["differences", "main"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON; 1 where implementations disagree."""
    known = sorted({example.folder for example in select("cpu")})
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", action="append", choices=known, help="default: all")
    parser.add_argument("--case", default="*", help="only cases whose name matches this pattern")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=9, help="rounds, an odd number")
    parser.add_argument("--quick", action="store_true", help="the main cases only, three rounds")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file for the results and the environment")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    repeats = 3 if options.quick else options.repeats

    rows: list[dict[str, Any]] = []
    agree = True
    for op in options.op or known:
        for case in select("cpu", *(["quick"] if options.quick else []), folder=op):
            if not fnmatch.fnmatch(case.name, options.case):
                continue
            torch.manual_seed(0)
            tensors = [x.to(options.device, _DTYPES[options.dtype]) for x in case.inputs()]
            peers = {name: p for name, p in cases.peers(case, tensors).items() if isinstance(p, Peer)}
            implementations = {"zoo": Peer(case.bound(tensors)), **peers}
            for row in measure(implementations, tensors, repeats, options.forward_only):
                row = {"op": op, "case": case.name, **row, **goals(cases.goals(case), row, options.device)}
                rows.append(row)
                agree &= row["agrees"]
                print(format_row(row), flush=True)
    if options.out:
        command = command_line("ops", sys.argv[1:] if arguments is None else arguments)
        report = {"environment": environment(options.device, options.threads, command), "results": rows}
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if agree else 1


def measure(
    implementations: Mapping[str, Peer], tensors: Sequence[Tensor], repeats: int, forward_only: bool
) -> Iterator[dict[str, Any]]:
    """Median milliseconds of each implementation, forward and, of those that train, forward and backward."""
    grad = torch.randn_like(next(iter(implementations.values())).function(*tensors))

    def forward(function: Callable[..., Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [function(*tensors)]

    def training(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    modes = {"forward": forward} if forward_only else {"forward": forward, "training": training}
    for mode, call in modes.items():
        functions = {n: i.function for n, i in implementations.items() if mode == "forward" or i.trains}
        errors = differences({name: call(function) for name, function in functions.items()})
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(repeats):
            for name, function in functions.items():
                synchronize(tensors[0].device)
                start = time.perf_counter()
                call(function)
                synchronize(tensors[0].device)
                times[name].append(1e3 * (time.perf_counter() - start))
        medians = {name: statistics.median(values) for name, values in times.items()}
        ours, *peers = medians
        yield {
            "mode": mode,
            "dtype": str(tensors[0].dtype).removeprefix("torch."),
            "milliseconds": {name: round(value, 3) for name, value in medians.items()},
            "fastest": {name: round(min(values), 3) for name, values in times.items()},
            "ratio": {name: round(medians[name] / medians[ours], 2) for name in peers},
            "largest_difference": errors,
            "agrees": all(error <= _TOLERANCE[tensors[0].dtype] for error in errors.values()),
        }


def differences(results: dict[str, list[Tensor]]) -> dict[str, float]:
    """Largest difference of each peer from ours over outputs and gradients, relative to the largest value of each."""
    ours, *_ = results.values()
    return {
        # torch's maximum keeps NaN
        name: torch.stack([(x - y).abs().max() / y.abs().max() for x, y in zip(theirs, ours, strict=True)]).max().item()
        for name, theirs in list(results.items())[1:]
    }


def goals(aims: Goals, row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The ratios that were aimed at, and which of them were missed; goals are for CPUs."""
    wanted = aims.forward if row["mode"] == "forward" else aims.training
    if device.type != "cpu" or not wanted:
        return {}
    return {"goals": dict(wanted), "missed": [peer for peer, goal in wanted.items() if row["ratio"][peer] < goal]}


def format_row(row: dict[str, Any]) -> str:
    ours, *_ = row["milliseconds"].items()
    ratios = []
    for peer, ratio in row["ratio"].items():
        goal = row.get("goals", {}).get(peer)
        note = "" if goal is None else f" (goal {goal:g}{', MISSED' if peer in row['missed'] else ''})"
        ratios.append(f"{peer} {ratio:.1f}x{note}")
    verdict = "" if row["agrees"] else "  DISAGREE " + str(row["largest_difference"])
    return f"{row['op']} {row['case']:<18} {row['mode']:<8} {ours[1]:9.2f} ms  " + "  ".join(ratios) + verdict


if __name__ == "__main__":
    sys.exit(main())
