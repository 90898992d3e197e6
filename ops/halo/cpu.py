"""The fast CPU path of halo attention: cache-sized chunks of blocks, every logit from two matrix products."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops._checks import compute_dtype

__all__ = ["halo_attention_backward_cpu", "halo_attention_cpu"]

# Logits of one chunk: 1 MiB of float32, half of a usual level-2 cache.
_CHUNK = 1 << 18


class _Geometry(NamedTuple):
    B: int
    H: int
    W: int
    heads: int
    block: int
    halo: int
    step: int  # side of a block of queries
    rows: int
    cols: int

    @property
    def window(self) -> int:
        return self.block + 2 * self.halo


def halo_attention_cpu(
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
    """The output [B, Hq, Wq, heads, dv] and its log-sum-exp [B, Hq, Wq, heads] in the computing dtype."""
    g = _geometry(k, block_size, halo_size, stride)
    wide = compute_dtype(q)
    tables = _tables(q, rel_height, rel_width, wide)
    spread = _spread(g, q.device, wide)
    border = _border(g, q.device, wide) if mask_border else None
    q_blocks = _query_blocks(q, g)
    k_windows, v_windows = (_windows(_pad(x, g, wide), g) for x in (k, v))
    out = q.new_empty((g.B, g.rows, g.step, g.cols, g.step, g.heads, v.shape[-1]))
    lse = q.new_empty((g.B, g.rows, g.step, g.cols, g.step, g.heads, 1), dtype=wide)

    for chunk in _chunks(g):
        queries = _gather_queries(q_blocks[chunk], wide)  # (M, step**2, d)
        keys, values = (w[chunk].reshape(queries.shape[0], g.window**2, -1) for w in (k_windows, v_windows))
        logits = _logits(queries, keys, _bias(queries, tables, border, chunk, g), spread, scale)
        top = logits.amax(-1, keepdim=True)
        total = logits.sub_(top).exp_().sum(-1, keepdim=True)
        _scatter_queries(out[chunk], torch.bmm(logits, values).div_(total), g)
        _scatter_queries(lse[chunk], total.log_().add_(top), g)
    return _crop(out, q, g), _crop(lse, q, g).squeeze(-1)


def halo_attention_backward_cpu(
    grad: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the two tables (shape (0, d) for a table that is None)."""
    g = _geometry(k, block_size, halo_size, stride)
    wide = compute_dtype(q)
    window, d = g.window, q.shape[-1]
    tables = _tables(q, rel_height, rel_width, wide)
    spread = _spread(g, q.device, wide)
    border = _border(g, q.device, wide) if mask_border else None
    q_blocks, grad_blocks = (_query_blocks(x, g) for x in (q, grad))
    k_pad, v_pad = (_pad(x, g, wide) for x in (k, v))
    k_windows, v_windows = _windows(k_pad, g), _windows(v_pad, g)
    dk_pad, dv_pad = torch.zeros_like(k_pad), torch.zeros_like(v_pad)
    dk_windows, dv_windows = _windows(dk_pad, g), _windows(dv_pad, g)
    dq = q.new_empty((g.B, g.rows, g.step, g.cols, g.step, g.heads, d))
    d_tables = None if tables is None else torch.zeros_like(tables)

    for chunk in _chunks(g):
        queries, upstream = (_gather_queries(x[chunk], wide) for x in (q_blocks, grad_blocks))
        keys, values = (w[chunk].reshape(queries.shape[0], window**2, -1) for w in (k_windows, v_windows))
        logits = _logits(queries, keys, _bias(queries, tables, border, chunk, g), spread, scale)
        # From the logits, not from their log-sum-exp, whose rounding would be an error of the exponent.
        attn = torch.softmax(logits, -1, out=logits)
        _add_windows(dv_windows[chunk], torch.bmm(attn.transpose(1, 2), upstream), g)
        d_attn = torch.bmm(upstream, values.transpose(1, 2))
        d_logits = torch._softmax_backward_data(d_attn, attn, -1, wide, grad_input=d_attn)
        _add_windows(dk_windows[chunk], torch.bmm(d_logits.transpose(1, 2), queries).mul_(scale), g)
        dq_chunk = torch.bmm(d_logits, keys).mul_(scale)
        if tables is not None and d_tables is not None:
            d_bias = d_logits.view(-1, window**2) @ spread.t()
            d_shifted = d_bias.new_zeros(queries.shape[0], g.step, g.step, tables.shape[0])
            by_row, by_col = _shifted_views(d_shifted, g)
            d_bias = d_bias.view(-1, g.step, g.step, 2 * window)
            by_row.copy_(d_bias[..., :window])
            by_col.copy_(d_bias[..., window:])
            d_shifted = d_shifted.view(-1, tables.shape[0])
            # a query of NaN has gradients of NaN in its own rows; its product with the zeros of the others is none
            d_tables.addmm_(d_shifted.t(), queries.nan_to_num(0.0, 0.0, 0.0).view(-1, d))
            dq_chunk.view(-1, d).addmm_(d_shifted, tables)
        _scatter_queries(dq[chunk], dq_chunk, g)

    dk, dv = (x[:, g.halo : g.halo + g.H, g.halo : g.halo + g.W].to(q.dtype).contiguous() for x in (dk_pad, dv_pad))
    d_rel = [q.new_zeros((0, d)), q.new_zeros((0, d))]
    if d_tables is not None:
        halves = d_tables.to(q.dtype).view(2, -1, d)
        d_rel = [d_rel[i] if given is None else halves[i].clone() for i, given in enumerate((rel_height, rel_width))]
    return _crop(dq, q, g), dk, dv, d_rel[0], d_rel[1]


