"""Launchers of the Triton core: they lay out tiles, pick a configuration and allocate; kernels never do."""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from . import tuning
from .geometry import Axis, Plan, plan
from .kernels import bias_gradient_kernel, columns_kernel, forward_kernel, rows_kernel
from .tuning import Config

__all__ = ["Relative", "local_backward", "local_forward"]

_LOG2E = math.log2(math.e)
_MOST_SPLITS = 32  # of the bias gradient: each holds a table of partial sums
_INTERPRET = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Relative:
    """Relative-position logits per query and window place, and how a query finds its window.

    height, width: [B, H, W, heads, window] float32, a row and a column term that are added to every logit.
    block, halo, stride: per axis; the window of query p starts at (p * stride) // block * block - halo.
    """

    height: Tensor
    width: Tensor
    block: tuple[int, int]
    halo: tuple[int, int]
    stride: tuple[int, int]


def _configs(dim: int, area: int) -> list[Config]:
    """The heuristic, the best first; the later ones need less shared memory."""
    whole = max(16, triton.next_power_of_2(area))
    first = Config(8, whole, 8, 1) if whole <= 256 and dim <= 64 else Config(8, 64, 4, 2)
    if whole <= 64 and dim <= 64:
        first = Config(8, whole, 4, 1)
    return [first, Config(8, 32, 4, 2), Config(8, 32, 4, 1), Config(4, 32, 4, 1), Config(4, 16, 2, 1)]


