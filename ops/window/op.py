"""Window attention: the public functions, their checks, and registration with torch.library."""

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.ops._dispatch import register_op, require, resolve_backend, resolve_scale, runs_triton, without_triton

from . import cpu, reference

__all__ = ["window_attention", "window_attention_qkvpacked"]

_NAME = "window_attention"


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
    name = "window_attention"
    require(q.ndim == 5, f"{name}: q must be [B, H, W, heads, dim], got shape {tuple(q.shape)}")
    for label, x in (("k", k), ("v", v)):
        require(x.shape == q.shape, f"{name}: {label} must have q's shape {tuple(q.shape)}, got {tuple(x.shape)}")
        require(x.dtype == q.dtype, f"{name}: {label} must have q's dtype {q.dtype}, got {x.dtype}")
        require(x.device == q.device, f"{name}: {label} must be on q's device {q.device}, got {x.device}")
    window, offset, factor = _checked(name, q, q.shape[3], window_size, shift, grid, bias, scale)
    path = resolve_backend(name, backend, q, without_triton(q))
    if path == "reference":
        return reference.window_attention(q, k, v, bias, window, offset, grid, factor)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return torch.ops.zoo.window_attention(q, k, v, bias, *window, *offset, grid, factor, path)[0]


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
    name = "window_attention_qkvpacked"
    require(
        qkv.ndim == 6 and qkv.shape[3] == 3,
        f"{name}: qkv must be [B, H, W, 3, heads, dim], got shape {tuple(qkv.shape)}",
    )
    window, offset, factor = _checked(name, qkv, qkv.shape[4], window_size, shift, grid, bias, scale)
    path = resolve_backend(name, backend, qkv, without_triton(qkv))
    if path == "reference":
        q, k, v = qkv.unbind(3)
        return reference.window_attention(q, k, v, bias, window, offset, grid, factor)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    return torch.ops.zoo.window_attention_qkvpacked(qkv, bias, *window, *offset, grid, factor, path)[0]


def _checked(
    name: str,
    x: Tensor,
    heads: int,
    window_size: int | Sequence[int],
    shift: int | Sequence[int],
    grid: bool,
    bias: Tensor | None,
    scale: float | None,
) -> tuple[tuple[int, int], tuple[int, int], float]:
    """The window, the shift and the scale in full, after the checks that both functions share."""
    require(x.is_floating_point(), f"{name}: the tensors must be floating point, got {x.dtype}")
    require(min(x.shape[1:]) > 0, f"{name}: only the batch may be empty, got shape {tuple(x.shape)}")
    window = _pair(name, "window_size", window_size)
    offset = _pair(name, "shift", shift)
    # messages are made where they are needed: torch 2.11 cannot trace one of a dynamic size
    if min(window) <= 0:
        raise ValueError(f"{name}: window_size must be positive, got {window_size}")
    if any(s < 0 or s >= w for s, w in zip(offset, window, strict=True)):
        raise ValueError(f"{name}: shift must be at least 0 and below window_size {window}, got {shift}")
    if grid and any(offset):
        raise ValueError(f"{name}: shift must be 0 when grid is True, got {shift}")
    if bias is not None:
        shape = (heads, 2 * window[0] - 1, 2 * window[1] - 1)
        if tuple(bias.shape) != shape:
            raise ValueError(
                f"{name}: bias must be [heads, 2 * window_height - 1, 2 * window_width - 1] = {shape}, "
                f"got {tuple(bias.shape)}"
            )
        require(bias.is_floating_point(), f"{name}: bias must be floating point, got {bias.dtype}")
        require(bias.device == x.device, f"{name}: bias must be on the device {x.device}, got {bias.device}")
    return window, offset, resolve_scale(scale, x.shape[-1])


def _pair(name: str, argument: str, value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    require(
        len(value) == 2 and all(isinstance(x, int) for x in value),
        f"{name}: {argument} must be one number or (height, width), got {value}",
    )
    return value[0], value[1]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    wh: int,
    ww: int,
    sh: int,
    sw: int,
    grid: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if runs_triton(_NAME, backend, q):
        from .kernels import window_attention_triton

        return window_attention_triton(q, k, v, bias, (wh, ww), (sh, sw), grid, scale)
    return cpu.forward(q, k, v, bias, (wh, ww), (sh, sw), grid, scale)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wh: int,
    ww: int,
    sh: int,
    sw: int,
    grid: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = (_empty(q), _empty(q), _empty(q))
    options = ((wh, ww), (sh, sw), grid, scale, grads)
    if runs_triton(_NAME, backend, q):
        from .kernels import window_attention_backward_triton

        dbias = window_attention_backward_triton(grad, q, k, v, bias, out, lse, *options)[3]
    else:
        dbias = cpu.backward(grad, q, k, v, bias, out, lse, *options)
    return *grads, q.new_empty(0) if dbias is None else dbias


def _forward_packed(
    qkv: Tensor, bias: Tensor | None, wh: int, ww: int, sh: int, sw: int, grid: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(3)
    return _forward(q, k, v, bias, wh, ww, sh, sw, grid, scale, backend)


def _backward_packed(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wh: int,
    ww: int,
    sh: int,
    sw: int,
    grid: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dqkv = _empty(qkv)
    dq, dk, dv = dqkv.unbind(3)
    q, k, v = qkv.unbind(3)
    options = ((wh, ww), (sh, sw), grid, scale, (dq, dk, dv))
    if runs_triton(_NAME, backend, qkv):
        from .kernels import window_attention_backward_triton

        dbias = window_attention_backward_triton(grad, q, k, v, bias, out, lse, *options)[3]
    else:
        dbias = cpu.backward(grad, q, k, v, bias, out, lse, *options)
    return dqkv, qkv.new_empty(0) if dbias is None else dbias


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _lse(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


def _bias_grad(q: Tensor, bias: Tensor | None) -> Tensor:
    return q.new_empty(0) if bias is None else _empty(bias)


def _setup_context(ctx, inputs, output) -> None:
    tensors = 4 if len(inputs) == 11 else 2
    ctx.tensors = tensors
    ctx.options = inputs[tensors:]
    ctx.save_for_backward(*inputs[:tensors], *output)


def _autograd(ctx, grad: Tensor, grad_lse: Tensor):
    saved = ctx.saved_tensors
    name = "window_attention_backward" if ctx.tensors == 4 else "window_attention_qkvpacked_backward"
    *grads, dbias = getattr(torch.ops.zoo, name)(grad, *saved, *ctx.options)
    bias = saved[ctx.tensors - 1]
    return (*grads, None if bias is None else dbias, *(None for _ in ctx.options))


_OPTIONS = "int window_h, int window_w, int shift_h, int shift_w, bool grid, float scale, str backend"

register_op(
    f"window_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    lambda q, k, v, bias, *options: (_empty(q), _lse(q)),
    setup_context=_setup_context,
    backward=_autograd,
)
register_op(
    "window_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, q, k, v, bias, *options: (_empty(q), _empty(q), _empty(q), _bias_grad(q, bias)),
    autocast=False,
)
register_op(
    f"window_attention_qkvpacked(Tensor qkv, Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward_packed,
    lambda qkv, bias, *options: (_empty(qkv.select(3, 0)), _lse(qkv.select(3, 0))),
    setup_context=_setup_context,
    backward=_autograd,
)
register_op(
    "window_attention_qkvpacked_backward(Tensor grad, Tensor qkv, Tensor? bias, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    _backward_packed,
    lambda grad, qkv, bias, *options: (_empty(qkv), _bias_grad(qkv, bias)),
    autocast=False,
)