def _geometry(k: Tensor, block: int, halo: int, stride: int) -> _Geometry:
    B, H, W, heads, _ = k.shape
    return _Geometry(B, H, W, heads, block, halo, block // stride, -(-H // block), -(-W // block))


def _chunks(g: _Geometry) -> Iterator[tuple[slice, slice]]:
    """Slices of (images, block rows) in a fixed order; their logits fit in the cache where one block row does."""
    block_row = g.cols * g.heads * g.step**2 * g.window**2
    if block_row * g.rows <= _CHUNK:
        images = max(1, _CHUNK // (block_row * g.rows))
        yield from ((slice(b, b + images), slice(None)) for b in range(0, g.B, images))
        return
    rows = max(1, _CHUNK // block_row)
    yield from ((slice(b, b + 1), slice(r, r + rows)) for b in range(g.B) for r in range(0, g.rows, rows))


def _pad(x: Tensor, g: _Geometry, dtype: torch.dtype) -> Tensor:
    """[B, H, W, heads, d] -> contiguous, with the halo and up to whole blocks, in the computing dtype."""
    bottom, right = g.rows * g.block - g.H + g.halo, g.cols * g.block - g.W + g.halo
    return F.pad(x.to(dtype), (0, 0, 0, 0, g.halo, right, g.halo, bottom)).contiguous()


def _windows(x: Tensor, g: _Geometry) -> Tensor:
    """A view of the padded map: (B, rows, cols, heads, window, window, d)."""
    b, h, w, n, _ = x.stride()
    shape = (g.B, g.rows, g.cols, g.heads, g.window, g.window, x.shape[-1])
    return x.as_strided(shape, (b, h * g.block, w * g.block, n, h, w, 1))


def _add_windows(target: Tensor, windows: Tensor, g: _Geometry) -> None:
    """target, a view with overlapping windows, += windows, in groups of windows that do not overlap."""
    windows = windows.view(target.shape)
    period = -(-g.window // g.block)
    for i in range(min(period, target.shape[1])):
        for j in range(min(period, target.shape[2])):
            target[:, i::period, j::period] += windows[:, i::period, j::period]


def _query_blocks(x: Tensor, g: _Geometry) -> Tensor:
    """[B, Hq, Wq, heads, d] -> (B, rows, step, cols, step, heads, d), padded to whole blocks with zeros."""
    bottom, right = g.rows * g.step - x.shape[1], g.cols * g.step - x.shape[2]
    if bottom or right:
        x = F.pad(x, (0, 0, 0, 0, 0, right, 0, bottom))
    return x.unflatten(2, (g.cols, g.step)).unflatten(1, (g.rows, g.step))


def _gather_queries(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, r, step, cols, step, heads, d) -> contiguous (b * r * cols * heads, step**2, d)."""
    step, d = x.shape[2], x.shape[-1]
    return x.permute(0, 1, 3, 5, 2, 4, 6).to(dtype).contiguous().view(-1, step * step, d)


def _scatter_queries(target: Tensor, x: Tensor, g: _Geometry) -> None:
    """The inverse of `_gather_queries`, into target."""
    b, r, step, cols, _, heads, d = target.shape
    target.copy_(x.view(b, r, cols, heads, step, step, d).permute(0, 1, 4, 2, 5, 3, 6))


def _crop(blocks: Tensor, q: Tensor, g: _Geometry) -> Tensor:
    """(B, rows, step, cols, step, heads, d) -> contiguous [B, Hq, Wq, heads, d]."""
    x = blocks.view(g.B, g.rows * g.step, g.cols * g.step, g.heads, blocks.shape[-1])
    return x[:, : q.shape[1], : q.shape[2]].contiguous()


def _tables(q: Tensor, rel_height: Tensor | None, rel_width: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Both tables above one another, [2 * (2 * window - 1), d]; a missing one is zero."""
    if rel_height is None and rel_width is None:
        return None
    given = rel_height if rel_height is not None else rel_width
    assert given is not None
    both = [torch.zeros_like(given) if t is None else t for t in (rel_height, rel_width)]
    return torch.cat(both).to(dtype)


def _spread(g: _Geometry, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One-hot rows that add a bias per key row and a bias per key column to every key of the window."""
    eye = torch.eye(g.window, device=device, dtype=dtype)
    rows, cols = eye.repeat_interleave(g.window, 1), eye.repeat(1, g.window)
    return torch.cat([rows, cols])  # (2 * window, window**2)


def _border(g: _Geometry, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Additive masks of key rows (rows, window) and key columns (cols, window); finite, as they enter a product."""
    masks = []
    for blocks, size in ((g.rows, g.H), (g.cols, g.W)):
        first = torch.arange(blocks, device=device) * g.block - g.halo
        position = first[:, None] + torch.arange(g.window, device=device)
        outside = (position < 0) | (position >= size)
        masks.append(outside.to(dtype) * (torch.finfo(dtype).min / 4))
    return masks[0], masks[1]


def _shifted_views(x: Tensor, g: _Geometry) -> tuple[Tensor, Tensor]:
    """Views (M, step, step, window) of x (M, step, step, 2 * (2 * window - 1)): the table rows that a query needs.

    Entry [m, i, j, t] of the first is x[m, i, j, t - i + window - 1], the second moves with j in the upper half.
    """
    length = x.shape[-1]
    shape = (x.shape[0], g.step, g.step, g.window)
    image, row, col = g.step * g.step * length, g.step * length, length
    first = g.window - 1
    by_row = x.as_strided(shape, (image, row - 1, col, 1), x.storage_offset() + first)
    by_col = x.as_strided(shape, (image, row, col - 1, 1), x.storage_offset() + length // 2 + first)
    return by_row, by_col


def _bias(
    queries: Tensor,
    tables: Tensor | None,
    border: tuple[Tensor, Tensor] | None,
    chunk: tuple[slice, slice],
    g: _Geometry,
) -> Tensor | None:
    """What is added to the logits, per key row and key column of a query: (M * step**2, 2 * window), or None."""
    if tables is None and border is None:
        return None
    M, window = queries.shape[0], g.window
    shape = (M, g.step, g.step, 2 * window)
    if tables is None:
        bias = queries.new_zeros(shape)
    else:
        bias = queries.new_empty(shape)
        products = (queries.view(-1, queries.shape[-1]) @ tables.t()).view(M, g.step, g.step, -1)
        by_row, by_col = _shifted_views(products, g)
        bias[..., :window] = by_row
        bias[..., window : 2 * window] = by_col
    if border is not None:
        mask_rows = border[0][chunk[1]]
        blocks = bias.view(-1, mask_rows.shape[0], g.cols, g.heads * g.step**2, bias.shape[-1])
        blocks[..., :window] += mask_rows[:, None, None]
        blocks[..., window : 2 * window] += border[1][:, None]
    return bias.view(M * g.step**2, -1)


def _logits(queries: Tensor, keys: Tensor, bias: Tensor | None, spread: Tensor, scale: float) -> Tensor:
    """(M, step**2, window**2)."""
    if bias is None:
        return torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
    logits = (bias @ spread).view(queries.shape[0], queries.shape[1], -1)
    return logits.baddbmm_(queries, keys.transpose(1, 2), alpha=scale)
