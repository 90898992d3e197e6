"""`zoo bench`: time the ops and the models, and fill the table of tile configurations of this machine's GPU."""

import argparse
import itertools
import statistics
import subprocess
import sys
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


def _candidates(kind: str, direction: str) -> list[Any]:
    from zoo.ops._local.tuning import Config

    tiles: tuple[int, ...] = (32, 64, 128)
    columns: tuple[int, ...] = (16,) if kind == "channel" else (32, 64, 128)
    if kind in ("neighborhood", "window", "grid", "halo"):
        tiles = (4, 8, 16)
        columns = (32, 64, 128, 256) if direction == "forward" else columns
    return [Config(*c) for c in itertools.product(tiles, columns, (2, 4, 8), (1, 2, 3))]


def _tune(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="zoo bench tune", description="Measure tile configurations on this GPU and write its table."
    )
    parser.add_argument("--kind", action="append", help="only these kinds: neighborhood, window, grid, halo, ...")
    parser.add_argument("--dtype", action="append", choices=_DTYPES, help="default: bfloat16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="default: the table that the ops read")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("`zoo bench tune` measures a GPU, and PyTorch sees none on this machine")
    from zoo.ops._local.tuning import Config, Key, save_table, table_path

    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    path = options.out or table_path(name)
    problems = [p for p in _problems(options.batch) if not options.kind or p.name.split()[0] in options.kind]
    if not problems:
        raise UserError(f"no problem is of the kinds {', '.join(options.kind)}")
    table: dict[Key, Config] = {}
    for dtype in (_DTYPES[d] for d in options.dtype or ("bfloat16",)):
        for problem in problems:
            torch.manual_seed(0)
            tensors = [torch.randn(shape, device=device).to(dtype) for shape in problem.shapes]
            for key, (config, before, after) in tune_problem(problem.call, tensors, options.repeats).items():
                table[key] = config
                print(
                    f"{problem.name:<24} {key.direction:<16} {key.dtype:<9} {before:8.1f} -> {after:8.1f} us  {config}"
                )
            save_table(path, table, environment(device))  # what was measured survives an interruption
    print(f"{len(table)} entries in {path}")
    return 0


def environment(device: torch.device) -> dict[str, str | None]:
    """What a table was measured with."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"gpu": name, "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}


def tune_problem(call: Callable[..., Tensor], tensors: Sequence[Tensor], repeats: int) -> dict[Any, Any]:
    """The best configuration of every launch that the forward and the backward of a call make.

    One pass at a time is varied while the others run what they would without tuning. A candidate counts only where
    outputs and gradients agree with those of the heuristic.

    Returns:
        tuning.Key -> (configuration, microseconds of forward and backward without it, and with it); keys whose
        heuristic is the best are left out.
    """
    from triton.runtime.errors import OutOfResources

    from zoo.ops._local.tuning import forced, observed

    leaves = [x.detach().requires_grad_() for x in tensors]
    grad = torch.ones_like(call(*leaves))

    def step() -> list[Tensor]:
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    with observed() as seen:
        expected = step()
    # one configuration serves all launches of a pass; where a call makes several, the key of each gets it
    best: dict[Any, Any] = {}
    for kind, direction in dict.fromkeys((k.kind, k.direction) for k in seen):
        before = _microseconds(step, tensors[0].device, repeats)
        found, fastest = None, before
        for config in _candidates(kind, direction):
            with forced(kind, direction, config):
                try:
                    if not _agree(step(), expected):
                        continue
                    time = _microseconds(step, tensors[0].device, repeats)
                except OutOfResources:
                    continue
            if time < 0.98 * fastest:
                found, fastest = config, time
        if found is not None:
            best |= {k: (found, before, fastest) for k in seen if (k.kind, k.direction) == (kind, direction)}
    return best


def _agree(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(
        bool((a - e).abs().max() <= _TOLERANCE[e.dtype] * e.abs().max().clamp(min=1e-6))
        for a, e in zip(actual, expected, strict=True)
    )


def _microseconds(step: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of a step on a GPU, by events; elsewhere, for tests, by the clock."""
    if device.type != "cuda":
        from time import perf_counter

        times = []
        for _ in range(repeats):
            start = perf_counter()
            step()
            times.append(1e6 * (perf_counter() - start))
        return statistics.median(times)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    step()
    for first, last in events:
        first.record()
        step()
        last.record()
    torch.cuda.synchronize(device)
    return statistics.median(1e3 * first.elapsed_time(last) for first, last in events)
