"""`zoo tune`: fill the table of tile configurations of this machine's GPU."""

import argparse
import contextlib
import importlib.util
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import processes
from zoo.errors import UserError
from zoo.ops.examples import Example, headlines_first, select
from zoo.timing import step_times

__all__ = ["main"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PRELOAD = ("zoo.tune", "zoo.ops", "zoo.ops.tuning")
_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-3}


def main(argv: Sequence[str]) -> int:
    """Run `zoo tune ...` and return its exit code.

    Raises:
        UserError: there is no GPU or no Triton here, nothing to tune, or the table cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="zoo tune",
        description="Measure tile configurations on this GPU and write its table. Candidates are compiled in processes "
        "side by side and then timed one by one; with a budget those most like the heuristic's come first.",
    )
    parser.add_argument("--kind", action="append", help="only these kinds: neighborhood, window, grid, halo, ...")
    parser.add_argument("--dtype", action="append", choices=_DTYPES, help="default: bfloat16")
    parser.add_argument("--batch", type=int, default=64, help="images at 224 pixels; fewer of larger maps")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds for everything; default: all candidates"
    )
    parser.add_argument("--workers", type=int, help="processes that compile; default: the number of CPUs less two")
    parser.add_argument("--out", type=Path, help="default: the table that the ops read")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("`zoo tune` measures a GPU, and PyTorch sees none on this machine")
    if importlib.util.find_spec("triton") is None:
        raise UserError("`zoo tune` measures Triton kernels, and the package triton is not installed")
    from zoo.ops.tuning import Config, Key, save_table, table_path

    start = time.monotonic()
    device = torch.device("cuda")
    path: Path = options.out or table_path(torch.cuda.get_device_name(device))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written; name another file with --out")
    known = list(dict.fromkeys(example.kind for example in problems()))
    if unknown := set(options.kind or ()).difference(known):
        raise UserError(f"no problem is of the kind {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    searches = [
        Search(number, dtype, options.batch)
        for number, example in enumerate(problems())
        for dtype in options.dtype or ("bfloat16",)
        if not options.kind or example.kind in options.kind
    ]
    workers = max(0, len(os.sched_getaffinity(0)) - 2) if options.workers is None else options.workers
    compiled = _compile(searches, workers, start, options.budget) if workers > 1 else None
    table: dict[Key, Config] = {}
    for number, search in enumerate(searches):
        name = f"{search.example.kind}, {search.example.name}"
        left = start + options.budget - time.monotonic()
        if left <= 0 or (compiled is not None and not compiled[number]):
            print(f"{name:<32} left out, the time was up")
            continue
        # every search gets its share of the time
        end = time.monotonic() + left / (len(searches) - number)
        allowed = None if compiled is None else compiled[number]
        found = tune(search.call, search.tensors(), options.repeats, allowed, end)
        for key, (config, before, after) in found.items():
            table[key] = config
            times = f"{before:8.1f} -> {after:8.1f} us"
            print(f"{name:<32} {key.direction:<16} {key.dtype:<9} {times}  {config}")
        save_table(path, table, environment(device))  # what was measured survives an interruption
    print(f"{len(table)} entries in {path}")
    return 0


def problems() -> list[Example]:
    """What the models of this package run at 224 pixels (and 384 where one is published at it), one of a kind first."""
    return headlines_first(select("model"))


@dataclass(frozen=True)
class Search:
    """A problem in a dtype, as another process can be told of it."""

    number: int
    dtype: str
    batch: int

    @property
    def example(self) -> Example:
        return problems()[self.number].with_batch(self.batch, 128)  # the catalogue's batch at 224 pixels

    def call(self, *tensors: Tensor) -> Tensor:
        return self.example.call(tensors, backend="triton")

    def tensors(self) -> list[Tensor]:
        torch.manual_seed(0)
        return [x.to(_DTYPES[self.dtype]) for x in self.example.inputs(device="cuda")]


def _candidates(kind: str, direction: str, heuristic: Any) -> list[Any]:
    """What may be faster than the heuristic's configuration, the most like it first."""
    from zoo.ops.tuning import Config

    tiles: tuple[int, ...] = (32, 64, 128)
    columns: tuple[int, ...] = (16,) if kind == "channel" else (32, 64, 128)
    warps: tuple[int, ...] = (2, 4, 8)
    if kind in ("neighborhood", "window", "grid", "halo"):
        tiles = (4, 8, 16)
        columns = (32, 64, 128, 256) if direction == "forward" else columns
    if kind == "routing":
        tiles, columns, warps = (16, *tiles), (16, *columns), (1, *warps)
    made = [Config(*c) for c in itertools.product(tiles, columns, warps, (1, 2, 3))]
    return sorted((c for c in made if c != heuristic), key=lambda c: _steps(c, heuristic))


