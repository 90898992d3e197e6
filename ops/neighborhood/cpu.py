"""Neighborhood attention on a CPU: tiles of queries against the box of keys that their windows cover.

The forward hands every tile to PyTorch's flash kernel with an additive mask; the backward recomputes the scores block
by block with batched GEMMs, so that nothing of the size of the scores outlives a block.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops._checks import compute_dtype, is_finite
from zoo.ops._flash import attend

from .reference import axis_windows

__all__ = ["neighborhood_attention_backward_cpu", "neighborhood_attention_cpu"]

_TILES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128)
_BLOCK = 1 << 18  # elements of a temporary for each thread, to stay in its cache
_BLOCK_THREADS = 4
_TILE_SCORES = 1 << 16  # of a head; a larger tile is chosen only where even one query has more keys


class _Run(NamedTuple):
    """Consecutive tiles of an axis that see their keys alike; tile i and its box start `i * size` after the first."""

    first: int
    size: int
    tiles: int
    box_first: int
    box: int
    rel: Tensor  # (size, box): bias index, or 2 * kernel_size - 1 outside the window


class _Phases(NamedTuple):
    """Dilation phases of an axis that have the same length."""

    first: int
    phases: int
    length: int
    dilation: int


class _Region(NamedTuple):
    """The tiles of a map that share one mask: a run of rows by a run of columns."""

    rows: _Run
    columns: _Run
    bias_index: Tensor  # (queries * keys): where in the flattened (2 * kh, 2 * kw) bias table a score finds its bias
    is_masked: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.size * self.columns.size, self.rows.box * self.columns.box


def _spans(n: int, kernel_size: int, stride: int, is_causal: bool) -> list[tuple[int, int]]:
    """The first key of every query and the one after its last; neither ever decreases."""
    keys, _, valid = axis_windows(n, kernel_size, 1, stride, is_causal, torch.device("cpu"))
    return list(zip(keys[:, 0].tolist(), (keys[:, 0] + valid.sum(1)).tolist(), strict=True))


def _runs(spans: Sequence[tuple[int, int]], kernel_size: int, tile: int) -> list[_Run]:
    runs: list[_Run] = []
    patterns: list[object] = []
    for first in range(0, len(spans), tile):
        windows = spans[first : first + tile]
        lo, box = windows[0][0], windows[-1][1] - windows[0][0]
        pattern = [(start - first, end - first) for start, end in windows]
        if runs and pattern == patterns[-1]:
            runs[-1] = runs[-1]._replace(tiles=runs[-1].tiles + 1)
            continue
        start, end = torch.tensor(windows).sub_(lo).t().unsqueeze(-1)
        column, row = torch.arange(box), torch.arange(len(windows))[:, None]
        rel = (lo - first + kernel_size - 1) + column - row
        rel = rel.masked_fill((column < start) | (column >= end), 2 * kernel_size - 1)
        runs.append(_Run(first, len(windows), 1, lo, box, rel))
        patterns.append(pattern)
    return runs


def _cost(rows: Counter[tuple[int, int]], columns: Counter[tuple[int, int]], dim: int) -> float:
    """Estimated nanoseconds of one head, given how many tiles there are of each size and box."""
    total = 0.0
    for (h, kh), row_tiles in rows.items():
        for (w, kw), column_tiles in columns.items():
            m, n = h * w, kh * kw
            products = (1.6 + 0.035 * dim) * n * (m + 12)  # GEMMs and exponentials, less efficient where m is small
            memory = 1e3 * max(0, m * n - _TILE_SCORES)
            total += row_tiles * column_tiles * (products + 0.2 * dim * (m + 2 * n) + memory + 500) + 5000
    return total


@functools.lru_cache(maxsize=128)
def _regions(
    lengths: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    is_causal: tuple[bool, bool],
    dim: int,
    single: bool,
) -> tuple[_Region, ...]:
    """The tiles of a phase: those that cost least, or a single query each."""
    with torch.inference_mode(False), torch.device("cpu"):
        spans, boxes = [], []
        for n, k, s, causal in zip(lengths, kernel_size, stride, is_causal, strict=True):
            axis = _spans(n, k, s, causal)
            spans.append(axis)
            tiles = [1] if single else sorted({min(n, math.ceil(tile / s) * s) for tile in (*_TILES, n)})
            boxes.append({tile: _tile_boxes(axis, tile) for tile in tiles})
        pairs = itertools.product(*boxes)
        tile_h, tile_w = min(pairs, key=lambda pair: _cost(boxes[0][pair[0]], boxes[1][pair[1]], dim))
        regions = []
        for r in _runs(spans[0], kernel_size[0], tile_h):
            for c in _runs(spans[1], kernel_size[1], tile_w):
                rows, columns = r.rel[:, None, :, None], c.rel[:, None]  # (h, w, kh, kw)
                outside = (rows == 2 * kernel_size[0] - 1) | (columns == 2 * kernel_size[1] - 1)
                bias_index = rows * (2 * kernel_size[1]) + columns
                regions.append(_Region(r, c, bias_index.flatten().int(), bool(outside.any())))
    return tuple(regions)


def _tile_boxes(spans: Sequence[tuple[int, int]], tile: int) -> Counter[tuple[int, int]]:
    lasts = (min(first + tile, len(spans)) - 1 for first in range(0, len(spans), tile))
    return Counter((last % tile + 1, spans[last][1] - spans[last - last % tile][0]) for last in lasts)


def _phases(size: int, dilation: int) -> list[_Phases]:
    n, longer = divmod(size, dilation)
    groups = [_Phases(0, longer, n + 1, dilation), _Phases(longer, dilation - longer, n, dilation)]
    return [group for group in groups if group.phases and group.length]


def _phase_view(x: Tensor, rows: _Phases, columns: _Phases) -> Tensor:
    """[B, H, W, nh, d] -> (B, h, w, nh, d, ph, pw) of the tokens of these phases."""
    for axis, (first, count, _, dilation) in enumerate((rows, columns), start=1):
        x = x.narrow(axis, first, x.size(axis) - first).unfold(axis, count, dilation)
    return x


def _boxes(x: Tensor, rows: tuple[int, int, int, int], columns: tuple[int, int, int, int]) -> Tensor:
    """Boxes (first, size, count, step) of a phase view: (B, ph, pw, th, tw, h, w, nh, d)."""
    for axis, (first, size, count, step) in enumerate((rows, columns), start=1):
        x = x.narrow(axis, first, (count - 1) * step + size).unfold(axis, size, step)
    return x.permute(0, 5, 6, 1, 2, 7, 8, 3, 4)  # (B, th, tw, nh, d, ph, pw, h, w) before


def _query_tiles(x: Tensor, region: _Region) -> Tensor:
    rows, columns = region.rows, region.columns
    return _boxes(
        x, (rows.first, rows.size, rows.tiles, rows.size), (columns.first, columns.size, columns.tiles, columns.size)
    )


def _key_boxes(x: Tensor, region: _Region) -> Tensor:
    rows, columns = region.rows, region.columns
    return _boxes(
        x,
        (rows.box_first, rows.box, rows.tiles, rows.size),
        (columns.box_first, columns.box, columns.tiles, columns.size),
    )


def _add_boxes(x: Tensor, region: _Region, boxes: Tensor, block: tuple[slice, ...]) -> None:
    """Add (B, ph, pw, th, tw, h, w, nh, d) boxes to a phase view; parts a tile wide do not overlap."""
    rows, columns = region.rows, region.columns
    for top, height in _parts(rows):
        for left, width in _parts(columns):
            target = _boxes(
                x,
                (rows.box_first + top, height, rows.tiles, rows.size),
                (columns.box_first + left, width, columns.tiles, columns.size),
            )
            target[block].add_(boxes[..., top : top + height, left : left + width, :, :])


def _parts(run: _Run) -> list[tuple[int, int]]:
    step = run.size if run.tiles > 1 else run.box
    return [(i, min(step, run.box - i)) for i in range(0, run.box, step)]


def _blocks(sizes: Sequence[int], elements: int) -> Iterator[tuple[slice, ...]]:
    """Split tiles of so many elements, in row-major order, into blocks that fit a temporary (or of one tile)."""
    budget = max(1, _BLOCK * min(_BLOCK_THREADS, torch.get_num_threads()) // elements)
    inner, axis = 1, len(sizes)
    while axis and inner * sizes[axis - 1] <= budget:
        axis -= 1
        inner *= sizes[axis]
    whole = [slice(0, size) for size in sizes[axis:]]
    if not axis:
        yield tuple(whole)
        return
    step = max(1, budget // inner)
    for flat in range(math.prod(sizes[: axis - 1])):
        outer = []
        for size in reversed(sizes[: axis - 1]):
            flat, i = divmod(flat, size)
            outer.append(slice(i, i + 1))
        for first in range(0, sizes[axis - 1], step):
            yield (*reversed(outer), slice(first, min(first + step, sizes[axis - 1])), *whole)


class _Problem:
    """A 1-D or 2-D call as a 2-D one, split into dilation phases and regions."""

    def __init__(
        self,
        spatial: Sequence[int],
        kernel_size: Sequence[int],
        dilation: Sequence[int],
        stride: Sequence[int],
        is_causal: Sequence[bool],
        bias: Tensor | None,
        like: Tensor,
        single: bool,
    ) -> None:
        pad = (1,) * (2 - len(spatial))
        self.spatial = (*pad, *spatial)
        self.kernel_size = (*pad, *kernel_size)
        self.dilation = (*pad, *dilation)
        self.stride = (*pad, *stride)
        self.is_causal = (*(False for _ in pad), *is_causal)
        kh, kw = self.kernel_size
        table = like.new_zeros(1, 2 * kh - 1, 2 * kw - 1) if bias is None else bias.to(like.dtype)
        table = table.view(-1, 2 * kh - 1, 2 * kw - 1)
        self.table = torch.nn.functional.pad(table, (0, 1, 0, 1), value=float("-inf")).flatten(1)
        self.has_bias = bias is not None
        self.single = single

    def parts(self, dim: int) -> Iterator[tuple[tuple[_Phases, _Phases], _Region]]:
        for rows in _phases(self.spatial[0], self.dilation[0]):
            for columns in _phases(self.spatial[1], self.dilation[1]):
                lengths = rows.length, columns.length
                for region in _regions(lengths, self.kernel_size, self.stride, self.is_causal, dim, self.single):
                    yield (rows, columns), region

    def mask(self, region: _Region) -> Tensor | None:
        """What every tile of the region adds to its scores: (1 or nh, queries, keys), -inf outside the windows."""
        if not (self.has_bias or region.is_masked):
            return None
        return self.table.index_select(1, region.bias_index.to(self.table.device)).view(-1, *region.shape)

    def add_bias_gradient(self, dbias: Tensor, region: _Region, dmask: Tensor) -> None:
        """Add (nh, queries, keys) to [nh, 2 * kh - 1, 2 * kw - 1]; hidden keys have a gradient of zero."""
        rows, columns = region.rows, region.columns
        dmask = dmask.view(-1, rows.size, columns.size, rows.box, columns.box)
        sums = _diagonals(_diagonals(dmask.transpose(2, 3)).movedim(-1, 1))  # (nh, width, height)
        target = dbias.transpose(1, 2)
        for axis, run, k in ((2, rows, self.kernel_size[0]), (1, columns, self.kernel_size[1])):
            # the first diagonal is the last query's first key
            first = run.box_first - (run.first + run.size - 1) + k - 1
            start, stop = max(first, 0), min(first + sums.size(axis), 2 * k - 1)
            sums, target = sums.narrow(axis, start - first, stop - start), target.narrow(axis, start, stop - start)
        target += sums


def _diagonals(x: Tensor) -> Tensor:
    """(..., queries, keys) -> (..., queries + keys - 1): sums over equal key - query, in a fixed order."""
    m, n = x.shape[-2:]
    # read with rows one shorter than they are, every row moves one to the right of the last
    shifted = torch.nn.functional.pad(x.flip(-2), (0, m)).flatten(-2)[..., : m * (n + m - 1)]
    return shifted.unflatten(-1, (m, n + m - 1)).sum(-2)


def _plane(*tensors: Tensor) -> Iterator[Tensor]:
    return (x.unsqueeze(1) if x.dim() == 4 else x for x in tensors)


def neighborhood_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as reference.py defines them."""
    options = kernel_size, dilation, stride, is_causal, scale
    out, lse = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=compute_dtype(q))
    _forward(q, k, v, bias, out, lse, *options, single=False)
    if not is_finite(out):
        images = _not_finite(out)
        some_out, some_lse = torch.empty_like(out[images]), torch.empty_like(lse[images])
        _forward(q[images], k[images], v[images], bias, some_out, some_lse, *options, single=True)
        out[images], lse[images] = some_out, some_lse
    return out, lse


