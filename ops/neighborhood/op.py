"""The public functions: argument checks, registration with torch.library, choice of the path."""

import math
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
    per_axis,
    require,
    resolve_scale,
    unpack,
)
from zoo.ops._overrides import overridable
from zoo.ops._register import call, pair_flops, register_qkv

from .cpu import neighborhood_attention_backward_cpu, neighborhood_attention_cpu
from .reference import neighborhood_attention_reference

__all__ = ["neighborhood_attention", "neighborhood_attention_qkvpacked"]

_NAME = "neighborhood_attention"
_PACKED = "neighborhood_attention_qkvpacked"
_LAYOUTS = ("[B, L, heads, dim]", "[B, H, W, heads, dim]")
_AXES = {1: ("length",), 2: ("height", "width")}


@overridable
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query to the `kernel_size` keys nearest to it along each axis.

    Neighborhood attention (arXiv:2204.07143), dilated (arXiv:2209.15001), causal (arXiv:2403.04690) and strided
    (arXiv:2504.16922), with the windows of NATTEN 0.21 (src/natten/backends/flex.py). An axis of L tokens splits into
    `dilation` phases, token i being number i // dilation of phase i % dilation. In a phase of n tokens the window of
    query i starts at clamp(leader - kernel_size // 2, 0, n - kernel_size), so that every query sees kernel_size keys;
    leader = min(i // stride * stride + stride // 2, n - 1). On a causal axis leader = min(i // stride * stride +
    stride - 1, n - 1), the window starts at max(leader - kernel_size + 1, 0) and ends at the query itself.

    Args:
        q: [B, L, heads, dim] or [B, H, W, heads, dim]; float16, bfloat16, float32 or float64, any strides.
        k: like q.
        v: like q; its last dimension may differ.
        kernel_size: keys per axis, odd or even; an int or one per axis.
        dilation: distance in tokens between the keys of a window; an int or one per axis.
        stride: queries that share a window, 1 .. kernel_size, in dilated steps; an int or one per axis.
        is_causal: whether keys after the query are hidden; a bool or one per axis.
        bias: [heads, 2 * kernel_size - 1] or [heads, 2 * kernel_height - 1, 2 * kernel_width - 1], added to the scaled
            scores, indexed by key - query + kernel_size - 1 in dilated steps. May be float32 beside q, k, v of lower
            precision.
        scale: factor of the scores; dim ** -0.5 unless given.
        backend: "reference", "cpu", "triton", or None to choose by device. "reference" can be differentiated twice.

    Returns:
        [B, L, heads, dim_v] or [B, H, W, heads, dim_v] in the dtype of q (under autocast, the autocast dtype).

    Raises:
        ValueError: an argument does not fit the others; the message names it and its value.
        RuntimeError: the named backend cannot run here.
    """
    sizes = _sizes(_NAME, q.dim() - 3, kernel_size, dilation, stride, is_causal)
    _check(_NAME, q, k, v, bias, *sizes)
    scale = resolve_scale(scale, q.shape[-1])
    backend = resolve_backend(_NAME, backend, q, without_triton(q))
    if backend == "reference":
        return run_reference(neighborhood_attention_reference, q, k, v, bias, *sizes, scale)[0]
    return call("neighborhood_attention", q, k, v, bias, *sizes, scale, backend)[0]


@overridable
def neighborhood_attention_qkvpacked(
    qkv: Tensor,
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """neighborhood_attention of queries, keys and values that one Linear made; the gradient is one dense tensor.

    Args:
        qkv: [B, L, 3, heads, dim] or [B, H, W, 3, heads, dim], read in place.
        kernel_size, dilation, stride, is_causal, bias, scale, backend: see neighborhood_attention.

    Returns:
        [B, L, heads, dim] or [B, H, W, heads, dim].

    Raises:
        ValueError: an argument does not fit the others; the message names it and its value.
        RuntimeError: the named backend cannot run here.
    """
    q, k, v = unpack(_PACKED, qkv, "[B, L, 3, heads, dim]", "[B, H, W, 3, heads, dim]")
    sizes = _sizes(_PACKED, q.dim() - 3, kernel_size, dilation, stride, is_causal)
    _check(_PACKED, q, k, v, bias, *sizes)
    scale = resolve_scale(scale, qkv.shape[-1])
    backend = resolve_backend(_PACKED, backend, qkv, without_triton(qkv))
    if backend == "reference":
        return run_reference(neighborhood_attention_reference, q, k, v, bias, *sizes, scale)[0]
    return call("neighborhood_attention_qkvpacked", qkv, bias, *sizes, scale, backend)[0]


_Sizes = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]


def _sizes(
    op: str,
    axes: int,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    stride: int | Sequence[int],
    is_causal: bool | Sequence[bool],
) -> _Sizes:
    axes = min(max(axes, 1), 2)  # of q, whose layout is yet to be checked
    causal = list(is_causal) if isinstance(is_causal, Sequence) else [is_causal] * axes
    fits = len(causal) == axes and all(isinstance(c, bool) for c in causal)
    require(fits, op, "is_causal must be a bool or {} of them, got {!r}", axes, is_causal)
    sizes = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride}
    kernels, dilations, strides = (per_axis(op, name, value, axes) for name, value in sizes.items())
    return kernels, dilations, strides, [int(c) for c in causal]


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *arguments: Any) -> None:
    check_layout(op, "q", q, *_LAYOUTS)
    check_layout(op, "v", v, *_LAYOUTS)
    require(k.shape == q.shape, op, "k must have the shape of q, {}, got {}", q.shape, k.shape)
    fits = v.shape[:-1] == q.shape[:-1]
    require(fits, op, "v must have the shape of q up to the last dimension, {}, got {}", q.shape, v.shape)
    check_agreement(op, {"q": q}, k=k, v=v)
    check_agreement(op, {"q": q}, dtypes=False, bias=bias)
    names = _AXES[q.dim() - 3]
    sizes = arguments[:4]
    require(all(len(x) == len(names) for x in sizes), op, "q has {} axes, the sizes are {}", len(names), sizes)
    for name, size, kernel, dilation, stride in zip(names, q.shape[1:-2], *sizes[:3], strict=True):
        require(stride <= kernel, op, "stride {} exceeds kernel_size {} along the {}", stride, kernel, name)
        if size < kernel * dilation:
            raise ValueError(
                f"{op}: kernel_size {kernel} x dilation {dilation} = {kernel * dilation} exceeds the {name} {size}: "
                f"a dilation phase would have {size // dilation} tokens for {kernel} keys; "
                f"lower kernel_size or dilation, or pad the {name} to {kernel * dilation}"
            )
    shape = (q.shape[-2], *(2 * x - 1 for x in sizes[0]))
    check_table(op, "bias", bias, "[heads, 2 * kernel_size - 1 per axis]", shape)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    kernel_size: list[int], dilation: list[int], stride: list[int], is_causal: list[int], scale: Number, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = kernel_size, dilation, stride, [bool(c) for c in is_causal]
    if runs_triton(_NAME, backend, q):
        from .kernels import neighborhood_attention_triton

        return neighborhood_attention_triton(q, k, v, bias, *sizes, scale)
    return neighborhood_attention_cpu(q, k, v, bias, *sizes, scale)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    kernel_size: list[int], dilation: list[int], stride: list[int], is_causal: list[int], scale: Number, backend: str,
    into: tuple[Tensor, Tensor, Tensor],
) -> Tensor | None:  # fmt: skip
    sizes = kernel_size, dilation, stride, [bool(c) for c in is_causal]
    if runs_triton(_NAME, backend, q):
        from .kernels import neighborhood_attention_backward_triton

        return neighborhood_attention_backward_triton(grad, q, k, v, bias, out, lse, *sizes, scale, into=into)[3]
    dq, dk, dv = into
    return neighborhood_attention_backward_cpu(grad, q, k, v, bias, dq, dk, dv, *sizes, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=compute_dtype(q))


register_qkv(
    _NAME, _forward, _backward, _fake,
    flops=lambda q, v, kernel_size: pair_flops(q, math.prod(kernel_size), v[-1]),
    per_head=("bias",),
    check=_check,
)  # fmt: skip
