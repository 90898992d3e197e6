"""Large kernel attention against PyTorch's convolutions."""

from collections.abc import Sequence

from torch import Tensor

from benchmarks import textbook
from benchmarks.cases import Floor, Goals, Peer, Peers
from zoo.ops.examples import Example

__all__ = ["FLOORS", "GOALS", "peers"]

GOALS = {"2x56x56 c64": Goals({"convolutions": 1.5})}
FLOORS = {"VAN stage 1, C64": (Floor(24, exponentials=57), None)}


def peers(example: Example, tensors: Sequence[Tensor]) -> Peers:
    return {"convolutions": Peer(textbook.large_kernel_direct)}
