"""PyTorch's flash attention for CPUs, which the CPU paths call for its log-sum-exp, without its faults."""

import torch
from torch import Tensor

from ._checks import compute_dtype, is_finite

__all__ = ["attend"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_DEVICES = ("cpu",)
_FEW = 16  # keys


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of (n, heads, tokens, d) and its log-sum-exp (n, heads, queries).

    mask: added to the scores, (n or 1, heads or 1, queries, keys).
    """
    if q.device.type in _DEVICES and q.shape[-1] == v.shape[-1]:
        added = mask
        if mask is None and k.shape[2] < _FEW:  # without a mask, a query of NaN beside few keys becomes zeros
            added = torch.zeros((1, 1, q.shape[2], k.shape[2]), dtype=q.dtype)
        # large logits keep the digits of the definition where they are rounded alike: there q is scaled
        scaled, rest = (q * scale, 1.0) if q.dtype == compute_dtype(q) else (q, scale)
        out, lse = _flash(scaled, k, v, 0.0, False, attn_mask=added, scale=rest)
        if is_finite(lse):  # in half precision infinite scores become zeros
            return out, lse
    wide = compute_dtype(q)
    scores = torch.matmul(q.to(wide) * scale, k.to(wide).transpose(-1, -2))
    scores = scores if mask is None else scores.add_(mask)
    return torch.matmul(scores.softmax(-1), v.to(wide)).to(v.dtype), scores.logsumexp(-1)
