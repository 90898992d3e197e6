"""The public function: argument checks, registration with torch.library, choice of the path."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.types import Number

from zoo.ops._backend import resolve_backend, run_reference, runs_triton, without_triton
from zoo.ops._checks import check_agreement, check_layout, check_table, compute_dtype, require, resolve_scale
from zoo.ops._overrides import overridable
from zoo.ops._register import call, empty, pair_flops, register_pair

from .cpu import halo_attention_backward_cpu, halo_attention_cpu
from .reference import halo_attention_reference

__all__ = ["halo_attention"]

_NAME = "halo_attention"


@overridable
def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    halo_size: int,
    *,
    rel_height: Tensor | None = None,
    rel_width: Tensor | None = None,
    border: str = "zero",
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Blocked local attention with a halo, and relative position logits.

    The map is cut into blocks of block_size x block_size. The queries of a block see the keys of that block and of
    halo_size pixels around it: a window of `window = block_size + 2 * halo_size` pixels a side. With
    i, j the position of the query in its block and y, x that of the key in the window, the logit is
    `scale * q.k + q.rel_height[y - i + window - 1] + q.rel_width[x - j + window - 1]`.

    A q of a smaller map means strided queries: with stride s (a divisor of block_size) q has ceil(H / s) rows and
    ceil(W / s) columns, and a block holds block_size // s queries a side; i and j count queries, not pixels.

    H and W need not be multiples of block_size: the blocks start at the top left, and the last ones hang over the map.
    Keys outside the map follow `border`, whether they lie in the halo or in the overhang.

    Scaling Local Self-Attention for Parameter Efficient Visual Backbones (arXiv:2103.12731), section 2.2; border
    "zero" is timm/layers/halo_attn.py, border "mask" is lucidrains/halonet-pytorch (as corrected by its PR 6).

    Args:
        q: [B, Hq, Wq, heads, dim], on the map of k or on a strided one.
        k: [B, H, W, heads, dim].
        v: [B, H, W, heads, dim_v]; dim_v may differ from dim.
        block_size: side of a block, in pixels of k.
        halo_size: pixels added on each side of a block, 0 or more.
        rel_height: [2 * window - 1, dim] or None, shared by all heads, applied to the unscaled q.
        rel_width: as rel_height.
        border: "zero": keys and values outside the map are zero, and take part in the softmax with their relative
            position logit; "mask": they are left out of it.
        scale: factor of q.k, dim ** -0.5 by default.
        backend: "reference", "cpu", "triton" or None for the best that can run.

    Returns:
        [B, Hq, Wq, heads, dim_v], contiguous, in the dtype of q.

    Raises:
        ValueError: a shape, dtype, size or border does not fit; the message names it.
        RuntimeError: the named backend cannot run this call.
    """
    require(border in ("zero", "mask"), _NAME, "border must be 'zero' or 'mask', got {!r}", border)
    for name, value, least in (("block_size", block_size, 1), ("halo_size", halo_size, 0)):
        fits = isinstance(value, int) and value >= least
        require(fits, _NAME, "{} must be an int >= {}, got {!r}", name, least, value)
    tensors = (q, k, v, rel_height, rel_width)
    stride = _check(_NAME, *tensors, block_size, halo_size)
    settings = (block_size, halo_size, stride, border == "mask", resolve_scale(scale, q.shape[-1]))
    backend = resolve_backend(_NAME, backend, q, without_triton(q))
    if backend == "reference":
        return run_reference(halo_attention_reference, *tensors, *settings)
    out: Tensor = call(_NAME, *tensors, *settings, backend)[0]
    return out


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor | None, rel_width: Tensor | None,
    block_size: int, halo_size: int, stride: int | None = None, *_: Any,
) -> int:  # fmt: skip
    """Raise unless the arguments fit; the stride of the queries, which is the one that a call names."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_layout(op, name, x, "[B, H, W, heads, dim]")
    require(q.shape[0] == k.shape[0], op, "q has batch {}, k has {}", q.shape[0], k.shape[0])
    fits = q.shape[3:] == k.shape[3:]
    require(fits, op, "q has (heads, dim) {}, k has {}", q.shape[3:], k.shape[3:])
    fits = v.shape[:4] == k.shape[:4]
    require(fits, op, "v has [B, H, W, heads] {}, k has {}", v.shape[:4], k.shape[:4])
    shape = (2 * (block_size + 2 * halo_size) - 1, q.shape[-1])
    for name, table in (("rel_height", rel_height), ("rel_width", rel_width)):
        check_table(op, name, table, "[2 * window - 1, dim]", shape)
    check_agreement(op, {"q": q}, k=k, v=v, rel_height=rel_height, rel_width=rel_width)
    found = _stride(q, k, block_size)
    require(stride in (None, found), op, "the maps of q and k have stride {}, got {}", found, stride)
    return found


def _stride(q: Tensor, k: Tensor, block_size: int) -> int:
    """The divisor of block_size that takes k's map to q's. Where several do, one block holds all: they are equal."""
    (rows, cols), (height, width) = q.shape[1:3], k.shape[1:3]
    strides = [s for s in range(1, block_size + 1) if block_size % s == 0]
    # sizes that are symbols are compared only if that must be
    for holds in (statically_known_true, bool) if torch.compiler.is_compiling() else (bool,):
        for stride in strides:
            if holds((height - 1) // stride + 1 == rows) and holds((width - 1) // stride + 1 == cols):
                return stride
    raise ValueError(
        f"{_NAME}: q has the map {tuple(q.shape[1:3])}, k has {tuple(k.shape[1:3])}; q must be of the same size, or of "
        f"ceil(size / stride) for a stride that divides block_size {block_size}"
    )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor | None, rel_width: Tensor | None,
    block_size: int, halo_size: int, stride: int, mask_border: bool, scale: Number, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    arguments = (q, k, v, rel_height, rel_width, block_size, halo_size, stride, mask_border, scale)
    if runs_triton(_NAME, backend, q):
        from .kernels import halo_attention_triton

        return halo_attention_triton(*arguments)
    return halo_attention_cpu(*arguments)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor | None, rel_width: Tensor | None,
    out: Tensor, lse: Tensor,
    block_size: int, halo_size: int, stride: int, mask_border: bool, scale: Number, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (grad, q, k, v, rel_height, rel_width)
    if runs_triton(_NAME, backend, q):
        from .kernels import halo_attention_backward_triton

        return halo_attention_backward_triton(*tensors, out, lse, block_size, halo_size, stride, mask_border, scale)
    return halo_attention_backward_cpu(*tensors, block_size, halo_size, stride, mask_border, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=compute_dtype(q))


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tables = (q.new_empty((0, q.shape[-1]) if t is None else t.shape) for t in arguments[:2])
    return empty(q), empty(k), empty(v), *tables


def _flops(q: Any, v: Any, rel_height: Any, rel_width: Any, block_size: int, halo_size: int) -> int:
    window = block_size + 2 * halo_size
    tables = sum(2 * math.prod(q) * window for table in (rel_height, rel_width) if table is not None)
    return pair_flops(q, window * window, v[-1]) + tables


register_pair(
    _NAME, _forward, _backward, _fake,
    backward_fake=_backward_fake,
    flops=_flops,
    shared=("rel_height", "rel_width"),
    check=_check,
)  # fmt: skip
