"""The ops that models call, in a form that TorchScript compiles: the one file that knows about it.

Outside a script every function is the public one of its name. Inside a script it calls the registered op, which is all
that TorchScript can reach, with the backend that was named. The definition is no registered op, so "reference" leaves
the choice to the op. Arguments have the positional order of the public functions; TorchScript takes none by keyword
alone, and one type per argument but for `int | tuple[int, int]`.
"""

import math
from typing import cast

import torch
from torch import Tensor

import zoo.ops as ops

__all__ = [
    "channel_attention",
    "channel_attention_qkvpacked",
    "halo_attention",
    "large_kernel_attention",
    "neighborhood_attention_qkvpacked",
    "routing_attention",
    "routing_index",
    "super_token_mapping",
    "super_token_sampling",
    "window_attention",
    "window_attention_qkvpacked",
]


def neighborhood_attention_qkvpacked(
    qkv: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """See `zoo.ops.neighborhood_attention_qkvpacked`; qkv is [B, H, W, 3, heads, dim]."""
    if torch.jit.is_scripting():
        causal = list(is_causal) if isinstance(is_causal, tuple) else [is_causal, is_causal]
        flags = [int(c) for c in causal]
        return torch.ops.zoo.neighborhood_attention_qkvpacked(
            qkv, bias, list(_pair(kernel_size)), list(_pair(dilation)), list(_pair(stride)), flags,
            _scale(scale, qkv.shape[5]), _registered(backend),
        )[0]  # fmt: skip
    return ops.neighborhood_attention_qkvpacked(
        qkv, kernel_size, dilation=dilation, stride=stride, is_causal=is_causal, bias=bias, scale=scale, backend=backend
    )


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    grid: bool = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """See `zoo.ops.window_attention`."""
    if torch.jit.is_scripting():
        wh, ww = _pair(window_size)
        sh, sw = _pair(shift)
        return torch.ops.zoo.window_attention(
            q, k, v, bias, wh, ww, sh, sw, grid, _scale(scale, q.shape[4]), _registered(backend)
        )[0]
    return ops.window_attention(q, k, v, window_size, shift=shift, grid=grid, bias=bias, scale=scale, backend=backend)


def window_attention_qkvpacked(
    qkv: Tensor,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    grid: bool = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """See `zoo.ops.window_attention_qkvpacked`."""
    if torch.jit.is_scripting():
        wh, ww = _pair(window_size)
        sh, sw = _pair(shift)
        return torch.ops.zoo.window_attention_qkvpacked(
            qkv, bias, wh, ww, sh, sw, grid, _scale(scale, qkv.shape[5]), _registered(backend)
        )[0]
    return ops.window_attention_qkvpacked(
        qkv, window_size, shift=shift, grid=grid, bias=bias, scale=scale, backend=backend
    )


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    halo_size: int,
    rel_height: Tensor | None = None,
    rel_width: Tensor | None = None,
    border: str = "zero",
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """See `zoo.ops.halo_attention`."""
    if torch.jit.is_scripting():
        if border not in ["zero", "mask"]:
            raise ValueError(f"halo_attention: border must be 'zero' or 'mask', got {border}")
        stride = _query_stride(q, k, block_size)
        return torch.ops.zoo.halo_attention(
            q, k, v, rel_height, rel_width, block_size, halo_size, stride, border == "mask",
            _scale(scale, q.shape[4]), _registered(backend),
        )[0]  # fmt: skip
    return ops.halo_attention(
        q, k, v, block_size, halo_size,
        rel_height=rel_height, rel_width=rel_width, border=border, scale=scale, backend=backend,
    )  # fmt: skip


def routing_index(
    q: Tensor,
    k: Tensor,
    regions: int | tuple[int, int],
    topk: int,
    padding: str = "none",
    backend: str | None = None,
) -> Tensor:
    """See `zoo.ops.routing_index`."""
    if torch.jit.is_scripting():
        rh, rw = _region(q, regions, padding)
        return torch.ops.zoo.routing_index(q, k, rh, rw, topk, _registered(backend))
    return ops.routing_index(q, k, regions, topk, padding=padding, backend=backend)


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: int | tuple[int, int],
    topk: int,
    scale: float | None = None,
    index: Tensor | None = None,
    padding: str = "none",
    backend: str | None = None,
) -> Tensor:
    """See `zoo.ops.routing_attention`, without its index."""
    if torch.jit.is_scripting():
        rh, rw = _region(q, regions, padding)
        picked = torch.ops.zoo.routing_index(q, k, rh, rw, topk, _registered(backend)) if index is None else index
        return torch.ops.zoo.routing_attention(
            q, k, v, picked.long(), rh, rw, _scale(scale, q.shape[3] * q.shape[4]), _registered(backend)
        )[0]
    out = ops.routing_attention(q, k, v, regions, topk, scale=scale, index=index, padding=padding, backend=backend)
    return cast(Tensor, out)


def super_token_sampling(
    x: Tensor,
    token_size: int | tuple[int, int],
    n_iter: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `zoo.ops.super_token_sampling`."""
    if torch.jit.is_scripting():
        th, tw = _pair(token_size)
        tokens, affinity, _ = torch.ops.zoo.super_token_sampling(
            x, th, tw, n_iter, _scale(scale, x.shape[3]), _registered(backend)
        )
        return tokens, affinity.detach()
    return ops.super_token_sampling(x, token_size, n_iter=n_iter, scale=scale, backend=backend)


def super_token_mapping(
    tokens: Tensor, affinity: Tensor, token_size: int | tuple[int, int], backend: str | None = None
) -> Tensor:
    """See `zoo.ops.super_token_mapping`."""
    if torch.jit.is_scripting():
        th, tw = _pair(token_size)
        return torch.ops.zoo.super_token_mapping(tokens, affinity, th, tw, _registered(backend))
    return ops.super_token_mapping(tokens, affinity, token_size, backend=backend)


def channel_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """See `zoo.ops.channel_attention`."""
    if torch.jit.is_scripting():
        return torch.ops.zoo.channel_attention(q, k, v, _scale(scale, q.shape[3]), _registered(backend))[0]
    return ops.channel_attention(q, k, v, scale=scale, backend=backend)


def channel_attention_qkvpacked(qkv: Tensor, scale: float | None = None, backend: str | None = None) -> Tensor:
    """See `zoo.ops.channel_attention_qkvpacked`."""
    if torch.jit.is_scripting():
        return torch.ops.zoo.channel_attention_qkvpacked(qkv, _scale(scale, qkv.shape[4]), _registered(backend))[0]
    return ops.channel_attention_qkvpacked(qkv, scale=scale, backend=backend)


def large_kernel_attention(
    x: Tensor,
    conv0_weight: Tensor,
    conv0_bias: Tensor | None,
    conv_spatial_weight: Tensor,
    conv_spatial_bias: Tensor | None,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    dilation: int = 3,
    backend: str | None = None,
) -> Tensor:
    """See `zoo.ops.large_kernel_attention`."""
    if torch.jit.is_scripting():
        return torch.ops.zoo.large_kernel_attention(
            x, conv0_weight, conv0_bias, conv_spatial_weight, conv_spatial_bias, conv1_weight, conv1_bias,
            dilation, _registered(backend),
        )[0]  # fmt: skip
    return ops.large_kernel_attention(
        x, conv0_weight, conv0_bias, conv_spatial_weight, conv_spatial_bias, conv1_weight, conv1_bias,
        dilation=dilation, backend=backend,
    )  # fmt: skip


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return value


def _scale(scale: float | None, dim: int) -> float:
    return 1.0 / math.sqrt(dim) if scale is None else scale


def _registered(backend: str | None) -> str:
    return "" if backend is None or backend == "reference" else backend


def _query_stride(q: Tensor, k: Tensor, block_size: int) -> int:
    """The stride of the queries, as `zoo.ops.halo_attention` finds it."""
    for stride in range(1, block_size + 1):
        rows, columns = (k.shape[1] + stride - 1) // stride, (k.shape[2] + stride - 1) // stride
        if block_size % stride == 0 and rows == q.shape[1] and columns == q.shape[2]:
            return stride
    raise ValueError(f"halo_attention: no stride takes a map {k.shape[1:3]} of keys to a map {q.shape[1:3]} of queries")


def _region(q: Tensor, regions: int | tuple[int, int], padding: str) -> tuple[int, int]:
    """The size of a region, as `zoo.ops.routing_index` finds it."""
    rows, cols = _pair(regions)
    height, width = q.shape[1], q.shape[2]
    if padding != "zero" and (padding != "none" or height % rows != 0 or width % cols != 0):
        raise ValueError(f"routing_attention: regions {rows} x {cols} do not divide the map {height} x {width}")
    return max(height // rows, 1), max(width // cols, 1)
