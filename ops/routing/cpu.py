"""Bi-level routing attention on a CPU: gathered regions, or the whole map under a region mask, in SDPA's flash kernels.

The aten kernels are called directly because the public SDPA does not return the log-sum-exp that backward needs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops._checks import compute_dtype, is_finite
from zoo.ops._flash import attend

from . import reference
from .layout import Pair, from_regions, grid_size, key_region_size, pad_to_regions, to_regions

_GROUP_ELEMENTS = 1 << 18  # of the queries of the images that are computed together
_CHUNK_ELEMENTS = 1 << 18  # of gathered keys alive at a time
_MASK_ELEMENTS = 1 << 20  # of one image's query-key mask

Grads = tuple[Tensor, Tensor, Tensor]


def routing_index(q: Tensor, k: Tensor, region: Pair, topk: int) -> Tensor:
    """The definition, a few images at a time and without sorting all regions."""
    rows, cols = grid_size(q, region)
    index = torch.empty(q.shape[0], rows * cols, topk, dtype=torch.int64, device=q.device)
    for i in _image_groups(q):
        index[i] = _stable_topk(reference.region_affinity(q[i], k[i], region), topk)
    return index


def _stable_topk(x: Tensor, topk: int) -> Tensor:
    """Indices of the largest values along the last axis, best first, the lower index first among equals."""
    if x.dtype != torch.float32:
        return x.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    # torch.topk breaks ties as it likes, so none are left: the value's bits, in the order of the values, then the index
    bits = (x + 0.0).view(torch.int32).long()  # -0.0 + 0.0 is 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = (ordered << 32) - torch.arange(x.shape[-1], device=x.device)
    return keys.topk(topk).indices


def forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, region: Pair, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, H, W, heads, dim of v] and log-sum-exp [B, H, W, heads], both contiguous."""
    check_range(index)
    dense = _prefers_dense(q, k, index, region)
    out = q.new_empty((*q.shape[:4], v.shape[4]))
    lse = q.new_empty(q.shape[:4], dtype=compute_dtype(q))
    for i in _image_groups(q):
        tensors = _for_flash(q[i], k[i], v[i])
        if dense:
            _dense(out[i], lse[i], index[i], region, scale, *tensors)
        if not dense or not is_finite(out[i]):  # a mask hides no NaN: it would reach queries that do not see it
            _gathered(out[i], lse[i], index[i], region, scale, *tensors)
    return out, lse


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, region: Pair, scale: float) -> Grads:
    """Gradients of q, k and v, contiguous; every sum runs in a fixed order."""
    dense = _prefers_dense(q, k, index, region)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for i in _image_groups(q):
        dq, dk, dv = (g[i] for g in grads)
        tensors = _for_flash(grad[i], q[i], k[i], v[i])
        if dense:
            _dense_backward(dq, dk, dv, index[i], region, scale, *tensors)
        if not dense or not is_finite(dq, dk, dv):
            _gathered_backward(dq, dk, dv, index[i], region, scale, *tensors)
    return grads


def check_range(index: Tensor) -> None:
    """Raise IndexError for a region number outside the map. Only for CPU tensors: elsewhere it would wait."""
    regions = index.shape[1]
    while torch._C._functorch.is_functorch_wrapped_tensor(index):  # torch.vmap takes no number out of a tensor
        index = torch._C._functorch.get_unwrapped(index)
    if index.numel() and index.device.type == "cpu":
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= regions:
            wrong = low if low < 0 else high
            raise IndexError(f"routing_attention: index holds region {wrong}; there are {regions} regions")