def _not_finite(*tensors: Tensor) -> Tensor:
    """Which images to compute again, a query at a time: a mask hides no NaN, and a tile has one box for its queries."""
    rows = [x.flatten(1).sum(1, dtype=compute_dtype(x)).isfinite() for x in tensors]
    return ~torch.stack(rows).all(0)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    kernel_size: Sequence[int], dilation: Sequence[int], stride: Sequence[int], is_causal: Sequence[bool],
    scale: float, single: bool,
) -> None:  # fmt: skip
    if not out.numel():
        return
    dtype = lse.dtype
    problem = _Problem(q.shape[1:-2], kernel_size, dilation, stride, is_causal, bias, lse, single)
    maps = list(_plane(*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)), out, lse.unsqueeze(-1)))
    heads, dim = q.shape[-2:]
    phases = None
    for part, region in problem.parts(dim):
        if part != phases:
            phases, (qp, kp, vp, op, lp) = part, (_phase_view(x, *part) for x in maps)
        mask = problem.mask(region)
        qs, outs, lses = (_query_tiles(x, region) for x in (qp, op, lp))
        ks, vs = (_key_boxes(x, region) for x in (kp, vp))
        queries, keys = region.shape
        for block in _blocks(qs.shape[:5], heads * keys * dim):
            query, key, value = (
                _tokens_first(x[block], dtype).reshape(-1, n, heads, x.size(-1)).transpose(1, 2)
                for x, n in ((qs, queries), (ks, keys), (vs, keys))
            )
            tiles_out, tiles_lse = attend(query, key, value, None if mask is None else mask.unsqueeze(0), scale)
            outs[block].copy_(tiles_out.transpose(1, 2).reshape(outs[block].shape))
            lses[block].copy_(tiles_lse.transpose(1, 2).reshape(lses[block].shape))


