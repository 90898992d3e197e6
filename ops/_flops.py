"""How many floating-point operations each op does, for torch.utils.flop_counter (a multiply-add counts as two).

Published figures of the model papers are multiply-adds, half of that. Backward passes recompute the logits: 2.5 times
the forward's products.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import zoo.ops.channel
import zoo.ops.halo
import zoo.ops.large_kernel
import zoo.ops.routing
import zoo.ops.super_token  # noqa: F401  the ops must be registered

__all__: list[str] = []

Shape = Sequence[int]
_BACKWARD = 2.5


def _pairs(queries: Shape, keys_per_query: int, dim_v: int) -> int:
    """Operations of softmax(q k^T) v: queries is [..., heads, dim]."""
    return 2 * math.prod(queries[:-1]) * keys_per_query * (queries[-1] + dim_v)


def _halo(
    q: Shape, k: Shape, v: Shape, rel_height: Any, rel_width: Any, block_size: int, halo_size: int, *args: Any, **_: Any
) -> int:
    window = block_size + 2 * halo_size
    tables = sum(2 * math.prod(q) * window for table in (rel_height, rel_width) if table is not None)
    return _pairs(q, window * window, v[-1]) + tables


def _halo_backward(
    grad: Shape, q: Shape, k: Shape, v: Shape, rel_height: Any, rel_width: Any, out: Shape, lse: Shape,
    block_size: int, halo_size: int, *args: Any, **_: Any,
) -> int:  # fmt: skip
    return int(_BACKWARD * _halo(q, k, v, rel_height, rel_width, block_size, halo_size))


def _routing(
    q: Shape, k: Shape, v: Shape, index: Shape, region_height: int, region_width: int, *args: Any, **_: Any
) -> int:
    return _pairs(q, index[2] * region_height * region_width, v[-1])


def _routing_backward(
    grad: Shape, q: Shape, k: Shape, v: Shape, index: Shape, out: Shape, lse: Shape,
    region_height: int, region_width: int, *args: Any, **_: Any,
) -> int:  # fmt: skip
    return int(_BACKWARD * _routing(q, k, v, index, region_height, region_width))


def _routing_index(q: Shape, k: Shape, region_height: int, region_width: int, *args: Any, **_: Any) -> int:
    regions = -(-q[1] // region_height) * -(-q[2] // region_width)
    return 2 * q[0] * regions * regions * q[3] * q[4]


def _channel(q: Shape, *args: Any, **_: Any) -> int:
    return 4 * math.prod(q) * q[-1]


def _channel_packed(qkv: Shape, *args: Any, **_: Any) -> int:
    return _channel((qkv[0], qkv[1], *qkv[3:]))


def _channel_backward(grad: Shape, *args: Any, **_: Any) -> int:
    return 2 * _channel(grad)


def _sampling(x: Shape, token_height: int, token_width: int, n_iter: int, *args: Any, **_: Any) -> int:
    return 2 * 2 * 9 * math.prod(x) * n_iter


def _sampling_backward(grad: Shape, affinity: Shape, *args: Any, **_: Any) -> int:
    return 2 * math.prod(affinity) * grad[-1]


def _mapping(tokens: Shape, affinity: Shape, *args: Any, **_: Any) -> int:
    return 2 * math.prod(affinity) * tokens[-1]


def _mapping_backward(grad: Shape, tokens: Shape, affinity: Shape, *args: Any, **_: Any) -> int:
    return 2 * _mapping(tokens, affinity)


def _large_kernel(x: Shape, conv0: Shape, bias0: Any, spatial: Shape, *args: Any, **_: Any) -> int:
    taps = math.prod(conv0[2:]) + math.prod(spatial[2:])
    return 2 * math.prod(x) * (taps + x[1])


def _large_kernel_backward(grad: Shape, *args: Any, **kwargs: Any) -> int:
    return 3 * _large_kernel(*args)


_FORMULAS: dict[str, Callable[..., int]] = {
    "halo_attention": _halo,
    "halo_attention_backward": _halo_backward,
    "routing_attention": _routing,
    "routing_attention_backward": _routing_backward,
    "routing_index": _routing_index,
    "channel_attention": _channel,
    "channel_attention_backward": _channel_backward,
    "channel_attention_qkvpacked": _channel_packed,
    "channel_attention_qkvpacked_backward": _channel_backward,
    "super_token_sampling": _sampling,
    "super_token_sampling_backward": _sampling_backward,
    "super_token_mapping": _mapping,
    "super_token_mapping_backward": _mapping_backward,
    "large_kernel_attention": _large_kernel,
    "large_kernel_attention_backward": _large_kernel_backward,
}
for _name, _formula in _FORMULAS.items():
    register_flop_formula(getattr(torch.ops.zoo, _name))(_formula)
