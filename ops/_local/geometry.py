"""Which queries see which keys: the geometry that the neighborhood, window, grid and halo ops share.

An axis of the map is split into lanes (one, or one per dilation phase). Inside a lane query p sees the keys of the
interval [lo[p], hi[p]), in lane positions, which may reach beyond the lane. A query tile is a run of lane positions;
its box is the smallest interval that holds everything its queries see. Tiles whose masks and offsets are equal form a
class, so one bias and mask table serves all of them.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Axis",
    "AxisPlan",
    "Lane",
    "Plan",
    "full_axis",
    "halo_axis",
    "neighborhood_axis",
    "partitions",
    "plan",
    "window_axis",
]


@dataclass(frozen=True)
class Lane:
    """Positions offset, offset + step, ... of an axis, and the interval of lane positions that each query sees.

    keys: how many key positions the lane has; other than the number of queries where queries are strided.
    query_cuts, key_cuts: where tiles end if they can, in ascending order.
    one: a tile never holds what several cuts keep apart; without, it holds as much as fits.
    """

    offset: int
    lo: tuple[int, ...]
    hi: tuple[int, ...]
    keys: int
    query_cuts: tuple[int, ...] = ()
    key_cuts: tuple[int, ...] = ()
    one: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis of the map: its length, the step between neighbours in a lane, and the lanes."""

    length: int
    step: int
    lanes: tuple[Lane, ...]


def full_axis(length: int) -> Axis:
    """Every position sees every position."""
    return Axis(length, 1, (Lane(0, (0,) * length, (length,) * length, length),))


