"""The questions that every op asks of its arguments, one function each.

Messages are templates, filled in where they are raised: a size that a message formats beforehand is a size that
torch.compile takes for a constant.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value, statically_known_true

from ._backend import cast_dtype

__all__ = [
    "check_agreement",
    "check_layout",
    "check_table",
    "compute_dtype",
    "cover",
    "is_finite",
    "pair",
    "per_axis",
    "require",
    "resolve_scale",
    "unpack",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition: bool, op: str, message: str, *values: Any) -> None:
    """Raise ValueError with the op's name and the message, the values in its braces, unless the condition holds."""
    if not condition:
        shown = (tuple(x) if isinstance(x, torch.Size) else x for x in values)
        raise ValueError(f"{op}: {message.format(*shown)}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the sums over tensors like x are made in: float64 for float64, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_finite(*tensors: Tensor) -> bool:
    """Whether no element is NaN or infinite; False too where the sum of all overflows."""
    return all(bool(x.sum(dtype=compute_dtype(x)).isfinite()) for x in tensors)


def resolve_scale(scale: float | None, dim: int) -> float:
    """The softmax scale: dim ** -0.5 unless one is given."""
    return 1.0 / math.sqrt(dim) if scale is None else float(scale)


def cover(size: int, side: int) -> int:
    """How many tiles of a side cover a size: a number, also of symbols, wherever the tiles are known to fit."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (on a line of its own, as TorchScript wants it)
        if _is_symbol(size) or _is_symbol(side):
            whole = size // side
            if statically_known_true(whole * side == size):
                return whole
    return (size + side - 1) // side


def _is_symbol(size: int) -> bool:
    return isinstance(size, torch.SymInt) or torch.compiler.is_compiling() and not has_static_value(size)


def per_axis(op: str, name: str, value: int | Sequence[int], axes: int = 2, least: int = 1) -> tuple[int, ...]:
    """An int for every axis from one for all or one for each, none below `least`."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    fits = len(values) == axes and all(isinstance(x, int) and not isinstance(x, bool) and x >= least for x in values)
    require(fits, op, "{} must be an int of at least {} or {} of them, got {!r}", name, least, axes, value)
    return values


def pair(op: str, name: str, value: int | Sequence[int], least: int = 1) -> tuple[int, int]:
    """`per_axis` of height and width."""
    height, width = per_axis(op, name, value, 2, least)
    return height, width


def check_layout(op: str, name: str, x: Tensor, *layouts: str) -> None:
    """x has the axes of one of the layouts ("[B, N, heads, dim]"), none empty but the batch, and a dtype of the ops."""
    fits = any(x.dim() == layout.count(",") + 1 for layout in layouts)
    require(fits, op, "{} must be {}, got shape {}", name, " or ".join(layouts), x.shape)
    require(x.dtype in _DTYPES, op, "{} must be float16, bfloat16, float32 or float64, got {}", name, x.dtype)
    require(all(n > 0 for n in x.shape[1:]), op, "{}: only the batch may be empty, got shape {}", name, x.shape)


def unpack(op: str, qkv: Tensor, *layouts: str) -> tuple[Tensor, ...]:
    """q, k and v of a packed tensor."""
    check_layout(op, "qkv", qkv, *layouts)
    require(qkv.shape[-3] == 3, op, "qkv must be {}, got shape {}", " or ".join(layouts), qkv.shape)
    return qkv.unbind(-3)


def check_table(op: str, name: str, table: Tensor | None, axes: str, shape: tuple[int, ...]) -> None:
    """A bias or weight has its shape, which `axes` puts into words, and a dtype of the ops; None is fine."""
    if table is not None:
        require(tuple(table.shape) == shape, op, "{} must be {} = {}, got {}", name, axes, list(shape), table.shape)
        message = "{} must be float16, bfloat16, float32 or float64, got {}"
        require(table.dtype in _DTYPES, op, message, name, table.dtype)


def check_agreement(op: str, first: dict[str, Tensor], /, dtypes: bool = True, **others: Tensor | None) -> None:
    """The other tensors are on the device of the first and, under autocast or without it, come to its dtype."""
    ((name, x),) = first.items()
    for other, tensor in others.items():
        if tensor is not None:
            require(tensor.device == x.device, op, "{} is on {}, {} on {}", other, tensor.device, name, x.device)
            same = not dtypes or cast_dtype(tensor) == cast_dtype(x)
            require(same, op, "{} has dtype {}, {} has {}", other, tensor.dtype, name, x.dtype)
