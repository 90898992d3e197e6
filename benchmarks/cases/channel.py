"""Channel attention against the form of the published module, and against SDPA over transposed channels."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Case, Implementation
from zoo.ops.channel import channel_attention

__all__ = ["CASES", "implementations", "inputs"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelCase(Case):
    batch: int
    tokens: int
    heads: int
    dim: int = 32


_GOALS = {"module": 1.0}

CASES: Sequence[ChannelCase] = (
    ChannelCase(
        name="4x3136 h3", batch=4, tokens=3136, heads=3, quick=True, forward_goals=_GOALS, training_goals=_GOALS
    ),
    ChannelCase(name="8x784 h6", batch=8, tokens=784, heads=6, forward_goals=_GOALS, training_goals=_GOALS),
    ChannelCase(
        name="8x196 h12", batch=8, tokens=196, heads=12, quick=True, forward_goals=_GOALS, training_goals=_GOALS
    ),
    ChannelCase(name="8x49 h24", batch=8, tokens=49, heads=24),
)


def inputs(case: ChannelCase) -> list[Tensor]:
    """q, k, v [B, N, heads, dim]."""
    return [torch.randn(case.batch, case.tokens, case.heads, case.dim) for _ in range(3)]


def implementations(case: ChannelCase, device: torch.device, dtype: torch.dtype) -> dict[str, Implementation]:
    return {
        "zoo": Implementation(functools.partial(channel_attention, scale=case.tokens**-0.5)),
        "module": Implementation(functools.partial(_module, scale=case.tokens**-0.5)),
        "sdpa": Implementation(functools.partial(_sdpa, scale=case.tokens**-0.5)),
    }


def _module(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, N, d)
    maps = ((k * scale).mT @ v).softmax(-1)
    return (maps @ q.mT).permute(0, 3, 1, 2).contiguous()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Channels are the tokens: k^T attends to v^T and mixes q^T."""
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))  # (B, heads, d, N)
    return F.scaled_dot_product_attention(k, v, q, scale=scale).permute(0, 3, 1, 2).contiguous()
