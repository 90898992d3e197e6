"""Channel attention: the public functions, their checks, and registration with torch.library."""

import math
from typing import Any

from torch import Tensor
from torch.types import Number

from zoo.ops._backend import resolve_backend, run_reference, runs_triton, without_triton
from zoo.ops._checks import check_agreement, check_layout, compute_dtype, require, resolve_scale, unpack
from zoo.ops._overrides import overridable
from zoo.ops._register import call, empty, register_qkv

from . import cpu, reference

__all__ = ["channel_attention", "channel_attention_qkvpacked"]

_NAME = "channel_attention"
_PACKED = "channel_attention_qkvpacked"


@overridable
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
    _check(_NAME, q, k, v)
    path = resolve_backend(_NAME, backend, q, without_triton(q))
    factor = resolve_scale(scale, q.shape[-1])
    if path == "reference":
        return run_reference(reference.channel_attention, q, k, v, factor)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return call("channel_attention", q, k, v, factor, path)[0]


@overridable
def channel_attention_qkvpacked(qkv: Tensor, *, scale: float | None = None, backend: str | None = None) -> Tensor:
    """`channel_attention` on one tensor qkv [B, N, 3, heads, dim], whose gradient comes back as one tensor too.

    All other arguments, the result [B, N, heads, dim] and the errors are those of `channel_attention`.
    """
    q, k, v = unpack(_PACKED, qkv, "[B, N, 3, heads, dim]")
    path = resolve_backend(_PACKED, backend, qkv, without_triton(qkv))
    factor = resolve_scale(scale, qkv.shape[-1])
    if path == "reference":
        return run_reference(reference.channel_attention, q, k, v, factor)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    return call("channel_attention_qkvpacked", qkv, factor, path)[0]


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> None:
    check_layout(op, "q", q, "[B, N, heads, dim]")
    for name, x in (("k", k), ("v", v)):
        require(x.shape == q.shape, op, "{} must have q's shape {}, got {}", name, q.shape, x.shape)
    check_agreement(op, {"q": q}, k=k, v=v)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: Number, backend: str) -> tuple[Tensor, Tensor]:
    if runs_triton(_NAME, backend, q):
        from .kernels import channel_forward_triton

        return channel_forward_triton(q, k, v, scale)
    return cpu.forward(q, k, v, scale)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, maps: Tensor, scale: Number, backend: str,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    if runs_triton(_NAME, backend, q):
        from .kernels import channel_backward_triton

        channel_backward_triton(grad, q, k, v, maps, scale, into)
    else:
        cpu.backward(grad, q, k, v, maps, scale, into)


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, _n, heads, dim = q.shape
    return empty(q), q.new_empty((batch, heads, dim, dim), dtype=compute_dtype(q))


register_qkv(
    _NAME, _forward, _backward, _fake,
    outputs=("out", "maps"),
    flops=lambda q: 4 * math.prod(q) * q[-1],
    backward_flops=2,
    check=_check,
)  # fmt: skip
