"""Launchers of the Triton core: they lay out tiles, pick a configuration and allocate; kernels never do."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from zoo.ops import _tuning as tuning
from zoo.ops._triton import INTERPRET, Launch, Like, fits_int32, summed, unit, upcast
from zoo.ops._tuning import Config

from .geometry import Axis, AxisTables, axis_plan, axis_tables, partitions, seen_from
from .kernels import (
    bias_gradient_kernel,
    bias_kernel,
    boxes_kernel,
    columns_kernel,
    fold_kernel,
    forward_kernel,
    rows_kernel,
    square_kernel,
    table_kernel,
)

__all__ = ["Relative", "forget_plans", "local_backward", "local_forward"]

_PARTIALS = 4  # waves of programs that make partial sums of the bias gradient, each a block of them
_SQUARE = 8  # side of a tile
_MOST_UNROLLED = 8  # blocks of columns: their addresses are then computed once for all images, for some code
_MOST_SUMMED = 256  # columns of a box for which rows_kernel sums the gradient of the bias: they must fit its registers
_PROGRAMS = 2048  # what keeps a GPU busy
_PART_BYTES = 256 * 2**20  # most that gradients of keys take, tile by tile; larger batches come in parts
_TABLE_BYTES = 64 * 2**20  # most that a table of additive terms takes; beyond, kernels compute them again and again


@dataclass(frozen=True)
class Relative:
    """Embeddings of relative positions, whose products with a query are added to its logits, and its windows.

    height, width: [2 window - 1, dim] or None, one row and one column term per logit; window place i of a query that
    stands at place p of its block has row i - p + window - 1.
    block: keys per block and axis. halo: keys that a window reaches beyond its block. stride: keys per query.
    """

    height: Tensor | None
    width: Tensor | None
    block: int
    halo: int
    stride: int

    @property
    def extent(self) -> "Extent | None":
        """None where there are no embeddings."""
        if self.height is None and self.width is None:
            return None
        return Extent(self.block, self.halo, self.block // self.stride)


class Extent(NamedTuple):
    """Sizes of a Relative: keys per block and axis, keys beyond it, queries per block and axis."""

    keys: int
    halo: int
    queries: int

    @property
    def window(self) -> int:
        return self.keys + 2 * self.halo

    @property
    def rows(self) -> int:
        """Of a table of embeddings, rounded up."""
        return max(16, triton.next_power_of_2(2 * self.window - 1))


@functools.lru_cache(maxsize=16)
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor; a Hopper's where there is no GPU to ask."""
    if device.type != "cuda":
        return 228 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_multiprocessor", 0)) or 64 * 1024


