"""Halo attention on the Triton core: relative-position logits per query, then tiles inside blocks against windows."""

import torch
from torch import Tensor

from zoo.ops._local.geometry import Axis, halo_axis
from zoo.ops._local.launch import Relative, local_backward, local_forward

__all__ = ["halo_attention_backward_triton", "halo_attention_triton"]


def _axes(k: Tensor, block_size: int, halo_size: int, stride: int) -> tuple[Axis, Axis]:
    height, width = (halo_axis(size, block_size, halo_size, stride) for size in k.shape[1:3])
    return height, width


def _index(count: int, block_size: int, halo_size: int, stride: int, device: torch.device) -> Tensor:
    """[queries, window]: the table row of each window place, for every query position of an axis."""
    window = block_size + 2 * halo_size
    place = torch.arange(count, device=device) % (block_size // stride)
    return torch.arange(window, device=device) - place[:, None] + window - 1


def _logits(q: Tensor, table: Tensor | None, axis: int, index: Tensor) -> Tensor:
    """[B, H, W, heads, window] float32: q . table of every window place along one axis (1: rows, 2: columns)."""
    if table is None:
        return q.new_zeros((*q.shape[:-1], index.shape[1]), dtype=torch.float32)
    equation = "bhwnd,hyd->bhwny" if axis == 1 else "bhwnd,wyd->bhwny"
    return torch.einsum(equation, q.float(), table.float()[index]).contiguous()


def _relative(
    q: Tensor, rel_height: Tensor | None, rel_width: Tensor | None, block_size: int, halo_size: int, stride: int
) -> tuple[Relative | None, tuple[Tensor, Tensor]]:
    index = tuple(_index(q.shape[a], block_size, halo_size, stride, q.device) for a in (1, 2))
    if rel_height is None and rel_width is None:
        return None, (index[0], index[1])
    height, width = _logits(q, rel_height, 1, index[0]), _logits(q, rel_width, 2, index[1])
    relative = Relative(height, width, (block_size,) * 2, (halo_size,) * 2, (stride,) * 2)
    return relative, (index[0], index[1])


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
    relative, _ = _relative(q, rel_height, rel_width, block_size, halo_size, stride)
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
    relative, index = _relative(q, rel_height, rel_width, block_size, halo_size, stride)
    axes = _axes(k, block_size, halo_size, stride)
    grads = local_backward(grad, q, k, v, None, out, lse, *axes, scale, relative, mask_border, kind="halo")
    dq, tables = grads.q, []
    for axis, table in ((1, rel_height), (2, rel_width)):
        if table is None or grads.relative is None:
            tables.append(q.new_empty((0, q.shape[-1])))
            continue
        dlogits, where = grads.relative[axis - 1], index[axis - 1]
        spread, gather = (
            ("bhwny,hyd->bhwnd", "bhwny,bhwnd->hyd") if axis == 1 else ("bhwny,wyd->bhwnd", "bhwny,bhwnd->wyd")
        )
        dq = dq + torch.einsum(spread, dlogits, table.float()[where]).to(dq.dtype)
        picked = torch.einsum(gather, dlogits, q.float()).flatten(0, 1)  # (queries * window, d)
        rows = torch.arange(table.shape[0], device=q.device)
        # a product with the one-hot of the index adds in a fixed order, which an atomic scatter would not
        tables.append(((rows[:, None] == where.flatten()).float() @ picked).to(table.dtype))
    return dq, grads.k, grads.v, tables[0], tables[1]
