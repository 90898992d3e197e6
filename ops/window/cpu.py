"""The fast path: windows are strided views of the image, so padding is never stored and a mask is never needed.

A padded window is a smaller window, and a shifted window that joins two sides of the image is two smaller windows;
along an axis there are at most three sizes. Each combination of sizes is one batch of dense attention.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops._checks import compute_dtype
from zoo.ops._flash import attend

# Elements of the scores and of q, k, v that a thread works on at once: bounds memory, hides the cost of a call.
_CHUNK = 1 << 20


class Segment(NamedTuple):
    """`windows` windows of `size` tokens along an axis; window i has the tokens start + i * stride + j * step."""

    start: int
    windows: int
    stride: int
    size: int
    step: int


def segments(length: int, window: int, shift: int, grid: bool) -> list[Segment]:
    """The windows of an axis, grouped by size; together they hold every position exactly once."""
    if grid:
        step = -(-length // window)
        size = -(-length // step)
        full = length - (size - 1) * step  # phases that still have a last token inside the image
        groups = [Segment(0, full, 1, size, step), Segment(full, step - full, 1, size - 1, step)]
    else:
        first = min(shift, length)
        count = (length - first) // window
        rest = length - first - count * window
        groups = [
            Segment(0, 1, window, first, 1),
            Segment(first, count, window, window, 1),
            Segment(length - rest, 1, window, rest, 1),
        ]
    return [s for s in groups if s.windows and s.size]


class Tiles(NamedTuple):
    """All windows of one size: rows x columns."""

    rows: Segment
    columns: Segment

    @property
    def tokens(self) -> int:
        return self.rows.size * self.columns.size

    def view(self, x: Tensor) -> Tensor:
        """(B, H, W, ...) -> (B, rows, columns, h, w, ...), without a copy."""
        r, c = self
        batch, sy, sx, *tail = x.stride()
        return x.as_strided(
            (x.shape[0], r.windows, c.windows, r.size, c.size, *x.shape[3:]),
            (batch, r.stride * sy, c.stride * sx, r.step * sy, c.step * sx, *tail),
            x.storage_offset() + r.start * sy + c.start * sx,
        )

    def chunks(self, batch: int, heads: int, dim: int) -> Iterator[tuple[slice, slice, slice]]:
        """Index a view by batch, rows and columns, in pieces of about one _CHUNK for every thread."""
        cost = heads * self.tokens * (self.tokens + 4 * dim)
        budget = max(1, _CHUNK * torch.get_num_threads() // cost)
        columns = min(self.columns.windows, budget)
        rows = min(self.rows.windows, max(1, budget // columns))
        images = min(batch, max(1, budget // (columns * rows)))
        counts = ((batch, images), (self.rows.windows, rows), (self.columns.windows, columns))
        return product(*([slice(i, i + step) for i in range(0, n, step)] for n, step in counts))

    def bias_index(self, window: tuple[int, int], device: torch.device) -> Tensor:
        """(tokens * tokens,) positions in the flattened table of query-key pairs."""
        y = torch.arange(self.rows.size, device=device)
        x = torch.arange(self.columns.size, device=device)
        dy = y[None, :] - y[:, None] + window[0] - 1  # (query, key)
        dx = x[None, :] - x[:, None] + window[1] - 1
        index = dy[:, None, :, None] * (2 * window[1] - 1) + dx[None, :, None, :]
        return index.flatten()


def tilings(height: int, width: int, window: tuple[int, int], shift: tuple[int, int], grid: bool) -> Iterator[Tiles]:
    for rows in segments(height, window[0], shift[0], grid):
        for columns in segments(width, window[1], shift[1], grid):
            yield Tiles(rows, columns)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    grid: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output [B, H, W, heads, dim] and the log-sum-exp of the scores [B, H, W, heads]."""
    _, height, width, heads, dim = q.shape
    dtype = compute_dtype(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=dtype, device=q.device)
    if not q.numel():
        return out, lse
    table = None if bias is None else bias.to(dtype).flatten(1)
    for tiles in tilings(height, width, window, shift, grid):
        n = tiles.tokens
        pairs = None
        if table is not None:
            pairs = table.index_select(1, tiles.bias_index(window, q.device)).view(1, heads, n, n)
        views = [tiles.view(x) for x in (q, k, v, out, lse)]
        for piece in tiles.chunks(q.shape[0], heads, dim):
            # Rows of heads * d values are the longest runs to copy; attention reads the heads through a stride.
            qi, ki, vi = (x[piece].to(dtype).reshape(-1, n, heads, dim).transpose(1, 2) for x in views[:3])
            result, log = attend(qi, ki, vi, pairs, scale)
            o, s = views[3][piece], views[4][piece]
            o.copy_(result.transpose(1, 2).reshape(o.shape))
            s.copy_(log.transpose(1, 2).reshape(s.shape))
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    grid: bool,
    scale: float,
    into: tuple[Tensor, Tensor, Tensor],
) -> Tensor | None:
    """Write dq, dk, dv into the three tensors given and return the bias gradient; probabilities are recomputed."""
    _, height, width, heads, _ = q.shape
    if not q.numel():
        return None if bias is None else torch.zeros_like(bias)
    dtype = compute_dtype(q)
    table = None if bias is None else bias.to(dtype).flatten(1)
    dtable = None if table is None else torch.zeros_like(table, memory_format=torch.contiguous_format)
    for tiles in tilings(height, width, window, shift, grid):
        index = tiles.bias_index(window, q.device)
        pairs = None if table is None else table.index_select(1, index)
        dpairs = _backward_tiles(tiles, (q, k, v, grad), dtype, pairs, scale, into)
        if dtable is not None and dpairs is not None:
            dtable.scatter_add_(1, index.expand(heads, -1), dpairs)
    return None if bias is None or dtable is None else dtable.view(bias.shape).to(bias.dtype)


