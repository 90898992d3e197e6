"""Compile Triton kernels for a GPU that is not there: types, layouts and shared memory, which no interpreter checks."""

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

import zoo.ops
from zoo.ops import _backend

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
_OPTIONS = ("num_warps", "num_stages")


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


class Compiled(list[tuple[Any, Any]]):
    """(kernel, compiled kernel) of every launch."""


def _compile(fn: Any, target: GPUTarget, args: Any, kwargs: dict[str, Any]) -> Any:
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
    return triton.compile(source, target=target, options=options)


class Target(NamedTuple):
    """A GPU to compile for, the bytes of shared memory that a block may have there, and of stack that a thread may.

    Much more than a KiB says that the assembler gave up; on compute capability 8 halo's rows pass has a little more.
    """

    gpu: GPUTarget
    shared: int
    stack: int = 1024


TARGETS = {
    **{
        f"sm_{capability}": Target(GPUTarget("cuda", capability, 32), kib * 1024, 1280 if capability < 90 else 1024)
        for capability, kib in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99))
    },
    **{name: Target(GPUTarget("hip", name, 64), 64 * 1024) for name in ("gfx90a", "gfx942")},
}


@contextmanager
def compile_only(target: str = "sm_90") -> Iterator[Compiled]:
    """Inside the block kernels are compiled when they are launched, and not run; ops take their Triton path on a CPU.

    What the ops return is whatever their memory held. A kernel that asks for more shared memory than there is is
    refused as a GPU refuses it, so that the launchers' next configuration is compiled.
    """
    compiled = Compiled()
    gpu, shared = TARGETS[target].gpu, TARGETS[target].shared

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            binary = _compile(kernel, gpu, args, kwargs)
            if binary.metadata.shared > shared:
                raise OutOfResources(binary.metadata.shared, shared, "shared memory")
            compiled.append((kernel, binary))

        return launch

    with (
        mock.patch.object(JITFunction, "__getitem__", launcher),
        mock.patch.object(_backend, "_INTERPRET", True),  # what lets tensors on a CPU have the kernels
    ):
        yield compiled


def kernels() -> list[Any]:
    """All kernels of all ops, compiled or interpreted."""
    found = []
    for module in pkgutil.walk_packages(zoo.ops.__path__, "zoo.ops."):
        if module.name.endswith(".kernels"):
            contents = vars(importlib.import_module(module.name)).items()
            found += [x for n, x in contents if hasattr(x, "fn") and n.endswith("_kernel")]
    return found


def name_of(kernel: Any) -> str:
    """What tables call a kernel: its folder and its name."""
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}".removeprefix("zoo.ops.").replace(".kernels", "")
