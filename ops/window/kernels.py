"""Window, shifted-window and grid attention on the Triton core: no partition, no roll, no padding."""

from torch import Tensor

from zoo.ops._local.geometry import Axis, window_axis
from zoo.ops._local.launch import local_backward, local_forward

__all__ = ["window_attention_backward_triton", "window_attention_triton"]


def _axes(q: Tensor, window: tuple[int, int], shift: tuple[int, int], grid: bool) -> tuple[Axis, Axis]:
    height, width = (window_axis(q.shape[1 + a], window[a], shift[a], grid) for a in (0, 1))
    return height, width


def window_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    grid: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, W, heads, dim] and log-sum-exp [B, H, W, heads]."""
    return local_forward(q, k, v, bias, *_axes(q, window, shift, grid), scale, kind="grid" if grid else "window")


def window_attention_backward_triton(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: tuple[int, int],
    shift: tuple[int, int],
    grid: bool,
    scale: float,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and of the bias; `into` names tensors that receive the first three."""
    axes = _axes(q, window, shift, grid)
    grads = local_backward(grad, q, k, v, bias, out, lse, *axes, scale, into=into, kind="grid" if grid else "window")
    return grads.q, grads.k, grads.v, grads.bias
