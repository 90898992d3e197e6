"""Routing attention against gathered regions. They are picked once, for all: routing is no part of what is timed."""

import functools
from collections.abc import Sequence

from torch import Tensor

from benchmarks import textbook
from benchmarks.cases import Floor, Goals, Peer, Peers
from zoo.ops.examples import Example

__all__ = ["FLOORS", "GOALS", "peers"]

GOALS = {"4x28x28 h4 r7 t4": Goals({"gather": 1.5})}
FLOORS = {
    "BiFormer stage 1": (Floor(48.5, exponentials=14), Floor(97)),
    "BiFormer stage 2": (Floor(24, exponentials=7), Floor(48.5)),
    "BiFormer stage 3": (Floor(12, exponentials=14), Floor(24)),
}


def peers(example: Example, tensors: Sequence[Tensor]) -> Peers:
    assert example.pick is not None
    regions, topk = example.arguments
    options = {"regions": regions, "topk": topk, "scale": example.options["scale"], **example.pick(tensors)}
    return {"gather": Peer(functools.partial(textbook.routing_gather, **options))}
