"""Halo attention on the Triton core: tiles inside blocks against windows, and the embeddings of relative positions."""

from torch import Tensor

from zoo.ops._local.geometry import Axis, halo_axis
from zoo.ops._local.launch import Relative, local_backward, local_forward

__all__ = ["halo_attention_backward_triton", "halo_attention_triton"]


def _axes(k: Tensor, block_size: int, halo_size: int, stride: int) -> tuple[Axis, Axis]:
    height, width = (halo_axis(size, block_size, halo_size, stride) for size in k.shape[1:3])
    return height, width


def halo_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    block_size: int,
    halo_size: int,
    stride: int,
    mask_border: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Wq, heads, dim_v] and log-sum-exp [B, Hq, Wq, heads]."""
    relative = Relative(rel_height, rel_width, block_size, halo_size, stride)
    axes = _axes(k, block_size, halo_size, stride)
    return local_forward(q, k, v, None, *axes, scale, relative, mask_border, kind="halo")


def halo_attention_backward_triton(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    mask_border: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the two tables (empty where there is none)."""
    relative = Relative(rel_height, rel_width, block_size, halo_size, stride)
    axes = _axes(k, block_size, halo_size, stride)
    grads = local_backward(grad, q, k, v, None, out, lse, *axes, scale, relative, mask_border, kind="halo")
    height, width = (q.new_empty((0, q.shape[-1])) if x is None else x for x in grads.relative)
    return grads.q, grads.k, grads.v, height, width
