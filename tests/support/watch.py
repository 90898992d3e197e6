"""Triton's interpreter under watch: other orders of programs, races between them, accesses outside of what is theirs.

On a GPU the programs of a launch run in any order and side by side. The interpreter runs them one after the other and
would hide that one reads what another writes.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

__all__ = ["ORDERS", "Findings", "watched"]

ORDERS = ("forward", "reversed", "shuffled")
_UNIT = 2  # bytes that are told apart: the smallest type of the kernels
_NOBODY, _SEVERAL = -1, -2

Findings = set[tuple[str, str]]  # what, and the kernel


class _Storage:
    """The memory of a tensor that a launch was given, and which program of the launch read and wrote it last."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.begin, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.reader = np.full(storage.nbytes() // _UNIT + 1, _NOBODY, np.int64)
        self.writer = self.reader.copy()

    def access(self, places: Any, program: int, write: bool) -> Iterator[str]:
        """Races of this access with those of other programs."""
        writers = self.writer[places]
        if ((writers != _NOBODY) & (writers != program)).any():
            yield "two programs write one place" if write else "a program reads what another has written"
        readers = self.reader[places]
        if write:
            if ((readers != _NOBODY) & (readers != program)).any():
                yield "a program writes what another has read"
            self.writer[places] = program
        else:
            alone = (readers == _NOBODY) | (readers == program)
            self.reader[places] = np.where(alone, program, _SEVERAL)


class _Launch:
    def __init__(self, kernel: str, arguments: Any, findings: Findings) -> None:
        storages = {x.data_ptr(): x for x in (a.untyped_storage() for a in arguments if isinstance(a, torch.Tensor))}
        self.storages = [_Storage(x) for pointer, x in storages.items() if pointer]
        self.kernel, self.findings, self.program = kernel, findings, 0

    def access(self, pointers: Any, mask: Any, bits: int, write: bool) -> None:
        mask = np.broadcast_to(np.asarray(mask), np.asarray(pointers).shape).reshape(-1).astype(bool)
        addresses = np.asarray(pointers).reshape(-1)[mask].astype(np.int64)
        size = max(1, bits // 8)
        known = np.zeros(addresses.size, bool)
        for storage in self.storages:
            inside = (addresses >= storage.begin) & (addresses + size <= storage.end)
            if inside.any():
                known |= inside
                first = (addresses[inside] - storage.begin) // _UNIT
                places = (first[:, None] + np.arange(max(1, size // _UNIT))).reshape(-1)
                self.findings.update((what, self.kernel) for what in storage.access(places, self.program, write))
        if not known.all():
            self.findings.add(("a store out of bounds" if write else "a load out of bounds", self.kernel))


@contextmanager
def watched(order: str = "forward", seed: int = 0) -> Iterator[Findings]:
    """Inside the block the programs of every launch run in this order, and what they do wrong is collected."""
    findings: Findings = set()
    grid: list[int] = [1, 1, 1]
    programs: list[int] = []
    current: list[_Launch] = []
    builder = interpreter.InterpreterBuilder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    call, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store

    def launched(self: Any, *arguments: Any, **named: Any) -> Any:
        current.append(_Launch(self.fn.__name__, [*arguments, *named.values()], findings))
        try:
            return call(self, *arguments, **named)
        finally:
            current.pop()

    def sized(self: Any, *sizes: int) -> None:
        grid[:] = [*sizes, 1, 1][:3]
        programs[:] = range(grid[0] * grid[1] * grid[2])
        if order == "reversed":
            programs.reverse()
        elif order == "shuffled":
            random.Random(seed).shuffle(programs)
        set_dim(self, *sizes)

    def placed(self: Any, x: int, y: int, z: int) -> None:
        program = programs[(x * grid[1] + y) * grid[2] + z]
        current[-1].program = program
        set_index(self, program // (grid[1] * grid[2]), program // grid[2] % grid[1], program % grid[2])

    def note(pointers: Any, mask: Any, write: bool) -> None:
        bits = pointers.get_element_ty().primitive_bitwidth
        current[-1].access(pointers.data, mask.data, bits, write)

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note(pointers, mask, write=False)
        return load(self, pointers, mask, *rest)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(pointers, mask, write=True)
        return store(self, pointers, value, mask, *rest)

    patches: list[tuple[Any, str, Callable[..., Any]]] = [
        (interpreter.GridExecutor, "__call__", launched), (builder, "set_grid_dim", sized),
        (builder, "set_grid_idx", placed), (builder, "create_masked_load", loaded),
        (builder, "create_masked_store", stored),
    ]  # fmt: skip
    with ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield findings