@dataclass(frozen=True)
class _Layout:
    plan: Plan
    block_n: int
    chunks: int
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
    tile = _tile(config, height)
    laid = plan(height, width, tile, bias_size, reverse, 1, device)
    block_n = min(config.columns, max(16, triton.next_power_of_2(laid.block_n)))
    laid = plan(height, width, tile, bias_size, reverse, block_n, device)
    return _Layout(laid, block_n, laid.block_n // block_n, tile[1], (laid.axes[0].box, laid.axes[1].box))


def _area(height: Axis, width: Axis, reverse: bool) -> int:
    laid = plan(height, width, _tile(Config(8, 0, 0, 0), height), None, reverse, 1, torch.device("cpu"))
    return laid.block_n


def _table(layout: _Layout, bias: Tensor | None) -> Tensor:
    """[heads or 1, classes, BLOCK_M, BLOCK_N]: bias in base 2 where a pair sees each other, -inf elsewhere."""
    index = layout.plan.index
    flat = index.new_zeros((1, 1), dtype=torch.float32) if bias is None else bias.flatten(1).float() * _LOG2E
    flat = torch.cat([flat, flat.new_full((flat.shape[0], 1), -math.inf)], 1)
    return flat.index_select(1, index.flatten()).view(flat.shape[0], *index.shape)


def _images(batch: int, tiles: int, heads: int) -> int:
    """Images a program walks over: as many as leave some thousand programs."""
    return max(1, min(batch, batch * tiles * heads // 2048))


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Element strides of batch, row, column and head; the last axis has unit stride."""
    return x.stride(0), x.stride(1), x.stride(2), x.stride(3)


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


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
        "UPCAST": _INTERPRET and q.dtype == torch.bfloat16,
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
        The output [B, H, W, heads, dim_v] in q's dtype, and the log-sum-exp [B, H, W, heads] in float32.
    """
    q, k, v = _unit(q), _unit(k), _unit(v)
    batch, heads = q.shape[0], q.shape[3]
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    bias_size = None if bias is None else (bias.shape[1], bias.shape[2])
    configs = _configs(max(q.shape[-1], v.shape[-1]), _area(height, width, False))

    def run(config: Config) -> None:
        layout = _layout(height, width, config, bias_size, False, q.device)
        table = _table(layout, bias)
        grid, groups, images = _grid(layout, batch, heads)
        forward_kernel[grid](
            q, k, v, out, lse, table, *_relative_tensors(relative, q),
            **_shape_arguments(q, k, v, layout, height, width), **_stride_arguments(q=q, k=k, v=v),
            classes_w=len(layout.plan.axes[1].spans), table_heads=table.shape[0], scale=scale * _LOG2E,
            groups=groups, images=images, **_windows(relative), MASK=mask,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    _launch(kind, "forward", q, v, (height, width), bias_size, configs, run)
    return out, lse


def _relative_tensors(relative: Relative | None, q: Tensor) -> tuple[Tensor, Tensor]:
    return (q, q) if relative is None else (relative.height, relative.width)


def _windows(relative: Relative | None) -> dict[str, int]:
    if relative is None:
        return {"WIN_H": 0, "WIN_W": 0}
    return {"WIN_H": relative.height.shape[-1], "WIN_W": relative.width.shape[-1]}


@dataclass(frozen=True)
class Gradients:
    """Gradients of q, k, v, of the bias, and of the relative logits (None where there are none)."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    relative: tuple[Tensor, Tensor] | None


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
    q, k, v, grad, out = _unit(q), _unit(k), _unit(v), _unit(grad), out.contiguous()
    batch, heads = q.shape[0], q.shape[3]
    dq, dk, dv = into or tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dbias = None if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format)
    drel = None if relative is None else (torch.empty_like(relative.height), torch.empty_like(relative.width))
    if out.numel() == 0:
        return Gradients(dq.zero_(), dk.zero_(), dv.zero_(), dbias, drel)
    delta = torch.empty_like(lse)
    bias_size = None if bias is None else (bias.shape[1], bias.shape[2])
    dim = max(q.shape[-1], v.shape[-1])
    axes = (height, width)

    def rows(config: Config) -> None:
        layout = _layout(height, width, config, bias_size, False, q.device)
        table = _table(layout, bias)
        grid, groups, images = _grid(layout, batch, heads)
        windows = _windows(relative)
        rows_kernel[grid](
            q, k, v, out, grad, lse, delta, dq, table, *_relative_tensors(relative, q), *(drel or (q, q)),
            **_shape_arguments(q, k, v, layout, height, width), **_stride_arguments(q=q, k=k, v=v, do=grad, dq=dq),
            classes_w=len(layout.plan.axes[1].spans), table_heads=table.shape[0], scale=scale * _LOG2E,
            groups=groups, images=images, **windows, MASK=mask,
            BLOCK_WIN=max(16, triton.next_power_of_2(max(windows.values()))),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if bias is not None and dbias is not None:
            _bias_gradient(layout, config, table, dbias, q, k, v, grad, lse, delta, height, width, scale)

    def columns(config: Config) -> None:
        layout = _layout(height, width, config, bias_size, True, q.device)
        table = _table(layout, bias)
        grid, groups, images = _grid(layout, batch, heads)
        columns_kernel[grid](
            q, k, v, grad, lse, delta, dk, dv, table, *_relative_tensors(relative, q),
            **_shape_arguments(q, k, v, layout, height, width),
            **_stride_arguments(q=q, k=k, v=v, do=grad, dk=dk, dv=dv),
            classes_w=len(layout.plan.axes[1].spans), table_heads=table.shape[0], scale=scale * _LOG2E,
            groups=groups, images=images, **_windows(relative), **_window_rule(relative),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    _launch(kind, "rows", q, v, axes, bias_size, _backward_configs(dim, _area(height, width, False)), rows)
    _launch(kind, "columns", q, v, axes, bias_size, _backward_configs(dim, _area(height, width, True)), columns)
    return Gradients(dq, dk, dv, dbias, drel)


def _backward_configs(dim: int, area: int) -> list[Config]:
    return [replace(c, columns=min(c.columns, 64), stages=1) for c in _configs(dim, area)]


def _window_rule(relative: Relative | None) -> dict[str, int]:
    rule = relative or Relative(*(torch.empty(0),) * 2, (1, 1), (0, 0), (1, 1))
    return {
        f"win_{name}_{axis}": getattr(rule, name)[i]
        for name in ("block", "halo", "stride")
        for i, axis in enumerate("hw")
    }


def _bias_gradient(
    layout: _Layout,
    config: Config,
    table: Tensor,
    dbias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    height: Axis,
    width: Axis,
    scale: float,
) -> None:
    """Sum ds per tile class in a fixed order, then gather what each bias entry received."""
    laid = layout.plan
    heads, classes = q.shape[3], laid.index.shape[0]
    work = q.shape[0] * laid.member_tiles.shape[0]
    splits = max(1, min(_MOST_SPLITS, -(-2048 // (heads * classes * layout.chunks)), work))
    partial = torch.empty((splits, heads, *laid.index.shape), dtype=torch.float32, device=q.device)
    bias_gradient_kernel[(splits * classes * layout.chunks, heads)](
        q, k, v, grad, lse, delta, partial, table,
        **{n: a for n, a in _shape_arguments(q, k, v, layout, height, width).items()},
        **_stride_arguments(q=q, k=k, v=v, do=grad),
        members_ptr=laid.members, member_tiles_ptr=laid.member_tiles,
        table_heads=table.shape[0], scale=scale * _LOG2E, splits=splits,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    flat = torch.cat([partial.sum(0).flatten(1), partial.new_zeros(heads, 1)], 1)
    dbias.copy_(flat[:, laid.inverse].sum(-1).view_as(dbias))
