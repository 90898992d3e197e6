"""Zero-padding of maps, and its inverse, for any size with one compiled or exported program.

Where sizes are symbols (torch.compile, torch.export) a branch on them would hold for some sizes only, and so would what
PyTorch's own padding and slicing ask of them: there both are opaque ops, each the gradient of the other.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.overrides import handle_torch_function, has_torch_function_unary

from ._register import call

__all__ = ["crop_map", "is_symbolic", "pad_map", "pad_same"]


def pad_map(x: Tensor, multiple: int = 1, least: int = 1) -> Tensor:
    """A map with zeros at the bottom and right, up to sides that are multiples of `multiple` and at least `least`.

    Args:
        x: [B, H, W, C].
        multiple: what the sides are to be multiples of.
        least: the smallest side, a multiple of `multiple`.

    Returns:
        [B, H', W', C]; x itself where nothing is missing.
    """
    if torch.jit.is_scripting():
        height = max(_multiple(x.shape[1], multiple), least)
        width = max(_multiple(x.shape[2], multiple), least)
        return _pad(x, height, width)
    if has_torch_function_unary(x):
        return handle_torch_function(pad_map, (x,), x, multiple, least)
    height, width = _multiple(x.shape[1], multiple), _multiple(x.shape[2], multiple)
    if is_symbolic(height, width):
        height, width = (cast(int, torch.sym_max(size, least)) for size in (height, width))
    else:
        height, width = max(height, least), max(width, least)
    return _pad(x, height, width)


def pad_same(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """A map with the zeros that TensorFlow's padding "SAME" puts around it: ceil(size / stride) windows fit.

    Of an odd number of zeros one more is at the bottom or right.

    Args:
        x: [B, H, W, C].
        kernel_size: side of the window of a convolution or pooling, at least `stride`.
        stride: its stride.

    Returns:
        [B, H', W', C]; x itself where nothing is missing.
    """
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(pad_same, (x,), x, kernel_size, stride)
    H, W = x.shape[1], x.shape[2]
    height = _multiple(H, stride) - stride + kernel_size
    width = _multiple(W, stride) - stride + kernel_size
    return _pad(x, height, width, (height - H) // 2, (width - W) // 2)


def crop_map(x: Tensor, height: int, width: int) -> Tensor:
    """The first height x width pixels of a map.

    Args:
        x: [B, H, W, C].
        height, width: at most H and W.

    Returns:
        [B, height, width, C]; x itself where that is all of it.
    """
    if not torch.jit.is_scripting():
        if has_torch_function_unary(x):
            return handle_torch_function(crop_map, (x,), x, height, width)
        if is_symbolic(x.shape[1], x.shape[2]):
            return call("crop_map", x, height, width, 0, 0)
    if height == x.shape[1] and width == x.shape[2]:
        return x
    return x[:, :height, :width]


def _multiple(size: int, multiple: int) -> int:
    # of the ways to write it, the one whose nested forms a symbolic simplifier folds: (s - 1) // 2 of (s - 1) // 4 + 1
    return (size - 1) // multiple * multiple + multiple


def _pad(x: Tensor, height: int, width: int, top: int = 0, left: int = 0) -> Tensor:
    if not torch.jit.is_scripting():  # noqa: SIM102 (on a line of its own, as TorchScript wants it)
        if is_symbolic(height, width):
            return call("pad_map", x, height, width, top, left)
    bottom, right = height - x.shape[1] - top, width - x.shape[2] - left
    if top == 0 and left == 0 and bottom == 0 and right == 0:
        return x
    return F.pad(x, (0, 0, left, right, top, bottom))


def is_symbolic(height: int, width: int) -> bool:
    """Whether a size stands for many, in torch.compile or torch.export: code is not to ask for its value."""
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        return False
    return not (has_static_value(height) and has_static_value(width))


@torch.library.custom_op("zoo::pad_map", mutates_args=())
def _pad_op(x: Tensor, height: int, width: int, top: int, left: int) -> Tensor:
    out = x.new_zeros((x.shape[0], height, width, x.shape[3]))
    out[:, top : top + x.shape[1], left : left + x.shape[2]] = x
    return out


@torch.library.custom_op("zoo::crop_map", mutates_args=())
def _crop_op(x: Tensor, height: int, width: int, top: int, left: int) -> Tensor:
    return x[:, top : top + height, left : left + width].clone(memory_format=torch.contiguous_format)


def _fake(x: Tensor, height: int, width: int, top: int, left: int) -> Tensor:
    return x.new_empty((x.shape[0], height, width, x.shape[3]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _height, _width, *start = inputs
    ctx.box = *x.shape[1:3], *start


for _op, _inverse in ((_pad_op, _crop_op), (_crop_op, _pad_op)):
    _op.register_fake(_fake)
    _op.register_autograd(
        lambda ctx, grad, inverse=_inverse: (inverse(grad, *ctx.box), None, None, None, None),
        setup_context=_setup_context,
    )
