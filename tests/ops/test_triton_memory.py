"""What the Triton kernels allocate: no scratch that grows as the map times what a query sees.

Measured where PyTorch's CPU allocator hands out memory, with the kernels in the interpreter (which itself computes in
numpy, and so is not counted). The limits are those that the READMEs of the ops state.
"""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import Case, channel, first, halo, large_kernel, mapping, neighborhood, routing, sampling, window

pytest.importorskip("triton")

from zoo.ops._local import launch
from zoo.ops.large_kernel import kernels as large_kernel_kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it counts what the interpreter's run allocates")


@pytest.fixture(autouse=True)
def _other_plans() -> Iterator[None]:
    """Plans are kept, and these tests change what they are made by."""
    launch.forget_plans()
    yield
    launch.forget_plans()


def peak_extra_memory(function: Callable[[], Any]) -> int:
    """Largest number of bytes that PyTorch's CPU allocator held at once during function(), above the start."""
    gc.collect()  # what the interpreter left in cycles would be freed inside, and count as negative
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peaks(case: Case) -> tuple[int, int, int]:
    """Peak bytes of the forward and of the backward, and the bytes of all inputs."""
    call, inputs = case
    leaves = [x.float().requires_grad_() for x in inputs]
    out = first(call(*leaves, backend="triton"))  # lays out the tiles, which are kept
    grad = torch.ones_like(out)
    torch.autograd.grad(out, leaves, grad, retain_graph=True)

    def forward() -> Tensor:
        return first(call(*leaves, backend="triton"))

    def backward() -> Any:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return peak_extra_memory(forward), peak_extra_memory(backward), sum(x.numel() * 4 for x in leaves)


def test_the_counter_counts() -> None:
    def allocate() -> None:
        y = torch.zeros(1024)
        del y
        z = torch.zeros(2048)
        w = torch.zeros(512)
        del z, w

    assert peak_extra_memory(allocate) == 4 * 2560


def channels_last(case: Case) -> Case:
    call, (x, *weights) = case
    return call, [x.contiguous(memory_format=torch.channels_last), *weights]


# a call on `batch` images; what forward and backward hold at most per further image, in units of its inputs
GROWTH: dict[str, tuple[Callable[[int], Case], float, float]] = {
    "neighborhood-3": (lambda b: neighborhood((12, 12), 3, batch=b, dim=16), 0.36, 1.07),
    "neighborhood-7": (lambda b: neighborhood((12, 12), 7, batch=b, dim=16), 0.36, 1.07),
    "window": (lambda b: window((8, 8), 4, batch=b, dim=16), 0.36, 1.07),
    "halo": (lambda b: halo((8, 8), 4, 1, batch=b, dim=16), 0.36, 1.07),
    "routing": (lambda b: routing((8, 8), 2, 2, batch=b, dim=16), 0.36, 1.07),
    "routing-dense": (lambda b: routing((14, 14), 7, 16, batch=b, dim=64), 0.36 + 0.15, 1.06 + 2 * 0.17),
    "channel": (lambda b: channel(256, batch=b, dim=8), 0.4, 1.06),
    "sampling": (lambda b: sampling((8, 8), 4, batch=b), 0.7, 1.6),
    "mapping": (lambda b: mapping((8, 8), 4, batch=b), 1.65, 1.05),
    "large-kernel": (lambda b: large_kernel((6, 6), 16, batch=b), 2.05, 3.05),
    "large-kernel-channels-last": (lambda b: channels_last(large_kernel((6, 6), 16, batch=b)), 2.05, 2.05),
}


LONG = ("neighborhood-7", "routing-dense", "large-kernel")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in GROWTH])
def test_growth_per_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, and what the op's README names; the number of keys that a query sees is no factor of it."""
    monkeypatch.setattr(launch, "_PARTIALS", 1)  # the tables of partial sums are at their limit with one image
    monkeypatch.setattr(launch, "_PART_BYTES", 1)  # and so are the gradients of keys tile by tile
    monkeypatch.setattr(launch, "_at_once", lambda device: 1)
    monkeypatch.setattr(large_kernel_kernels, "_MOST_PROGRAMS", 1)
    call, forward, backward = GROWTH[name]
    two, four = peaks(call(2)), peaks(call(4))
    images = four[2] - two[2]
    assert four[0] - two[0] <= forward * images
    assert four[1] - two[1] <= backward * images


def test_growth_with_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are per class of tiles, so a longer map of the same classes adds its own results alone."""
    monkeypatch.setattr(launch, "_PARTIALS", 1)
    monkeypatch.setattr(launch, "_at_once", lambda device: 1)
    small, large = (peaks(neighborhood((n, 8), 5, dim=16)) for n in (24, 40))
    assert large[0] - small[0] <= 0.36 * (large[2] - small[2])
    assert large[1] - small[1] <= 1.07 * (large[2] - small[2])


def test_partial_sums_of_the_bias_gradient_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many blocks of partial sums, 64 x 32 here, as the limit says."""
    found = {}
    monkeypatch.setattr(launch, "_at_once", lambda device: 1)
    for splits in (2, 4, 8):
        monkeypatch.setattr(launch, "_PARTIALS", splits)
        launch.forget_plans()
        found[splits] = peaks(neighborhood((8, 8), 3, batch=4))[1]
    assert found[8] - found[4] == 2 * (found[4] - found[2]) == 4 * 64 * 32 * 4


@pytest.mark.slow
def test_gradients_of_keys_tile_by_tile_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most as many images at once as fit."""
    call = halo((8, 8), 4, 1, batch=6, dim=16)
    image = 4 * 8**2 * 2 * 16 * 4  # tiles, a window rounded up, both gradients, float32
    found = {}
    for images in (1, 2, 3):
        monkeypatch.setattr(launch, "_PART_BYTES", images * image)
        found[images] = peaks(call)[1]
    assert 0.4 * image < found[2] - found[1] <= 1.1 * image
    assert 0.4 * image < found[3] - found[2] <= 1.1 * image
