"""Compile Triton kernels for a GPU that is not there: types, layouts and shared memory, which no interpreter checks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
_OPTIONS = ("num_warps", "num_stages")


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


class Compiled(list[tuple[str, Any]]):
    """(kernel name, compiled kernel) of every launch."""


class _Recorder:
    def __init__(self, kernel: Any, target: GPUTarget, compiled: Compiled) -> None:
        self.kernel, self.target, self.compiled = kernel, target, compiled

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            fn = self.kernel
            options = {k: kwargs.pop(k) for k in _OPTIONS if k in kwargs}
            bound = {**dict(zip(fn.arg_names, args, strict=False)), **kwargs}
            free = {p.name for p in fn.params if p.do_not_specialize}
            # what the real launcher specializes on: ones, aligned pointers and multiples of 16
            constants = {
                p.name: bound[p.name]
                for p in fn.params
                if p.is_constexpr or (p.name not in free and type(bound[p.name]) is int and bound[p.name] == 1)
            }
            signature = {n: "constexpr" if n in constants else _type(bound[n]) for n in fn.arg_names}
            attributes = {
                (fn.arg_names.index(n),): [["tt.divisibility", 16]]
                for n, v in bound.items()
                if n not in constants and n not in free and (isinstance(v, Tensor) or (type(v) is int and v % 16 == 0))
            }
            source = ASTSource(
                fn, signature, constexprs={(fn.arg_names.index(n),): v for n, v in constants.items()}, attrs=attributes
            )
            self.compiled.append((fn.__name__, triton.compile(source, target=self.target, options=options)))

        return launch


@contextmanager
def compile_only(modules: list[tuple[Any, list[str]]], monkeypatch: Any, capability: int = 90) -> Iterator[Compiled]:
    """Inside the block the named kernels of the launcher modules are compiled when they are launched, and not run."""
    compiled = Compiled()
    target = GPUTarget("cuda", capability, 32)
    for module, names in modules:
        for name in names:
            monkeypatch.setattr(module, name, _Recorder(getattr(module, name), target, compiled))
    yield compiled
