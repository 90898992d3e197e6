"""The definition of channel attention, in plain PyTorch."""

import torch
from torch import Tensor

from zoo.ops._checks import compute_dtype


def channel_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """See `zoo.ops.channel.channel_attention`; every argument is given and checked."""
    given, dtype = q.dtype, compute_dtype(q)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    scores = torch.einsum("bnhi,bnhj->bhij", scale * k, v)
    return torch.einsum("bhij,bnhj->bnhi", scores.softmax(-1), q).to(given).contiguous()