def neighborhood_attention_backward_cpu(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> Tensor:
    """Write the gradients of q, k, v to dq, dk, dv (of any strides); the bias's (empty without one) is returned."""
    options = kernel_size, dilation, stride, is_causal, scale
    grads = (dq, dk, dv)
    dbias = _backward(grad, q, k, v, bias, grads, *options, single=False)
    if not is_finite(*grads):
        wrong = _not_finite(*grads)
        dbias = torch.zeros_like(dbias)
        for images, single in ((~wrong, False), (wrong, True)):
            some = (torch.empty_like(dq[images]), torch.empty_like(dk[images]), torch.empty_like(dv[images]))
            dbias += _backward(grad[images], q[images], k[images], v[images], bias, some, *options, single=single)
            for x, part in zip(grads, some, strict=True):
                x[images] = part
    return dbias.to(q.dtype if bias is None else bias.dtype)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, grads: tuple[Tensor, Tensor, Tensor],
    kernel_size: Sequence[int], dilation: Sequence[int], stride: Sequence[int], is_causal: Sequence[bool],
    scale: float, single: bool,
) -> Tensor:  # fmt: skip
    dtype, (dq, dk, dv) = compute_dtype(q), grads
    dbias = q.new_zeros((0,) if bias is None else bias.shape, dtype=dtype)
    if q.numel():
        # keys are summed over the tiles that see them
        sums = [x.zero_() if x.dtype == dtype else torch.zeros_like(x, dtype=dtype) for x in (dk, dv)]
        problem = _Problem(q.shape[1:-2], kernel_size, dilation, stride, is_causal, bias, sums[0], single)
        maps = list(_plane(q, grad, k, v, dq, *sums))
        table = dbias.unsqueeze(1) if dbias.dim() == 2 else dbias
        phases = None
        for part, region in problem.parts(q.shape[-1]):
            if part != phases:
                phases, views = part, [_phase_view(x, *part) for x in maps]
            dmask = _region_backward(region, problem.mask(region), views, problem.has_bias, scale, dtype)
            if dmask is not None:
                problem.add_bias_gradient(table, region, dmask)
        for x, total in zip((dk, dv), sums, strict=True):
            if x is not total:
                x.copy_(total)
    return dbias


