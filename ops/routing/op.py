"""`routing_attention` and `routing_index`: argument checks, registration with torch.library, choice of path."""

from typing import Any

import torch
from torch import Tensor

from zoo.ops._dispatch import (
    autocast_dtype,
    register_op,
    require,
    resolve_backend,
    resolve_scale,
    runs_triton,
    without_triton,
)

from . import cpu, reference
from .layout import Pair, grid_size

__all__ = ["routing_attention", "routing_index"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: int | tuple[int, int],
    topk: int,
    *,
    scale: float | None = None,
    index: Tensor | None = None,
    padding: str = "none",
    return_index: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Bi-level routing attention: each region's queries attend to all tokens of the `topk` regions nearest to it.

    Which regions those are is decided once for all heads, by the inner product of the regions' mean query and mean
    key (see `routing_index`); no gradient flows through that choice.

    Args:
        q: queries [B, H, W, heads, dim].
        k: keys [B, H, W, heads, dim], or [B, Hk, Wk, heads, dim] with `index` given: each of the regions then holds
            Hk / rows x Wk / cols keys (the original's pooling of keys inside a region, `kv_downsample_mode`).
        v: values, of k's size; their dim may differ from that of q and k.
        regions: number of regions per axis, one for both axes or (rows, cols).
        topk: number of regions that every region attends to, 1 .. number of regions.
        scale: factor of the logits; default (heads * dim) ** -0.5, the full width as in BiFormer, not the head's.
        index: [B, R, topk] integers, region numbers in row-major order, instead of the routing. A region that is
            named twice counts twice.
        padding: what happens where `regions` does not divide H and W.
            "none": that is an error; pad the input of the projection beforehand, as BiFormer does.
            "zero": regions are H // rows x W // cols tokens (at least 1 x 1), as many as cover the map, which can be
            more than `regions` asks for. Keys and values outside the map are zero and DO enter the softmax, with
            logit 0 (BiFormer's NCHW form).
        return_index: return (output, index) instead of the output alone.
        backend: "reference", "cpu" or "triton"; None chooses.

    Returns:
        [B, H, W, heads, dim of v] in the dtype of q (of autocast inside an autocast region).

    Raises:
        ValueError: an argument does not fit; the message names it.
        IndexError: `index` names a region outside the map (tensors on a CPU only).
        RuntimeError: the named backend cannot run here.

    Source: BiFormer (arXiv:2303.08810) section 3.2; ops/bra_legacy.py and ops/bra_nchw.py of rayleizhu/BiFormer.
    """
    op = "routing_attention"
    region = _check(op, q, k, regions, topk, padding, same_size=index is None)
    require(v.dim() == 5, f"{op}: v must be [B, H, W, heads, dim], got shape {tuple(v.shape)}")
    require(
        v.shape[:4] == k.shape[:4],
        f"{op}: v must agree with k in all but the last axis, got {tuple(v.shape)} and {tuple(k.shape)}",
    )
    require(_agrees(v, q), f"{op}: v is {v.dtype} on {v.device}, {_place(q)}")
    backend = resolve_backend(op, backend, q, without_triton(q))
    factor = resolve_scale(scale, q.shape[3] * q.shape[4])

    if index is None:
        index = _index(q, k, region, topk, backend)
    else:
        rows, cols = grid_size(q, region)
        require(
            index.dim() == 3 and tuple(index.shape) == (q.shape[0], rows * cols, topk),
            f"{op}: index must be [B, R, topk] = {(q.shape[0], rows * cols, topk)}, got {tuple(index.shape)}",
        )
        require(index.dtype in (torch.int32, torch.int64), f"{op}: index must be int32 or int64, got {index.dtype}")
        require(index.device == q.device, f"{op}: index is on {index.device}, q on {q.device}")
        index = index.long()

    if backend == "reference":
        if not torch.compiler.is_compiling():
            cpu.check_range(index)
        dtype = autocast_dtype(q)
        if dtype is not None and q.dtype != torch.float64:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        out, _ = reference.routing_attention(q, k, v, index, region, factor)
    else:
        out, _ = _attention_op(q, k, v, index, region[0], region[1], factor, backend)
    return (out, index) if return_index else out


def routing_index(
    q: Tensor,
    k: Tensor,
    regions: int | tuple[int, int],
    topk: int,
    *,
    padding: str = "none",
    backend: str | None = None,
) -> Tensor:
    """The key regions that `routing_attention` picks for every query region, best first.

    Args: as for `routing_attention`. The affinity of two regions is the inner product over heads * dim of the mean
        query and the mean key of the tokens inside the map, in float32 (float64 for float64), also under autocast.

    Returns:
        [B, R, topk] int64, regions numbered row by row. Of two equal affinities the lower region number comes first.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend cannot run here.
    """
    region = _check("routing_index", q, k, regions, topk, padding, same_size=True)
    return _index(q, k, region, topk, resolve_backend("routing_index", backend, q, without_triton(q)))


def _index(q: Tensor, k: Tensor, region: Pair, topk: int, backend: str) -> Tensor:
    q, k = q.detach(), k.detach()
    if backend == "reference":
        return reference.routing_index(q, k, region, topk)
    index: Tensor = _index_op(q, k, region[0], region[1], topk, backend)
    return index


def _check(
    op: str, q: Tensor, k: Tensor, regions: int | tuple[int, int], topk: int, padding: str, same_size: bool
) -> Pair:
    """Check what both functions take; the size of a region."""
    for name, x in (("q", q), ("k", k)):
        require(x.dim() == 5, f"{op}: {name} must be [B, H, W, heads, dim], got shape {tuple(x.shape)}")
    require(q.dtype in _DTYPES, f"{op}: q has dtype {q.dtype}; float16, bfloat16, float32 and float64 are supported")
    require(_agrees(k, q), f"{op}: k is {k.dtype} on {k.device}, {_place(q)}")
    require(
        q.shape[0] == k.shape[0] and q.shape[3:] == k.shape[3:],
        f"{op}: q and k must agree in batch, heads and dim, got {tuple(q.shape)} and {tuple(k.shape)}",
    )
    height, width = q.shape[1], q.shape[2]
    require(
        height > 0 and width > 0 and q.shape[3] > 0 and q.shape[4] > 0,
        f"{op}: q must not be empty except in its batch, got shape {tuple(q.shape)}",
    )
    rows, cols = (regions, regions) if isinstance(regions, int) else regions
    require(rows > 0 and cols > 0, f"{op}: regions must be positive, got {regions}")
    require(padding in ("none", "zero"), f"{op}: padding must be 'none' or 'zero', got {padding!r}")
    if padding == "none":
        require(
            height % rows == 0 and width % cols == 0,
            f"{op}: regions {rows} x {cols} do not divide the map {height} x {width}; "
            f"pad it to a multiple or pass padding='zero'",
        )
    region = (max(height // rows, 1), max(width // cols, 1))
    rows, cols = grid_size(q, region)
    require(0 < topk <= rows * cols, f"{op}: topk must be in 1..{rows * cols}, the number of regions, got {topk}")
    if q.shape[1:3] != k.shape[1:3]:
        require(
            not same_size,
            f"{op}: q and k must have the same size unless index is given, got {height} x {width} and "
            f"{k.shape[1]} x {k.shape[2]}",
        )
        require(
            k.shape[1] > 0 and k.shape[2] > 0 and k.shape[1] % rows == 0 and k.shape[2] % cols == 0,
            f"{op}: the {rows} x {cols} regions do not divide the key map {k.shape[1]} x {k.shape[2]}",
        )
    return region


def _agrees(x: Tensor, q: Tensor) -> bool:
    """One device, and one dtype unless autocast is going to see to that."""
    return x.device == q.device and (x.dtype == q.dtype or autocast_dtype(q) is not None)


def _place(q: Tensor) -> str:
    return f"q is {q.dtype} on {q.device}"


def _index_impl(q: Tensor, k: Tensor, region_height: int, region_width: int, topk: int, backend: str) -> Tensor:
    region = (region_height, region_width)
    if runs_triton("routing_index", backend, q):
        from .kernels import routing_index_triton, sorts_in_a_kernel

        if sorts_in_a_kernel(q, region):
            return routing_index_triton(q, k, region, topk)
    return cpu.routing_index(q, k, region, topk)


def _index_fake(q: Tensor, k: Tensor, region_height: int, region_width: int, topk: int, backend: str) -> Tensor:
    rows, cols = grid_size(q, (region_height, region_width))
    return q.new_empty((q.shape[0], rows * cols, topk), dtype=torch.int64)


def _attention_impl(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, region_height: int, region_width: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if runs_triton("routing_attention", backend, q):
        from .kernels import routing_forward_triton

        return routing_forward_triton(q, k, v, index, (region_height, region_width), scale)
    return cpu.forward(q, k, v, index, (region_height, region_width), scale)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, region_height: int, region_width: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:4], v.shape[4])), q.new_empty(q.shape[:4], dtype=wide)


def _backward_impl(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    region_height: int,
    region_width: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if runs_triton("routing_attention", backend, q):
        from .kernels import routing_backward_triton

        return routing_backward_triton(grad, q, k, v, index, out, lse, (region_height, region_width), scale)
    return cpu.backward(grad, q, k, v, index, out, lse, (region_height, region_width), scale)


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.region_height, ctx.region_width, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, index, out, lse = ctx.saved_tensors
    grads = _backward_op(
        grad.contiguous(), q, k, v, index, out, lse, ctx.region_height, ctx.region_width, ctx.scale, ctx.backend
    )
    return (*grads, None, None, None, None, None)


_index_op = register_op(
    "routing_index(Tensor q, Tensor k, SymInt region_height, SymInt region_width, SymInt topk, str backend) -> Tensor",
    _index_impl,
    _index_fake,
    autocast=False,
)
_attention_op = register_op(
    "routing_attention(Tensor q, Tensor k, Tensor v, Tensor index, SymInt region_height, SymInt region_width, "
    "float scale, str backend) -> (Tensor, Tensor)",
    _attention_impl,
    _attention_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = register_op(
    "routing_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor index, Tensor out, Tensor lse, "
    "SymInt region_height, SymInt region_width, float scale, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
    autocast=False,
)