def _backward_tiles(
    tiles: Tiles,
    tensors: tuple[Tensor, ...],
    dtype: torch.dtype,
    pairs: Tensor | None,
    scale: float,
    into: tuple[Tensor, ...],
) -> Tensor | None:
    """Write the gradients of one tiling; the gradient of `pairs` (heads, tokens * tokens)."""
    n = tiles.tokens
    batch, _, _, heads, dim = tensors[0].shape
    dpairs = None if pairs is None else torch.zeros(heads, n, n, dtype=dtype, device=pairs.device)
    views, targets = [tiles.view(x) for x in tensors], [tiles.view(x) for x in into]
    for piece in tiles.chunks(batch, heads, dim):
        # (windows * heads, tokens, d)
        q, k, v, g = (x[piece].permute(0, 1, 2, 5, 3, 4, 6).to(dtype).reshape(-1, n, dim) for x in views)
        q = q * scale
        p = torch.bmm(q, k.transpose(1, 2))
        if pairs is not None:
            p.view(-1, heads, n, n).add_(pairs.view(heads, n, n))
        # From the scores, not from their log-sum-exp, whose rounding would be an error of the exponent.
        p = torch.softmax(p, -1, out=p)
        dv = torch.bmm(p.transpose(1, 2), g)
        dp = torch.bmm(g, v.transpose(1, 2))
        dscores = torch._softmax_backward_data(dp, p, -1, dtype, grad_input=dp)
        dq = torch.bmm(dscores, k).mul_(scale)
        dk = torch.bmm(dscores.transpose(1, 2), q)
        if dpairs is not None:
            dpairs += dscores.view(-1, heads, n, n).sum(0)
        for target, x in zip(targets, (dq, dk, dv), strict=True):
            target = target[piece]
            images, rows, columns, h, w = target.shape[:5]
            target.copy_(x.view(images, rows, columns, heads, h, w, dim).permute(0, 1, 2, 4, 5, 3, 6))
    return None if dpairs is None else dpairs.flatten(1)
