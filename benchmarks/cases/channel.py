"""Channel attention against the form of the published module (timm's), and against SDPA over transposed channels."""

import functools
from collections.abc import Sequence

from torch import Tensor

from benchmarks import textbook
from benchmarks.cases import Compiler, Floor, Goals, Peer, Peers
from zoo.ops.examples import Example

__all__ = ["FLOORS", "GOALS", "gpu_peers", "peers"]

_PARITY = Goals({"module": 1.0}, {"module": 1.0})

GOALS = {"4x3136 h3": _PARITY, "8x784 h6": _PARITY, "8x196 h12": _PARITY}
FLOORS = {"DaViT stage 1": (Floor(72), Floor(125))}


def peers(example: Example, tensors: Sequence[Tensor]) -> Peers:
    scale = example.options["scale"]
    return {
        "module": Peer(functools.partial(textbook.channel_module, scale=scale)),
        "sdpa": Peer(functools.partial(textbook.channel_sdpa, scale=scale)),
    }


def gpu_peers(example: Example, tensors: Sequence[Tensor], compiled: Compiler) -> Peers:
    found = peers(example, tensors)
    module = functools.partial(textbook.channel_module, scale=example.options["scale"])
    return {"timm": found["module"], "sdpa": found["sdpa"], "timm compiled": compiled(module)}
