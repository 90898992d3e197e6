"""The Triton kernels in a watched interpreter: any order of programs, no races, nothing out of bounds, no NaN read."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_cases import CASES, first, with_new_ops

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from watch import ORDERS, watched  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it watches the interpreter")
# quick: a call of every op that takes seconds; the others are slow tests
QUICK = {*with_new_ops("na-3-odd-map", "window-odd-shifted", "halo-zero", "channel-dim24")} - {
    "large-kernel",
    "routing",
}


@triton.jit
def _planted_kernel(x_ptr, y_ptr, size, WHAT: tl.constexpr):
    """Programs that each write their place of y, and do something wrong besides."""
    i = tl.program_id(0)
    x = tl.load(x_ptr + i)
    if WHAT == 1:  # a sum that is not atomic
        x += tl.load(y_ptr)
        tl.store(y_ptr, x)
    elif WHAT == 2:  # what the neighbour makes
        x += tl.load(y_ptr + i - 1, mask=i > 0, other=0.0)
        tl.store(y_ptr + i, x)
    elif WHAT == 3:
        tl.store(y_ptr + i + size, x)
    elif WHAT == 4:
        tl.store(y_ptr + i, x + tl.load(x_ptr + size))
    else:
        tl.store(y_ptr + i, x)


@pytest.mark.parametrize(
    ("what", "found"),
    [
        (0, None),
        (1, "two programs write one place"),
        (2, "a program reads what another has written"),
        (3, "a store out of bounds"),
        (4, "a load out of bounds"),
    ],
)
def test_the_watch_sees(what: int, found: str | None) -> None:
    memory = np.ones(64, np.float32)  # what lies beyond the two tensors is there, and not theirs
    x, y = torch.from_numpy(memory[16:24]), torch.from_numpy(memory[40:48])
    with watched() as findings:
        _planted_kernel[(8,)](x, y, 8, WHAT=what)
    assert {kernel for _, kernel in findings} <= {"_planted_kernel"}
    assert (found is None and not findings) or found in {what for what, _ in findings}


def test_the_order_is_another() -> None:
    results = {}
    for order in ORDERS:
        y = torch.zeros(8)
        with watched(order):
            _planted_kernel[(8,)](torch.ones(8), y, 8, WHAT=2)
        results[order] = y
    assert results["forward"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert results["reversed"].tolist() == [1] * 8
    assert len({tuple(y.tolist()) for y in results.values()}) == 3


def island(x: Tensor) -> Tensor:
    """The tensor as a view of a larger one that is NaN elsewhere, with unit last stride."""
    large = torch.full([n + (5 if i + 1 == x.dim() else 3) for i, n in enumerate(x.shape)], float("nan"))
    view = large[tuple(slice(1, 1 + n) for n in x.shape[:-1])][..., 2 : 2 + x.shape[-1]]
    view.copy_(x)
    return view


def run(call: Callable[..., Any], inputs: list[Tensor], order: str) -> tuple[list[Tensor], set[tuple[str, str]]]:
    leaves = [island(x.float()).requires_grad_() for x in inputs]
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        with watched(order) as findings:
            out = first(call(*leaves, backend="triton"))
            grad = island(torch.linspace(-1, 1, out.numel()).view(out.shape))
            grads = torch.autograd.grad(out, leaves, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    return [x.detach() for x in (out, *grads)], findings


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_case(name: str) -> None:
    """Inputs and gradients lie in NaN, and so does memory that nothing has written: what is read outside shows."""
    call, inputs = CASES[name]()
    results = {order: run(call, inputs, order) for order in ORDERS}
    for order, (tensors, findings) in results.items():
        assert not findings, f"{order}: {sorted(findings)}"
        for a, e in zip(tensors, results["forward"][0], strict=True):
            assert a.isfinite().all()
            assert torch.equal(a, e), order
