"""Tables that a model keeps for the maps of one image size, and what brings them to the maps of another."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.maps import is_symbolic

from ._sources import CheckpointError

__all__ = ["as_map", "check_image_size", "check_map", "halved", "is_size", "resize_map"]


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_image_size(value: int | Sequence[int]) -> tuple[int, int]:
    """Height and width from an int or a pair.

    Raises:
        ValueError: it is neither.
    """
    sizes = list(value) if isinstance(value, Sequence) else [value, value]
    if len(sizes) != 2 or not all(map(is_size, sizes)):
        raise ValueError(f"img_size must be a positive int or a pair of them, got {value!r}")
    return sizes[0], sizes[1]


def check_map(x: Tensor, least: int) -> Tensor:
    """A map (B, H, W, C) as it is, unless it is too small for what comes. For `torch.fx.wrap`, as `resize_map`.

    Raises:
        ValueError: a side is smaller than `least`; where sizes are symbols nothing is asked.
    """
    height, width = x.shape[1], x.shape[2]
    if not is_symbolic(height, width) and min(height, width) < least:
        raise ValueError(f"a map of {height} x {width} is smaller than {least} x {least}; give larger images")
    return x


def halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    """The height and width after convolutions of stride 2 that round up."""
    return -(-size[0] // 2**times), -(-size[1] // 2**times)


def resize_map(table: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """A position table (1, H, W, C), interpolated to a map of another size; one of this size comes back as it is.

    A module that calls it in a `forward` says `torch.fx.wrap("resize_map")`: the size decides what there is to do.

    Args:
        table: (1, H, W, C).
        height, width: of the map.
        mode: "bicubic" or "bilinear", with the corners of the outer pixels aligned.
    """
    if not is_symbolic(height, width) and table.shape[1] == height and table.shape[2] == width:
        return table
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    x = table.to(dtype).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=[height, width], mode=mode, align_corners=False)
    return x.permute(0, 2, 3, 1).to(table.dtype)


def as_map(table: Tensor, name: str) -> Tensor:
    """A position table of a file, (1, N, C) over the rows of a square map, as (1, H, W, C); one with H, W as it is.

    Raises:
        CheckpointError: N is no square.
    """
    if table.ndim == 4:
        return table
    tokens = table.shape[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(f"{name} has {tokens} positions, which are no square map; save it as (1, H, W, C)")
    return table.reshape(1, side, side, table.shape[2])
