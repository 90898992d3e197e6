"""Super-token sampling and mapping against unfold and fold."""

from collections.abc import Sequence

from torch import Tensor

from benchmarks import textbook
from benchmarks.cases import Floor, Peer, Peers
from zoo.ops.examples import Example

__all__ = ["FLOORS", "peers"]

FLOORS = {"STViT stage 1, C64": (Floor(57), None)}


def peers(example: Example, tensors: Sequence[Tensor]) -> Peers:
    cell = example.arguments[-1]

    def unfold(x: Tensor) -> Tensor:
        return textbook.mapping_unfold(*textbook.sampling_unfold(x, cell), cell)

    return {"unfold/fold": Peer(unfold)}
