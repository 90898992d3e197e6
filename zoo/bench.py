"""`zoo bench`: time the ops and the models, and fill the table of tile configurations of this machine's GPU."""

import argparse
import contextlib
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import ops
from zoo.errors import UserError

__all__ = ["main"]

_SCRIPTS = {"ops": "ops.py", "models": "models.py", "gpu": "gpu.py"}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PRELOAD = ("zoo.bench", "zoo.ops", "zoo.ops.tuning")
_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-3}


def main(argv: Sequence[str]) -> int:
    """Run `zoo bench ops|models|gpu|tune ...` and return its exit code.

    Raises:
        UserError: there is no such benchmark, no checkout to take it from, or no GPU to tune for.
    """
    parser = argparse.ArgumentParser(
        prog="zoo bench", description=__doc__, epilog="`zoo bench WHAT --help` says more.", add_help=False
    )
    parser.add_argument("what", nargs="?", metavar="WHAT", help=", ".join((*_SCRIPTS, "tune")))
    args = list(argv)
    if not args or args[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if args else 2
    if args[0] == "tune":
        return _tune(args[1:])
    if args[0] not in _SCRIPTS:
        raise UserError(f"no benchmark {args[0]!r}; there are {', '.join((*_SCRIPTS, 'tune'))}")
    script = Path(__file__).resolve().parent.parent / "benchmarks" / _SCRIPTS[args[0]]
    if not script.is_file():
        raise UserError(f"`zoo bench {args[0]}` needs a checkout of the repository: {script} is not there")
    return subprocess.run([sys.executable, str(script), *args[1:]], check=False).returncode


@dataclass(frozen=True)
class Problem:
    """An op at the size of a backbone stage: shapes of its tensors, then how it is called on them."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Any]


def _maps(batch: int, side: int, heads: int, dim: int) -> tuple[tuple[int, ...], ...]:
    return ((batch, side, side, heads, dim),) * 3


def _problems(batch: int) -> list[Problem]:
    """What the backbones of this package run at 224 pixels (and 384 where a family is published at it)."""

    def neighborhood(side: int, heads: int, kernel: int, share: int = 1) -> Problem:
        shapes = (*_maps(max(1, batch // share), side, heads, 32), (heads, 2 * kernel - 1, 2 * kernel - 1))

        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return ops.neighborhood_attention(q, k, v, kernel, bias=bias, backend="triton")

        return Problem(f"neighborhood {side}x{side} k{kernel}", shapes, call)

    def window(side: int, heads: int, grid: bool) -> Problem:
        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return ops.window_attention(q, k, v, 7, grid=grid, bias=bias, backend="triton")

        return Problem(
            f"{'grid' if grid else 'window'} {side}x{side}", (*_maps(batch, side, heads, 32), (heads, 13, 13)), call
        )

    def halo(side: int, heads: int, dim: int) -> Problem:
        def call(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            return ops.halo_attention(q, k, v, 8, 3, rel_height=rows, rel_width=columns, backend="triton")

        return Problem(f"halo {side}x{side} d{dim}", (*_maps(batch, side, heads, dim), (27, dim), (27, dim)), call)

    def routing(side: int, heads: int, topk: int) -> Problem:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.routing_attention(q, k, v, 7, topk, backend="triton")[0]

        return Problem(f"routing {side}x{side}", _maps(batch, side, heads, 32), call)

    def channel(tokens: int, heads: int) -> Problem:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.channel_attention(q, k, v, backend="triton")

        return Problem(f"channel {tokens}", ((batch, tokens, heads, 32),) * 3, call)

    def super_token(side: int, channels: int, cell: int) -> Problem:
        def call(x: Tensor) -> Tensor:
            tokens, affinity = ops.super_token_sampling(x, cell, backend="triton")
            return ops.super_token_mapping(tokens, affinity, cell, backend="triton")

        return Problem(f"super_token {side}x{side} cell {cell}", ((batch, side, side, channels),), call)

    def large_kernel(side: int, c: int) -> Problem:
        def call(*tensors: Tensor) -> Tensor:
            return ops.large_kernel_attention(*tensors, backend="triton")

        shapes = ((batch, c, side, side), (c, 1, 5, 5), (c,), (c, 1, 7, 7), (c,), (c, c, 1, 1), (c,))
        return Problem(f"large_kernel {side}x{side}", shapes, call)

    return [
        *(neighborhood(side, heads, 7) for side, heads in ((56, 2), (28, 4), (14, 8), (7, 16))),
        neighborhood(96, 6, 11, share=4),
        *(window(side, heads, grid) for grid in (False, True) for side, heads in ((56, 2), (28, 4), (14, 8))),
        halo(32, 8, 16),
        halo(56, 4, 32),
        *(routing(side, heads, topk) for side, heads, topk in ((56, 2, 1), (28, 4, 4), (14, 8, 16))),
        *(channel(tokens, heads) for tokens, heads in ((3136, 3), (784, 6), (196, 12))),
        *(super_token(side, channels, cell) for side, channels, cell in ((56, 64, 8), (28, 128, 4))),
        *(large_kernel(side, channels) for side, channels in ((56, 64), (28, 128), (14, 320))),
    ]


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


def _tune(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="zoo bench tune",
        description="Measure tile configurations on this GPU and write its table. Candidates are compiled in processes "
        "side by side and then timed one by one; with a budget those most like the heuristic's come first.",
    )
    parser.add_argument("--kind", action="append", help="only these kinds: neighborhood, window, grid, halo, ...")
    parser.add_argument("--dtype", action="append", choices=_DTYPES, help="default: bfloat16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds for everything; default: all candidates"
    )
    parser.add_argument("--workers", type=int, help="processes that compile; default: the number of CPUs less two")
    parser.add_argument("--out", type=Path, help="default: the table that the ops read")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("`zoo bench tune` measures a GPU, and PyTorch sees none on this machine")
    from zoo.ops.tuning import Config, Key, save_table, table_path

    start = time.monotonic()
    device = torch.device("cuda")
    path: Path = options.out or table_path(torch.cuda.get_device_name(device))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written; name another file with --out")
    searches = [
        Search(number, dtype, options.batch)
        for dtype in options.dtype or ("bfloat16",)
        for number, problem in enumerate(_problems(options.batch))
        if not options.kind or problem.name.split()[0] in options.kind
    ]
    if not searches:
        raise UserError(f"no problem is of the kinds {', '.join(options.kind)}")
    if options.budget < math.inf:
        searches = _headlines_first(searches)
    workers = max(0, len(os.sched_getaffinity(0)) - 2) if options.workers is None else options.workers
    compiled = _compile(searches, workers, start, options.budget) if workers > 1 else None
    table: dict[Key, Config] = {}
    for number, search in enumerate(searches):
        left = start + options.budget - time.monotonic()
        if left <= 0 or (compiled is not None and not compiled[number]):
            print(f"{search.problem.name:<24} left out, the time was up")
            continue
        # every search gets its share of the time
        end = time.monotonic() + left / (len(searches) - number)
        allowed = None if compiled is None else compiled[number]
        found = tune_problem(search.problem.call, search.tensors(), options.repeats, allowed, end)
        for key, (config, before, after) in found.items():
            table[key] = config
            times = f"{before:8.1f} -> {after:8.1f} us"
            print(f"{search.problem.name:<24} {key.direction:<16} {key.dtype:<9} {times}  {config}")
        save_table(path, table, environment(device))  # what was measured survives an interruption
    print(f"{len(table)} entries in {path}")
    return 0


@dataclass(frozen=True)
class Search:
    """A problem of `_problems` in a dtype, as another process can be told of it."""

    number: int
    dtype: str
    batch: int

    @property
    def problem(self) -> Problem:
        return _problems(self.batch)[self.number]

    def tensors(self) -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.randn(shape, device="cuda").to(_DTYPES[self.dtype]) for shape in self.problem.shapes]


def _headlines_first(searches: Sequence[Search]) -> list[Search]:
    """The first problem of each kind, then the second of each, and so on."""
    seen: dict[str, int] = {}
    ranks = []
    for search in searches:
        kind = f"{search.dtype} {search.problem.name.split()[0]}"
        ranks.append(seen.setdefault(kind, 0))
        seen[kind] += 1
    return [search for _, search in sorted(zip(ranks, searches, strict=True), key=lambda pair: pair[0])]


Passes = dict[tuple[str, str], list[Any]]  # (kind, direction) -> configurations


def _compile(searches: Sequence[Search], workers: int, start: float, budget: float) -> list[Passes]:
    """Per search, the candidates of each pass that were compiled and ran within 0.6 of the budget."""
    from zoo import processes

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
        out = search.problem.call(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        torch.cuda.synchronize()
    found = {(key.kind, key.direction): config for key, config in seen.items()}
    report([(kind, direction, config) for (kind, direction), config in found.items()])


def environment(device: torch.device) -> dict[str, str | None]:
    """What a table was measured with."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"gpu": name, "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}


