"""What the Triton kernels of all ops, and the functions that launch them, share."""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "INTERPRET",
    "LOG2E",
    "PRECISION",
    "Launch",
    "Like",
    "block",
    "fits_int32",
    "lasting",
    "load",
    "summed",
    "unit",
    "upcast",
]

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


@triton.jit(do_not_specialize=["rows"])
def _sum_kernel(x_ptr, y_ptr, rows, size, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """y[place] = sum of x[row, place] over the rows, in a fixed order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([AT_ONCE, BLOCK], tl.float32)
    for start in range(0, rows, AT_ONCE):
        row = start + tl.arange(0, AT_ONCE)
        at = row.to(tl.int64)[:, None] * size + place[None, :]
        acc += tl.load(x_ptr + at, mask=(row < rows)[:, None] & (place < size)[None, :], other=0.0)
    tl.store(y_ptr + place, tl.sum(acc, 0).to(y_ptr.dtype.element_ty), mask=place < size)


def summed(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum [size] of partial sums [rows, size] in float32, in a dtype; the same bits every time.

    PyTorch's own sum over a first axis takes few blocks for it, and ten times as long.
    """
    rows, size = partial.shape
    out = partial.new_empty(size, dtype=dtype)
    columns, at_once = (1024, 64) if INTERPRET else (32, 64)
    launcher(_sum_kernel, (triton.cdiv(size, columns),))(partial, out, rows, size, BLOCK=columns, AT_ONCE=at_once)
    return out


def upcast(dtype: torch.dtype) -> bool:
    """Whether kernels must compute in float32 what they load: bfloat16 arithmetic is wrong in the interpreter."""
    return INTERPRET and dtype == torch.bfloat16


class Like(NamedTuple):
    """What launchers ask of a tensor; plans that depend on nothing else are kept for tensors like it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> "Like":
        return cls(x.shape, x.stride(), x.dtype, x.device)

    def stride(self) -> tuple[int, ...]:
        return self.strides


def _ready(compiled: Any, grid: Sequence[int]) -> Callable[..., None] | None:
    """The compiled kernel of a launch as a function of all arguments; None of the interpreter or of a stand-in."""
    return compiled[(*grid, 1, 1)[:3]] if hasattr(compiled, "packed_metadata") else None


def _aligned(x: Tensor) -> bool:
    """Whether Triton compiles for a pointer that is a multiple of 16 bytes."""
    return x.data_ptr() % 16 == 0


class Launch:
    """A kernel with its grid, its options and all of its arguments but some tensors, for many launches on one device.

    Triton looks at every argument of a launch, of which some kernels have sixty. The compiled kernel that it chose
    depends on the types, on integers, which are the same every time, and on which pointers are multiples of 16 bytes:
    a call whose pointers are like those of an earlier one runs that one's kernel at once.
    """

    def __init__(self, kernel: Any, grid: Sequence[int], tensors: Sequence[str], **fixed: Any) -> None:
        self._kernel, self._grid, self._tensors, self._fixed = kernel, tuple(grid), tuple(tensors), fixed
        self._arguments = [fixed.get(name) for name in kernel.arg_names]
        self._places = [kernel.arg_names.index(name) for name in self._tensors]
        self._compiled: dict[tuple[bool, ...], Any] = {}

    def __call__(self, *tensors: Tensor) -> None:
        """Tensors in the order of their names."""
        aligned = tuple([_aligned(x) for x in tensors])
        known = self._compiled.get(aligned)
        if known is None:
            named = dict(zip(self._tensors, tensors, strict=True))
            ready = _ready(self._kernel[self._grid](**named, **self._fixed), self._grid)
            if ready is not None:
                self._compiled[aligned] = ready
            return
        arguments = self._arguments.copy()
        for place, x in zip(self._places, tensors, strict=True):
            arguments[place] = x
        known(*arguments)


_LAUNCHED: dict[tuple[Any, ...], Any] = {}
_MOST_LAUNCHED = 4096


def launcher(kernel: Any, grid: Sequence[int]) -> Callable[..., None]:
    """kernel[grid], and sooner where it was launched with such arguments before.

    What compiled kernel Triton takes depends on the types and on the integers, which are part of what is remembered
    here, and on which pointers are multiples of 16 bytes.
    """

    def launch(*args: Any, **kwargs: Any) -> None:
        values = [*args, *[kwargs[name] for name in kernel.arg_names[len(args) :]]]
        seen = tuple([(x.dtype, _aligned(x)) if isinstance(x, Tensor) else x for x in values])
        key = (id(kernel), grid, kwargs.get("num_warps"), kwargs.get("num_stages"), args[0].device, seen)
        known = _LAUNCHED.get(key)
        if known is not None:
            known(*values)
            return
        ready = _ready(kernel[grid](*args, **kwargs), grid)
        if ready is not None:
            if len(_LAUNCHED) >= _MOST_LAUNCHED:
                _LAUNCHED.clear()
            _LAUNCHED[key] = ready

    return launch


def unit(x: Tensor) -> Tensor:
    """x with a unit last stride, itself where it has one."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def block(count: int, most: int) -> int:
    """A power of two that holds `count`, at least 16 (what a product needs) and at most `most`."""
    return min(max(16, most), max(16, triton.next_power_of_2(count)))


def fits_int32(*tensors: Tensor | Like) -> bool:
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
