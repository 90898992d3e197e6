"""What the Triton kernels of all ops, and the functions that launch them, share."""

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["INTERPRET", "LOG2E", "PRECISION", "block", "fits_int32", "lasting", "load", "unit", "upcast"]

LOG2E = math.log2(math.e)
INTERPRET = triton.knobs.runtime.interpret
# float32 products: on NVIDIA's tensor cores as three of tf32, which keep float32's error; AMD's have no such form.
PRECISION = tl.constexpr("ieee" if torch.version.hip or INTERPRET else "tf32x3")


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


def lasting(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What `make` makes, for a cache: memory that no CUDA graph owns, in whatever region this thread is.

    Inside torch.compile(mode="reduce-overhead") and around a capture, what a thread allocates comes from the graph's
    own pool, which is used again when the graph is replayed.

    Raises:
        RuntimeError: a CUDA graph is being captured, and nothing can be copied to the GPU.
    """
    if device.type != "cuda":
        return make()
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and the Triton kernels have not run at this map size before, so their "
            "tables are not on the GPU yet; call once with tensors of this size before the capture"
        )
    found: list[Tensor] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
                found.append(make())
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="zoo-tables")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]
