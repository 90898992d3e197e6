"""How many floating-point operations each op does, for torch.utils.flop_counter (a multiply-add counts as two).

Published figures of the model papers are multiply-adds, half of that. Backward passes recompute the logits: 2.5 times
the forward's products.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import zoo.ops.routing
import zoo.ops.super_token  # noqa: F401  the ops must be registered

__all__: list[str] = []

Shape = Sequence[int]
_BACKWARD = 2.5


def _pairs(queries: Shape, keys_per_query: int, dim_v: int) -> int:
    """Operations of softmax(q k^T) v: queries is [..., heads, dim]."""
    return 2 * math.prod(queries[:-1]) * keys_per_query * (queries[-1] + dim_v)


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


def _sampling(x: Shape, token_height: int, token_width: int, n_iter: int, *args: Any, **_: Any) -> int:
    return 2 * 2 * 9 * math.prod(x) * n_iter


def _sampling_backward(grad: Shape, affinity: Shape, *args: Any, **_: Any) -> int:
    return 2 * math.prod(affinity) * grad[-1]


def _mapping(tokens: Shape, affinity: Shape, *args: Any, **_: Any) -> int:
    return 2 * math.prod(affinity) * tokens[-1]


def _mapping_backward(grad: Shape, tokens: Shape, affinity: Shape, *args: Any, **_: Any) -> int:
    return 2 * _mapping(tokens, affinity)


_FORMULAS: dict[str, Callable[..., int]] = {
    "routing_attention": _routing,
    "routing_attention_backward": _routing_backward,
    "routing_index": _routing_index,
    "super_token_sampling": _sampling,
    "super_token_sampling_backward": _sampling_backward,
    "super_token_mapping": _mapping,
    "super_token_mapping_backward": _mapping_backward,
}
for _name, _formula in _FORMULAS.items():
    register_flop_formula(getattr(torch.ops.zoo, _name))(_formula)
