"""Triton kernels that are not run: what a call launches and allocates, and what its launches would compile."""

import functools
import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

__all__ = ["Launches", "launched"]

_OPTIONS = ("num_warps", "num_stages")


@dataclass
class Launches:
    """By the kernel's name: the grids, the tensors that it was given, and the variants that would be compiled."""

    grids: dict[str, list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    tensors: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    variants: dict[str, set[Any]] = field(default_factory=lambda: defaultdict(set))

    def clear(self) -> None:
        for found in (self.grids, self.tensors, self.variants):
            found.clear()


def _variant(names: list[str], constant: set[str], free: set[str], args: Any, kwargs: dict[str, Any]) -> Any:
    """What Triton compiles for: types, constants, and of integers whether they are 1 or multiples of 16."""
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    found: list[Any] = []
    for name in sorted(bound):
        x = bound[name]
        if name in constant or name in _OPTIONS:
            found.append((name, x))
        elif isinstance(x, Tensor):
            found.append((name, x.dtype, x.data_ptr() % 16 == 0))
        elif isinstance(x, int):
            found.append((name, abs(x) >= 2**31, None if name in free else (x == 1, x % 16 == 0)))
        else:
            found.append((name, type(x)))
    return tuple(found)


@contextmanager
def launched() -> Iterator[Launches]:
    """Inside the block no kernel runs: what ops return on their Triton path is whatever their memory held."""
    launches = Launches()

    def launcher(kernel: Any, grid: Any) -> Any:
        names, constant, free = _parameters(kernel)

        def run(*args: Any, **kwargs: Any) -> None:
            given = [*names[: len(args)], *kwargs]  # the interpreter would drop what the kernel does not take
            assert sorted(n for n in given if n not in _OPTIONS) == sorted(names), set(given) ^ set(names)
            name = f"{kernel.fn.__module__}.{kernel.fn.__name__}".removeprefix("zoo.ops.")
            launches.grids[name].append(tuple(grid))
            launches.tensors[name] += [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            launches.variants[name].add(_variant(names, constant, free, args, kwargs))

        return run

    with (
        mock.patch.object(JITFunction, "__getitem__", launcher),
        mock.patch.object(InterpretedFunction, "__getitem__", launcher),
    ):
        yield launches


@functools.cache
def _parameters(kernel: Any) -> tuple[list[str], set[str], set[str]]:
    """All parameters of a kernel, its constants, and what its decorator does not let Triton specialize on."""
    parameters = inspect.signature(kernel.fn).parameters.values()
    constant = {p.name for p in parameters if p.annotation is tl.constexpr}
    if isinstance(kernel, JITFunction):
        free = {p.name for p in kernel.params if p.do_not_specialize}
    else:
        free = set(kernel.kwargs.get("do_not_specialize") or ())
    return [p.name for p in parameters], constant, free
