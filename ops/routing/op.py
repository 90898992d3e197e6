"""`routing_attention` and `routing_index`: argument checks, registration with torch.library, choice of path."""

from typing import Any

import torch
from torch import Tensor
from torch.types import Number

from zoo.ops._backend import resolve_backend, run_reference, runs_triton, without_triton
from zoo.ops._checks import check_agreement, check_layout, compute_dtype, pair, require, resolve_scale
from zoo.ops._overrides import overridable
from zoo.ops._register import call, pair_flops, register_op, register_pair

from . import cpu, reference
from .layout import Pair, grid_size

__all__ = ["routing_attention", "routing_index"]

_NAME = "routing_attention"
_INDEX = "routing_index"


@overridable
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
    region = _region(_NAME, q, regions, padding)
    if index is None:
        _check_index(_NAME, q, k, *region, topk)
    else:
        shape = (q.shape[0], _count(q, region), topk)
        fits = index.dim() == 3 and tuple(index.shape) == shape
        require(fits, _NAME, "index must be [B, R, topk] = {}, got {}", shape, index.shape)
    _check(_NAME, q, k, v, index, *region)
    backend = resolve_backend(_NAME, backend, q, without_triton(q))
    factor = resolve_scale(scale, q.shape[3] * q.shape[4])
    index = _index(q, k, region, topk, backend) if index is None else index.long()
    if backend == "reference":
        if not torch.compiler.is_compiling():
            cpu.check_range(index)
        out, _ = run_reference(reference.routing_attention, q, k, v, index, region, factor)
    else:
        out, _ = call("routing_attention", q, k, v, index, *region, factor, backend)
    return (out, index) if return_index else out


@overridable
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
    region = _region(_INDEX, q, regions, padding)
    _check_index(_INDEX, q, k, *region, topk)
    return _index(q, k, region, topk, resolve_backend(_INDEX, backend, q, without_triton(q)))


def _index(q: Tensor, k: Tensor, region: Pair, topk: int, backend: str) -> Tensor:
    q, k = q.detach(), k.detach()
    if backend == "reference":
        return reference.routing_index(q, k, region, topk)
    index: Tensor = call("routing_index", q, k, *region, topk, backend)
    return index


def _region(op: str, q: Tensor, regions: int | tuple[int, int], padding: str) -> Pair:
    """The size of a region."""
    check_layout(op, "q", q, "[B, H, W, heads, dim]")
    rows, cols = pair(op, "regions", regions)
    height, width = q.shape[1:3]
    require(padding in ("none", "zero"), op, "padding must be 'none' or 'zero', got {!r}", padding)
    if padding == "none":
        message = "regions {} x {} do not divide the map {} x {}; pad it to a multiple or pass padding='zero'"
        require(height % rows == 0 and width % cols == 0, op, message, rows, cols, height, width)
    return max(height // rows, 1), max(width // cols, 1)


def _count(q: Tensor, region: Pair) -> int:
    rows, cols = grid_size(q, region)
    return rows * cols


def _check_index(op: str, q: Tensor, k: Tensor, region_height: int, region_width: int, topk: int, *_: Any) -> None:
    _check_keys(op, q, k, region_height, region_width)
    message = "q and k must have the same size unless index is given, got {} x {} and {} x {}"
    require(q.shape[1:3] == k.shape[1:3], op, message, *q.shape[1:3], *k.shape[1:3])
    count = _count(q, (region_height, region_width))
    require(0 < topk <= count, op, "topk must be in 1..{}, the number of regions, got {}", count, topk)


def _check_keys(op: str, q: Tensor, k: Tensor, region_height: int, region_width: int) -> None:
    check_layout(op, "q", q, "[B, H, W, heads, dim]")
    check_layout(op, "k", k, "[B, H, W, heads, dim]")
    check_agreement(op, {"q": q}, k=k)
    fits = q.shape[0] == k.shape[0] and q.shape[3:] == k.shape[3:]
    require(fits, op, "q and k must agree in batch, heads and dim, got {} and {}", q.shape, k.shape)
    require(region_height > 0 and region_width > 0, op, "a region has {} x {} tokens", region_height, region_width)


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, index: Tensor | None, region_height: int, region_width: int, *_: Any
) -> None:
    _check_keys(op, q, k, region_height, region_width)
    check_layout(op, "v", v, "[B, H, W, heads, dim]")
    fits = v.shape[:4] == k.shape[:4]
    require(fits, op, "v must agree with k in all but the last axis, got {} and {}", v.shape, k.shape)
    check_agreement(op, {"q": q}, v=v)
    if index is None:
        return
    rows, cols = grid_size(q, (region_height, region_width))
    fits = index.dim() == 3 and index.shape[0] == q.shape[0] and index.shape[1] == rows * cols
    require(fits, op, "index must be [B, R, topk] = [{}, {}, topk], got {}", q.shape[0], rows * cols, index.shape)
    require(0 < index.shape[2] <= rows * cols, op, "topk must be in 1..{}, got {}", rows * cols, index.shape[2])
    fits = index.dtype in (torch.int32, torch.int64)
    require(fits, op, "index must be int32 or int64, got {}", index.dtype)
    check_agreement(op, {"q": q}, dtypes=False, index=index)
    if q.shape[1:3] != k.shape[1:3]:
        message = "the {} x {} regions do not divide the key map {} x {}"
        require(k.shape[1] % rows == 0 and k.shape[2] % cols == 0, op, message, rows, cols, *k.shape[1:3])


def _run_index(q: Tensor, k: Tensor, region_height: int, region_width: int, topk: int, backend: str) -> Tensor:
    region = (region_height, region_width)
    if runs_triton(_INDEX, backend, q):
        from .kernels import routing_index_triton, sorts_in_a_kernel

        if sorts_in_a_kernel(q, region):
            return routing_index_triton(q, k, region, topk)
    return cpu.routing_index(q, k, region, topk)


def _index_fake(q: Tensor, k: Tensor, region_height: int, region_width: int, topk: int, backend: str) -> Tensor:
    return q.new_empty((q.shape[0], _count(q, (region_height, region_width)), topk), dtype=torch.int64)


def _index_flops(q: Any, region_height: int, region_width: int) -> int:
    regions = -(-q[1] // region_height) * -(-q[2] // region_width)
    return 2 * q[0] * regions * regions * q[3] * q[4]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, region_height: int, region_width: int, scale: Number, backend: str
) -> tuple[Tensor, Tensor]:
    if runs_triton(_NAME, backend, q):
        from .kernels import routing_forward_triton

        return routing_forward_triton(q, k, v, index, (region_height, region_width), scale)
    return cpu.forward(q, k, v, index, (region_height, region_width), scale)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, out: Tensor, lse: Tensor,
    region_height: int, region_width: int, scale: Number, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad, region = grad.contiguous(), (region_height, region_width)
    if runs_triton(_NAME, backend, q):
        from .kernels import routing_backward_triton

        return routing_backward_triton(grad, q, k, v, index, out, lse, region, scale)
    return cpu.backward(grad, q, k, v, index, region, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:4], v.shape[4])), q.new_empty(q.shape[:4], dtype=compute_dtype(q))


def _flops(q: Any, v: Any, index: Any, region_height: int, region_width: int) -> int:
    return pair_flops(q, index[2] * region_height * region_width, v[-1])


register_op(_INDEX, _run_index, _index_fake, results=("index",), flops=_index_flops, check=_check_index)
register_pair(
    _NAME, _forward, _backward, _fake,
    gradients=("q", "k", "v"),
    flops=_flops,
    check=_check,
)  # fmt: skip
