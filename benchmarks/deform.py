"""LITv2's deformable merging against torchvision's operator, at the stages of LITv2-S.

    python -m benchmarks.deform --threads 1

Both compute the same; calls take turns and the median of each is reported. Writes benchmarks/results/deform_cpu.json.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor

from benchmarks import ROOT
from benchmarks.environment import command_line, environment
from zoo.models.litv2 import deform_conv

RESULTS = ROOT / "benchmarks/results/deform_cpu.json"
_STAGES = ((96, 192, 56), (192, 384, 28), (384, 768, 14))  # channels before and after, side


def _theirs(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    found: Tensor = torchvision.ops.deform_conv2d(x, offset, weight, bias, stride=2)
    return found


def _milliseconds(call: Callable[[], Any]) -> float:
    before = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - before)


def measure(stage: tuple[int, int, int], batch: int, rounds: int) -> dict[str, Any]:
    """A row: both forms at one stage, forward and with gradients."""
    channels, out, side = stage
    shapes = ((batch, channels, side, side), (batch, 8, side // 2, side // 2), (out, channels, 2, 2), (out,))
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    forms = {"ours": deform_conv, "torchvision": _theirs}
    torch.testing.assert_close(*(form(*inputs) for form in forms.values()), rtol=1e-3, atol=1e-3 * channels**0.5)
    row: dict[str, Any] = {"stage": stage, "batch": batch}
    grad = torch.randn(batch, out, side // 2, side // 2)
    for mode in ("forward", "training"):
        taken: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(rounds):
            for name, form in forms.items():
                with torch.set_grad_enabled(mode == "training"):
                    if mode == "forward":
                        taken[name].append(_milliseconds(lambda form=form: form(*inputs)))  # type: ignore[misc]
                    else:
                        taken[name].append(
                            _milliseconds(lambda form=form: torch.autograd.grad(form(*inputs), inputs, grad))  # type: ignore[misc]
                        )
        found = {name: statistics.median(values[1:]) for name, values in taken.items()}
        row[mode] = {**{k: round(v, 2) for k, v in found.items()}, "ratio": found["torchvision"] / found["ours"]}
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deform", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [measure(stage, args.batch, args.rounds) for stage in _STAGES]
    for row in rows:
        print(*row["stage"], *(f"{mode} {row[mode]['ratio']:.2f}x" for mode in ("forward", "training")))
    command = command_line("deform", sys.argv[1:] if arguments is None else arguments)
    found = {"environment": environment(torch.device("cpu"), args.threads, command), "results": rows}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
