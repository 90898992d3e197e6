"""Neighborhood attention on the Triton core; one-dimensional sequences are maps of height 1."""

from collections.abc import Sequence

from torch import Tensor

from zoo.ops._local.geometry import Axis, full_axis, neighborhood_axis
from zoo.ops._local.launch import local_backward, local_forward

__all__ = ["neighborhood_attention_backward_triton", "neighborhood_attention_triton"]


def _axes(
    spatial: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
) -> tuple[Axis, Axis]:
    settings = zip(spatial, kernel_size, dilation, stride, is_causal, strict=True)
    axes = [neighborhood_axis(*(int(s) for s in setting[:4]), bool(setting[4])) for setting in settings]
    return (axes[0], axes[1]) if len(axes) == 2 else (full_axis(1), axes[0])


def _map(x: Tensor) -> Tensor:
    return x if x.dim() == 5 else x.unsqueeze(1)


def _bias(bias: Tensor | None) -> Tensor | None:
    return bias.unsqueeze(1) if bias is not None and bias.dim() == 2 else bias


def neighborhood_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, *spatial, heads, dim_v] and log-sum-exp [B, *spatial, heads]."""
    axes = _axes(q.shape[1:-2], kernel_size, dilation, stride, is_causal)
    out, lse = local_forward(_map(q), _map(k), _map(v), _bias(bias), *axes, scale, kind="neighborhood")
    return (out, lse) if q.dim() == 5 else (out.squeeze(1), lse.squeeze(1))


def neighborhood_attention_backward_triton(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    *,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and of the bias; `into` names tensors that receive the first three."""
    axes = _axes(q.shape[1:-2], kernel_size, dilation, stride, is_causal)
    targets = None if into is None else (_map(into[0]), _map(into[1]), _map(into[2]))
    maps = (_map(grad), _map(q), _map(k), _map(v), _bias(bias), _map(out), lse if q.dim() == 5 else lse.unsqueeze(1))
    grads = local_backward(*maps, *axes, scale, into=targets, kind="neighborhood")
    dbias = None if bias is None or grads.bias is None else grads.bias.view_as(bias)
    if q.dim() == 5:
        return grads.q, grads.k, grads.v, dbias
    return grads.q.squeeze(1), grads.k.squeeze(1), grads.v.squeeze(1), dbias
