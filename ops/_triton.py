"""What the Triton kernels of all ops, and the functions that launch them, share."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["INTERPRET", "LOG2E", "block", "fits_int32", "load", "unit", "upcast"]

LOG2E = math.log2(math.e)
INTERPRET = triton.knobs.runtime.interpret


def _let_numpy_be_new() -> None:
    """The interpreter of Triton 3.6 makes an int of an array of one element, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch: Any = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if INTERPRET and tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 9):
    _let_numpy_be_new()


@triton.jit
def load(ptr, offsets, mask, UPCAST: tl.constexpr):
    """Zeros where the mask says no. UPCAST: to float32."""
    x = tl.load(ptr + offsets, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


def upcast(dtype: torch.dtype) -> bool:
    """Whether kernels must compute in float32 what they load: bfloat16 arithmetic is wrong in the interpreter."""
    return INTERPRET and dtype == torch.bfloat16


def unit(x: Tensor) -> Tensor:
    """x with a unit last stride, itself where it has one."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def block(count: int, most: int) -> int:
    """A power of two that holds `count`, at least 16 (what a product needs) and at most `most`."""
    return min(max(16, most), max(16, triton.next_power_of_2(count)))


def fits_int32(*tensors: Tensor) -> bool:
    """Whether offsets inside one entry of the first axis fit 32 bits; a kernel adds the entry's own in 64 bits."""
    return all(sum((n - 1) * abs(s) for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) < 2**31 for x in tensors)
