"""Channel attention: the public functions, their checks, and registration with torch.library."""

import torch
from torch import Tensor

from zoo.ops._dispatch import register_op, require, resolve_backend, resolve_scale, runs_triton, without_triton

from . import cpu, reference

__all__ = ["channel_attention", "channel_attention_qkvpacked"]

_NAME = "channel_attention"


def channel_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Attention between the channels of a head, over all positions (DaViT, arXiv:2204.03645, section 3.2).

    The map is A = softmax(scale * k^T v), [dim, dim] with the softmax over its last axis, and the output q A^T. Which
    tensor plays which part is that of the published code (dingmyu/davit, ChannelAttention): k and v make the map, q
    is what it mixes. The second version of the block (Florence-2, arXiv:2311.06242) makes the map of q and k and
    mixes v: `channel_attention(v, q, k, scale=N**-0.5)`.

    Args:
        q, k, v: [B, N, heads, dim], any strides, float16, bfloat16, float32 or float64.
        scale: factor of k^T v, dim ** -0.5 by default.
        backend: "reference", "cpu", "triton", or None to choose by the device.

    Returns:
        [B, N, heads, dim], contiguous, of q's dtype.

    Raises:
        ValueError: an argument does not fit; the message names it and its value.
        RuntimeError: the backend that was named cannot run this call.
    """
    name = "channel_attention"
    require(q.ndim == 4, f"{name}: q must be [B, N, heads, dim], got shape {tuple(q.shape)}")
    for label, x in (("k", k), ("v", v)):
        require(x.shape == q.shape, f"{name}: {label} must have q's shape {tuple(q.shape)}, got {tuple(x.shape)}")
        require(x.dtype == q.dtype, f"{name}: {label} must have q's dtype {q.dtype}, got {x.dtype}")
        require(x.device == q.device, f"{name}: {label} must be on q's device {q.device}, got {x.device}")
    _check(name, q)
    path = resolve_backend(name, backend, q, without_triton(q))
    factor = resolve_scale(scale, q.shape[-1])
    if path == "reference":
        return reference.channel_attention(q, k, v, factor)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return torch.ops.zoo.channel_attention(q, k, v, factor, path)[0]


def channel_attention_qkvpacked(qkv: Tensor, *, scale: float | None = None, backend: str | None = None) -> Tensor:
    """`channel_attention` on one tensor qkv [B, N, 3, heads, dim], whose gradient comes back as one tensor too.

    All other arguments, the result [B, N, heads, dim] and the errors are those of `channel_attention`.
    """
    name = "channel_attention_qkvpacked"
    require(
        qkv.ndim == 5 and qkv.shape[2] == 3, f"{name}: qkv must be [B, N, 3, heads, dim], got shape {tuple(qkv.shape)}"
    )
    _check(name, qkv)
    path = resolve_backend(name, backend, qkv, without_triton(qkv))
    factor = resolve_scale(scale, qkv.shape[-1])
    if path == "reference":
        q, k, v = qkv.unbind(2)
        return reference.channel_attention(q, k, v, factor)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    return torch.ops.zoo.channel_attention_qkvpacked(qkv, factor, path)[0]


def _check(name: str, x: Tensor) -> None:
    require(x.is_floating_point(), f"{name}: the tensors must be floating point, got {x.dtype}")
    require(min(x.shape[1:]) > 0, f"{name}: only the batch may be empty, got shape {tuple(x.shape)}")


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    if runs_triton(_NAME, backend, q):
        from .kernels import channel_forward_triton

        return channel_forward_triton(q, k, v, scale)
    return cpu.forward(q, k, v, scale)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, maps: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    grads = (_empty(q), _empty(q), _empty(q))
    _backward_into(grad, q, k, v, maps, scale, backend, grads)
    return grads


def _backward_into(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: Tensor,
    scale: float,
    backend: str,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    if runs_triton(_NAME, backend, q):
        from .kernels import channel_backward_triton

        channel_backward_triton(grad, q, k, v, maps, scale, into)
    else:
        cpu.backward(grad, q, k, v, maps, scale, into)


def _forward_packed(qkv: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return _forward(q, k, v, scale, backend)


def _backward_packed(grad: Tensor, qkv: Tensor, maps: Tensor, scale: float, backend: str) -> Tensor:
    dqkv = _empty(qkv)
    q, k, v = qkv.unbind(2)
    dq, dk, dv = dqkv.unbind(2)
    _backward_into(grad, q, k, v, maps, scale, backend, (dq, dk, dv))
    return dqkv


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, heads, dim = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _empty(q), torch.empty((batch, heads, dim, dim), dtype=dtype, device=q.device)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, scale, backend = inputs
    ctx.options = (scale, backend)
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx, grad: Tensor, grad_maps: Tensor):
    *tensors, maps = ctx.saved_tensors
    if len(tensors) == 3:
        return (*torch.ops.zoo.channel_attention_backward(grad, *tensors, maps, *ctx.options), None, None)
    return torch.ops.zoo.channel_attention_qkvpacked_backward(grad, *tensors, maps, *ctx.options), None, None


register_op(
    "channel_attention(Tensor q, Tensor k, Tensor v, float scale, str backend) -> (Tensor, Tensor)",
    _forward,
    lambda q, k, v, *options: _fake(q),
    setup_context=_setup_context,
    backward=_autograd,
)
register_op(
    "channel_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor maps, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, q, *rest: (_empty(q), _empty(q), _empty(q)),
    autocast=False,
)
register_op(
    "channel_attention_qkvpacked(Tensor qkv, float scale, str backend) -> (Tensor, Tensor)",
    _forward_packed,
    lambda qkv, *options: _fake(qkv.select(2, 0)),
    setup_context=_setup_context,
    backward=_autograd,
)
register_op(
    "channel_attention_qkvpacked_backward(Tensor grad, Tensor qkv, Tensor maps, float scale, str backend) -> Tensor",
    _backward_packed,
    lambda grad, qkv, *rest: _empty(qkv),
    autocast=False,
)
