"""Large logits and numbers that are none: the CPU paths against the reference, forward and every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import ops

Case = tuple[Callable[..., Any], Callable[[float], list[Tensor]]]


def qkv(size: float, shape: tuple[int, ...] = (2, 9, 10, 2, 8)) -> list[Tensor]:
    """q, k and v whose logits have about this size."""
    q, k, v = torch.randn(3, *shape)
    factor = (size / shape[-1] ** 0.5) ** 0.5 if size > 1 else 1.0
    return [q * factor, k * factor, v]


def picks(regions: int, topk: int) -> Tensor:
    return torch.rand(2, regions, regions).argsort(-1)[..., :topk]


CASES: dict[str, Case] = {
    "window": (lambda q, k, v, **o: ops.window_attention(q, k, v, 4, shift=1, **o), qkv),
    "window-grid": (lambda q, k, v, **o: ops.window_attention(q, k, v, (4, 2), grid=True, **o), qkv),
    "window-bias": (
        lambda q, k, v, b, **o: ops.window_attention(q, k, v, 4, bias=b, **o),
        lambda size: [*qkv(size), torch.randn(2, 7, 7)],
    ),
    "window-large-bias": (
        lambda q, k, v, b, **o: ops.window_attention(q, k, v, 4, bias=b, **o),
        lambda size: [*qkv(1), torch.randn(2, 7, 7) * size],
    ),
    "neighborhood": (lambda q, k, v, **o: ops.neighborhood_attention(q, k, v, 3, dilation=(1, 2), **o), qkv),
    "neighborhood-bias": (
        lambda q, k, v, b, **o: ops.neighborhood_attention(q, k, v, 5, stride=(2, 1), bias=b, **o),
        lambda size: [*qkv(size), torch.randn(2, 9, 9)],
    ),
    "halo": (
        lambda q, k, v, a, b, **o: ops.halo_attention(q, k, v, 4, 1, rel_height=a, rel_width=b, **o),
        lambda size: [*qkv(size), torch.randn(11, 8), torch.randn(11, 8)],
    ),
    "halo-plain": (lambda q, k, v, **o: ops.halo_attention(q, k, v, 4, 1, **o), qkv),
    "halo-mask": (lambda q, k, v, **o: ops.halo_attention(q, k, v, 4, 2, border="mask", **o), qkv),
    "routing-dense": (
        lambda q, k, v, i, **o: ops.routing_attention(q, k, v, (3, 5), 6, index=i, scale=8**-0.5, **o),
        lambda size: [*qkv(size), picks(15, 6)],
    ),
    "routing-gathered": (
        lambda q, k, v, i, **o: ops.routing_attention(q, k, v, (4, 8), 2, index=i, scale=8**-0.5, **o),
        lambda size: [*qkv(size, (2, 32, 32, 2, 8)), picks(32, 2)],
    ),
    "channel": (ops.channel_attention, lambda size: qkv(size, (2, 33, 2, 8))),
    "sampling": (
        lambda x, **o: ops.super_token_sampling(x, (3, 4), n_iter=2, **o),
        lambda size: [torch.randn(2, 9, 10, 8) * size**0.5],
    ),
    "mapping": (
        lambda t, a, **o: ops.super_token_mapping(t, a, (3, 4), **o),
        lambda size: [torch.randn(2, 3, 3, 8) * size, torch.randn(2, 9, 10, 9).softmax(-1)],
    ),
    "large-kernel": (
        lambda x, a, b, c, **o: ops.large_kernel_attention(x, a, None, b, None, c, None, **o),
        lambda size: [torch.randn(2, 4, 9, 10) * size**0.25, *(torch.randn(4, 1, n, n) for n in (5, 7)),
                      torch.randn(4, 4, 1, 1)],
    ),
}  # fmt: skip


def run(case: Case, tensors: list[Tensor], backend: str, dtype: torch.dtype, hole: Any = None) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in tensors]
    out = case[0](*leaves, backend=backend)
    out = out[0] if isinstance(out, tuple) else out
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(dtype)
    if hole is not None:
        weight[hole[0]] = hole[1]
    grads = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], weight)
    return [x.detach().double() for x in (out, *grads)]


def errors(case: Case, size: float, dtype: torch.dtype, draws: int) -> list[tuple[Tensor, Tensor, float]]:
    """Per tensor: the errors of the reference and of the CPU path in a dtype, one per draw, and the largest value."""
    found: list[list[tuple[float, float, float]]] = []
    for seed in range(draws):
        torch.manual_seed(seed)
        tensors = [x.to(dtype).double() if x.is_floating_point() else x for x in case[1](size)]
        exact = run(case, tensors, "reference", torch.float64)
        runs = (run(case, tensors, b, dtype) for b in ("reference", "cpu"))
        found.append(
            [
                (float((p - e).abs().max()), float((a - e).abs().max()), float(e.abs().max()))
                for e, p, a in zip(exact, *runs, strict=True)
            ]
        )
    per_tensor = torch.tensor(found).unbind(1)  # [draws, 3] each
    return [(x[:, 0], x[:, 1], float(x[:, 2].max())) for x in per_tensor]


@pytest.mark.parametrize("size", [30.0, 1e3, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_large_logits(name: str, dtype: torch.dtype, size: float) -> None:
    """At most twice the error of the reference in the same dtype, both against float64, in the upper half of the draws.

    The single worst draw is one where two logits nearly tie, which magnifies any rounding: it is a draw from a long
    tail, another one on every processor.
    """
    floor = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}[dtype]
    for i, (plain, actual, largest) in enumerate(errors(CASES[name], size, dtype, 24)):
        for part, factor in ((0.5, 2), (0.75, 2), (1.0, 8)):
            allowed = factor * plain.quantile(part) + floor * largest
            error = actual.quantile(part)
            assert error <= allowed, f"tensor {i}, quantile {part}: error {error:.1e}, {allowed:.1e} are allowed"


@pytest.mark.parametrize("size", [3e6, 3e8, 1e12])
@pytest.mark.parametrize("name", CASES)
def test_huge_logits(name: str, size: float) -> None:
    """Where float32 cannot tell two logits apart a softmax is a choice, and its gradients have the size of others."""
    case = CASES[name]
    torch.manual_seed(0)
    tensors = case[1](size)
    larger = max(float(x.abs().max()) for x in tensors if x.is_floating_point()) ** (1 if name != "large-kernel" else 4)
    for x in run(case, tensors, "cpu", torch.float32):
        assert x.isfinite().all()
        assert x.abs().max() <= 1e4 * max(1.0, larger)


def holes(name: str, tensors: list[Tensor]) -> dict[int, Any]:
    """A pixel of every map among the tensors."""
    if name == "large-kernel":
        return {0: (1, 2, 4, 5)}
    if name == "channel":
        return dict.fromkeys(range(3), (1, 4, 1, 3))
    found = {i: (1, x.shape[1] // 2, x.shape[2] // 2) for i, x in enumerate(tensors) if x.dim() >= 4 and len(x) == 2}
    return {i: (*place, 1, 3) if tensors[i].dim() == 5 else (*place, 0) for i, place in found.items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_what_is_no_number_stays_in_its_windows(name: str, dtype: torch.dtype, value: float) -> None:
    """In one pixel of every tensor, and of the gradient: where the reference is finite, the CPU path is."""
    torch.manual_seed(0)
    case = CASES[name]
    tensors = [x.to(dtype) if x.is_floating_point() else x for x in case[1](1.0)]
    places = holes(name, tensors)
    out = run(case, tensors, "cpu", dtype)[0]
    for which in (*places, None):
        given = [x.clone() for x in tensors]
        hole = None
        if which is None:
            hole = (tuple(n // 2 for n in out.shape), value)
        else:
            given[which][places[which]] = value
        expected = run(case, given, "reference", dtype, hole)
        actual = run(case, given, "cpu", dtype, hole)
        assert not all(x.isfinite().all() for x in expected)
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            finite = e.isfinite()
            assert a[finite].isfinite().all(), f"in {which}: tensor {i} has numbers that are none"
            if dtype == torch.float32:
                torch.testing.assert_close(a[finite], e[finite], rtol=1e-4, atol=1e-4)
                # zero padding keeps a pixel out of some sums of a convolution's weight gradient, torch's not
                if name != "large-kernel":
                    assert torch.equal(a.isfinite(), finite), f"in {which}: tensor {i} lost what is no number"


def test_a_window_across_the_sides_keeps_them_apart() -> None:
    """The reference joins two sides of the image in a window under a mask, the CPU path has two windows."""
    q = torch.randn(1, 8, 8, 1, 4)
    v = q.clone()
    v[0, 7, 7, 0, 0] = float("nan")
    out = ops.window_attention(q, q, v, 4, shift=2, backend="cpu")
    assert out[0, :6].isfinite().all()
    assert out[0, :, :6].isfinite().all()
    assert not out[0, 6:, 6:, 0, 0].isfinite().any()
