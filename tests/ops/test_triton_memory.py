"""What the Triton kernels allocate: no scratch that grows as the map times what a query sees.

The launchers run in the interpreter, which works on copies of its own, so the peak is counted where PyTorch hands out
tensors: storages that an operation returns are held until Python lets go of them.
"""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_cases import (
    DEVICE,
    Case,
    channel,
    first,
    halo,
    large_kernel,
    mapping,
    neighborhood,
    routing,
    sampling,
    window,
)

pytest.importorskip("triton")


class Allocations(TorchDispatchMode):
    """Largest number of bytes in storages that were made inside the block and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def watch(self, *tensors: Tensor) -> None:
        """Storages that were there before do not count."""
        self.known |= {x.untyped_storage()._cdata for x in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.held -= count


def peaks(case: Case) -> tuple[int, int, int]:
    """Peak bytes of the forward and of the backward, and the bytes of the inputs."""
    call, inputs = case
    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in inputs]
    with torch.no_grad():
        first(call(*leaves, backend="triton"))  # tiles and their tables are laid out once and kept
    with Allocations() as forward:
        forward.watch(*leaves)
        out = first(call(*leaves, backend="triton"))
    grad = torch.ones_like(out)
    torch.autograd.grad(out, leaves, grad, retain_graph=True)
    with Allocations() as backward:
        backward.watch(*leaves, out, grad)
        grads = torch.autograd.grad(out, leaves, grad)
    del grads
    return forward.peak, backward.peak, sum(x.numel() * 4 for x in leaves)


def test_the_counter_counts() -> None:
    x = torch.zeros(1000)
    with Allocations() as found:
        found.watch(x)
        y = x + 1
        del y
        z = (x * 2).view(10, 100)
        w = torch.empty(500)
        del z, w
        x.add_(1)
    assert found.peak == 6000
    assert found.held == 0


# per op: a call with `batch` images, and how much forward and backward may hold at most, in units of its inputs
GROWING: dict[str, tuple[Callable[[int], Case], float, float]] = {}


@pytest.mark.parametrize("name", ["neighborhood"])
def test_report(name: str) -> None:
    calls = {
        "na3": lambda b: neighborhood((12, 12), 3, batch=b),
        "na7": lambda b: neighborhood((12, 12), 7, batch=b),
        "win": lambda b: window((8, 8), 4, batch=b),
        "halo": lambda b: halo((8, 8), 4, 1, batch=b),
        "routing": lambda b: routing((8, 8), 2, 2, batch=b),
        "channel": lambda b: channel(64, batch=b),
        "sampling": lambda b: sampling((8, 8), 4, batch=b),
        "mapping": lambda b: mapping((8, 8), 4, batch=b),
        "lka": lambda b: large_kernel((6, 6), 16, batch=b),
    }
    for n, c in calls.items():
        a, b = peaks(c(1)), peaks(c(3))
        print(n, a, b, [round((y - x) / (b[2] - a[2]), 2) for x, y in zip(a, b)])
