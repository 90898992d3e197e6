"""Between maps [B, H, W, heads, dim] and regions [B, rows * cols, tokens, heads, dim]."""

from torch import Tensor
from torch.nn import functional as F

from zoo.ops._checks import cover

Pair = tuple[int, int]


def grid_size(x: Tensor, region: Pair) -> Pair:
    """How many regions of this size cover the map, per axis."""
    return cover(x.shape[1], region[0]), cover(x.shape[2], region[1])


def key_region_size(q: Tensor, k: Tensor, region: Pair) -> Pair:
    """The size of a key region: that of a query region, unless the key map has another resolution."""
    if q.shape[1:3] == k.shape[1:3]:
        return region
    rows, cols = grid_size(q, region)
    return k.shape[1] // rows, k.shape[2] // cols


def pad_to_regions(x: Tensor, region: Pair) -> Tensor:
    """Zeros at the bottom and right, up to a multiple of the region size."""
    bottom, right = -x.shape[1] % region[0], -x.shape[2] % region[1]
    return F.pad(x, (0, 0, 0, 0, 0, right, 0, bottom)) if bottom or right else x


def to_regions(x: Tensor, region: Pair) -> Tensor:
    """[B, H, W, heads, dim] -> [B, rows * cols, height * width, heads, dim], zero-padded where needed."""
    batch, heads, dim = x.shape[0], x.shape[3], x.shape[4]
    rows, cols = grid_size(x, region)
    x = pad_to_regions(x, region).reshape(batch, rows, region[0], cols, region[1], heads, dim)
    return x.transpose(2, 3).reshape(batch, rows * cols, region[0] * region[1], heads, dim)


def from_regions(x: Tensor, region: Pair, size: Pair) -> Tensor:
    """[B, rows * cols, height * width, heads, dim] -> [B, *size, heads, dim], contiguous, padding cut off."""
    batch, heads, dim = x.shape[0], x.shape[3], x.shape[4]
    rows, cols = -(-size[0] // region[0]), -(-size[1] // region[1])
    x = x.reshape(batch, rows, cols, region[0], region[1], heads, dim).transpose(2, 3)
    x = x.reshape(batch, rows * region[0], cols * region[1], heads, dim)
    return x[:, : size[0], : size[1]].contiguous()
