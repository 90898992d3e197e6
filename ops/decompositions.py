"""Every registered op as operators of ATen, for programs that are to run without zoo: ONNX, or a plain torch.export.

Written so that one program serves every size and batch: maps are cut into tiles by index along each axis, the indices
are computed from the sizes, and nothing asks a size for its value. The tiles of `_Axis` are what all local ops share:
queries of a tile see a span of keys, some of which a mask hides. Forward only; half precision is computed in float32.

The definitions are in `<op>/reference.py`; tests compare each decomposition with them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import has_static_value, statically_known_true

from ._checks import compute_dtype, cover

__all__ = ["DECOMPOSITIONS", "decompose", "table"]

_TILE = 8  # queries per axis of a tile of neighborhood attention; its span is 7 to 14 keys with the usual windows

Sizes = Sequence[int]


def table() -> dict[Any, Callable[..., Any]]:
    """The table that `torch.export.ExportedProgram.run_decompositions` takes: a registered op to its ATen form."""
    return {getattr(torch.ops.zoo, name).default: function for name, function in DECOMPOSITIONS.items()}


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """An exported program without zoo's operators: it loads and runs where zoo is not installed.

    A whole `torch.onnx.export(model, ..., dynamo=True)` needs no such call; a program that was exported before does:
    `torch.onnx.export(zoo.ops.decompose(program), ...)`.

    Args:
        program: of `torch.export.export`, forward only.

    Raises:
        ValueError: it differentiates, with a registered backward, which has no ATen form.
    """
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    without = sorted(t for t in targets if t.startswith("zoo.") and t.split(".")[1] not in DECOMPOSITIONS)
    if without:
        raise ValueError(f"decompose: {without[0]} has no ATen form; export the forward pass alone")
    return program.run_decompositions(table())


@dataclass
class _Axis:
    """Tiles along one axis; all indices lie inside the axis.

    query: [tiles, queries per tile].
    key: [tiles, keys per tile].
    inside: [tiles, keys per tile], False for a key that stands for none; None where there is no such key.
    seen: [tiles, queries per tile, keys per tile], or with 1 for the queries where they see the same; None for all.
    relative: key - query as the bias counts it, of the shape of `seen`; or [queries per tile, keys per tile].
    place: [length], the number of every token among all queries.
    """

    query: Tensor
    key: Tensor
    inside: Tensor | None
    seen: Tensor | None
    relative: Tensor | None
    place: Tensor


class _Tiles:
    """Tiles of a map, or of a sequence: the product of those along the axes, on its flattened tokens.

    Args:
        make: tiles along an axis.
        axes: what `make` takes of each axis.
        widths: of the maps of queries and of keys.
        like: a tensor of the device.

    query: [tiles * queries per tile], key: [tiles * keys per tile].
    inside, seen: as along an axis.
    relative: per axis.
    place: [tokens].
    """

    def __init__(
        self, make: Callable[..., _Axis], axes: Sequence[Sequence[Any]], widths: Sequence[Any], like: Tensor
    ) -> None:
        self.axes = made = [make(*sizes, like) for sizes in axes]
        self.relative = [a.relative for a in made]
        self.number: Any = math.prod(a.query.shape[0] for a in made)
        self.queries: Any = math.prod(a.query.shape[1] for a in made)
        self.keys: Any = math.prod(a.key.shape[1] for a in made)
        if len(made) == 1:
            (a,) = made
            self.query, self.key, self.place = a.query.flatten(), a.key.flatten(), a.place
            return
        rows, columns = made
        query_width, key_width = (_factor(w, like) for w in widths)
        self.query = _product(rows.query * query_width, columns.query, torch.add).flatten()
        if all(a.key is a.query for a in made):
            self.key = self.query
        else:
            self.key = _product(rows.key * key_width, columns.key, torch.add).flatten()
        n, m, across = rows.query.shape[1], columns.query.shape[1], columns.query.shape[0]
        n, m, across = (_factor(size, like) for size in (n, m, across))
        # the number of a row's first query, and what a column adds to it
        row = rows.place // n * (across * (n * m)) + rows.place % n * m
        column = columns.place // m * (n * m) + columns.place % m
        self.place = (row.unsqueeze(1) + column).flatten()

    @cached_property
    def inside(self) -> Tensor | None:
        return self._all([a.inside for a in self.axes])

    @cached_property
    def seen(self) -> Tensor | None:
        return self._all([a.seen for a in self.axes])

    @cached_property
    def around(self) -> "_Around":
        return _around([a.key.shape[0] for a in self.axes], self.key)

    def _all(self, masks: Sequence[Tensor | None]) -> Tensor | None:
        """What holds along every axis; None stands for all."""
        known = [x for x in masks if x is not None]
        if len(known) == 0 or len(masks) == 1:
            return masks[0]
        middle = [1] * (known[0].dim() - 2)  # queries, where they are told apart
        rows, columns = (
            torch.ones((a.key.shape[0], *middle, a.key.shape[1]), dtype=torch.bool, device=a.key.device)
            if x is None
            else x
            for a, x in zip(self.axes, masks, strict=True)
        )
        return _product(rows, columns, torch.logical_and)


def _arange(size: Any, like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device)


def _length(size: Any, like: Tensor) -> Tensor:
    """A size as a tensor [1]: ONNX has no arithmetic between tensors and sizes that are symbols."""
    # not torch.tensor, which a trace of a literal detaches in place
    return torch.full((1,), size, dtype=torch.int64, device=like.device)


def _factor(size: Any, like: Tensor) -> Any:
    """A size to compute with."""
    return _length(size, like) if isinstance(size, torch.SymInt) else size


def _unasked(size: Any, like: Tensor) -> Any:
    """A size that PyTorch knows nothing of, where it is a symbol: no guard asks whether it is one.

    What is computed with it is simple too, where the size is a formula of the image's.
    """
    if not isinstance(size, torch.SymInt):
        return size
    count = _length(size, like).sum().item()
    torch._check(count >= 1)
    return count


def _cells(count: Any, size: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [count, 1] and columns [size] of [count, size]; `count` is a number, or of `_unasked`."""
    return _arange(count, like).unsqueeze(1), _arange(size, like)


