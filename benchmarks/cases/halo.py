"""Halo attention against timm's form: unfolded keys and values, a full score tensor, relative logits."""

import functools
from collections.abc import Sequence

from torch import Tensor

from benchmarks import textbook
from benchmarks.cases import Floor, Peer, Peers
from zoo.ops.examples import Example

__all__ = ["FLOORS", "peers"]

FLOORS = {
    "b8 h3, 32x32 d16": (Floor(32, 17, 55), Floor(64, 42, 55)),
    "b8 h3, 56x56 d32": (Floor(97, 51, 85), Floor(194, 128, 85)),
}


def peers(example: Example, tensors: Sequence[Tensor]) -> Peers:
    block, reach = example.arguments
    return {"timm": Peer(functools.partial(textbook.halo_timm, block=block, reach=reach))}