def _configs(q: Like, v: Like, area: int, tiles: int) -> list[Config]:
    """The heuristic, the best first; the later ones need less shared memory.

    Tiles of 64 rows and 4 warps: with more, a product of 64 rows is computed twice. Loads run an image ahead where two
    programs still share a multiprocessor.

    Args:
        area: positions of the largest box.
        tiles: how many tensors are loaded for the rows of a tile.
    """
    dim = q.shape[-1] + v.shape[-1]
    most = 64 if dim <= 160 else 32
    if q.dtype == torch.float32 and dim > 64:
        most = 16  # its products need more registers
    columns = min(most, max(16, triton.next_power_of_2(area)))
    small = min(columns, 32)
    width = area if area <= columns * _MOST_UNROLLED else columns  # what an image loads of k and v
    ahead = 2 * (width * dim + 64 * tiles * dim // 2) * q.dtype.itemsize + 64 * columns * 4
    stages = 2 if 2 * ahead <= _shared_memory(q.device) else 1
    configs = [Config(8, columns, 4, 2)] if stages == 2 else []
    return [
        *configs, Config(8, columns, 4, 1), Config(8, small, 4, 1), Config(4, small, 4, 1), Config(4, 16, 2, 1)
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Layout:
    """Tiles against boxes, whose columns come in `chunks` blocks of block_n and one of `tail`.

    arguments: what all kernels are told of it.
    """

    height: AxisTables
    width: AxisTables
    reverse: bool
    tile: tuple[int, int]
    columns: int
    block_n: int
    chunks: int
    tail: int
    classes: int
    arguments: dict[str, Any]

    @property
    def block_m(self) -> int:
        return self.tile[0] * self.tile[1]

    @property
    def blocks(self) -> int:
        return self.chunks + (self.tail > 0)

    @property
    def tiles(self) -> int:
        return len(self.height.plan.tiles) * len(self.width.plan.tiles)

    def some(self, *names: str) -> dict[str, Any]:
        return {name: self.arguments[name] for name in names}


def _tile(side: int, height: Axis) -> tuple[int, int]:
    if height.length == 1 and len(height.lanes) == 1:
        return 1, side * side
    return side, side


@functools.cache
def _layout(height: Axis, width: Axis, config: Config, reverse: bool, device: torch.device) -> _Layout:
    """Columns in blocks of config.columns; what is left over goes into one smaller block of its own."""
    tile = _tile(config.tile, height)
    tables = axis_tables(height, tile[0], reverse, device), axis_tables(width, tile[1], reverse, device)
    box_h, box_w = tables[0].plan.box, tables[1].plan.box
    block_n = min(config.columns, max(16, triton.next_power_of_2(box_h * box_w)))
    chunks, rest = divmod(box_h * box_w, block_n)
    tail = max(16, triton.next_power_of_2(rest)) if rest else 0
    if tail == block_n:
        chunks, tail = chunks + 1, 0
    columns = chunks * block_n + tail
    classes = len(tables[0].counts) * len(tables[1].counts)
    arguments = {
        "tiles_h_ptr": tables[0].tiles,
        "tiles_w_ptr": tables[1].tiles,
        "spans_h_ptr": tables[0].spans,
        "spans_w_ptr": tables[1].spans,
        "members_h_ptr": tables[0].members,
        "members_w_ptr": tables[1].members,
        "order_h_ptr": tables[0].order,
        "order_w_ptr": tables[1].order,
        "n_tiles_w": len(tables[1].plan.tiles),
        "classes_w": len(tables[1].counts),
        "n_classes": classes,
        "TILE_H": tile[0],
        "TILE_W": tile[1],
        "BLOCK_M": tile[0] * tile[1],
        "BOX_H": box_h,
        "BOX_W": box_w,
        "BLOCK_N": block_n,
        "CHUNKS": chunks,
        "TAIL": tail,
        "COLUMNS": columns,
        "CLASSES": max(16, triton.next_power_of_2(classes)),
    }
    return _Layout(*tables, reverse, tile, columns, block_n, chunks, tail, classes, arguments)


@functools.cache
def _area(height: Axis, width: Axis, reverse: bool) -> int:
    """Columns of the largest box."""
    tile = _tile(_SQUARE, height)
    return axis_plan(height, tile[0], reverse).box * axis_plan(width, tile[1], reverse).box


def _has_table(layout: _Layout, heads: int) -> bool:
    return 4 * heads * layout.classes * layout.block_m * layout.columns <= _TABLE_BYTES


class _Table:
    """The table [heads or 1, classes, BLOCK_M, COLUMNS]: bias where a pair sees each other, -inf elsewhere.

    In q's dtype where that is the bias's, which half the memory traffic of a half precision is for. A table that would
    be too large is none, and kernels compute what it would hold.

    arguments: what kernels are told of it.
    """

    def __init__(self, q: Like, layout: _Layout, bias: Like | None) -> None:
        heads, size_h, size_w = (1, 1, 1) if bias is None else bias.shape
        there = _has_table(layout, heads)
        self.arguments = {
            "size_h": size_h, "size_w": size_w, "table_heads": heads, "BIAS": bias is not None, "TABLE": there,
        }  # fmt: skip
        self._shape = (heads, layout.classes, layout.block_m, layout.columns)
        self._dtype = q.dtype if bias is None or bias.dtype == q.dtype else torch.float32
        self._fill = None
        if there:
            size = layout.block_m * layout.columns
            block = min(1024, size & -size)
            named = layout.some(
                "spans_h_ptr", "spans_w_ptr", "classes_w", "n_classes", "TILE_H", "TILE_W", "BLOCK_M"
            )  # fmt: skip
            self._fill = Launch(
                table_kernel, (heads * layout.classes * (size // block),), ("bias_ptr", "table_ptr"),
                size_h=size_h, size_w=size_w, **named, box_w=layout.arguments["BOX_W"],
                columns=layout.columns, BLOCK=block, BIAS=bias is not None, REVERSE=layout.reverse,
            )  # fmt: skip

    def make(self, q: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The bias, which is contiguous, and the table; q for one that is not there."""
        bias = q if bias is None else bias
        if self._fill is None:
            return bias, q
        table = q.new_empty(self._shape, dtype=self._dtype)
        self._fill(bias, table)
        return bias, table


@functools.cache
def _at_once(device: torch.device) -> int:
    """How many programs of these kernels a GPU runs side by side: two on a multiprocessor; a Hopper's without a GPU."""
    return 2 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132)


def _partials(device: torch.device) -> int:
    """Programs that make partial sums of the bias gradient, and so blocks of these."""
    return _PARTIALS * _at_once(device)


@functools.lru_cache(maxsize=4096)
def _images(batch: int, programs: int, at_once: int) -> int:
    """Images that a program walks over, where an image takes `programs`: about as many as leave _PROGRAMS.

    Of these, those for which the GPU, which works in waves, is done first; what a program does once for all its images
    counts as half of one.
    """

    def cost(images: int) -> float:
        waves = -(-programs * -(-batch // images) // at_once)
        return waves * (images + 0.5)

    usual = max(1, batch * programs // _PROGRAMS)
    return min(range(-(-usual // 2), min(batch, max(usual, usual * 4 // 3)) + 1), key=cost)


_OF_TILES = (
    "tiles_h_ptr", "tiles_w_ptr", "classes_w", "n_classes", "TILE_W", "BLOCK_M", "BOX_H", "BOX_W", "COLUMNS",
)  # fmt: skip
_OF_SPANS = ("spans_h_ptr", "spans_w_ptr")
_OF_MEMBERS = ("members_h_ptr", "members_w_ptr", "order_h_ptr", "order_w_ptr", "CLASSES")
_OF_BLOCKS = ("BLOCK_N", "CHUNKS", "TAIL")


def _shape_arguments(q: Like, k: Like, v: Like, height: Axis, width: Axis) -> dict[str, Any]:
    return {
        "batch": q.shape[0],
        "heads": q.shape[3],
        "q_height": q.shape[1],
        "q_width": q.shape[2],
        "k_height": k.shape[1],
        "k_width": k.shape[2],
        "q_step_h": height.step,
        "q_step_w": width.step,
        "k_step_h": height.step,
        "k_step_w": width.step,
        "D": q.shape[4],
        "DV": v.shape[4],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[4])),
        "BLOCK_DV": max(16, triton.next_power_of_2(v.shape[4])),
        "UPCAST": upcast(q.dtype),
    }


def _unroll(layout: _Layout, q: Like) -> bool:
    """Whether the blocks of a box are written out one after the other, where registers suffice for it: not in float32,
    and not for the gradients of keys on AMD's GPUs, where it costs 2 KiB of stack.
    """
    if layout.blocks == 1:
        return True
    scarce = q.dtype == torch.float32 or (layout.reverse and torch.version.hip is not None)
    return layout.chunks <= _MOST_UNROLLED and not scarce


def _stride_arguments(**tensors: Like) -> dict[str, int]:
    """Element strides of batch, row, column and head; the last axis has unit stride."""
    return {
        f"{name}_s{axis}": stride
        for name, x in tensors.items()
        for axis, stride in zip("bhwn", x.strides[:4], strict=True)
    }


def _grid(layout: _Layout, batch: int, heads: int) -> tuple[tuple[int], int, int]:
    images = _images(batch, layout.tiles * heads, _at_once(layout.height.tiles.device))
    groups = -(-batch // images)
    return (layout.tiles * groups * heads,), groups, images


_memo = functools.lru_cache(maxsize=1024)


@_memo
def _problem(kind: str, direction: str, q: Like, v: Like, height: Axis, width: Axis) -> tuning.Key:
    dim = max(q.shape[-1], v.shape[-1])
    return tuning.key(kind, direction, q, dim, (_side(height), _side(width)), height.length * width.length)


def _launch(kind: str, direction: str, q: Like, v: Like, axes: tuple[Axis, Axis], configs: Any, run: Any) -> None:
    tuning.launch(_problem(kind, direction, q, v, *axes), configs, q.device, run, axes, q.shape[-1], v.shape[-1])


@functools.cache
def _side(axis: Axis) -> int:
    """The most positions of the axis that a query sees."""
    return max(hi - lo for lane in axis.lanes for lo, hi in zip(lane.lo, lane.hi, strict=True))


def local_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    height: Axis,
    width: Axis,
    scale: float,
    relative: Relative | None = None,
    mask: bool = False,
    *,
    kind: str = "local",
) -> tuple[Tensor, Tensor]:
    """Attention of queries [B, H, W, heads, dim] over what the axes let them see.

    Args:
        bias: [heads, 2 kh - 1, 2 kw - 1], indexed key - query + k - 1 in lane steps.
        relative: see Relative; its tiles never reach across blocks.
        mask: leave keys outside the map out of the softmax; otherwise they are zeros that take part.
        kind: the op's name in tables of tile configurations.

    Returns:
        The output [B, H, W, heads, dim_v] in q's dtype, and the log-sum-exp [B, H, W, heads] in
        float32, as local_backward reads it.
    """
    q, k, v = unit(q), unit(k), unit(v)
    bias = None if bias is None else bias.contiguous()
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    maps = (Like.of(q), Like.of(k), Like.of(v))
    like_bias = None if bias is None else Like.of(bias)
    extent = None if relative is None else relative.extent

    def run(config: Config) -> None:
        table, forward = _forward_plan(config, *maps, like_bias, height, width, scale, extent, mask)
        forward(q, k, v, out, lse, _embeddings(relative, q), *table.make(q, bias))

    _launch(kind, "forward", maps[0], maps[2], (height, width), _forward_configs(*maps, height, width), run)
    return out, lse


@_memo
def _forward_configs(q: Like, k: Like, v: Like, height: Axis, width: Axis) -> tuple[Config, ...]:
    return tuple(_configs(q, v, _area(height, width, False), 1))


_MAPS = ("q_ptr", "k_ptr", "v_ptr")
_TABLES = ("bias_ptr", "table_ptr")


@_memo
def _forward_plan(
    config: Config, q: Like, k: Like, v: Like, bias: Like | None, height: Axis, width: Axis, scale: float,
    extent: Extent | None, mask: bool,
) -> tuple[_Table, Launch]:  # fmt: skip
    layout = _layout(height, width, config, False, q.device)
    grid, groups, images = _grid(layout, q.shape[0], q.shape[3])
    table = _Table(q, layout, bias)
    launch = Launch(
        forward_kernel, grid, (*_MAPS, "o_ptr", "lse_ptr", "relative_ptr", *_TABLES), **_relative_arguments(extent),
        **layout.some(*_OF_TILES, *_OF_SPANS, *_OF_BLOCKS, "n_tiles_w"), **table.arguments,
        **_shape_arguments(q, k, v, height, width), **_stride_arguments(q=q, k=k, v=v), groups=groups, images=images,
        UNROLL=_unroll(layout, q), MASK=mask, SAME_KV=_same(k, v), **_numerics(q, k, v, scale=scale),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return table, launch


def _numerics(*tensors: Like, scale: float) -> dict[str, Any]:
    """q first; what is written is as large as what is read, if that is dense."""
    dense = (_dense(x) for x in tensors)
    wide = not fits_int32(*tensors, *dense)
    return {"scale": scale, "HALF": tensors[0].dtype != torch.float32, "WIDE": wide}


def _dense(x: Like) -> Like:
    """A contiguous tensor of x's shape."""
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.append(strides[-1] * size)
    return x._replace(strides=tuple(reversed(strides)))


def _same(a: Like, b: Like) -> bool:
    """Whether one offset inside an image serves both."""
    return a.strides[1:3] == b.strides[1:3]


def _embeddings(relative: Relative | None, q: Tensor) -> Tensor:
    """The embeddings of both axes [2, rows, dim], rounded up, in q's dtype; q where there are none."""
    extent = None if relative is None else relative.extent
    if relative is None or extent is None:
        return q
    embeddings = q.new_zeros(2, extent.rows, max(16, triton.next_power_of_2(q.shape[-1])))
    for axis, table in enumerate((relative.height, relative.width)):
        if table is not None:
            embeddings[axis, : table.shape[0], : table.shape[1]] = table
    return embeddings


def _relative_arguments(extent: Extent | None, tile: int | None = None) -> dict[str, Any]:
    """The sizes that go with the embeddings; `tile` for the columns kernel: its tiles' side."""
    found: dict[str, Any] = {"REL": 0, "BLOCK_R": 16, "QUERIES": 1}
    window, keys, halo = 1, 1, 0
    if extent is not None:
        window, keys, halo = extent.window, extent.keys, extent.halo
        found = {"REL": window, "BLOCK_R": extent.rows, "QUERIES": extent.queries}
    if tile is None:
        return found | {"BLOCK_W": max(16, triton.next_power_of_2(window))}
    return found | {"KEYS": keys, "HALO": halo, "BLOCK_T": max(16, triton.next_power_of_2(tile))}


@dataclass(frozen=True)
class Gradients:
    """Gradients of q, k, v, of the bias, and of the two tables of relative positions (None where there are none)."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    relative: tuple[Tensor | None, Tensor | None] = (None, None)


def local_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    height: Axis,
    width: Axis,
    scale: float,
    relative: Relative | None = None,
    mask: bool = False,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    kind: str = "local",
) -> Gradients:
    """Gradients of local_forward; `into` names tensors (views of one packed gradient, say) to write dq, dk, dv to."""
    q, k, v, grad, out = unit(q), unit(k), unit(v), unit(grad), out.contiguous()
    bias = None if bias is None else bias.contiguous()
    dq, dk, dv = into or tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dbias = None if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    tables = (None, None) if relative is None else (relative.height, relative.width)
    drel = [None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in tables]
    if out.numel() == 0:
        return Gradients(
            dq.zero_(), dk.zero_(), dv.zero_(), None if dbias is None else dbias.zero_(), (drel[0], drel[1])
        )
    most = _most_images(q, v, height, width, relative)
    if most < q.shape[0]:
        for start in range(0, q.shape[0], most):
            some = slice(start, start + most)
            found = local_backward(
                grad[some], q[some], k[some], v[some], bias, out[some], lse[some], height, width, scale, relative, mask,
                (dq[some], dk[some], dv[some]), kind=kind,
            )  # fmt: skip
            for target, part in zip(drel, found.relative, strict=True):
                if target is not None and part is not None:
                    target += part
        return Gradients(dq, dk, dv, dbias, (drel[0], drel[1]))
    call = _Backward(
        Like.of(q), Like.of(k), Like.of(v), Like.of(grad), Like.of(dq), Like.of(dk), Like.of(dv),
        None if bias is None else Like.of(bias), height, width, scale, None if relative is None else relative.extent,
        mask, None if relative is None else relative.block,
    )  # fmt: skip
    embeddings = _embeddings(relative, q)

    def rows(config: Config) -> None:
        plan = _rows_plan(config, call)
        of_bias, table = plan.table.make(q, bias)
        sums = lse.new_empty(plan.sums)
        partial = lse.new_empty(plan.partial)
        parts = q.new_empty(plan.parts)
        plan.kernel(q, k, v, out, grad, lse, stats, dq, sums, partial, parts, embeddings, of_bias, table)
        if plan.add is not None:
            plan.add(parts, dk, dv)
        left[:] = [] if plan.add is not None else [columns]
        if call.extent is not None:
            total = summed(sums.flatten(0, 1).flatten(1), torch.float32).view(plan.sums[2:])
            for of_axis, target in zip(total, drel, strict=True):
                if target is not None:
                    target.copy_(of_axis[: target.shape[0], : target.shape[1]])
        if dbias is None:
            return
        for kernel, shape, fold in plan.bias:
            if kernel is not None:
                partial = lse.new_empty(shape)
                kernel(q, k, v, grad, stats, partial, of_bias, table)
            fold.run(partial, dbias)

    def columns(config: Config) -> None:
        additive, kernel = _columns_plan(config, call)
        kernel(q, k, v, grad, stats, dk, dv, embeddings, *additive.make(q, bias))

    def square(config: Config) -> None:
        plan = _square_plan(config, call)
        _, table = plan.table.make(q, bias)
        partial = lse.new_empty(plan.partial)
        plan.kernel(q, k, v, out, grad, lse, dq, dk, dv, partial, table)
        if dbias is not None:
            plan.bias[0][2].run(partial, dbias)

    def launch(direction: str, configs: tuple[Config, ...], run: Any) -> None:
        _launch(kind, direction, call.q, call.v, (height, width), configs, run)

    configs = _backward_configs(call)
    if "square" in configs:
        launch("square", configs["square"], square)
    else:
        stats = lse.new_empty(*lse.shape, 2)  # log-sum-exp, and sum(out * grad)
        left: list[Any] = []
        launch("rows", configs["rows"], rows)
        for run in left:
            launch("columns", configs["columns"], run)
    return Gradients(dq, dk, dv, dbias, (drel[0], drel[1]))


def _most_images(q: Tensor, v: Tensor, height: Axis, width: Axis, relative: Relative | None) -> int:
    """Images of which the gradients of keys, tile by tile, stay within bounds."""
    if relative is None:
        return q.shape[0]
    blocks = math.prod(-(-axis.length // relative.block) for axis in (height, width))
    window = triton.next_power_of_2(relative.block + 2 * relative.halo) ** 2
    image = blocks * q.shape[3] * window * (q.shape[4] + v.shape[4]) * q.element_size()
    return max(1, _PART_BYTES // image)


class _Backward(NamedTuple):
    """All that the plans of a backward depend on."""

    q: Like
    k: Like
    v: Like
    grad: Like
    dq: Like
    dk: Like
    dv: Like
    bias: Like | None
    height: Axis
    width: Axis
    scale: float
    extent: Extent | None
    mask: bool
    block: int | None

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[3]

    def numerics(self) -> dict[str, Any]:
        return _numerics(self.q, self.k, self.v, self.grad, self.dq, self.dk, self.dv, self.stats(), scale=self.scale)

    def stats(self) -> Like:
        return self.q._replace(shape=(*self.q.shape[:-1], 2))

    def shapes(self) -> dict[str, Any]:
        return _shape_arguments(self.q, self.k, self.v, self.height, self.width)


class _Sums(NamedTuple):
    """A kernel that leaves partial sums: its table, and for the gradient of the bias, columns by columns, the kernel
    that makes partial sums of this shape (None where the kernel itself does) and what adds them.

    sums, partial, parts: shapes of what the kernel writes for the embeddings, for the bias, and for keys and values.
    add: adds the parts of keys and values; None where another pass makes their gradients.
    """

    table: _Table
    kernel: Launch
    sums: tuple[int, ...]
    partial: tuple[int, ...]
    bias: tuple[tuple[Launch | None, tuple[int, ...], "_Fold"], ...]
    parts: tuple[int, ...] = (1,)
    add: Launch | None = None


@_memo
def _backward_configs(call: _Backward) -> dict[str, tuple[Config, ...]]:
    """The heuristic for every kernel that the backward launches."""
    q, v, height, width = call.q, call.v, call.height, call.width
    area = _area(height, width, False)
    configs = _configs(q, v, area, 3)
    # five float32 products in one block, each three of tf32, are too much for ptxas: 7 to 9 KiB of stack but for sm_90
    plain = q.dtype != torch.float32 and call.extent is None and not call.mask
    if plain and _in_one_pass(height, width, call.heads, q.device):
        return {"square": tuple(configs)}
    if call.extent is not None and q.dtype == torch.float32:
        configs = [c for c in configs if c.tile < _SQUARE]  # relative positions need registers of their own
    elif call.bias is not None and area > configs[0].columns:
        configs = [replace(configs[0], columns=min(configs[0].columns, 32)), *configs]  # as do sums
    passes = {"rows": configs, "columns": _configs(q, v, _area(height, width, True), 2)}
    if q.dtype == torch.float32:  # blocks of 64 spill up to 8 KiB for sm_80
        passes = {name: [replace(c, columns=min(c.columns, 32)) for c in found] for name, found in passes.items()}
    return {name: tuple(dict.fromkeys(found)) for name, found in passes.items()}


@_memo
def _rows_plan(config: Config, call: _Backward) -> _Sums:
    layout = _layout(call.height, call.width, config, False, call.q.device)
    table = _Table(call.q, layout, call.bias)
    unroll = _unroll(layout, call.q)
    has_bias, heads, extent = call.bias is not None, call.heads, call.extent
    summed = has_bias and unroll and layout.columns <= _MOST_SUMMED
    whole = _one_tile_each(layout, call)
    most = (_partials(call.q.device) if summed or extent is not None else _PROGRAMS) // heads
    share, segments = _segments(layout, call.batch, most)
    kernel = Launch(
        rows_kernel, (segments * heads,),
        (
            *_MAPS, "o_ptr", "do_ptr", "lse_ptr", "stats_ptr", "dq_ptr", "drelative_ptr", "partial_ptr", "parts_ptr",
            "relative_ptr", *_TABLES,
        ),
        **_relative_arguments(extent), **table.arguments,
        **layout.some(*_OF_TILES, *_OF_SPANS, *_OF_BLOCKS, *_OF_MEMBERS, "n_tiles_w"), **call.shapes(),
        **_stride_arguments(q=call.q, k=call.k, v=call.v, do=call.grad, dq=call.dq), share=share, UNROLL=unroll,
        SUM_BIAS=summed, PARTS=whole, n_tiles=layout.tiles, MASK=call.mask, SAME_KV=_same(call.k, call.v),
        **call.numerics(),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    sums = (
        (1,) if extent is None else (segments, heads, 2, extent.rows, max(16, triton.next_power_of_2(call.q.shape[-1])))
    )
    partial = (segments, heads, layout.block_m, layout.columns) if summed else (1,)
    bias: tuple[Any, ...] = ()
    if summed:
        bias = ((None, partial, _Fold(layout, partial, call, share, 0)),)
    elif has_bias:
        bias = tuple(_bias_gradient(layout, config, table, call))
    if not whole:
        return _Sums(table, kernel, sums, partial, bias)
    parts = (call.batch, layout.tiles, heads, layout.columns, call.q.shape[-1] + call.v.shape[-1])
    return _Sums(table, kernel, sums, partial, bias, parts, _adder(layout, call))


def _adder(layout: _Layout, call: _Backward) -> Launch:
    """Adds what the tiles left for the keys of their boxes."""
    seen = [
        seen_from(axis, side, call.q.device) for axis, side in zip((call.height, call.width), layout.tile, strict=True)
    ]
    shapes = call.shapes()
    block = 1024 if INTERPRET else 64
    keys = triton.cdiv(shapes["k_height"] * shapes["k_width"], block)
    return Launch(
        boxes_kernel, (keys * call.batch * call.heads,), ("parts_ptr", "dk_ptr", "dv_ptr"),
        seen_h_ptr=seen[0].table, seen_w_ptr=seen[1].table, MOST_H=seen[0].most, MOST_W=seen[1].most, BLOCK=block,
        **layout.some("tiles_h_ptr", "tiles_w_ptr", "n_tiles_w", "BOX_W", "COLUMNS"), n_tiles=layout.tiles,
        **{name: shapes[name] for name in ("batch", "heads", "k_height", "k_width", "D", "DV", "BLOCK_D", "BLOCK_DV")},
        **_stride_arguments(dk=call.dk, dv=call.dv), WIDE=call.numerics()["WIDE"],
    )  # fmt: skip


def _one_tile_each(layout: _Layout, call: _Backward) -> bool:
    """Whether every block of keys has its queries in one tile, which then knows all that they do to its box."""
    if call.block is None:
        return False
    blocks = (-(-axis.length // call.block) for axis in (call.height, call.width))
    return math.prod(blocks) == layout.tiles


@_memo
def _columns_plan(config: Config, call: _Backward) -> tuple[_Table, Launch]:
    layout = _layout(call.height, call.width, config, True, call.q.device)
    grid, groups, images = _grid(layout, call.batch, call.heads)
    table = _Table(call.q, layout, call.bias)
    kernel = Launch(
        columns_kernel, grid, (*_MAPS, "do_ptr", "stats_ptr", "dk_ptr", "dv_ptr", "relative_ptr", *_TABLES),
        **_relative_arguments(call.extent, config.tile),
        **layout.some(*_OF_TILES, *_OF_SPANS, *_OF_BLOCKS, "n_tiles_w"), **table.arguments, **call.shapes(),
        **_stride_arguments(q=call.q, k=call.k, v=call.v, do=call.grad, dk=call.dk, dv=call.dv),
        groups=groups, images=images, UNROLL=_unroll(layout, call.q), **call.numerics(),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return table, kernel


@_memo
def _square_plan(config: Config, call: _Backward) -> _Sums:
    config = replace(config, tile=_SQUARE, columns=_SQUARE**2)
    layout = _layout(call.height, call.width, config, False, call.q.device)
    table = _Table(call.q, layout, call.bias)
    share, segments = _segments(layout, call.batch, _partials(call.q.device) // call.heads)
    partial = (segments, call.heads, layout.block_m, layout.columns) if call.bias is not None else (1,)
    kernel = Launch(
        square_kernel, (segments * call.heads,),
        (*_MAPS, "o_ptr", "do_ptr", "lse_ptr", "dq_ptr", "dk_ptr", "dv_ptr", "partial_ptr", "table_ptr"),
        **layout.some(*_OF_TILES, *_OF_MEMBERS), **{n: table.arguments[n] for n in ("table_heads", "BIAS")},
        **call.shapes(),
        **_stride_arguments(q=call.q, k=call.k, v=call.v, do=call.grad, dq=call.dq, dk=call.dk, dv=call.dv),
        share=share, SAME_KV=_same(call.k, call.v), **call.numerics(),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    bias = () if call.bias is None else ((None, partial, _Fold(layout, partial, call, share, 0)),)
    return _Sums(table, kernel, (1,), partial, bias)


def _in_one_pass(height: Axis, width: Axis, heads: int, device: torch.device) -> bool:
    """Whether square_kernel can: boxes that are apart, and a block and a table that hold them."""
    tile = _tile(_SQUARE, height)
    apart = partitions(height, tile[0]) and partitions(width, tile[1])
    if not apart or _area(height, width, False) > _SQUARE**2:
        return False
    return _has_table(_layout(height, width, Config(_SQUARE, _SQUARE**2, 4, 1), False, device), heads)


def _segments(layout: _Layout, batch: int, most: int) -> tuple[int, int]:
    """How many (tile, image) pairs a program sums, and how many programs that makes: `most`, or one a class.

    Every program has as much to do as the next.
    """
    return _shares(layout.height.counts, layout.width.counts, batch, max(1, most))


@functools.lru_cache(maxsize=4096)
def _shares(counts_h: tuple[int, ...], counts_w: tuple[int, ...], batch: int, most: int) -> tuple[int, int]:
    pairs = [h * w * batch for h in counts_h for w in counts_w]
    most = max(most, len(pairs))
    low, high = max(1, -(-sum(pairs) // most)), max(pairs)
    while low < high:  # the smallest share of few enough segments
        middle = (low + high) // 2
        if sum(-(-n // middle) for n in pairs) > most:
            low = middle + 1
        else:
            high = middle
    return low, sum(-(-n // low) for n in pairs)


def _bias_gradient(
    layout: _Layout, config: Config, table: _Table, call: _Backward
) -> Iterator[tuple[Launch, tuple[int, ...], "_Fold"]]:
    """Sums of ds per tile class in a fixed order, some columns of a box at a time, and what adds them."""
    heads = call.heads
    share, segments = _segments(layout, call.batch, _partials(call.q.device) // (heads * layout.blocks))
    most = max(1, _TABLE_BYTES // (4 * segments * heads * layout.block_m * layout.block_n))
    ranges = [(c * layout.block_n, min(most, layout.chunks - c), layout.block_n) for c in range(0, layout.chunks, most)]
    if layout.tail:
        ranges.append((layout.chunks * layout.block_n, 1, layout.tail))
    for start, chunks, block in ranges:
        partial = (segments, heads, layout.block_m, chunks * block)
        kernel = Launch(
            bias_gradient_kernel, (segments * chunks * heads,),
            (*_MAPS, "do_ptr", "stats_ptr", "partial_ptr", *_TABLES),
            **table.arguments, **layout.some(*_OF_TILES, *_OF_SPANS, *_OF_MEMBERS), **call.shapes(),
            **_stride_arguments(q=call.q, k=call.k, v=call.v, do=call.grad), share=share,
            start=start, width=chunks * block, BLOCK_N=block, CHUNKS=chunks, SAME_KV=_same(call.k, call.v),
            **call.numerics(), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        yield kernel, partial, _Fold(layout, partial, call, share, start)


class _Fold:
    """Adds the segments of every class, then what every bias entry received in columns of the box from `start` on."""

    def __init__(self, layout: _Layout, partial: tuple[int, ...], call: _Backward, share: int, start: int) -> None:
        assert call.bias is not None
        heads, width = partial[1], partial[3]
        size = partial[2] * width
        self._shape = (heads, layout.classes, size)
        block = math.gcd(size, 1024 if INTERPRET else 32)  # few programs where each takes the interpreter long
        self._fold = Launch(
            fold_kernel, (size // block * layout.classes * heads,), ("partial_ptr", "out_ptr"),
            batch=call.batch, share=share, heads=heads, size=size, BLOCK=block, AT_ONCE=32,
            **layout.some("members_h_ptr", "members_w_ptr", "classes_w", "n_classes", "CLASSES"),
        )  # fmt: skip
        size_h, size_w = call.bias.shape[1:]
        self._bias = Launch(
            bias_kernel, (triton.cdiv(size_h * size_w, 16) * heads,), ("folded_ptr", "out_ptr"),
            size_h=size_h, size_w=size_w, start=start, width=width, BLOCK=16, ADD=start > 0,
            **layout.some(
                "spans_h_ptr", "spans_w_ptr", "classes_w", "n_classes", "TILE_H", "TILE_W", "BOX_H", "BOX_W", "BLOCK_M"
            ),
        )  # fmt: skip

    def run(self, partial: Tensor, dbias: Tensor) -> None:
        folded = partial.new_empty(self._shape)
        self._fold(partial, folded)
        self._bias(folded, dbias)


def forget_plans() -> None:
    """Plan anew: what they were made by (the constants of this file, a table of configurations) has changed."""
    for plans in (
        _problem, _forward_configs, _forward_plan, _backward_configs, _rows_plan, _columns_plan, _square_plan
    ):  # fmt: skip
        plans.cache_clear()
