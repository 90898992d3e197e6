"""Window attention: the public functions, their checks, and registration with torch.library."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.types import Number

from zoo.ops._backend import resolve_backend, run_reference, runs_triton, without_triton
from zoo.ops._checks import (
    check_agreement,
    check_layout,
    check_table,
    compute_dtype,
    pair,
    require,
    resolve_scale,
    unpack,
)
from zoo.ops._overrides import overridable
from zoo.ops._register import call, empty, pair_flops, register_qkv

from . import cpu, reference

__all__ = ["window_attention", "window_attention_qkvpacked"]

_NAME = "window_attention"
_PACKED = "window_attention_qkvpacked"


@overridable
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | Sequence[int],
    *,
    shift: int | Sequence[int] = 0,
    grid: bool = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention inside the windows of an image; every token attends to the tokens of its own window.

    Blocks (arXiv:2103.14030, Swin): aligned windows of `window_size`. With a `shift`, the windows of Swin's cyclic
    shift under Swin's region mask: windows start at the shift, and tokens from opposite sides of the image do not see
    each other. Grids (arXiv:2204.01697, MaxViT): `grid=True` puts the tokens with equal position modulo
    ceil(H / window) together, so a group is a grid of `window_size` tokens spread over the image. H and W may have
    any size: the image is padded at the bottom and right, and padding is never attended to.

    Args:
        q, k, v: [B, H, W, heads, dim], any strides, float16, bfloat16, float32 or float64.
        window_size: tokens of a window (or grid), one number or (height, width).
        shift: offset of the first whole window, 0 <= shift < window_size, one number or (height, width); blocks only.
        grid: strided grids in place of blocks.
        bias: relative position bias [heads, 2 * window_height - 1, 2 * window_width - 1], indexed by key - query
            position in the window, centre first: element [h, wh - 1, ww - 1] is a token's bias to itself.
        scale: factor of q @ k, dim ** -0.5 by default.
        backend: "reference", "cpu", "triton", or None to choose by the device.

    Returns:
        [B, H, W, heads, dim], contiguous, of q's dtype.

    Raises:
        ValueError: an argument does not fit; the message names it and its value.
        RuntimeError: the backend that was named cannot run this call.
    """
    sizes = _sizes(_NAME, window_size, shift)
    factor = resolve_scale(scale, q.shape[-1])
    _check(_NAME, q, k, v, bias, *sizes, grid)
    path = resolve_backend(_NAME, backend, q, without_triton(q))
    if path == "reference":
        return run_reference(reference.window_attention, q, k, v, bias, sizes[:2], sizes[2:], grid, factor)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return call("window_attention", q, k, v, bias, *sizes, grid, factor, path)[0]


@overridable
def window_attention_qkvpacked(
    qkv: Tensor,
    window_size: int | Sequence[int],
    *,
    shift: int | Sequence[int] = 0,
    grid: bool = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`window_attention` on one tensor qkv [B, H, W, 3, heads, dim], whose gradient comes back as one tensor too.

    All other arguments, the result [B, H, W, heads, dim] and the errors are those of `window_attention`.
    """
    q, k, v = unpack(_PACKED, qkv, "[B, H, W, 3, heads, dim]")
    sizes = _sizes(_PACKED, window_size, shift)
    factor = resolve_scale(scale, qkv.shape[-1])
    _check(_PACKED, q, k, v, bias, *sizes, grid)
    path = resolve_backend(_PACKED, backend, qkv, without_triton(qkv))
    if path == "reference":
        return run_reference(reference.window_attention, q, k, v, bias, sizes[:2], sizes[2:], grid, factor)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    return call("window_attention_qkvpacked", qkv, bias, *sizes, grid, factor, path)[0]


def _sizes(op: str, window_size: int | Sequence[int], shift: int | Sequence[int]) -> tuple[int, int, int, int]:
    return *pair(op, "window_size", window_size), *pair(op, "shift", shift, least=0)


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    window_h: int, window_w: int, shift_h: int, shift_w: int, grid: bool, *_: Any,
) -> None:  # fmt: skip
    window, shift = (window_h, window_w), (shift_h, shift_w)
    check_layout(op, "q", q, "[B, H, W, heads, dim]")
    for name, x in (("k", k), ("v", v)):
        require(x.shape == q.shape, op, "{} must have q's shape {}, got {}", name, q.shape, x.shape)
    check_agreement(op, {"q": q}, k=k, v=v)
    check_agreement(op, {"q": q}, dtypes=False, bias=bias)
    require(shift_h < window_h and shift_w < window_w, op, "shift must be below window_size {}, got {}", window, shift)
    require(not (grid and any(shift)), op, "shift must be 0 when grid is True, got {}", shift)
    shape = (q.shape[3], 2 * window_h - 1, 2 * window_w - 1)
    check_table(op, "bias", bias, "[heads, 2 * window_height - 1, 2 * window_width - 1]", shape)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    window_h: int, window_w: int, shift_h: int, shift_w: int, grid: bool, scale: Number, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = (window_h, window_w), (shift_h, shift_w)
    if runs_triton(_NAME, backend, q):
        from .kernels import window_attention_triton

        return window_attention_triton(q, k, v, bias, *sizes, grid, scale)
    return cpu.forward(q, k, v, bias, *sizes, grid, scale)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    window_h: int, window_w: int, shift_h: int, shift_w: int, grid: bool, scale: Number, backend: str,
    into: tuple[Tensor, Tensor, Tensor],
) -> Tensor | None:  # fmt: skip
    options = (window_h, window_w), (shift_h, shift_w), grid, scale, into
    if runs_triton(_NAME, backend, q):
        from .kernels import window_attention_backward_triton

        return window_attention_backward_triton(grad, q, k, v, bias, out, lse, *options)[3]
    return cpu.backward(grad, q, k, v, bias, *options)


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty(q), q.new_empty(q.shape[:-1], dtype=compute_dtype(q))


register_qkv(
    _NAME, _forward, _backward, _fake,
    flops=lambda q, v, window_h, window_w: pair_flops(q, window_h * window_w, v[-1]),
    per_head=("bias",),
    check=_check,
)  # fmt: skip
