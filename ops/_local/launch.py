"""Launchers of the Triton core: they lay out tiles, pick a configuration and allocate; kernels never do."""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from zoo.ops import _tuning as tuning
from zoo.ops._triton import fits_int32, unit, upcast
from zoo.ops._tuning import Config

from .geometry import Axis, Plan, partitions, plan
from .kernels import (
    bias_gradient_kernel,
    columns_kernel,
    fold_kernel,
    forward_kernel,
    rows_kernel,
    square_kernel,
)

__all__ = ["Relative", "local_backward", "local_forward"]

_PARTIALS = 1024  # blocks of partial sums of the bias gradient, and the programs that make them
_SQUARE = 8  # side of a tile
_MOST_UNROLLED = 8  # blocks of columns: their addresses are then computed once for all images, for some code
_PROGRAMS = 2048  # what keeps a GPU busy


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


@functools.lru_cache(maxsize=16)
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor; a Hopper's where there is no GPU to ask."""
    if device.type != "cuda":
        return 228 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_multiprocessor", 0)) or 64 * 1024


def _configs(q: Tensor, v: Tensor, area: int, tiles: int) -> list[Config]:
    """The heuristic, the best first; the later ones need less shared memory.

    Tiles of 64 rows and 4 warps: with more, a product of 64 rows is computed twice. Loads run an image ahead where two
    programs still share a multiprocessor.

    Args:
        area: positions of the largest box.
        tiles: how many tensors are loaded for the rows of a tile.
    """
    dim = q.shape[-1] + v.shape[-1]
    columns = min(64 if dim <= 160 else 32, max(16, triton.next_power_of_2(area)))
    small = min(columns, 32)
    width = area if area <= columns * _MOST_UNROLLED else columns  # what an image loads of k and v
    ahead = 2 * (width * dim + 64 * tiles * dim // 2) * q.element_size() + 64 * columns * 4
    stages = 2 if 2 * ahead <= _shared_memory(q.device) else 1
    configs = [Config(8, columns, 4, 2)] if stages == 2 else []
    return [
        *configs, Config(8, columns, 4, 1), Config(8, small, 4, 1), Config(4, small, 4, 1), Config(4, 16, 2, 1)
    ]  # fmt: skip


@dataclass(frozen=True)
class _Layout:
    plan: Plan
    block_n: int
    chunks: int
    tail: int
    tile_w: int
    box: tuple[int, int]


def _tile(config: Config, height: Axis) -> tuple[int, int]:
    if height.length == 1 and len(height.lanes) == 1:
        return 1, config.tile * config.tile
    return config.tile, config.tile


@functools.lru_cache(maxsize=256)
def _layout(
    height: Axis, width: Axis, config: Config, bias_size: tuple[int, int] | None, reverse: bool, device: torch.device
) -> _Layout:
    """Columns in blocks of config.columns; what is left over goes into one smaller block of its own."""
    tile = _tile(config, height)
    area = plan(height, width, tile, bias_size, reverse, 1, device).block_n
    block_n = min(config.columns, max(16, triton.next_power_of_2(area)))
    chunks, rest = divmod(area, block_n)
    tail = max(16, triton.next_power_of_2(rest)) if rest else 0
    if tail == block_n:
        chunks, tail = chunks + 1, 0
    laid = plan(height, width, tile, bias_size, reverse, chunks * block_n + tail, device)
    return _Layout(laid, block_n, chunks, tail, tile[1], (laid.axes[0].box, laid.axes[1].box))


def _area(height: Axis, width: Axis, reverse: bool) -> int:
    laid = plan(height, width, _tile(Config(_SQUARE, 0, 0, 0), height), None, reverse, 1, torch.device("cpu"))
    return laid.block_n


def _table(layout: _Layout, bias: Tensor | None, scale: float, fold: bool) -> Tensor:
    """[heads or 1, classes, BLOCK_M, BLOCK_N]: bias where a pair sees each other, -inf elsewhere.

    Divided by the scale where the kernel multiplies with it afterwards.
    """
    index = layout.plan.index
    if bias is None:
        flat = index.new_zeros((1, 1), dtype=torch.float32)
    else:
        flat = bias.flatten(1).float() * (1 / scale if fold else 1)
    flat = torch.cat([flat, flat.new_full((flat.shape[0], 1), -math.inf)], 1)
    return flat.index_select(1, index.flatten()).view(flat.shape[0], *index.shape)


def _images(batch: int, tiles: int, heads: int) -> int:
    """Images a program walks over: as many as leave some thousand programs."""
    return max(1, min(batch, batch * tiles * heads // _PROGRAMS))


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Element strides of batch, row, column and head; the last axis has unit stride."""
    return x.stride(0), x.stride(1), x.stride(2), x.stride(3)


def _shape_arguments(q: Tensor, k: Tensor, v: Tensor, layout: _Layout, height: Axis, width: Axis) -> dict[str, Any]:
    return {
        "tiles_h_ptr": layout.plan.tiles_h,
        "tiles_w_ptr": layout.plan.tiles_w,
        "batch": q.shape[0],
        "heads": q.shape[3],
        "q_height": q.shape[1],
        "q_width": q.shape[2],
        "k_height": k.shape[1],
        "k_width": k.shape[2],
        "n_tiles_w": layout.plan.tiles_w.shape[0],
        "n_classes": layout.plan.index.shape[0],
        "q_step_h": height.step,
        "q_step_w": width.step,
        "k_step_h": height.step,
        "k_step_w": width.step,
        "D": q.shape[4],
        "DV": v.shape[4],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[4])),
        "BLOCK_DV": max(16, triton.next_power_of_2(v.shape[4])),
        "TILE_W": layout.tile_w,
        "BLOCK_M": layout.plan.block_m,
        "BOX_H": layout.box[0],
        "BOX_W": layout.box[1],
        "BLOCK_N": layout.block_n,
        "CHUNKS": layout.chunks,
        "TAIL": layout.tail,
        "COLUMNS": layout.plan.block_n,
        "UNROLL": layout.chunks <= _MOST_UNROLLED,
        "UPCAST": upcast(q.dtype),
    }


def _stride_arguments(**tensors: Tensor) -> dict[str, int]:
    return {
        f"{name}_s{axis}": stride
        for name, x in tensors.items()
        for axis, stride in zip("bhwn", _strides(x), strict=True)
    }


def _grid(layout: _Layout, batch: int, heads: int) -> tuple[tuple[int, int], int, int]:
    tiles = layout.plan.tiles_h.shape[0] * layout.plan.tiles_w.shape[0]
    images = _images(batch, tiles, heads)
    groups = -(-batch // images)
    return (tiles * groups, heads), groups, images


def _launch(
    kind: str, direction: str, q: Tensor, v: Tensor, axes: tuple[Axis, Axis], bias_size: Any, configs: Any, run: Any
) -> None:
    dim = max(q.shape[-1], v.shape[-1])
    problem = tuning.key(kind, direction, q, dim, (_side(axes[0]), _side(axes[1])), axes[0].length * axes[1].length)
    tuning.launch(problem, configs, q.device, run, axes, bias_size, q.shape[-1], v.shape[-1])


@functools.lru_cache(maxsize=1024)
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
    batch, heads = q.shape[0], q.shape[3]
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    bias_size = None if bias is None else (bias.shape[1], bias.shape[2])
    configs = _configs(q, v, _area(height, width, False), 1)

    common = _numerics(q, k, v, out, scale=scale)

    def run(config: Config) -> None:
        layout = _layout(height, width, config, bias_size, False, q.device)
        table = _table(layout, bias, scale, common["FOLD"])
        grid, groups, images = _grid(layout, batch, heads)
        forward_kernel[grid](
            q, k, v, out, lse, table, **_relative_arguments(relative, q),
            **_shape_arguments(q, k, v, layout, height, width), **_stride_arguments(q=q, k=k, v=v),
            classes_w=len(layout.plan.axes[1].spans), table_heads=table.shape[0],
            groups=groups, images=images, MASK=mask, SAME_KV=_same(k, v), **common,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    _launch(kind, "forward", q, v, (height, width), bias_size, configs, run)
    return out, lse


def _numerics(*tensors: Tensor, scale: float) -> dict[str, Any]:
    """q first. A table that is divided by the scale costs float32 some digits, and must not be by one near zero."""
    fold = tensors[0].dtype != torch.float32 and 2**-20 < scale < 2**20
    return {"scale": scale, "FOLD": fold, "WIDE": not fits_int32(*tensors)}


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether one offset inside an image serves both."""
    return a.stride()[1:3] == b.stride()[1:3]


def _relative_arguments(relative: Relative | None, q: Tensor, tile: int | None = None) -> dict[str, Any]:
    """The embeddings in q's dtype and the sizes that go with them; `tile` for the columns kernel: its tiles' side."""
    if relative is None or (relative.height is None and relative.width is None):
        found: dict[str, Any] = {"relative_ptr": q, "REL": 0, "BLOCK_R": 16, "QUERIES": 1}
        window, keys, halo = 1, 1, 0
    else:
        keys, halo = relative.block, relative.halo
        window = keys + 2 * halo
        rows = max(16, triton.next_power_of_2(2 * window - 1))
        embeddings = q.new_zeros(2, rows, max(16, triton.next_power_of_2(q.shape[-1])))
        for axis, table in enumerate((relative.height, relative.width)):
            if table is not None:
                embeddings[axis, : table.shape[0], : table.shape[1]] = table
        found = {"relative_ptr": embeddings, "REL": window, "BLOCK_R": rows, "QUERIES": keys // relative.stride}
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
    batch, heads = q.shape[0], q.shape[3]
    dq, dk, dv = into or tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dbias = None if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format)
    tables = (None, None) if relative is None else (relative.height, relative.width)
    drel = [None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in tables]
    if out.numel() == 0:
        return Gradients(dq.zero_(), dk.zero_(), dv.zero_(), dbias, (drel[0], drel[1]))
    stats = lse.new_empty(*lse.shape, 2)  # log-sum-exp, and sum(out * grad)
    bias_size = None if bias is None else (bias.shape[1], bias.shape[2])
    axes = (height, width)
    common = _numerics(q, k, v, grad, out, dq, dk, dv, stats, scale=scale)
    fold = common["FOLD"]

    def rows(config: Config) -> None:
        layout = _layout(height, width, config, bias_size, False, q.device)
        table = _table(layout, bias, scale, fold)
        most = _PROGRAMS if relative is None else _PARTIALS
        share, segments, _ = _segments(layout.plan.counts, batch, max(1, most // heads), q.device)
        found = _relative_arguments(relative, q)
        shape = (segments.shape[0], heads, 2, found["BLOCK_R"], max(16, triton.next_power_of_2(q.shape[-1])))
        sums = table.new_empty((1,) if relative is None else shape)
        rows_kernel[(segments.shape[0], heads)](
            q, k, v, out, grad, lse, stats, dq, sums, table, **found,
            **_shape_arguments(q, k, v, layout, height, width), **_stride_arguments(q=q, k=k, v=v, do=grad, dq=dq),
            members_ptr=layout.plan.members, member_tiles_ptr=layout.plan.member_tiles, segments_ptr=segments,
            table_heads=table.shape[0], share=share, MASK=mask, SAME_KV=_same(k, v), **common,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        for axis, target in enumerate(drel):
            if target is not None:
                target.copy_(sums[:, :, axis, : target.shape[0], : target.shape[1]].sum((0, 1)))
        if bias is not None and dbias is not None:
            _bias_gradient(layout, config, table, dbias, q, k, v, grad, stats, height, width, common)

    def columns(config: Config) -> None:
        layout = _layout(height, width, config, bias_size, True, q.device)
        table = _table(layout, bias, scale, fold)
        grid, groups, images = _grid(layout, batch, heads)
        columns_kernel[grid](
            q, k, v, grad, stats, dk, dv, table, **_relative_arguments(relative, q, config.tile),
            **_shape_arguments(q, k, v, layout, height, width),
            **_stride_arguments(q=q, k=k, v=v, do=grad, dk=dk, dv=dv),
            classes_w=len(layout.plan.axes[1].spans), table_heads=table.shape[0],
            groups=groups, images=images, **common,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def square(config: Config) -> None:
        config = replace(config, tile=_SQUARE, columns=_SQUARE**2)
        layout = _layout(height, width, config, bias_size, False, q.device)
        table = _table(layout, bias, scale, fold)
        share, segments, starts = _segments_of(layout, batch, heads, q.device)
        partial = _partial(layout, segments, heads, bias is not None)
        shape = _shape_arguments(q, k, v, layout, height, width)
        for unused in ("TAIL", "UNROLL", "CHUNKS", "BLOCK_N"):
            del shape[unused]
        square_kernel[(segments.shape[0], heads)](
            q, k, v, out, grad, lse, dq, dk, dv, partial, table, **shape,
            **_stride_arguments(q=q, k=k, v=v, do=grad, dq=dq, dk=dk, dv=dv),
            members_ptr=layout.plan.members, member_tiles_ptr=layout.plan.member_tiles, segments_ptr=segments,
            table_heads=table.shape[0], share=share, BIAS=bias is not None, SAME_KV=_same(k, v), **common,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if dbias is not None:
            _fold(layout, partial, starts, dbias)

    area = _area(height, width, False)
    if relative is None and not mask and area <= _SQUARE**2 and _partitioned(height, width):
        _launch(kind, "square", q, v, axes, bias_size, _configs(q, v, area, 3), square)
    else:
        _launch(kind, "rows", q, v, axes, bias_size, _configs(q, v, area, 3), rows)
        _launch(kind, "columns", q, v, axes, bias_size, _configs(q, v, _area(height, width, True), 2), columns)
    return Gradients(dq, dk, dv, dbias, (drel[0], drel[1]))


def _partitioned(height: Axis, width: Axis) -> bool:
    tile = _tile(Config(_SQUARE, 0, 0, 0), height)
    return partitions(height, tile[0]) and partitions(width, tile[1])


@functools.lru_cache(maxsize=1024)
def _segments(counts: tuple[int, ...], batch: int, most: int, device: torch.device) -> tuple[int, Tensor, Tensor]:
    """How many (tile, image) pairs a program sums, [segments, 2] (class, share of it), and each class's first segment.

    counts: tiles per class. Every segment has as much to do as the next; there are at most `most`, one a class or more.
    """
    share = max(1, -(-sum(counts) * batch // most))
    while sum(-(-count * batch // share) for count in counts) > max(most, len(counts)):
        share += 1
    parts = [-(-count * batch // share) for count in counts]
    rows = [(kind, part) for kind, n in enumerate(parts) for part in range(n)]
    starts = torch.tensor([0, *parts]).cumsum(0)
    return share, torch.tensor(rows, dtype=torch.int32).to(device), starts.int().to(device)


def _bias_gradient(
    layout: _Layout,
    config: Config,
    table: Tensor,
    dbias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    stats: Tensor,
    height: Axis,
    width: Axis,
    common: dict[str, Any],
) -> None:
    """Sum ds per tile class in a fixed order, then gather what each bias entry received."""
    laid = layout.plan
    share, segments, starts = _segments_of(layout, q.shape[0], q.shape[3], q.device)
    partial = _partial(layout, segments, q.shape[3], True)
    shape = _shape_arguments(q, k, v, layout, height, width)
    for unused in ("TAIL", "UNROLL"):
        del shape[unused]
    for start, chunks, block in ((0, layout.chunks, layout.block_n), (layout.chunks * layout.block_n, 1, layout.tail)):
        if block == 0:
            continue
        bias_gradient_kernel[(segments.shape[0] * chunks, q.shape[3])](
            q, k, v, grad, stats, partial, table, **{**shape, "CHUNKS": chunks, "BLOCK_N": block},
            **_stride_arguments(q=q, k=k, v=v, do=grad),
            members_ptr=laid.members, member_tiles_ptr=laid.member_tiles, segments_ptr=segments,
            table_heads=table.shape[0], share=share, start=start, SAME_KV=_same(k, v), **common,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    _fold(layout, partial, starts, dbias)


def _segments_of(layout: _Layout, batch: int, heads: int, device: torch.device) -> tuple[int, Tensor, Tensor]:
    blocks = layout.chunks + (layout.tail > 0)
    return _segments(layout.plan.counts, batch, max(1, _PARTIALS // (heads * blocks)), device)


def _partial(layout: _Layout, segments: Tensor, heads: int, bias: bool) -> Tensor:
    shape = (segments.shape[0], heads, *layout.plan.index.shape[1:])
    return torch.empty(shape if bias else (1,), dtype=torch.float32, device=segments.device)


def _fold(layout: _Layout, partial: Tensor, starts: Tensor, dbias: Tensor) -> None:
    """Add the segments of every class, then what every bias entry received."""
    heads, size, classes = partial.shape[1], partial[0, 0].numel(), len(layout.plan.counts)
    folded = partial.new_empty(heads, classes * size + 1)
    folded[:, -1] = 0  # for bias entries that receive less than others
    block = min(1024, size & -size)
    fold_kernel[(size // block, classes, heads)](
        partial, starts, folded, heads, folded.stride(0), SIZE=size, BLOCK=block
    )
    dbias.copy_(folded[:, layout.plan.inverse].sum(-1).view_as(dbias))
