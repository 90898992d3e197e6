"""A tiny call of every op, for `zoo doctor` and for checks that go over all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["EXAMPLES", "Example"]


@dataclass(frozen=True)
class Example:
    """Shapes of the tensors, the positional arguments after them, and keywords that may refer to the tensors."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    arguments: tuple[Any, ...] = ()
    named: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def inputs(self) -> list[Tensor]:
        """Seeded float32 tensors."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator) for shape in self.shapes]

    def call(self, op: Callable[..., Any], tensors: list[Tensor], **extra: Any) -> Any:
        """Call the op on the tensors."""
        count = len(tensors) - len(self.named)
        keywords = dict(zip(self.named, tensors[count:], strict=True))
        return op(*tensors[:count], *self.arguments, **keywords, **dict(self.options), **extra)


_MAP = (1, 11, 9, 2, 16)
_QKV = (_MAP, _MAP, _MAP)

EXAMPLES = (
    Example("neighborhood_attention", (*_QKV, (2, 5, 5)), (3,), named=("bias",), options=(("dilation", 2),)),
    Example("window_attention", (*_QKV, (2, 7, 7)), (4,), named=("bias",), options=(("shift", 2),)),
    Example("halo_attention", (*_QKV, (15, 16), (15, 16)), (4, 2), named=("rel_height", "rel_width")),
    Example("routing_attention", ((1, 12, 8, 2, 16),) * 3, (4, 2)),
    Example("channel_attention", ((1, 33, 2, 16),) * 3),
    Example("super_token_sampling", ((1, 11, 9, 16),), (4,)),
    Example(
        "large_kernel_attention",
        ((1, 16, 9, 10), (16, 1, 5, 5), (16,), (16, 1, 7, 7), (16,), (16, 16, 1, 1), (16,)),
    ),
)