def _image_groups(q: Tensor) -> Iterator[slice]:
    """Slices of the batch: small temporaries stay in the cache and are not handed back to the system in between.

    Elsewhere than on a CPU, where each would be a round of kernel launches, the batch is one slice.
    """
    step = max(1, _GROUP_ELEMENTS // max(1, q[:1].numel())) if q.device.type == "cpu" else max(1, q.shape[0])
    return (slice(start, start + step) for start in range(0, q.shape[0], step))


def _for_flash(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Unit last strides and one head dim: zero channels change neither logits nor outputs."""
    dim = max(x.shape[-1] for x in tensors)
    tensors = tuple(x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1])) for x in tensors)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _prefers_dense(q: Tensor, k: Tensor, index: Tensor, region: Pair) -> bool:
    """Whether all keys under a mask cost less than the gathered ones.

    Nanoseconds per query-key pair, measured on one core: dense 2.7; gathered 4 plus a share of the fixed cost of a
    region's small product, 55 over its number of queries.
    """
    key_region = key_region_size(q, k, region)
    queries, regions = region[0] * region[1], index.shape[1]
    keys = regions * key_region[0] * key_region[1]
    gathered = index.shape[2] * key_region[0] * key_region[1]
    return regions * queries * keys <= _MASK_ELEMENTS and 2.7 * keys <= gathered * (4 + 55 / queries)


def _attend(mask: Tensor | None, scale: float, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of [n, tokens, heads, dim]; output alike, log-sum-exp [n, tokens, heads]."""
    out, lse = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _attend_backward(mask: Tensor | None, scale: float, grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Grads:
    wide = compute_dtype(q)
    grad, q, k, v = (x.transpose(1, 2).to(wide) for x in (grad, q, k, v))
    q = q * scale
    logits = q @ k.transpose(-2, -1)
    logits = logits if mask is None else logits.add_(mask)
    # From the logits, not from their log-sum-exp, whose rounding would be an error of the exponent.
    weights = torch.softmax(logits, -1, out=logits)
    dv = weights.transpose(-2, -1) @ grad
    dweights = grad @ v.transpose(-2, -1)
    dlogits = torch._softmax_backward_data(dweights, weights, -1, wide, grad_input=dweights)
    dq, dk = (dlogits @ k).mul_(scale), dlogits.transpose(-2, -1) @ q
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _dense(
    out: Tensor, lse: Tensor, index: Tensor, region: Pair, scale: float, q: Tensor, k: Tensor, v: Tensor
) -> None:
    key_region = key_region_size(q, k, region)
    q, k, v = pad_to_regions(q, region), pad_to_regions(k, key_region), pad_to_regions(v, key_region)
    mask = _region_mask(q, k, index, region, key_region)
    flat_out, flat_lse = _attend(mask, scale, *(x.flatten(1, 2) for x in (q, k, v)))
    _crop_into(out, flat_out.unflatten(1, q.shape[1:3]))
    _crop_into(lse, flat_lse.unflatten(1, q.shape[1:3]))


def _dense_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    index: Tensor,
    region: Pair,
    scale: float,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> None:
    key_region = key_region_size(q, k, region)
    grad, q = pad_to_regions(grad, region), pad_to_regions(q, region)
    k, v = pad_to_regions(k, key_region), pad_to_regions(v, key_region)
    mask = _region_mask(q, k, index, region, key_region)
    grads = _attend_backward(mask, scale, *(x.flatten(1, 2) for x in (grad, q, k, v)))
    for target, source, like in zip((dq, dk, dv), grads, (q, k, v), strict=True):
        _crop_into(target, source.unflatten(1, like.shape[1:3]))


def _region_mask(q: Tensor, k: Tensor, index: Tensor, region: Pair, key_region: Pair) -> Tensor:
    """[B, 1, queries, keys]: the logarithm of how often the query's region has picked the key's region."""
    batch, (rows, cols) = q.shape[0], grid_size(q, region)
    wide = compute_dtype(q)
    picks = torch.ones(index.shape, dtype=wide, device=q.device)
    count = torch.zeros(batch, rows * cols, rows * cols, dtype=wide, device=q.device).scatter_add_(2, index, picks)
    mask = count.log_().view(batch, rows, 1, cols, 1, rows, 1, cols, 1)
    mask = mask.expand(batch, rows, region[0], cols, region[1], rows, key_region[0], cols, key_region[1])
    return mask.reshape(batch, 1, q.shape[1] * q.shape[2], k.shape[1] * k.shape[2])


def _crop_into(target: Tensor, source: Tensor) -> None:
    target.copy_(source[tuple(slice(n) for n in target.shape)])


def _regions_into(target: Tensor, source: Tensor, region: Pair) -> None:
    """Regions [B * R, tokens, heads, dim] into the map [B, H, W, heads, at most dim]."""
    batch, height, width, heads, dim = target.shape
    rows, cols = grid_size(target, region)
    source = source[..., :dim].unflatten(0, (batch, rows * cols))
    if height % region[0] or width % region[1]:
        target.copy_(from_regions(source, region, (height, width)))
        return
    source = source.unflatten(2, region).unflatten(1, (rows, cols)).transpose(2, 3)
    target.view(batch, rows, region[0], cols, region[1], heads, dim).copy_(source)


def _chunks(index: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Runs of query regions over the whole batch, with the key regions [run * topk] that they picked.

    k is [B * R, tokens, heads, dim].
    """
    batch, count, topk = index.shape
    picked = index + count * torch.arange(batch, device=index.device).view(-1, 1, 1)
    picked = picked.view(batch * count, topk)
    step = max(1, _CHUNK_ELEMENTS // max(1, topk * k[:1].numel()))
    for start in range(0, batch * count, step):
        run = slice(start, min(start + step, batch * count))
        yield run, picked[run].flatten()


def _gathered(
    out: Tensor, lse: Tensor, index: Tensor, region: Pair, scale: float, q: Tensor, k: Tensor, v: Tensor
) -> None:
    key_region = key_region_size(q, k, region)
    q, k, v = (to_regions(x, r).flatten(0, 1) for x, r in ((q, region), (k, key_region), (v, key_region)))
    parts = [
        _attend(None, scale, q[run], _pick(k, picked, index), _pick(v, picked, index))
        for run, picked in _chunks(index, k)
    ]
    _regions_into(out, _joined([part[0] for part in parts]), region)
    _regions_into(lse.unsqueeze(-1), _joined([part[1] for part in parts]).unsqueeze(-1), region)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gathered_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    index: Tensor,
    region: Pair,
    scale: float,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> None:
    key_region = key_region_size(q, k, region)
    grad, q = (to_regions(x, region).flatten(0, 1) for x in (grad, q))
    k, v = (to_regions(x, key_region).flatten(0, 1) for x in (k, v))
    key_sum, value_sum = (torch.zeros(k.shape, dtype=compute_dtype(k), device=k.device) for _ in range(2))
    query_parts = []
    for run, picked in _chunks(index, k):
        keys, values = _pick(k, picked, index), _pick(v, picked, index)
        part, dkeys, dvalues = _attend_backward(None, scale, grad[run], q[run], keys, values)
        query_parts.append(part)
        key_sum.index_add_(0, picked, dkeys.reshape(-1, *k.shape[1:]).to(key_sum.dtype))
        value_sum.index_add_(0, picked, dvalues.reshape(-1, *k.shape[1:]).to(key_sum.dtype))
    _regions_into(dq, _joined(query_parts), region)
    _regions_into(dk, key_sum, key_region)
    _regions_into(dv, value_sum, key_region)


def _pick(x: Tensor, picked: Tensor, index: Tensor) -> Tensor:
    """Rows of [B * R, tokens, heads, dim] as [run, topk * tokens, heads, dim]."""
    return x.index_select(0, picked).reshape(-1, index.shape[2] * x.shape[1], *x.shape[2:])