def tune_problem(
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


def step_times(
    step: Callable[[], Any], device: torch.device, repeats: int, seconds: float = math.inf, least: int = 1
) -> list[float]:
    """Microseconds of `repeats` calls, fewer but `least` where `seconds` are over.

    A GPU's are taken between events, its caches flushed, and the whole call queued before it begins, so that what the
    host needs to issue it does not count. Elsewhere they are the clock's.
    """
    times: list[float] = []
    start = time.perf_counter()
    if device.type != "cuda":
        while len(times) < repeats and (len(times) < least or time.perf_counter() - start < seconds):
            before = time.perf_counter()
            step()
            times.append(1e6 * (time.perf_counter() - before))
        return times
    cache = torch.empty(256 << 20, dtype=torch.int8, device=device)  # larger than any cache
    step()
    host = min(host_time(step) for _ in range(3))
    flush = min(_flushed(cache, 1, cache.zero_) for _ in range(3))
    count = queue_ahead(host, flush)
    while len(times) < repeats and (len(times) < least or time.perf_counter() - start < seconds):
        times.append(_flushed(cache, count, step))
    return times


def _flushed(cache: Tensor, flushes: int, step: Callable[[], Any]) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(flushes):
        cache.zero_()
    first.record()
    step()
    last.record()
    last.synchronize()
    return 1e3 * float(first.elapsed_time(last))


def queue_ahead(host: float, flush: float, most: int = 64) -> int:
    """How many flushes keep a GPU busy while the host queues a call, given the microseconds of each."""
    return min(most, 2 + int(1.5 * host / max(flush, 1.0)))


def host_time(step: Callable[[], Any]) -> float:
    """Microseconds until a call on an idle GPU returns to the host."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    return 1e6 * (time.perf_counter() - start)
