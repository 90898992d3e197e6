"""The public functions: argument checks, registration with torch.library, choice of the path."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops._dispatch import (
    LIBRARY,
    autocast_dtype,
    no_autocast,
    register_op,
    resolve_backend,
    resolve_scale,
    runs_triton,
    without_triton,
)

from .cpu import neighborhood_attention_backward_cpu, neighborhood_attention_cpu
from .reference import neighborhood_attention_reference

__all__ = ["neighborhood_attention", "neighborhood_attention_qkvpacked"]

_NAME = "neighborhood_attention"
_PACKED = "neighborhood_attention_qkvpacked"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_AXES = {1: ("length",), 2: ("height", "width")}


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
    axes = _check_tensors(_NAME, q, k, v)
    sizes = _check_sizes(_NAME, q.shape[1:-2], axes, kernel_size, dilation, stride, is_causal)
    _check_bias(_NAME, q, bias, sizes[0])
    scale = resolve_scale(scale, q.shape[-1])
    backend = resolve_backend(_NAME, backend, q, without_triton(q))
    if backend == "reference":
        return _reference(q, k, v, bias, sizes, scale)
    return _forward(q, k, v, bias, *sizes, scale, backend)[0]


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
    if qkv.dim() not in (5, 6) or qkv.shape[-3] != 3:
        raise ValueError(
            f"{_PACKED}: qkv must be [B, L, 3, heads, dim] or [B, H, W, 3, heads, dim], got shape {tuple(qkv.shape)}"
        )
    q, k, v = qkv.unbind(-3)
    axes = _check_tensors(_PACKED, q, k, v)
    sizes = _check_sizes(_PACKED, q.shape[1:-2], axes, kernel_size, dilation, stride, is_causal)
    _check_bias(_PACKED, q, bias, sizes[0])
    scale = resolve_scale(scale, qkv.shape[-1])
    backend = resolve_backend(_PACKED, backend, qkv, without_triton(qkv))
    if backend == "reference":
        return _reference(q, k, v, bias, sizes, scale)
    return _packed_forward(qkv, bias, *sizes, scale, backend)[0]


_Sizes = tuple[list[int], list[int], list[int], list[bool]]


def _check_tensors(op: str, q: Tensor, k: Tensor, v: Tensor) -> int:
    if q.dim() not in (4, 5):
        raise ValueError(f"{op}: q must be [B, L, heads, dim] or [B, H, W, heads, dim], got shape {tuple(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"{op}: k must have the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.dim() != q.dim() or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"{op}: v must have the shape of q up to the last dimension, {tuple(q.shape)}, got {tuple(v.shape)}"
        )
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"{op}: the head dimension must be positive, got q {tuple(q.shape)} and v {tuple(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            raise ValueError(f"{op}: {name} is on {x.device}, q on {q.device}")
    return q.dim() - 3


def _check_dtypes(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    # after autocast, which may be what makes them agree
    if q.dtype not in _DTYPES:
        raise ValueError(f"{op}: q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{op}: {name} is {x.dtype}, q is {q.dtype}; they must agree")


def _check_sizes(
    op: str,
    spatial: Sequence[int],
    axes: int,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    stride: int | Sequence[int],
    is_causal: bool | Sequence[bool],
) -> _Sizes:
    kernels = _per_axis(op, "kernel_size", kernel_size, axes)
    dilations = _per_axis(op, "dilation", dilation, axes)
    strides = _per_axis(op, "stride", stride, axes)
    causal = list(is_causal) if isinstance(is_causal, Sequence) else [is_causal] * axes
    if len(causal) != axes or not all(isinstance(c, bool) for c in causal):
        raise ValueError(f"{op}: is_causal must be a bool or {axes} of them, got {is_causal!r}")
    for name, size, k, d, s in zip(_AXES[axes], spatial, kernels, dilations, strides, strict=True):
        if s > k:
            raise ValueError(f"{op}: stride {s} exceeds kernel_size {k} along the {name}")
        if size < k * d:
            raise ValueError(
                f"{op}: kernel_size {k} x dilation {d} = {k * d} exceeds the {name} {size}: a dilation phase "
                f"would have {size // d} tokens for {k} keys; "
                f"lower kernel_size or dilation, or pad the {name} to {k * d}"
            )
    return kernels, dilations, strides, causal


def _per_axis(op: str, name: str, value: int | Sequence[int], axes: int) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value] * axes
    if len(values) != axes or not all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in values):
        raise ValueError(f"{op}: {name} must be a positive int or {axes} of them, got {value!r}")
    return values


def _check_bias(op: str, q: Tensor, bias: Tensor | None, kernel_size: list[int]) -> None:
    if bias is None:
        return
    shape = (q.shape[-2], *(2 * k - 1 for k in kernel_size))
    if tuple(bias.shape) != shape:
        raise ValueError(
            f"{op}: bias must have shape {shape} (heads, 2 * kernel_size - 1 per axis), got {tuple(bias.shape)}"
        )
    if bias.device != q.device:
        raise ValueError(f"{op}: bias is on {bias.device}, q on {q.device}")
    if bias.dtype not in _DTYPES:
        raise ValueError(f"{op}: bias must be float16, bfloat16, float32 or float64, got {bias.dtype}")


def _reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sizes: _Sizes, scale: float) -> Tensor:
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    _check_dtypes(_NAME, q, k, v)
    with no_autocast(q):
        return neighborhood_attention_reference(q, k, v, bias, *sizes, scale)[0]


def _check_registered(
    op: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, arguments: tuple[Any, ...]
) -> None:
    """Checks of a direct call of the registered op, which asks for them by leaving the backend empty."""
    _check_dtypes(op, q, k, v)
    *sizes, _, backend = arguments
    if not backend:
        kernels = _check_sizes(op, q.shape[1:-2], _check_tensors(op, q, k, v), *sizes)[0]
        _check_bias(op, q, bias, kernels)
    elif backend not in ("cpu", "triton"):
        raise ValueError(f"{op}: the registered op runs backend '', 'cpu' or 'triton', got {backend!r}")


def _forward_impl(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    _check_registered(_NAME, q, k, v, bias, arguments)
    return _run_forward(q, k, v, bias, arguments)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, arguments: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    if runs_triton(_NAME, arguments[-1], q):
        from .kernels import neighborhood_attention_triton

        return neighborhood_attention_triton(q, k, v, bias, *arguments[:-1])
    return neighborhood_attention_cpu(q, k, v, bias, *arguments[:-1])


def _run_backward(
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor],
    into: tuple[Tensor, Tensor, Tensor],
    arguments: tuple[Any, ...],
) -> Tensor:
    """Write dq, dk and dv into the tensors given; the gradient of the bias, empty where there is none."""
    q, k, v, bias, out, lse = tensors
    if runs_triton(_NAME, arguments[-1], q):
        from .kernels import neighborhood_attention_backward_triton

        dbias = neighborhood_attention_backward_triton(grad, *tensors, *arguments[:-1], into=into)[3]
        return q.new_empty((0,)) if dbias is None else dbias
    return neighborhood_attention_backward_cpu(grad, q, k, v, bias, *into, *arguments[:-1])


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    _check_dtypes(_NAME, q, k, v)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=dtype)


def _backward_impl(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv, _run_backward(grad, (q, k, v, bias, out, lse), (dq, dk, dv), arguments)


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    gradients = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return *gradients, q.new_empty((0,)) if bias is None else bias.new_empty(bias.shape)


def _packed_forward_impl(qkv: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(-3)
    _check_registered(_PACKED, q, k, v, bias, arguments)
    return _run_forward(q, k, v, bias, arguments)


def _packed_forward_fake(qkv: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(-3)
    return _forward_fake(q, k, v, bias, *arguments)


def _packed_backward_impl(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(-3)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dq, dk, dv = dqkv.unbind(-3)
    return dqkv, _run_backward(grad, (q, k, v, bias, out, lse), (dq, dk, dv), arguments)


def _packed_backward_fake(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    dbias = qkv.new_empty((0,)) if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, kernel_size, dilation, stride, is_causal, scale, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.arguments = kernel_size, dilation, stride, is_causal, scale, backend
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, bias, out, lse = ctx.saved_tensors
    dq, dk, dv, dbias = _backward(grad, q, k, v, bias, out, lse, *ctx.arguments)
    return dq, dk, dv, None if bias is None else dbias, *(None,) * len(ctx.arguments)


def _packed_autograd(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    qkv, bias, out, lse = ctx.saved_tensors
    dqkv, dbias = _packed_backward(grad, qkv, bias, out, lse, *ctx.arguments)
    return dqkv, None if bias is None else dbias, *(None,) * len(ctx.arguments)


def _twice(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(f"{_NAME}: only backend='reference' can be differentiated twice")


def _vmap_rule(op: Any, inputs: Sequence[int], outputs: Sequence[int]) -> Any:
    """Batching rule: heads are independent, so a mapped dimension is folded into them.

    inputs, outputs: the axis of the heads in every tensor argument and result.
    """

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        folded = list(args)
        for i, axis in enumerate(inputs):
            x, mapped = args[i], in_dims[i]
            if x is not None:
                x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if mapped is None else x.movedim(mapped, 0)
                axis %= x.dim() - 1
                folded[i] = x.movedim(0, axis).flatten(axis, axis + 1)
        results = op(*folded)
        # an absent bias has an empty gradient
        parts = [
            x.unflatten(axis, (info.batch_size, -1)) if x.dim() > 1 else x
            for x, axis in zip(results, outputs, strict=True)
        ]
        dims = [axis % (x.dim() - 1) if x.dim() > 1 else None for x, axis in zip(parts, outputs, strict=True)]
        return tuple(parts), tuple(dims)

    return rule


_ARGUMENTS = "int[] kernel_size, int[] dilation, int[] stride, bool[] is_causal, float scale, str backend"
_backward = register_op(
    f"{_NAME}_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
    backward=_twice,
    autocast=False,
)
_forward = register_op(
    f"{_NAME}(Tensor q, Tensor k, Tensor v, Tensor? bias, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
_packed_backward = register_op(
    f"{_PACKED}_backward(Tensor grad, Tensor qkv, Tensor? bias, Tensor out, Tensor lse, {_ARGUMENTS})"
    " -> (Tensor, Tensor)",
    _packed_backward_impl,
    _packed_backward_fake,
    backward=_twice,
    autocast=False,
)
_packed_forward = register_op(
    f"{_PACKED}(Tensor qkv, Tensor? bias, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _packed_forward_impl,
    _packed_forward_fake,
    setup_context=_setup_context,
    backward=_packed_autograd,
)

for _op, _inputs, _outputs in (
    (_forward, (-2, -2, -2, 0), (-2, -1)),
    (_backward, (-2, -2, -2, -2, 0, -2, -1), (-2, -2, -2, 0)),
    (_packed_forward, (-2, 0), (-2, -1)),
    (_packed_backward, (-2, -2, 0, -2, -1), (-2, 0)),
):
    torch.library.register_vmap(str(_op.name()), _vmap_rule(_op, _inputs, _outputs), lib=LIBRARY)


def _flops(query: Sequence[int], value_dim: int, kernel_size: Sequence[int], products: int) -> int:
    return products * math.prod(query[:-1]) * math.prod(kernel_size) * (query[-1] + value_dim)


@register_flop_formula(torch.ops.zoo.neighborhood_attention)
def _forward_flops(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], bias: Any, kernel_size: Any, *_: Any, **__: Any
) -> int:
    return _flops(q, v[-1], kernel_size, 2)


@register_flop_formula(torch.ops.zoo.neighborhood_attention_backward)
def _backward_flops(
    grad: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, lse: Any, kernel_size: Any, *_: Any, **__: Any
) -> int:
    return _flops(q, v[-1], kernel_size, 5)


@register_flop_formula(torch.ops.zoo.neighborhood_attention_qkvpacked)
def _packed_flops(qkv: Sequence[int], bias: Any, kernel_size: Sequence[int], *_: Any, **__: Any) -> int:
    return _flops((*qkv[:-3], *qkv[-2:]), qkv[-1], kernel_size, 2)


@register_flop_formula(torch.ops.zoo.neighborhood_attention_qkvpacked_backward)
def _packed_backward_flops(
    grad: Any, qkv: Sequence[int], bias: Any, out: Any, lse: Any, kernel_size: Any, *_: Any, **__: Any
) -> int:
    return _flops((*qkv[:-3], *qkv[-2:]), qkv[-1], kernel_size, 5)
