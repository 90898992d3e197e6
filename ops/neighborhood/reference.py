"""The definition of neighborhood attention in plain PyTorch: gather each query's keys, softmax, weigh the values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.ops._checks import compute_dtype


def axis_windows(
    length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The window of every query along one axis: key indices, bias indices and validity, each [length, kernel_size].

    In a dilation phase of n tokens the queries of a stride group share their leader's window (arXiv:2504.16922).
    """
    token = torch.arange(length, device=device)
    query, phase = token // dilation, token % dilation
    n = (length - phase + dilation - 1) // dilation
    leader = torch.minimum(query // stride * stride + (stride - 1 if is_causal else stride // 2), n - 1)
    start = leader - (kernel_size - 1 if is_causal else kernel_size // 2)
    start = torch.minimum(start.clamp(min=0), n - kernel_size)
    key = start[:, None] + torch.arange(kernel_size, device=device)
    offset = key - query[:, None]
    return key * dilation + phase[:, None], offset + kernel_size - 1, offset <= (0 if is_causal else kernel_size - 1)


def neighborhood_attention_reference(
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
    """Output [B, *spatial, heads, dim_v] and log-sum-exp [B, *spatial, heads] of queries [B, *spatial, heads, dim]."""
    dtype = compute_dtype(q)
    spatial = q.shape[1:-2]
    axes = zip(spatial, kernel_size, dilation, stride, is_causal, strict=True)
    tables = [axis_windows(*axis, q.device) for axis in axes]
    keys, rel, valid = tables[0]
    if len(tables) == 2:
        keys = _grid(keys, tables[1][0], spatial[1])
        rel = _grid(rel, tables[1][1], 2 * kernel_size[1] - 1)
        valid = _grid(valid.long(), tables[1][2].long(), 1) == 2
    query, key, value = (x.flatten(1, -3).to(dtype) for x in (q, k, v))  # (B, N, nh, d)
    logits = torch.einsum("bqhd,bqkhd->bqhk", query * scale, key[:, keys])
    if bias is not None:
        logits = logits + bias.to(dtype).flatten(1)[:, rel].transpose(0, 1)  # (N, nh, keys)
    logits = logits.masked_fill(~valid[:, None], float("-inf"))
    out = torch.einsum("bqhk,bqkhd->bqhd", logits.softmax(-1), value[:, keys]).to(q.dtype)
    return out.unflatten(1, spatial), logits.logsumexp(-1).unflatten(1, spatial)


def _grid(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """rows * width + columns of every query and key of the map: [H * W, kh * kw]."""
    return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)
