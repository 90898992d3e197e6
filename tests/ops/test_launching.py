"""Launches that skip Triton's look at their arguments, and the plans of the local ops: what is remembered, and when."""

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import halo

pytest.importorskip("triton")

from zoo.ops import _triton
from zoo.ops._local import launch
from zoo.ops._triton import Launch, launcher


class Compiled:
    packed_metadata = ()

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __getitem__(self, grid: Any) -> Any:
        assert len(grid) == 3
        return lambda *args: self.log.append(("compiled", grid, args))


class Kernel:
    """What launchers use of a Triton kernel."""

    arg_names = ("x_ptr", "y_ptr", "n", "BLOCK")

    def __init__(self) -> None:
        self.log: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Compiled:
            self.log.append(("triton", grid, args, kwargs))
            return Compiled(self.log)

        return run

    def ways(self) -> list[str]:
        return [entry[0] for entry in self.log]


def aligned(offset: int = 0) -> Tensor:
    """A tensor whose memory starts `offset` bytes beyond a multiple of 16."""
    memory = torch.empty(64, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + offset
    return memory[start : start + 16].view(torch.float32)


def test_a_launch_looks_at_its_arguments_once_for_each_alignment() -> None:
    kernel = Kernel()
    made = Launch(kernel, (3,), ("y_ptr", "x_ptr"), n=5, BLOCK=16, num_warps=2)
    x, y, odd = aligned(), aligned(), aligned(4)
    made(y, x)
    made(y, x)
    assert kernel.ways() == ["triton", "compiled"]
    assert kernel.log[0][3] == {"y_ptr": y, "x_ptr": x, "n": 5, "BLOCK": 16, "num_warps": 2}
    grid, args = kernel.log[1][1:]
    assert grid == (3, 1, 1)
    assert args[0] is x and args[1] is y and args[2:] == (5, 16)  # noqa: PT018  in the kernel's order
    made(odd, x)
    made(odd, x)
    made(y, x)
    assert kernel.ways() == ["triton", "compiled", "triton", "compiled", "compiled"]


@pytest.mark.parametrize(
    "other",
    [
        {"n": 6},
        {"BLOCK": 32},
        {"num_warps": 8},
        {"num_stages": 1},
        {"grid": (4,)},
        {"x": torch.empty(4, dtype=torch.float16)},
        {"x": aligned(4)},
    ],
    ids=lambda o: next(iter(o)),
)
def test_a_launcher_remembers_calls_that_are_alike(other: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_LAUNCHED", {})
    kernel = Kernel()
    usual: dict[str, Any] = {"grid": (3,), "x": aligned(), "n": 5, "BLOCK": 16, "num_warps": 2, "num_stages": 2}

    def run(grid: Any, x: Tensor, n: int, **options: Any) -> None:
        launcher(kernel, grid)(x, x, n=n, **options)

    run(**usual)
    run(**usual)
    assert kernel.ways() == ["triton", "compiled"]
    assert kernel.log[1][2][2:] == (5, 16)
    run(**usual | other)
    assert kernel.ways()[-1] == "triton"
    run(**usual)
    assert kernel.ways()[-1] == "compiled"


def test_the_memory_of_launches_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_LAUNCHED", {})
    monkeypatch.setattr(_triton, "_MOST_LAUNCHED", 3)
    kernel, x = Kernel(), aligned()
    for n in range(10):
        launcher(kernel, (1,))(x, x, n, 16)
        assert len(_triton._LAUNCHED) <= 3


def test_large_batches_of_halo_backward_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits for every image, and the sums over images to rounding."""
    call, inputs = halo((8, 9), 4, 1, batch=3, heads=2)
    leaves = [x.float().requires_grad_() for x in inputs]
    out = call(*leaves, backend="triton")
    grad = torch.randn_like(out)
    whole = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    seen = []
    original = launch.local_backward
    monkeypatch.setattr(launch, "local_backward", lambda *a, **k: (seen.append(a[0].shape[0]), original(*a, **k))[1])
    monkeypatch.setattr(launch, "_PART_BYTES", 1)
    parts = torch.autograd.grad(out, leaves, grad)
    assert seen == [1, 1, 1]  # the first call is through the op's own name for it
    for a, e in zip(parts[:3], whole[:3], strict=True):
        assert torch.equal(a, e)
    for a, e in zip(parts[3:], whole[3:], strict=True):
        torch.testing.assert_close(a, e)
