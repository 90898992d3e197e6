"""Neighborhood attention against gather, unfold, dense masked SDPA, compiled FlexAttention, and NATTEN on a GPU."""

import contextlib
import functools
from collections.abc import Sequence

from torch import Tensor

from benchmarks import textbook
from benchmarks.cases import Compiler, Floor, Goals, Peer, Peers
from zoo.ops.examples import Example

__all__ = ["FLOORS", "GOALS", "gpu_peers", "peers"]

_DENSE_MASK_BYTES = 1 << 30
_FORWARD, _TRAINING = {"gather": 15.0, "unfold": 30.0, "flex": 10.0}, {"gather": 10.0}

GOALS = {
    "2x56x56 h2 k7": Goals(_FORWARD | {"dense": 8.0}, _TRAINING),
    "4x28x28 h4 k7": Goals(_FORWARD | {"dense": 1.5}, _TRAINING),
    "8x14x14 h8 k7": Goals(_FORWARD, _TRAINING),
}
FLOORS = {
    "NAT stage 1": (Floor(48.5, 6.4, 10.6), Floor(97, 16, 11)),
    "NAT stage 2": (Floor(24, 3.2, 5.3), Floor(48.5, 8, 5)),
    "NAT stage 3": (Floor(12, 1.6, 2.7), Floor(24, 4, 3)),
    "NAT stage 4": (Floor(6, 0.8, 1.3), Floor(12, 2, 1)),
    "DiNAT-L 96x96 k11": (Floor(107, 35, 58), Floor(214, 87, 58)),
    "detection 200x304": (Floor(14.7, 1.9, 3.2), Floor(29, 4.8, 3.2)),
}


def _windows(example: Example, q: Tensor) -> textbook.Windows:
    return textbook.neighborhood_windows(q.shape[1:3], example.arguments[0], example.options["dilation"], q.device)


def peers(example: Example, tensors: Sequence[Tensor]) -> Peers:
    """The dense mask is left out where it would not fit."""
    q, kernel, dilation = tensors[0], example.arguments[0], example.options["dilation"]
    _, height, width, heads, _ = q.shape
    windows = _windows(example, q)
    found: Peers = {
        "gather": Peer(functools.partial(textbook.neighborhood_gather, windows=windows)),
        "gather_matmul": Peer(functools.partial(textbook.neighborhood_gather_matmul, windows=windows)),
        "unfold": Peer(
            functools.partial(textbook.neighborhood_unfold, kernel_size=kernel, dilation=dilation, windows=windows)
        ),
    }
    if heads * (height * width) ** 2 * q.dtype.itemsize <= _DENSE_MASK_BYTES:
        found["dense"] = Peer(textbook.DenseNeighborhood(windows))
    # FlexAttention has no backward on a CPU
    flex = textbook.FlexNeighborhood((height, width), kernel, dilation, q.device)
    return found | {"flex": Peer(flex, trains=q.device.type == "cuda")}


def gpu_peers(example: Example, tensors: Sequence[Tensor], compiled: Compiler) -> Peers:
    q, kernel = tensors[0], example.arguments[0]
    batch, height, width, heads, _ = q.shape
    found: Peers = {"gather": "too large: k and v are copied once per key of a window"}
    if batch * height * width * heads <= 1 << 20:
        found["gather"] = Peer(functools.partial(textbook.neighborhood_gather, windows=_windows(example, q)))
    with contextlib.suppress(ImportError):
        import natten

        found["natten, no bias"] = Peer(lambda q, k, v: natten.na2d(q, k, v, kernel_size=kernel), exact=False, inputs=3)
    if (height * width) ** 2 > 1 << 28:
        return found | {"flex compiled": "too large: its block mask is made from one flag per pair of tokens"}
    on_gpu = q.device.type == "cuda"  # a dry run has no compiler

    @functools.cache
    def flex() -> textbook.FlexNeighborhood:
        return textbook.FlexNeighborhood(
            (height, width), kernel, example.options["dilation"], q.device, compiled=on_gpu
        )

    return found | {"flex compiled": Peer(lambda *x: flex()(*x), trains=on_gpu, compiled=True)}
