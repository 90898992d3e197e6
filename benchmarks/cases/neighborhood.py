"""Neighborhood attention against its textbook forms: gather, unfold, dense masked SDPA, compiled FlexAttention."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cases import Case, Implementation
from zoo.ops.neighborhood import neighborhood_attention

__all__ = ["CASES", "implementations", "inputs"]

_DENSE_MASK_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class NeighborhoodCase(Case):
    batch: int
    spatial: tuple[int, int]
    heads: int
    dim: int = 32
    kernel_size: int = 7
    dilation: int = 1


_GOALS = {"gather": 15.0, "unfold": 30.0, "flex": 10.0}
_TRAINING = {"gather": 10.0}

CASES: Sequence[NeighborhoodCase] = (
    NeighborhoodCase(
        name="2x56x56 h2 k7",
        batch=2,
        spatial=(56, 56),
        heads=2,
        quick=True,
        forward_goals=_GOALS | {"dense": 8.0},
        training_goals=_TRAINING,
    ),
    NeighborhoodCase(
        name="4x28x28 h4 k7",
        batch=4,
        spatial=(28, 28),
        heads=4,
        quick=True,
        forward_goals=_GOALS | {"dense": 1.5},
        training_goals=_TRAINING,
    ),
    NeighborhoodCase(
        name="8x14x14 h8 k7",
        batch=8,
        spatial=(14, 14),
        heads=8,
        quick=True,
        forward_goals=_GOALS,
        training_goals=_TRAINING,
    ),
    NeighborhoodCase(name="16x7x7 h16 k7", batch=16, spatial=(7, 7), heads=16),
    NeighborhoodCase(name="2x56x56 h2 k7 d8", batch=2, spatial=(56, 56), heads=2, dilation=8),
    NeighborhoodCase(name="2x57x61 h2 k7 d3", batch=2, spatial=(57, 61), heads=2, dilation=3),
    NeighborhoodCase(name="2x56x56 h2 k11", batch=2, spatial=(56, 56), heads=2, kernel_size=11),
    NeighborhoodCase(name="2x56x56 h2 k13", batch=2, spatial=(56, 56), heads=2, kernel_size=13),
    NeighborhoodCase(name="1x112x112 h4 k7", batch=1, spatial=(112, 112), heads=4),
)


def inputs(case: NeighborhoodCase) -> list[Tensor]:
    """q, k, v [B, H, W, heads, dim] and the relative position bias [heads, 2k - 1, 2k - 1]."""
    q, k, v = (torch.randn(case.batch, *case.spatial, case.heads, case.dim) for _ in range(3))
    size = 2 * case.kernel_size - 1
    return [q, k, v, torch.randn(case.heads, size, size)]


def implementations(case: NeighborhoodCase, device: torch.device, dtype: torch.dtype) -> dict[str, Implementation]:
    """Ours and its peers; the dense mask is left out where it would not fit."""
    built = {
        "zoo": Implementation(functools.partial(_ours, case=case)),
        "gather": Implementation(functools.partial(_gather, windows=_windows(case, device))),
        "gather_matmul": Implementation(functools.partial(_gather_matmul, windows=_windows(case, device))),
        "unfold": Implementation(functools.partial(_unfold, case=case, windows=_windows(case, device))),
    }
    tokens = math.prod(case.spatial)
    if case.heads * tokens**2 * dtype.itemsize <= _DENSE_MASK_BYTES:
        built["dense"] = Implementation(_Dense(case, device))
    # FlexAttention has no backward on a CPU
    built["flex"] = Implementation(_Flex(case, device), trains=device.type == "cuda")
    return built


def _ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, case: NeighborhoodCase) -> Tensor:
    return neighborhood_attention(q, k, v, case.kernel_size, dilation=case.dilation, bias=bias)


def _axis(length: int, kernel_size: int, dilation: int) -> tuple[Tensor, Tensor]:
    """The first key of every query's window, and the window's offsets into the bias table: (length,), (length, k)."""
    token = torch.arange(length)
    phase, query = token % dilation, token // dilation
    tokens = (length - phase + dilation - 1) // dilation
    start = torch.minimum((query - kernel_size // 2).clamp(min=0), tokens - kernel_size)
    rel = start[:, None] + torch.arange(kernel_size) - query[:, None] + kernel_size - 1
    return start * dilation + phase, rel


@dataclass(frozen=True)
class _Windows:
    starts: tuple[Tensor, Tensor]
    keys: Tensor  # (N, k * k)
    bias: Tensor  # (N, k * k)


@functools.cache
def _windows(case: NeighborhoodCase, device: torch.device) -> _Windows:
    (height, width), k, d = case.spatial, case.kernel_size, case.dilation
    (top, rel_h), (left, rel_w) = _axis(height, k, d), _axis(width, k, d)
    step = torch.arange(k) * d
    rows, columns = top[:, None] + step, left[:, None] + step
    keys = rows[:, None, :, None] * width + columns[None, :, None, :]
    bias = rel_h[:, None, :, None] * (2 * k - 1) + rel_w[None, :, None, :]
    flat = height * width, k * k
    return _Windows((top.to(device), left.to(device)), keys.view(flat).to(device), bias.view(flat).to(device))


def _gather(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, windows: _Windows) -> Tensor:
    """Advanced indexing copies every query's keys and values, in the layout of the op."""
    scale = q.shape[-1] ** -0.5
    keys, values = (x.flatten(1, 2)[:, windows.keys] for x in (k, v))  # (B, N, k * k, nh, d)
    logits = torch.einsum("bnhd,bnkhd->bnhk", q.flatten(1, 2) * scale, keys)
    logits = logits + bias.flatten(1)[:, windows.bias].transpose(0, 1)
    return torch.einsum("bnhk,bnkhd->bnhd", logits.softmax(-1), values).view(q.shape)


