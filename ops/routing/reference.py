"""Bi-level routing attention in plain PyTorch: the definition that every other path must agree with."""

import torch
from torch import Tensor

from zoo.ops._backend import no_autocast
from zoo.ops._checks import compute_dtype

from .layout import Pair, from_regions, grid_size, key_region_size, pad_to_regions, to_regions


def routing_index(q: Tensor, k: Tensor, region: Pair, topk: int) -> Tensor:
    """The key regions [B, R, topk] of every query region, best first; among equals the lower region comes first.

    Affinity is the inner product, over all heads together, of the regions' mean query and mean key, in float32
    (float64 for float64). A mean counts only the tokens inside the map. No gradient flows through the choice.
    """
    return region_affinity(q, k, region).sort(dim=-1, descending=True, stable=True).indices[..., :topk].contiguous()


def region_affinity(q: Tensor, k: Tensor, region: Pair) -> Tensor:
    """[B, R, R]: how near every query region is to every key region."""
    with torch.no_grad(), no_autocast(q):
        return _region_mean(q, region) @ _region_mean(k, key_region_size(q, k, region)).transpose(1, 2)


def routing_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, region: Pair, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each region's queries to all tokens of its `topk` key regions, and the log-sum-exp.

    A map that the regions do not divide is filled with zero queries, keys and values at the bottom and right: a
    filled key has logit 0 and takes part in the softmax. float16 and bfloat16 are computed in float32.
    """
    size, dtype, key_region = (q.shape[1], q.shape[2]), q.dtype, key_region_size(q, k, region)
    q, k, v = (x.to(compute_dtype(q)) for x in (q, k, v))
    batch, count, topk = index.shape
    picked = (index + count * torch.arange(batch, device=index.device).view(-1, 1, 1)).flatten()

    def gather(x: Tensor) -> Tensor:
        x = to_regions(x, key_region).flatten(0, 1)  # (B * R, m, nh, d)
        return x.index_select(0, picked).reshape(batch, count, topk * x.shape[1], x.shape[2], x.shape[3])

    with no_autocast(q):
        logits = torch.einsum("brnhd,brmhd->brhnm", to_regions(q, region) * scale, gather(k))
        out = torch.einsum("brhnm,brmhd->brnhd", logits.softmax(-1), gather(v))
        lse = logits.logsumexp(-1).transpose(2, 3).unsqueeze(-1)
    return from_regions(out, region, size).to(dtype), from_regions(lse, region, size).squeeze(-1)


def _region_mean(x: Tensor, region: Pair) -> Tensor:
    """[B, H, W, nh, d] -> [B, R, nh * d]; tokens outside the map do not count."""
    x = x.to(compute_dtype(x))
    return _region_sum(x, region) / _region_sum(x.new_ones(1, x.shape[1], x.shape[2], 1, 1), region)


def _region_sum(x: Tensor, region: Pair) -> Tensor:
    rows, cols = grid_size(x, region)
    x = pad_to_regions(x, region).flatten(3)
    x = x.unflatten(2, (cols, region[1])).sum(3).unflatten(1, (rows, region[0])).sum(2)
    return x.flatten(1, 2)
