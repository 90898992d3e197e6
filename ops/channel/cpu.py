"""The fast path: one batched product per image and step, which reads the heads of [N, heads, dim] through strides."""

import torch
from torch import Tensor

from zoo.ops._checks import compute_dtype


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output [B, N, heads, dim] and the attention maps [B, heads, dim, dim]."""
    batch, _, heads, dim = q.shape
    dtype = compute_dtype(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    maps = torch.empty((batch, heads, dim, dim), dtype=dtype, device=q.device)
    for i in range(batch):
        torch.bmm((_rows(k[i], dtype) * scale).transpose(1, 2), _rows(v[i], dtype), out=maps[i])
    maps = maps.softmax(-1)
    for i in range(batch):
        out[i].copy_(torch.bmm(_rows(q[i], dtype), maps[i].transpose(1, 2)).transpose(0, 1))
    return out, maps


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, maps: Tensor, scale: float, into: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Write dq, dk, dv into the three tensors given."""
    dq, dk, dv = into
    dtype = maps.dtype
    dmaps = torch.empty_like(maps)
    for i in range(q.shape[0]):
        g = _rows(grad[i], dtype)
        torch.bmm(g.transpose(1, 2), _rows(q[i], dtype), out=dmaps[i])
        dq[i].copy_(torch.bmm(g, maps[i]).transpose(0, 1))
    dscores = dmaps.sub_((dmaps * maps).sum(-1, keepdim=True)).mul_(maps).mul_(scale)
    for i in range(q.shape[0]):
        dk[i].copy_(torch.bmm(_rows(v[i], dtype), dscores[i].transpose(1, 2)).transpose(0, 1))
        dv[i].copy_(torch.bmm(_rows(k[i], dtype), dscores[i]).transpose(0, 1))


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:  # (N, heads, d) -> (heads, N, d)
    return x.to(dtype).transpose(0, 1)
