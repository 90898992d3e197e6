"""The public function: argument checks, registration with torch.library, choice of the path."""

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

from .cpu import halo_attention_backward_cpu, halo_attention_cpu
from .reference import halo_attention_reference

__all__ = ["halo_attention"]

_NAME = "halo_attention"
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? rel_height, Tensor? rel_width"
_SETTINGS = "int block_size, int halo_size, int stride, bool mask_border, float scale, str backend"


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
    stride = _check(q, k, v, block_size, halo_size, {"rel_height": rel_height, "rel_width": rel_width}, border)
    settings = (block_size, halo_size, stride, border == "mask", resolve_scale(scale, q.shape[-1]))
    backend = resolve_backend(_NAME, backend, q, without_triton(q))
    if backend == "reference":
        return halo_attention_reference(q, k, v, rel_height, rel_width, *settings)
    out: Tensor = _forward(q, k, v, rel_height, rel_width, *settings, backend)[0]
    return out


def _check(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, halo_size: int, tables: dict[str, Tensor | None], border: str
) -> int:
    """Raise unless the arguments fit; the stride of the queries."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        shape = tuple(x.shape)
        require(x.dim() == 5, f"{_NAME}: {name} must be [B, H, W, heads, dim], got shape {shape}")
        require(min(shape[1:]) > 0, f"{_NAME}: {name} must have sizes of at least 1, got shape {shape}")
        require(x.is_floating_point(), f"{_NAME}: {name} must be floating point, got {x.dtype}")
    require(q.shape[0] == k.shape[0], f"{_NAME}: q has batch {q.shape[0]}, k has {k.shape[0]}")
    fits = q.shape[3:] == k.shape[3:]
    require(fits, f"{_NAME}: q has (heads, dim) {tuple(q.shape[3:])}, k has {tuple(k.shape[3:])}")
    fits = v.shape[:4] == k.shape[:4]
    require(fits, f"{_NAME}: v has [B, H, W, heads] {tuple(v.shape[:4])}, k has {tuple(k.shape[:4])}")
    for name, value, least in (("block_size", block_size, 1), ("halo_size", halo_size, 0)):
        require(isinstance(value, int) and value >= least, f"{_NAME}: {name} must be an int >= {least}, got {value!r}")
    require(border in ("zero", "mask"), f"{_NAME}: border must be 'zero' or 'mask', got {border!r}")
    rows, dim = 2 * (block_size + 2 * halo_size) - 1, q.shape[-1]
    for name, table in tables.items():
        if table is not None:
            fits = tuple(table.shape) == (rows, dim)
            require(fits, f"{_NAME}: {name} must be [2 * window - 1, dim] = [{rows}, {dim}], got {tuple(table.shape)}")
    for name, tensor in {"k": k, "v": v, **tables}.items():
        if tensor is not None:
            require(tensor.device == q.device, f"{_NAME}: {name} is on {tensor.device}, q on {q.device}")
            same = tensor.dtype == q.dtype or autocast_dtype(q) is not None
            require(same, f"{_NAME}: {name} has dtype {tensor.dtype}, q has {q.dtype}")
    return _stride(q, k, block_size)


def _stride(q: Tensor, k: Tensor, block_size: int) -> int:
    """The divisor of block_size that takes k's map to q's. Where several do, one block holds all: they are equal."""
    for stride in range(1, block_size + 1):
        sizes = tuple(-(-size // stride) for size in k.shape[1:3])
        if block_size % stride == 0 and sizes == tuple(q.shape[1:3]):
            return stride
    raise ValueError(
        f"{_NAME}: q has the map {tuple(q.shape[1:3])}, k has {tuple(k.shape[1:3])}; q must be of the same size, or of "
        f"ceil(size / stride) for a stride that divides block_size {block_size}"
    )


def _forward_impl(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if runs_triton(_NAME, arguments[-1], q):
        from .kernels import halo_attention_triton

        return halo_attention_triton(q, k, v, *arguments[:-1])
    return halo_attention_cpu(q, k, v, *arguments[:-1])


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=wide)


def _backward_impl(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    if runs_triton(_NAME, arguments[-1], q):
        from .kernels import halo_attention_backward_triton

        return halo_attention_backward_triton(grad, q, k, v, *arguments[:-1])
    return halo_attention_backward_cpu(grad, q, k, v, *arguments[:-1])


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tables = (q.new_empty((0, q.shape[-1]) if t is None else t.shape) for t in arguments[:2])
    return *(x.new_empty(x.shape) for x in (q, k, v)), *tables


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.settings = inputs[5:]
    ctx.mark_non_differentiable(output[1])


def _backward_autograd(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *given, out, lse = ctx.saved_tensors
    grads = _backward(grad, *given, out, lse, *ctx.settings)
    return *(None if x is None else dx for dx, x in zip(grads, given, strict=True)), *(None,) * len(ctx.settings)


_backward = register_op(
    f"{_NAME}_backward(Tensor grad, {_TENSORS}, Tensor out, Tensor lse, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
    autocast=False,
)
_forward = register_op(
    f"{_NAME}({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
    setup_context=_setup_context,
    backward=_backward_autograd,
)
