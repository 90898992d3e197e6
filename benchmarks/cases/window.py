"""Window and grid attention against partition, attention and reversal: by SDPA, and with the scores written out."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Case, Implementation
from zoo.ops.window import window_attention

__all__ = ["CASES", "implementations", "inputs"]


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowCase(Case):
    batch: int
    side: int
    heads: int
    dim: int = 32
    window: int = 7
    grid: bool = False


# Partition is about a quarter of the work, so parity is the goal.
_GOALS = {"sdpa": 1.0, "scores": 1.0}

CASES: Sequence[WindowCase] = (
    WindowCase(
        name="2x56x56 h2 w7", batch=2, side=56, heads=2, quick=True, forward_goals=_GOALS, training_goals=_GOALS
    ),
    WindowCase(name="2x56x56 h2 g7", batch=2, side=56, heads=2, grid=True, forward_goals=_GOALS, training_goals=_GOALS),
    WindowCase(
        name="8x14x14 h8 w7", batch=8, side=14, heads=8, quick=True, forward_goals=_GOALS, training_goals=_GOALS
    ),
    WindowCase(name="4x28x28 h4 w7", batch=4, side=28, heads=4),
    WindowCase(name="16x7x7 h16 w7", batch=16, side=7, heads=16),
    WindowCase(name="2x96x96 h2 w12", batch=2, side=96, heads=2, window=12),
)


def inputs(case: WindowCase) -> list[Tensor]:
    """q, k, v [B, H, W, heads, dim] and the relative position bias [heads, 2w - 1, 2w - 1]."""
    q, k, v = (torch.randn(case.batch, case.side, case.side, case.heads, case.dim) for _ in range(3))
    size = 2 * case.window - 1
    return [q, k, v, torch.randn(case.heads, size, size)]


def implementations(case: WindowCase, device: torch.device, dtype: torch.dtype) -> dict[str, Implementation]:
    index = _index(case.window).to(device)
    return {
        "zoo": Implementation(functools.partial(_ours, case=case)),
        "sdpa": Implementation(functools.partial(_partitioned, case=case, index=index, fused=True)),
        "scores": Implementation(functools.partial(_partitioned, case=case, index=index, fused=False)),
    }


def _ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, case: WindowCase) -> Tensor:
    return window_attention(q, k, v, case.window, grid=case.grid, bias=bias)


def _index(window: int) -> Tensor:
    """(w * w, w * w) positions of key - query in the flattened table."""
    i = torch.arange(window)
    rel = i[None, :] - i[:, None] + window - 1
    pairs = rel[:, None, :, None] * (2 * window - 1) + rel[None, :, None, :]
    return pairs.flatten(2).flatten(0, 1)


def _partitioned(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, case: WindowCase, index: Tensor, fused: bool
) -> Tensor:
    count, w = case.side // case.window, case.window
    split = (w, count) if case.grid else (count, w)
    order = (0, 2, 4, 5, 1, 3, 6) if case.grid else (0, 1, 3, 5, 2, 4, 6)

    def windows(x: Tensor) -> Tensor:  # (B * windows, heads, w * w, d)
        x = x.unflatten(2, split).unflatten(1, split).permute(order)
        return x.reshape(-1, case.heads, w * w, case.dim)

    pairs = bias.flatten(1)[:, index]
    if fused:
        out = F.scaled_dot_product_attention(windows(q), windows(k), windows(v), attn_mask=pairs[None])
    else:
        scores = (windows(q) * case.dim**-0.5) @ windows(k).mT + pairs
        out = scores.softmax(-1) @ windows(v)
    out = out.view(case.batch, count, count, case.heads, w, w, case.dim)
    back = (0, 4, 1, 5, 2, 3, 6) if case.grid else (0, 1, 4, 2, 5, 3, 6)
    return out.permute(back).reshape(q.shape)
