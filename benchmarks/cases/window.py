"""Window and grid attention against partition, attention and reversal: SDPA, the scores written out, timm."""

import functools
from collections.abc import Sequence

from torch import Tensor

from benchmarks import textbook
from benchmarks.cases import Compiler, Floor, Goals, Peer, Peers
from zoo.ops.examples import Example

__all__ = ["FLOORS", "GOALS", "gpu_peers", "peers"]

# Partition is about a quarter of the work, so parity is the goal.
_PARITY = Goals({"sdpa": 1.0, "scores": 1.0}, {"sdpa": 1.0, "scores": 1.0})
_STAGE = (Floor(48.5, 6.4, 10.6), Floor(97, 16, 11))

GOALS = {"2x56x56 h2 w7": _PARITY, "2x56x56 h2 g7": _PARITY, "8x14x14 h8 w7": _PARITY}
FLOORS = {"window 7, 56x56": _STAGE, "grid 7, 56x56": _STAGE}


def peers(example: Example, tensors: Sequence[Tensor]) -> Peers:
    window = example.arguments[0]
    positions = textbook.window_positions(window).to(tensors[0].device)
    form = functools.partial(
        textbook.window_partitioned, window=window, grid=example.options["grid"], positions=positions
    )
    return {"sdpa": Peer(functools.partial(form, fused=True)), "scores": Peer(functools.partial(form, fused=False))}


def gpu_peers(example: Example, tensors: Sequence[Tensor], compiled: Compiler) -> Peers:
    window = example.arguments[0]
    options = {
        "window": window,
        "grid": example.options["grid"],
        "positions": textbook.window_positions(window).to(tensors[0].device),
    }
    sdpa = functools.partial(textbook.window_partitioned, fused=True, **options)
    timm = functools.partial(textbook.window_timm, **options)
    return {"sdpa": Peer(sdpa), "timm": Peer(timm), "sdpa compiled": compiled(sdpa)}
