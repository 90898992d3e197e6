"""Halo attention in plain PyTorch: the definition that every other path is measured against."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["halo_attention_reference"]


def halo_attention_reference(
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
) -> Tensor:
    """softmax(scale * q k^T + q rel_height^T + q rel_width^T) v, every block of queries over its block and the halo.

    Args:
        q: [B, ceil(H / stride), ceil(W / stride), heads, d]; k: [B, H, W, heads, d]; v: [B, H, W, heads, dv].
        rel_height, rel_width: [2 * window - 1, d], row = key in window - query in block + window - 1.
        mask_border: keys outside the map are left out of the softmax; otherwise they are zero keys and zero values.

    Returns:
        [B, ceil(H / stride), ceil(W / stride), heads, dv].
    """
    B, H, W, heads, d = k.shape
    window, step = block_size + 2 * halo_size, block_size // stride
    rows, cols = -(-H // block_size), -(-W // block_size)

    def windows(x: Tensor) -> Tensor:  # (B, H, W, ...) -> (B, rows, cols, ..., window, window)
        bottom, right = rows * block_size - H + halo_size, cols * block_size - W + halo_size
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (halo_size, right, halo_size, bottom))
        return x.unfold(1, window, block_size).unfold(2, window, block_size)

    q_pad = F.pad(q, (0, 0, 0, 0, 0, cols * step - q.shape[2], 0, rows * step - q.shape[1]))
    blocks = q_pad.reshape(B, rows, step, cols, step, heads, d)
    logits = torch.einsum("brxcyhd,brchdij->brchxyij", blocks, windows(k)) * scale
    index = torch.arange(window, device=q.device) - torch.arange(step, device=q.device)[:, None] + window - 1
    if rel_height is not None:
        logits = logits + torch.einsum("brxcyhd,xid->brchxyi", blocks, rel_height[index])[..., None]
    if rel_width is not None:
        logits = logits + torch.einsum("brxcyhd,yjd->brchxyj", blocks, rel_width[index])[..., None, :]
    if mask_border:
        inside = windows(torch.ones(1, H, W, device=q.device)) > 0  # (1, rows, cols, window, window)
        logits = logits.masked_fill(~inside[:, :, :, None, None, None], float("-inf"))
    attn = logits.flatten(-2).softmax(-1).unflatten(-1, (window, window))
    out = torch.einsum("brchxyij,brchdij->brxcyhd", attn, windows(v))
    return out.reshape(B, rows * step, cols * step, heads, v.shape[-1])[:, : q.shape[1], : q.shape[2]].contiguous()