def _region_backward(
    region: _Region, mask: Tensor | None, views: list[Tensor], has_bias: bool, scale: float, dtype: torch.dtype
) -> Tensor | None:
    qp, gp, kp, vp, dqp, dkp, dvp = views
    qs, gs, dqs = (_query_tiles(x, region) for x in (qp, gp, dqp))
    ks, vs = (_key_boxes(x, region) for x in (kp, vp))
    heads = qs.size(-2)
    queries, keys = region.shape
    dmask = torch.zeros_like(mask) if has_bias and mask is not None else None
    blocks = list(_blocks(qs.shape[:5], heads * queries * keys))
    largest = max(math.prod(s.stop - s.start for s in block) for block in blocks) * heads
    space = torch.empty(3, largest, queries, keys, dtype=dtype, device=qs.device)
    for block in blocks:
        query, dout, key, value = (_heads_first(x[block], dtype) for x in (qs, gs, ks, vs))
        query *= scale
        score, weight, dweight = space[:, : query.size(0)]
        torch.bmm(query, key.transpose(1, 2), out=score)
        if mask is not None:
            score.view(-1, heads, queries, keys).add_(mask)
        torch.softmax(score, -1, out=weight)
        _add_boxes(dvp, region, _heads_last(torch.bmm(weight.transpose(1, 2), dout), vs[block]), block)
        torch.bmm(dout, value.transpose(1, 2), out=dweight)
        dscore = torch._softmax_backward_data(dweight, weight, -1, dtype, grad_input=score)
        if dmask is not None:
            dmask += dscore.view(-1, heads, queries, keys).sum(0)
        _add_boxes(dkp, region, _heads_last(torch.bmm(dscore.transpose(1, 2), query), ks[block]), block)
        torch.mul(_heads_last(torch.bmm(dscore, key), qs[block]), scale, out=dqs[block])
    return dmask


def _tokens_first(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    return tiles if tiles.dtype == dtype else torch.empty(tiles.shape, dtype=dtype, device=tiles.device).copy_(tiles)


def _heads_first(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, ph, pw, th, tw, h, w, nh, d) -> a copy (tiles * nh, h * w, d)."""
    tiles = tiles.movedim(-2, 5)
    copy = torch.empty(tiles.shape, dtype=dtype, device=tiles.device).copy_(tiles)
    return copy.view(-1, tiles.size(-3) * tiles.size(-2), tiles.size(-1))


def _heads_last(x: Tensor, like: Tensor) -> Tensor:
    """(tiles * nh, h * w, d) -> (B, ph, pw, th, tw, h, w, nh, d)."""
    *leading, h, w, heads, dim = like.shape
    return x.view(*leading, heads, h, w, dim).movedim(5, -2)