def _divides(divisor: Any, size: Any) -> bool:
    """Whether it is known to."""
    return statically_known_true(size // divisor * divisor == size)


def _within(token: Tensor, length: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Which tokens an axis has, and the nearest one that it has; `first` is negative where tokens may be."""
    if first >= 0:
        return token < length, token.minimum(length - 1)
    return (token >= 0) & (token < length), token.clamp(min=0).minimum(length - 1)


def _blocks(length: Any, size: Any, first: int, like: Tensor) -> _Axis:
    """Windows of `size` tokens, one of which starts at `first`, 0 <= first < size."""
    if isinstance(size, torch.SymInt):
        return _regions_of(length, size, like)
    begin = first - size if first else 0
    tile, number = _cells(_unasked(cover(length - begin, size), like), size, like)
    token, place = tile * size + number, _arange(length, like)
    if begin:
        token, place = token + begin, place - begin
    return _same(token, number, length, place, begin, not begin and _divides(size, length))


def _regions_of(length: Any, size: Any, like: Tensor) -> _Axis:
    """Windows whose size is a symbol too."""
    whole = _divides(size, length)
    tiles = cover(length, size)
    tiles = int(tiles) if has_static_value(tiles) else _unasked(tiles, like)
    count = _unasked(size, like)
    tile, number = _cells(tiles, count, like)
    token = tile * _factor(count, like) + number
    inside, token = (None, token) if whole else _within(token, _length(length, like))
    return _Axis(token, token, inside, None if inside is None else inside.unsqueeze(1), None, _arange(length, like))


def _grid(length: Any, size: int, like: Tensor) -> _Axis:
    """Windows of `size` tokens spread over the axis, ceil(length / size) apart."""
    tiles = _unasked(cover(length, size), like)
    apart = _factor(tiles, like)
    tile, number = _cells(tiles, size, like)
    position = _arange(length, like)
    place = position % apart * size + position // apart
    return _same(tile + number * apart, number, length, place, 0, _divides(size, length))


def _same(token: Tensor, number: Tensor, length: Any, place: Tensor, first: int, whole: bool) -> _Axis:
    """Tiles whose queries are their keys, the first of them at `first`; `whole` if they have no other tokens."""
    relative = number - number.unsqueeze(1)
    if whole:
        return _Axis(token, token, None, None, relative, place)
    inside, token = _within(token, _length(length, token), first)
    return _Axis(token, token, inside, inside.unsqueeze(1), relative, place)


def _neighborhoods(length: Any, kernel: int, dilation: int, stride: int, causal: bool, like: Tensor) -> _Axis:
    """The windows of neighborhood attention; tokens of a dilation phase are in tiles of their own.

    See `axis_windows` in neighborhood/reference.py, whose formulas these are.
    """
    longest = cover(length, dilation)
    size = min(_TILE, longest) if isinstance(longest, int) else _TILE
    span = size + kernel - 1 + stride - 1
    span = min(span, longest) if isinstance(longest, int) else span
    per_phase = _unasked(cover(longest, size), like)
    tokens = _length(length, like)  # of a phase, here if there is but one
    place = _arange(length, like)
    tile, number = _cells(per_phase * dilation, size, like)
    phase = None
    if dilation > 1:
        tiles = _factor(per_phase, like)  # of a phase
        phase, tile = tile // tiles, tile % tiles
        tokens = (tokens - 1 - phase) // dilation + 1
        of_phase = place // dilation
        place = (place % dilation * tiles + of_phase // size) * size + of_phase % size
    query = (tile * size + number).minimum(tokens - 1)
    leader = query
    if stride > 1:
        leader = query // stride * stride + (stride - 1 if causal else stride // 2)
        leader = leader.minimum(tokens - 1)
    start = (leader - (kernel - 1 if causal else kernel // 2)).clamp(min=0).minimum(tokens - kernel)
    inside, key = _within(start.select(1, 0).unsqueeze(1) + _arange(span, like), tokens)

    start = start.unsqueeze(2)
    keys = key.unsqueeze(1)
    relative = keys - query.unsqueeze(2)
    seen = inside.unsqueeze(1) & (keys >= start) & (keys < start + kernel)
    if causal:
        seen = seen & (relative <= 0)
    if phase is not None:
        query, key = query * dilation + phase, key * dilation + phase
    return _Axis(query, key, inside, seen, relative, place)


def _halos(queries: Any, length: Any, block: int, halo: int, stride: int, like: Tensor) -> _Axis:
    """Blocks of queries, of a map that is `stride` times smaller, and the keys of the block and its halo."""
    step, window = block // stride, block + 2 * halo
    tiles = _unasked(cover(length, block), like)
    tile, number = _cells(tiles, step, like)
    keys = _arange(window, like)
    query = (tile * step + number).minimum(_length(queries, like) - 1)
    inside, key = _within(tile * block + (keys - halo), _length(length, like), -halo)
    return _Axis(query, key, inside, inside.unsqueeze(1), keys - number.unsqueeze(1), _arange(queries, like))


def _product(rows: Tensor, columns: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[A, T, ..] and [A', T', ..] to [A * A', T * T', ..], of any number of axes."""
    high: list[Any] = [size for n in rows.shape for size in (n, 1)]
    wide: list[Any] = [size for n in columns.shape for size in (1, n)]
    shape = [n * m for n, m in zip(rows.shape, columns.shape, strict=True)]
    return combine(rows.reshape(high), columns.reshape(wide)).reshape(shape)


# What was computed in the trace that is going on: the layers of a model share their tables.
_TABLES: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def _shared(make: Callable[..., Any], *sizes: Any, like: Tensor) -> Any:
    """make(*sizes, like), once in a trace."""
    tracer = get_proxy_mode()
    known = {} if tracer is None else _TABLES.setdefault(tracer, {})
    key = (make, str(sizes), like.device)
    if key not in known:
        known[key] = make(*sizes, like)
    return known[key]


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which leaves nothing in a trace where it is of that dtype."""
    return x if x.dtype == dtype else x.to(dtype)


def _attend(
    q: Tensor, k: Tensor | None, v: Tensor | None, tiles: _Tiles, terms: Tensor | None, scale: float,
    hide: bool = True, extra: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax attention in tiles: the output and the log-sum-exp, of q's shape up to the last axis.

    Args:
        q, k, v: [B, spatial axes, heads, dim]; or q alone, all three in [B, spatial axes, 3, heads, dim].
        tiles: the tiles of that map.
        terms: added to the logits, [heads, queries, keys] or [tiles, heads, queries, keys].
        scale: of the products.
        hide: keys that are not seen stay out; otherwise those outside the map are keys and values of zeros.
        extra: from q in tiles, [B, tiles, heads, queries, dim], to what is added to the logits.
    """
    given, dtype = q.dtype, compute_dtype(q)
    batch, spatial, heads = q.shape[0], q.shape[1 : 1 + len(tiles.axes)], q.shape[-2]
    number, queries, keys = tiles.number, tiles.queries, tiles.keys

    def cut(x: Tensor, index: Tensor, count: Any) -> Sequence[Tensor]:  # those in x, [B, tiles, heads, count, dim]
        several = x.shape[1 + len(spatial) : -2]
        x = _as(x, dtype).flatten(1, len(spatial)) if len(spatial) > 1 else _as(x, dtype)
        x = x.index_select(1, index).reshape(batch, number, count, *several, heads, x.shape[-1])
        return x.permute(3, 0, 1, 4, 2, 5).unbind(0) if several else (x.transpose(2, 3),)

    if k is None or v is None:
        if tiles.key is tiles.query:
            q, k, v = cut(q, tiles.key, keys)
        else:
            axis = q.dim() - 3
            k, v = cut(q.narrow(axis, 1, 2), tiles.key, keys)
            (q,) = cut(q.select(axis, 0), tiles.query, queries)
    else:
        (q,), (k,), (v,) = cut(q, tiles.query, queries), cut(k, tiles.key, keys), cut(v, tiles.key, keys)
    if not hide and tiles.inside is not None:
        inside = tiles.inside.reshape(number, 1, keys, 1)
        k, v = (torch.where(inside, x, torch.zeros((), dtype=dtype, device=x.device)) for x in (k, v))
    logits = (q * scale) @ k.transpose(-2, -1)
    if terms is not None:
        logits = logits + terms
    if extra is not None:
        logits = logits + extra(q)
    if hide and tiles.seen is not None:
        logits = logits.masked_fill(~tiles.seen.unsqueeze(1), float("-inf"))

    def back(x: Tensor) -> Tensor:
        x = x.transpose(2, 3).reshape(batch, number * queries, heads, x.shape[-1])
        return x.index_select(1, tiles.place).reshape(batch, *spatial, heads, x.shape[-1])

    out = back(logits.softmax(-1) @ v)
    return _as(out, given), back(logits.logsumexp(-1, keepdim=True)).squeeze(-1)


def _bias(bias: Tensor, number: Tensor, q: Tensor) -> Tensor:
    """The elements of bias [heads, ...] with these numbers [..., queries, keys]: [..., heads, queries, keys]."""
    table = _as(bias, compute_dtype(q)).flatten(1)
    picked = table.index_select(1, number.flatten()).reshape(table.shape[0], *number.shape)
    return picked if number.dim() == 2 else picked.transpose(0, 1)


def _window_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None,
    window_h: int, window_w: int, shift_h: int, shift_w: int, grid: bool, scale: float, *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    H, W = q.shape[1:3]
    if grid:
        tiles = _shared(_Tiles, _grid, [(H, window_h), (W, window_w)], (W, W), like=q)
    else:
        tiles = _shared(_Tiles, _blocks, [(H, window_h, shift_h), (W, window_w, shift_w)], (W, W), like=q)
    terms = None
    if bias is not None:
        rows, columns = (r + n - 1 for r, n in zip(tiles.relative, (window_h, window_w), strict=True))
        terms = _bias(bias, _product(rows, columns, lambda r, c: r * (2 * window_w - 1) + c), q)
    return _attend(q, k, v, tiles, terms, scale)


def _neighborhood_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None,
    kernel_size: Sizes, dilation: Sizes, stride: Sizes, is_causal: Sizes, scale: float, *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    spatial = q.shape[1 : 1 + len(kernel_size)]
    sizes = list(zip(spatial, kernel_size, dilation, stride, (bool(c) for c in is_causal), strict=True))
    tiles = _shared(_Tiles, _neighborhoods, sizes, (spatial[-1], spatial[-1]), like=q)
    terms = None
    if bias is not None:
        # pairs that are not seen may lie outside of the table; any element does for them
        number, *others = ((r + n - 1).clamp(0, 2 * n - 2) for r, n in zip(tiles.relative, kernel_size, strict=True))
        for columns in others:
            number = _product(number, columns, lambda r, c: r * (2 * kernel_size[-1] - 1) + c)
        terms = _bias(bias, number, q)
    return _attend(q, k, v, tiles, terms, scale)


def _halo_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor | None, rel_width: Tensor | None,
    block_size: int, halo_size: int, stride: int, mask_border: bool, scale: float, *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = [(q.shape[i], k.shape[i], block_size, halo_size, stride) for i in (1, 2)]
    tiles = _shared(_Tiles, _halos, sizes, (q.shape[2], k.shape[2]), like=q)
    step, window = block_size // stride, block_size + 2 * halo_size

    def relative(x: Tensor) -> Tensor:
        """q [B, tiles, heads, queries, dim] with the rows of its keys' height and width: [..., queries, keys]."""
        batch, number, heads, _queries, dim = x.shape
        x = x.reshape(batch, number, heads, step, step, dim)
        total: Any = 0
        for i, table, equation in ((0, rel_height, "bthxyd,xid->bthxyi"), (1, rel_width, "bthxyd,yid->bthxyi")):
            if table is not None:
                rows = _as(table, x.dtype).index_select(0, (tiles.relative[i] + window - 1).flatten())
                part = torch.einsum(equation, x, rows.reshape(step, window, dim))
                total = total + part.unsqueeze(-1 - i)
        total = total.expand(batch, number, heads, step, step, window, window)
        return total.reshape(batch, number, heads, step * step, window * window)

    extra = None if rel_height is None and rel_width is None else relative
    return _attend(q, k, v, tiles, None, scale, mask_border, extra)


def _regions(x: Tensor, region: Sizes) -> tuple[Tensor, _Tiles]:
    """[B, H, W, ...] to [B, R, tokens of a region, channels], zeros outside the map."""
    H, W = x.shape[1:3]
    tiles = _shared(_Tiles, _blocks, [(H, region[0], 0), (W, region[1], 0)], (W, W), like=x)
    x = x.flatten(1, 2).flatten(2).index_select(1, tiles.key)
    x = x.reshape(x.shape[0], tiles.number, tiles.keys, x.shape[-1])
    if tiles.inside is not None:
        x = torch.where(tiles.inside.unsqueeze(-1), x, torch.zeros((), dtype=x.dtype, device=x.device))
    return x, tiles


def _from_regions(x: Tensor, tiles: _Tiles, like: Tensor) -> Tensor:
    """The inverse of `_regions` for the map of `like`: [B, R, tokens, channels] to [B, H, W, channels]."""
    x = x.reshape(x.shape[0], tiles.key.shape[0], x.shape[-1]).index_select(1, tiles.place)
    return x.reshape(*like.shape[:3], x.shape[-1])


def _routing_index(q: Tensor, k: Tensor, region_height: int, region_width: int, topk: int, *_: Any) -> Tensor:
    region = (region_height, region_width)

    def mean(x: Tensor) -> Tensor:
        tokens, tiles = _regions(_as(x, compute_dtype(x)), region)
        if tiles.inside is None:
            return tokens.mean(2)
        return tokens.sum(2) / _as(tiles.inside, tokens.dtype).sum(1, keepdim=True)

    affinity = mean(q) @ mean(k).transpose(1, 2)
    # On a CPU every sort is stable, and ONNX has one without that word, whose ties are in order too.
    if affinity.device.type == "cpu":
        order = affinity.sort(dim=-1, descending=True).indices
    else:
        order = affinity.sort(dim=-1, descending=True, stable=True).indices
    order = order.index_select(2, _arange(topk, q))
    count = math.prod(cover(q.shape[i + 1], region[i]) for i in range(2))
    return order.index_select(1, _arange(count, q)) if isinstance(count, torch.SymInt) else order


def _routing_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, region_height: int, region_width: int, scale: float, *_: Any
) -> tuple[Tensor, Tensor]:
    region, dtype, heads = (region_height, region_width), compute_dtype(q), q.shape[3]
    key_region = region
    if not _same_map(q, k):
        rows, columns = (cover(q.shape[i + 1], region[i]) for i in range(2))
        key_region = (k.shape[1] // rows, k.shape[2] // columns)
    topk = index.shape[2]
    queries, tiles = _regions(_as(q, dtype), region)
    batch, count = queries.shape[:2]
    queries = queries.unflatten(-1, (heads, q.shape[4])).transpose(2, 3)
    first = _arange(batch, q) * _length(count, q)  # of every image
    if isinstance(count, torch.SymInt):  # the same number, of which nothing is known
        index = index.index_select(1, _arange(count, q))
    picked = (index.long() + first.reshape(batch, 1, 1)).flatten()

    def gather(x: Tensor) -> Tensor:  # [B, R, heads, topk * tokens, dim]
        tokens, _tiles = _regions(_as(x, dtype), key_region)
        picks = tokens.flatten(0, 1).index_select(0, picked)
        return picks.reshape(batch, count, topk * tokens.shape[2], heads, x.shape[4]).transpose(2, 3)

    logits = (queries * scale) @ gather(k).transpose(-2, -1)
    out = (logits.softmax(-1) @ gather(v)).transpose(2, 3).flatten(3)
    lse = logits.logsumexp(-1).transpose(2, 3)
    out, lse = (_from_regions(x, tiles, q) for x in (out, lse))
    return _as(out.unflatten(-1, (heads, v.shape[4])), q.dtype), lse


def _same_map(q: Tensor, k: Tensor) -> bool:
    return all(statically_known_true(q.shape[i] == k.shape[i]) for i in (1, 2))


@dataclass
class _Around:
    """The 3 x 3 tokens around every cell of a grid.

    token: [cells * 9], the number of the token, or of the nearest one that is in the grid.
    inside: [cells, 9, 1], whether it is.
    given: [cells * 9], where in [cells, 9] the cell around gives this token its share.
    """

    token: Tensor
    inside: Tensor
    given: Tensor


def _around(sizes: Sequence[Any], like: Tensor) -> _Around:
    cells = (_cells(n, 3, like) for n in sizes)
    down, right = (_within(x + (step - 1), _length(n, like), -1) for (x, step), n in zip(cells, sizes, strict=True))
    number = _product(down[1] * _factor(sizes[1], like), right[1], torch.add)  # [cells, 9]
    seen = _product(down[0], right[0], torch.logical_and)
    return _Around(number.flatten(), seen.unsqueeze(-1), (number * 9 + (8 - _arange(9, like))).flatten())


def _spread(tokens: Tensor, around: _Around) -> Tensor:
    """[B, cells, C] to the nine tokens around each cell, zeros outside: [B, cells, 9, C]."""
    x = tokens.index_select(1, around.token)
    x = x.reshape(x.shape[0], around.inside.shape[0], 9, x.shape[-1])
    return torch.where(around.inside, x, torch.zeros((), dtype=x.dtype, device=x.device))


def _collect(parts: Tensor, around: _Around) -> Tensor:
    """The inverse: what every token gets from the cells around it, [B, cells, 9, C] to [B, cells, C]."""
    x = parts.flatten(1, 2).index_select(1, around.given).reshape(parts.shape)
    return torch.where(around.inside, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum(2)


def _super_token_sampling(
    x: Tensor, token_height: int, token_width: int, n_iter: int, scale: float, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from .super_token.reference import EPS  # which is imported after this file

    size, dtype = (token_height, token_width), compute_dtype(x)
    pixels, tiles = _regions(_as(x, dtype), size)  # [B, cells, pixels of a cell, C]
    tokens = pixels.mean(2)
    affinity = mass = tokens
    for _iteration in range(n_iter):
        affinity = (pixels @ _spread(tokens, tiles.around).transpose(-2, -1) * scale).softmax(-1)
        mass = _collect(affinity.sum(2).unsqueeze(-1), tiles.around) + EPS
        tokens = _collect(affinity.transpose(-2, -1) @ pixels, tiles.around) / mass
    rows, columns = (cover(x.shape[i + 1], size[i]) for i in range(2))
    tokens, mass = (_on_grid(t, rows, columns) for t in (tokens, mass))
    return _as(tokens, x.dtype), _as(_from_regions(affinity, tiles, x), x.dtype), mass


def _on_grid(tokens: Tensor, rows: Any, columns: Any) -> Tensor:
    """[B, rows * columns, C] to [B, rows, columns, C]."""
    count = rows * columns
    if isinstance(count, torch.SymInt):  # the same number, of which nothing was known
        tokens = tokens.index_select(1, _arange(count, tokens))
    return tokens.reshape(tokens.shape[0], rows, columns, tokens.shape[-1])


def _super_token_mapping(tokens: Tensor, affinity: Tensor, token_height: int, token_width: int, *_: Any) -> Tensor:
    weights, tiles = _regions(_as(affinity, compute_dtype(tokens)), (token_height, token_width))
    out = weights @ _spread(_as(tokens, weights.dtype).flatten(1, 2), tiles.around)
    return _as(_from_regions(out, tiles, affinity), tokens.dtype)


def _channel_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *_: Any) -> tuple[Tensor, Tensor]:
    given, dtype = q.dtype, compute_dtype(q)
    q, k, v = (_as(x, dtype).transpose(1, 2) for x in (q, k, v))  # [B, heads, N, dim]
    maps = ((k * scale).transpose(-2, -1) @ v).softmax(-1)
    return _as((q @ maps.transpose(-2, -1)).transpose(1, 2), given).contiguous(), maps


def _large_kernel_attention(
    x: Tensor, conv0_weight: Tensor, conv0_bias: Tensor | None, conv_spatial_weight: Tensor,
    conv_spatial_bias: Tensor | None, conv1_weight: Tensor, conv1_bias: Tensor | None, dilation: int, *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = compute_dtype(x)
    y = _as(x, dtype)
    for weight, bias, steps in ((conv0_weight, conv0_bias, 1), (conv_spatial_weight, conv_spatial_bias, dilation)):
        padding = [steps * (n // 2) for n in weight.shape[-2:]]
        bias = None if bias is None else _as(bias, dtype)
        y = F.conv2d(y, _as(weight, dtype), bias, padding=padding, dilation=steps, groups=weight.shape[0])
    gate = F.conv2d(y, _as(conv1_weight, dtype), None if conv1_bias is None else _as(conv1_bias, dtype))
    return _as(_as(x, dtype) * gate, x.dtype), y


def _pad_map(x: Tensor, height: Any, width: Any, top: int, left: int) -> Tensor:
    """Zeros around a map, by index: PyTorch's padding asks whether a size is one."""
    for axis, size, first in ((1, height, top), (2, width, left)):
        if statically_known_true(size == x.shape[axis]):
            continue
        place = _arange(size, x)
        some = not statically_known_true(first == 0)
        inside, place = _within(place - first if some else place, _length(x.shape[axis], x), -1 if some else 0)
        shown = inside.reshape(size, 1, 1) if axis == 1 else inside.unsqueeze(1)
        x = torch.where(shown, x.index_select(axis, place), torch.zeros((), dtype=x.dtype, device=x.device))
    return x


def _crop_map(x: Tensor, height: Any, width: Any, top: int, left: int) -> Tensor:
    for axis, size, first in ((1, height, top), (2, width, left)):
        if not statically_known_true(size == x.shape[axis]):
            place = _arange(size, x)
            x = x.index_select(axis, place if statically_known_true(first == 0) else place + first)
    return x


def _packed(function: Callable[..., Any]) -> Callable[..., Any]:
    """From the form on q, k and v, which takes them in one tensor too."""
    return lambda qkv, *rest: function(qkv, None, None, *rest)


# The name of a registered op -> its ATen form, which takes the op's arguments, the backend if any.
DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    "channel_attention": _channel_attention,
    "channel_attention_qkvpacked": lambda qkv, *rest: _channel_attention(*qkv.unbind(-3), *rest),
    "crop_map": _crop_map,
    "halo_attention": _halo_attention,
    "large_kernel_attention": _large_kernel_attention,
    "neighborhood_attention": _neighborhood_attention,
    "neighborhood_attention_qkvpacked": _packed(_neighborhood_attention),
    "pad_map": _pad_map,
    "routing_attention": _routing_attention,
    "routing_index": _routing_index,
    "super_token_mapping": _super_token_mapping,
    "super_token_sampling": _super_token_sampling,
    "window_attention": _window_attention,
    "window_attention_qkvpacked": _packed(_window_attention),
}