def _steps(a: Any, b: Any) -> float:
    """How many doublings (of stages: additions) apart two configurations are."""
    doublings = sum(abs(math.log2(getattr(a, n) / getattr(b, n))) for n in ("tile", "columns", "warps"))
    return doublings + abs(a.stages - b.stages)


Passes = dict[tuple[str, str], list[Any]]  # (kind, direction) -> configurations


def _compile(searches: Sequence[Search], workers: int, start: float, budget: float) -> list[Passes]:
    """Per search, the candidates of each pass that were compiled and ran within 0.6 of the budget."""
    jobs = [processes.Job(_run_once, (search, None), 60) for search in searches]
    end = start + 0.3 * budget
    endings = processes.run(jobs, workers=workers, deadline=end, end=end, preload=_PRELOAD)
    ranked: list[tuple[int, int, str, str, Any]] = []
    for number, ending in enumerate(endings):
        for kind, direction, heuristic in ending.messages[-1] if ending.messages else ():
            candidates = _candidates(kind, direction, heuristic)
            ranked += [(rank, number, kind, direction, config) for rank, config in enumerate(candidates)]
    ranked.sort(key=lambda entry: entry[:2])
    jobs = [processes.Job(_run_once, (searches[number], entry), 30) for _, number, *entry in ranked]
    end = start + 0.6 * budget
    compiled: list[Passes] = [{} for _ in searches]
    for entry, ending in zip(
        ranked, processes.run(jobs, workers=workers, deadline=end, end=end, preload=_PRELOAD), strict=True
    ):
        if ending.failure is None:
            _, number, kind, direction, config = entry
            compiled[number].setdefault((kind, direction), []).append(config)
    return compiled


def _run_once(report: Callable[[Any], None], search: Search, candidate: Sequence[Any] | None) -> None:
    """A forward and a backward, with a candidate for one pass; reports the passes and what each of them ran."""
    from zoo.ops.tuning import forced, observed

    leaves = [x.requires_grad_() for x in search.tensors()]
    with observed() as seen, contextlib.nullcontext() if candidate is None else forced(*candidate):
        out = search.call(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        torch.cuda.synchronize()
    found = {(key.kind, key.direction): config for key, config in seen.items()}
    report([(kind, direction, config) for (kind, direction), config in found.items()])


def environment(device: torch.device) -> dict[str, str | None]:
    """What a table was measured with."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"gpu": name, "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}


def tune(
    call: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    repeats: int,
    allowed: Passes | None = None,
    end: float = math.inf,
) -> dict[Any, Any]:
    """The best configuration of every launch that the forward and the backward of a call make.

    One pass at a time is varied while the others run what they would without tuning. A candidate counts only where
    outputs and gradients agree with those of the heuristic.

    Args:
        allowed: the candidates per pass; all by default.
        end: time.monotonic() after which no candidate is begun; until then all passes have their turns.

    Returns:
        tuning.Key -> (configuration, microseconds of forward and backward without it, and with it); keys whose
        heuristic is the best are left out.
    """
    from zoo.ops.tuning import forced, observed

    device = tensors[0].device
    leaves = [x.detach().requires_grad_() for x in tensors]
    grad = torch.ones_like(call(*leaves))

    def step() -> list[Tensor]:
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    with observed() as seen:
        expected = step()
    # one configuration serves all launches of a pass; where a call makes several, the key of each gets it
    heuristics = {(key.kind, key.direction): config for key, config in reversed(seen.items())}
    if allowed is None:
        allowed = {each: _candidates(*each, config) for each, config in heuristics.items()}
    before = statistics.median(step_times(step, device, repeats))
    fastest: dict[tuple[str, str], tuple[float, Any]] = {}
    turns = itertools.zip_longest(*([(each, c) for c in allowed.get(each, ())] for each in heuristics))
    for each, config in (turn for turns_of_a_rank in turns for turn in turns_of_a_rank if turn is not None):
        if time.monotonic() > end:
            break
        best = fastest.get(each, (before, None))[0]
        with forced(each[0], each[1], config):
            try:
                if not _agree(step(), expected) or statistics.median(step_times(step, device, 1)) > 2 * best:
                    continue
                taken = statistics.median(step_times(step, device, repeats))
            except Exception as error:  # too large for this GPU, or more than its compiler can do
                print(f"{' '.join(each)}, {config}: {type(error).__name__}", file=sys.stderr)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
        if taken < 0.98 * best:
            fastest[each] = (taken, config)
    return {
        key: (fastest[each][1], before, fastest[each][0])
        for key in seen
        if (each := (key.kind, key.direction)) in fastest
    }


def _agree(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(
        bool((a - e).abs().max() <= _TOLERANCE[e.dtype] * e.abs().max().clamp(min=1e-6))
        for a, e in zip(actual, expected, strict=True)
    )