def _gather_matmul(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, windows: _Windows) -> Tensor:
    """The same with the heads first, so that the copies feed batched matrix products without another copy."""
    query, keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    keys, values = keys[:, :, windows.keys], values[:, :, windows.keys]  # (B, nh, N, k * k, d)
    logits = (query.unsqueeze(3) * q.shape[-1] ** -0.5) @ keys.mT + bias.flatten(1)[:, windows.bias].unsqueeze(2)
    return (logits.softmax(-1) @ values).squeeze(3).transpose(1, 2).reshape(q.shape)


def _unfold(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, case: NeighborhoodCase, windows: _Windows) -> Tensor:
    """im2col over the map, then every query's window: the border's are repeated."""
    size, dilation = case.kernel_size, case.dilation
    height, width = (n - dilation * (size - 1) for n in case.spatial)
    top, left = windows.starts

    def columns(x: Tensor) -> Tensor:
        x = F.unfold(x.flatten(3).permute(0, 3, 1, 2), size, dilation=dilation).unflatten(2, (height, width))
        if dilation == 1:
            x = F.pad(x, (size // 2, (size - 1) // 2) * 2, mode="replicate")
        else:
            x = x.index_select(2, top).index_select(3, left)
        return x.reshape(case.batch, case.heads, case.dim, size**2, -1)  # (B, nh, d, k * k, N)

    keys, values = columns(k), columns(v)
    query = q.flatten(1, 2).permute(0, 2, 3, 1).unsqueeze(3) * q.shape[-1] ** -0.5  # (B, nh, d, 1, N)
    logits = (query * keys).sum(2) + bias.flatten(1)[:, windows.bias].transpose(1, 2)
    return (logits.softmax(2).unsqueeze(2) * values).sum(3).permute(0, 3, 1, 2).reshape(q.shape)


class _Dense:
    """SDPA over the whole map with a float mask; without gradients the mask is made once, outside the measurement."""

    def __init__(self, case: NeighborhoodCase, device: torch.device) -> None:
        self.case, self.windows = case, _windows(case, device)
        self.mask: Tensor | None = None

    def make_mask(self, bias: Tensor) -> Tensor:
        tokens = math.prod(self.case.spatial)
        values = bias.flatten(1)[:, self.windows.bias]
        mask = values.new_full((values.shape[0], tokens, tokens), float("-inf"))
        return mask.scatter(2, self.windows.keys.expand_as(values), values)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            mask = self.make_mask(bias)
        else:
            mask = self.mask = self.make_mask(bias) if self.mask is None else self.mask
        q_, k_, v_ = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask[None])
        return out.transpose(1, 2).reshape(q.shape)


class _Flex:
    """torch.compile'd FlexAttention with a block mask and the bias as a score modification."""

    def __init__(self, case: NeighborhoodCase, device: torch.device) -> None:
        (height, width), k, d = case.spatial, case.kernel_size, case.dilation
        top, left = _windows(case, device).starts

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            dy, dx = key // width - top[query // width], key % width - left[query % width]
            on_grid = (dy % d == 0) & (dx % d == 0)
            return on_grid & (dy >= 0) & (dy < k * d) & (dx >= 0) & (dx < k * d)

        tokens = height * width
        self.block_mask = create_block_mask(visible, None, None, tokens, tokens, device=device)
        self.width, self.kernel_size, self.dilation = width, k, d
        self.attend = torch.compile(flex_attention, dynamic=False)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        width, size, d = self.width, self.kernel_size, self.dilation

        def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            # of hidden keys the index may leave the table
            dy = (key // width // d - query // width // d + size - 1).clamp(0, 2 * size - 2)
            dx = (key % width // d - query % width // d + size - 1).clamp(0, 2 * size - 2)
            return score + bias[head, dy, dx]

        q_, k_, v_ = (x.flatten(1, 2).transpose(1, 2).contiguous() for x in (q, k, v))
        out = self.attend(q_, k_, v_, score_mod=biased, block_mask=self.block_mask)
        return out.transpose(1, 2).reshape(q.shape)