@functools.lru_cache(maxsize=1024)
def neighborhood_axis(length: int, kernel: int, dilation: int, stride: int, causal: bool) -> Axis:
    """Neighborhood attention: exactly `kernel` keys, shifted inwards at the border, or the causal rule."""
    lanes = []
    for phase in range(dilation):
        count = -(-(length - phase) // dilation)
        lo, hi = [], []
        for p in range(count):
            group = p // stride * stride
            if causal:
                leader = min(group + stride - 1, count - 1)
                lo.append(max(leader - kernel + 1, 0))
                hi.append(p + 1)
            else:
                leader = min(group + stride // 2, count - 1)
                lo.append(min(max(leader - kernel // 2, 0), count - kernel))
                hi.append(lo[-1] + kernel)
        lanes.append(Lane(phase, tuple(lo), tuple(hi), count))
    return Axis(length, dilation, tuple(lanes))


@functools.lru_cache(maxsize=1024)
def window_axis(length: int, window: int, shift: int, grid: bool) -> Axis:
    """Windows or the grid of a map that is padded to a multiple of the window and rolled by -shift.

    The mask keeps apart what the roll brought together, so the part of a window (or of a grid lane) from the map's
    beginning and the part from its end are two.
    """
    windows = -(-length // window)
    step = windows if grid else 1
    parts: dict[tuple[int, bool], list[int]] = {}
    for position in range(length):
        rolled = (position - shift) % (windows * window)
        parts.setdefault((rolled % windows if grid else rolled // window, position < shift), []).append(position)
    runs = sorted(parts.values())
    if grid:
        return Axis(length, step, tuple(Lane(r[0], (0,) * len(r), (len(r),) * len(r), len(r)) for r in runs))
    lo = tuple(r[0] for r in runs for _ in r)
    hi = tuple(r[-1] + 1 for r in runs for _ in r)
    cuts = tuple(r[0] for r in runs)
    return Axis(length, 1, (Lane(0, lo, hi, length, cuts, cuts),))


@functools.lru_cache(maxsize=1024)
def halo_axis(length: int, block: int, halo: int, stride: int) -> Axis:
    """Blocks that see themselves and `halo` positions on both sides, on the map or not.

    length and block count key positions; there is one query for every `stride` of them.
    """
    starts = [p * stride // block * block for p in range(-(-length // stride))]
    lo = tuple(s - halo for s in starts)
    hi = tuple(s + block + halo for s in starts)
    blocks = range(0, length, block)
    # keys from the middle of a block to the middle of the next are seen from these two, whole blocks from three
    keys = range(block // 2, length, block) if 2 * halo <= block else blocks
    return Axis(length, 1, (Lane(0, lo, hi, length, tuple(b // stride for b in blocks), tuple(keys), one=True),))


@dataclass(frozen=True)
class AxisPlan:
    """Tiles of one axis against their boxes.

    tiles: per tile (first row position, rows, first column position, columns, class), positions on the axis.
    classes: per class, per row of the tile, the visible columns [lo, hi) in box coordinates, and the lane distance
    between the box's first column and the tile's first row. Rows are queries and columns keys, or the reverse.
    """

    tile: int
    box: int
    tiles: tuple[tuple[int, int, int, int, int], ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    relative: tuple[int, ...]


def _plan_axis(axis: Axis, tile: int, reverse: bool) -> AxisPlan:
    classes: dict[tuple[int, tuple[tuple[int, int], ...], int], int] = {}
    tiles = []
    box = 1
    for lane in axis.lanes:
        queries = len(lane.lo)
        count = lane.keys if reverse else queries
        for a, b in _runs(count, tile, lane.key_cuts if reverse else lane.query_cuts, lane.one):
            if reverse:
                seen = [p for p in range(queries) if lane.lo[p] < b and lane.hi[p] > a]
                c0, c1 = (seen[0], seen[-1] + 1) if seen else (a, a)
                spans = tuple((_first(lane, k, c0, c1) - c0, _last(lane, k, c0, c1) - c0) for k in range(a, b))
            else:
                c0, c1 = min(lane.lo[a:b]), max(lane.hi[a:b])
                spans = tuple((lane.lo[p] - c0, lane.hi[p] - c0) for p in range(a, b))
            key = (c1 - c0, spans, c0 - a)
            index = classes.setdefault(key, len(classes))
            tiles.append((lane.offset + a * axis.step, b - a, lane.offset + c0 * axis.step, c1 - c0, index))
            box = max(box, c1 - c0)
    return AxisPlan(tile, box, tuple(tiles), tuple(k[1] for k in classes), tuple(k[2] for k in classes))


def _runs(count: int, tile: int, cuts: tuple[int, ...], one: bool) -> list[tuple[int, int]]:
    """[0, count) in runs of at most `tile` that end at cuts: at the next one, or at the last one that fits."""
    edges = sorted({0, count, *cuts})
    runs = []
    a = 0
    while a < count:
        following = [e for e in edges if e > a]
        fitting = [e for e in following if e <= a + tile]
        end = following[0] if one or not fitting else fitting[-1]
        b = min(a + tile, end)
        runs.append((a, b))
        a = b
    return runs


@functools.lru_cache(maxsize=1024)
def partitions(axis: Axis, tile: int) -> bool:
    """Whether the boxes of an axis's tiles are apart and cover all keys: a key's queries are then all in one tile."""
    for lane in axis.lanes:
        end = 0
        for a, b in _runs(len(lane.lo), tile, lane.query_cuts, lane.one):
            if min(lane.lo[a:b]) != end:
                return False
            end = max(lane.hi[a:b])
        if end != lane.keys:
            return False
    return True


def _first(lane: Lane, key: int, c0: int, c1: int) -> int:
    """The first query of [c0, c1) that sees the key; both ends of an interval never fall, so the seers are a run."""
    return next((p for p in range(c0, c1) if lane.lo[p] <= key < lane.hi[p]), c0)


def _last(lane: Lane, key: int, c0: int, c1: int) -> int:
    return next((p + 1 for p in range(c1 - 1, c0 - 1, -1) if lane.lo[p] <= key < lane.hi[p]), c0)


@dataclass(frozen=True)
class Plan:
    """A map's tiles against their boxes, with the index tensors that kernels read.

    tiles_h, tiles_w: [tiles, 5] int32, see AxisPlan.tiles.
    index: [classes_h * classes_w, BLOCK_M, BLOCK_N] int32: the bias slot of each (row, column) pair; the slot
        after the last one (`slots`) stands for a pair that does not see each other.
    inverse: [slots, count] int64: where in a flat [classes, BLOCK_M, BLOCK_N] each slot stands; padded with the size.
    members: [classes + 1] int32 offsets into member_tiles [tiles] int32: the tiles of each class.
    counts: how many tiles each class has.
    """

    axes: tuple[AxisPlan, AxisPlan]
    block_m: int
    block_n: int
    slots: int
    tiles_h: Tensor
    tiles_w: Tensor
    index: Tensor
    inverse: Tensor
    members: Tensor
    member_tiles: Tensor
    counts: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def plan(
    height: Axis,
    width: Axis,
    tile: tuple[int, int],
    bias_size: tuple[int, int] | None,
    reverse: bool,
    chunk: int,
    device: torch.device,
) -> Plan:
    """Lay tiles of `tile` positions over the map; the column count is rounded up to a multiple of `chunk`.

    bias_size: sides (2 kh - 1, 2 kw - 1) of the bias table, indexed key - query + k - 1; None where there is no bias.
    """
    axes = (_plan_axis(height, tile[0], reverse), _plan_axis(width, tile[1], reverse))
    block_m = tile[0] * tile[1]
    block_n = -(-axes[0].box * axes[1].box // chunk) * chunk
    rows = bias_size or (1, 1)
    slots = rows[0] * rows[1]

    seen_h, seen_w = _visible(axes[0]), _visible(axes[1])  # (class, tile, box)
    seen = (
        (seen_h[:, None, :, None, :, None] & seen_w[None, :, None, :, None, :]).flatten(4).flatten(2, 3).flatten(0, 1)
    )
    if bias_size is None:
        slot = torch.zeros(seen.shape, dtype=torch.int64)
    else:
        dh, dw = _distance(axes[0], rows[0], reverse), _distance(axes[1], rows[1], reverse)
        slot = dh[:, None, :, None, :, None] * rows[1] + dw[None, :, None, :, None, :]
        slot = slot.flatten(4).flatten(2, 3).flatten(0, 1)
    index = torch.full((seen.shape[0], block_m, block_n), slots, dtype=torch.int64)
    index[..., : seen.shape[-1]] = torch.where(seen, slot, slots)

    classes_w = len(axes[1].spans)
    member = [th[4] * classes_w + tw[4] for th in axes[0].tiles for tw in axes[1].tiles]
    counts = [0] * (index.shape[0] + 1)
    for c in member:
        counts[c + 1] += 1
    order = sorted(range(len(member)), key=lambda t: (member[t], t))

    def put(x: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(x, dtype=dtype).to(device)

    return Plan(
        axes,
        block_m,
        block_n,
        slots,
        put(list(axes[0].tiles)),
        put(list(axes[1].tiles)),
        put(index),
        _inverse(_only_rows(index, axes, slots), slots).to(device),
        put(torch.tensor(counts).cumsum(0)),
        put(order),
        tuple(counts[1:]),
    )


def _visible(axis: AxisPlan) -> Tensor:
    """[classes, tile, box]; rows beyond the tile see their whole box, so that a softmax over them stays finite."""
    seen = torch.zeros(len(axis.spans), axis.tile, axis.box, dtype=torch.bool)
    for c, spans in enumerate(axis.spans):
        seen[c, len(spans) :] = True
        for row, (lo, hi) in enumerate(spans):
            seen[c, row, lo:hi] = True
    return seen


def _distance(axis: AxisPlan, rows: int, reverse: bool) -> Tensor:
    """[classes, tile, box]: the bias index of each pair, key - query + k - 1, clamped where the pair is masked."""
    base = torch.arange(axis.box)[None, None, :] - torch.arange(axis.tile)[None, :, None]
    distance = base + torch.tensor(axis.relative)[:, None, None]  # column - row, in lane steps
    return ((-distance if reverse else distance) + rows // 2).clamp(0, rows - 1)


def _only_rows(index: Tensor, axes: tuple[AxisPlan, AxisPlan], slots: int) -> Tensor:
    """The index with the rows beyond each tile taken out, for the gradient of the bias."""
    valid_h = torch.tensor([[r < len(s) for r in range(axes[0].tile)] for s in axes[0].spans])
    valid_w = torch.tensor([[r < len(s) for r in range(axes[1].tile)] for s in axes[1].spans])
    valid = (valid_h[:, None, :, None] & valid_w[None, :, None, :]).flatten(2).flatten(0, 1)
    return torch.where(valid[..., None], index, slots)


def _inverse(index: Tensor, slots: int) -> Tensor:
    flat = index.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=slots + 1)[:slots]
    width = int(counts.max()) if slots else 0
    inverse = torch.full((slots, max(width, 1)), flat.numel(), dtype=torch.int64)
    start = 0
    for slot, count in enumerate(counts.tolist()):
        inverse[slot, :count] = order[start : start + count]
        start += count
    return inverse
