"""Which queries see which keys: the geometry that the neighborhood, window, grid and halo ops share.

An axis of the map is split into lanes (one, or one per dilation phase). Inside a lane query p sees the keys of the
interval [lo[p], hi[p]), in lane positions, which may reach beyond the lane. A query tile is a run of lane positions;
its box is the smallest interval that holds everything its queries see. Tiles whose masks and offsets are equal form a
class, so one bias and mask table serves all of them.
"""

import functools
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.ops._triton import lasting

__all__ = [
    "Axis",
    "AxisPlan",
    "AxisTables",
    "Lane",
    "Seen",
    "axis_plan",
    "axis_tables",
    "full_axis",
    "halo_axis",
    "neighborhood_axis",
    "partitions",
    "seen_from",
    "window_axis",
]


@dataclass(frozen=True, eq=False)
class Lane:
    """Positions offset, offset + step, ... of an axis, and the interval of lane positions that each query sees.

    Neither end of the interval ever falls from one query to the next.

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


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of the map: its length, the step between neighbours in a lane, and the lanes.

    The functions that make axes remember them, so equal axes are one object, which caches find without reading it.

    rounded: the most keys that a query sees, if boxes are to have few sizes: those of dilated windows, where a box for
        every size of a lane would be a kernel for every size of map. Else 0.
    """

    length: int
    step: int
    lanes: tuple[Lane, ...]
    rounded: int = 0


@functools.cache
def full_axis(length: int) -> Axis:
    """Every position sees every position."""
    return Axis(length, 1, (Lane(0, (0,) * length, (length,) * length, length),))


@functools.cache
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
    return Axis(length, dilation, tuple(lanes), kernel if dilation > 1 else 0)


@functools.cache
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


@functools.cache
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


@functools.cache
def axis_plan(axis: Axis, tile: int, reverse: bool) -> AxisPlan:
    """Cut an axis into tiles of at most `tile` positions: queries against keys or, reversed, keys against queries."""
    classes: dict[tuple[int, tuple[tuple[int, int], ...], int], int] = {}
    tiles = []
    box = 1
    for lane in axis.lanes:
        count = lane.keys if reverse else len(lane.lo)
        for a, b in _runs(count, tile, lane.key_cuts if reverse else lane.query_cuts, lane.one):
            if reverse:
                # the queries that see a key are a run, as both ends of an interval never fall
                seers = [(bisect_right(lane.hi, k), bisect_right(lane.lo, k)) for k in range(a, b)]
                c0, c1 = bisect_right(lane.hi, a), bisect_left(lane.lo, b)
                c0, c1 = (c0, c1) if c0 < c1 else (a, a)
                spans = tuple((lo - c0, hi - c0) if lo < hi else (0, 0) for lo, hi in seers)
            else:
                c0, c1 = min(lane.lo[a:b]), max(lane.hi[a:b])
                spans = tuple((lane.lo[p] - c0, lane.hi[p] - c0) for p in range(a, b))
            key = (c1 - c0, spans, c0 - a)
            index = classes.setdefault(key, len(classes))
            tiles.append((lane.offset + a * axis.step, b - a, lane.offset + c0 * axis.step, c1 - c0, index))
            box = max(box, c1 - c0)
    if axis.rounded and (box > tile or axis.length % axis.step):  # lanes of one tile are what models are made for
        full = tile + axis.rounded - 1  # what a tile inside a long lane sees
        fewer = -(-3 * full // 4)
        box = fewer if box <= fewer else max(box, full)
    return AxisPlan(tile, box, tuple(tiles), tuple(k[1] for k in classes), tuple(k[2] for k in classes))


def _runs(count: int, tile: int, cuts: tuple[int, ...], one: bool) -> list[tuple[int, int]]:
    """[0, count) in runs of at most `tile`, which end at cuts where there are any.

    At the next cut if `one`, else at the last one that fits. Without cuts, the run that is not full stands in the
    middle: beside a border it would let its neighbour's box reach further than any other.
    """
    if not cuts:
        full, rest = divmod(count, tile)
        before = (full + 1) // 2 * tile
        return [(a, a + tile) for a in range(0, before, tile)] + [(before, before + rest)] * (rest > 0) + [
            (a, a + tile) for a in range(before + rest, count, tile)
        ]  # fmt: skip
    edges = sorted({0, count, *cuts})
    runs = []
    a = 0
    while a < count:
        fits = bisect_right(edges, a + tile) - 1
        following = bisect_right(edges, a)
        end = edges[following] if one or fits < following else edges[fits]
        b = min(a + tile, end)
        runs.append((a, b))
        a = b
    return runs


@functools.cache
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


@dataclass(frozen=True, eq=False)
class AxisTables:
    """The plan of an axis as kernels read it, int32.

    tiles: [tiles, 5], see AxisPlan.tiles.
    spans: [classes, 2 tile + 1], of every class its rows' (lo, hi), and its distance. A row beyond the tile sees the
        whole box, so that a softmax over it stays finite.
    members: [classes + 1], where in `order` [tiles] the tiles of each class begin.
    counts: how many tiles each class has.
    """

    plan: AxisPlan
    tiles: Tensor
    spans: Tensor
    members: Tensor
    order: Tensor
    counts: tuple[int, ...]


@functools.cache  # a captured CUDA graph may point to them, so none is ever freed
def axis_tables(axis: Axis, tile: int, reverse: bool, device: torch.device) -> AxisTables:
    """See AxisTables; a few hundred bytes for every tile."""
    laid = axis_plan(axis, tile, reverse)
    spans = [
        x
        for rows, distance in zip(laid.spans, laid.relative, strict=True)
        for x in (*(end for row in rows for end in row), *(0, laid.box) * (tile - len(rows)), distance)
    ]
    counts = [0] * len(laid.spans)
    for t in laid.tiles:
        counts[t[4]] += 1
    starts = [sum(counts[:c]) for c in range(len(counts) + 1)]
    order = sorted(range(len(laid.tiles)), key=lambda t: laid.tiles[t][4])
    parts = [[x for t in laid.tiles for x in t], spans, starts, order]
    aligned = [[*part, *(0,) * (-len(part) % 4)] for part in parts]  # to 16 bytes, as what kernels are told of pointers
    packed = lasting(lambda: torch.tensor([x for part in aligned for x in part], dtype=torch.int32).to(device), device)
    tiles, spans_, members, order_ = packed.split([len(part) for part in aligned])
    return AxisTables(laid, tiles, spans_, members, order_, tuple(counts))


@dataclass(frozen=True, eq=False)
class Seen:
    """Which tiles of queries see a key of an axis of one lane: of every key (first tile, tiles), int32; at most `most`.

    Boxes follow one another as their tiles do, so these are a run.
    """

    table: Tensor
    most: int


@functools.cache  # as axis_tables
def seen_from(axis: Axis, tile: int, device: torch.device) -> Seen:
    """See Seen."""
    (lane,) = axis.lanes
    boxes = [(first, first + columns) for _, _, first, columns, _ in axis_plan(axis, tile, False).tiles]
    starts, ends = [a for a, _ in boxes], [b for _, b in boxes]
    runs = [(bisect_right(ends, key), bisect_right(starts, key)) for key in range(lane.keys)]
    table = [x for a, b in runs for x in (a, b - a)]
    made = lasting(lambda: torch.tensor(table, dtype=torch.int32).to(device), device)
    return Seen(made, max(b - a for a, b in runs))
