"""Calls of every op on its Triton kernels, and the rule by which their errors are judged; shared by several files.

The error rule: at most twice the error that plain PyTorch makes in the same dtype, plus a small absolute term.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Call = Callable[..., Any]
Case = tuple[Call, list[Tensor]]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def first(x: Any) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


def run(call: Call, inputs: list[Tensor], backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Output and every gradient, in float64; memory that a path leaves unwritten is NaN."""
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        out = first(call(*leaves, backend=backend))
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=DEVICE).view_as(out)
        grads = torch.autograd.grad(out, leaves, weight.to(dtype))
    finally:
        torch.use_deterministic_algorithms(False)
    return [x.detach().double() for x in (out, *grads)]


def check(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Assert the error rule for the output and every gradient, and the same bits twice."""
    call, inputs = case
    exact = run(call, [x.to(dtype).double() for x in inputs], "reference", torch.float64)
    plain = run(call, inputs, "reference", dtype)
    actual = run(call, inputs, "triton", dtype)
    floor = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    largest = max(float(e.abs().max()) for e in exact)
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        size = float(e.abs().max())
        if size < 1e-12 * largest:
            # zero but for float64's rounding, as dq and dk are where a query sees one key alone: what remains is the
            # rounding of terms that cancel, and a sum over the queries adds many
            size = 4 * largest
        allowed = 2 * float((p - e).abs().max()) + floor * size
        error = float((a - e).abs().max())
        assert error <= allowed, f"tensor {i}: error {error:.2e} of {size:.2e}, allowed {allowed:.2e}"
    for a, b in zip(actual, run(call, inputs, "triton", dtype), strict=True):
        assert torch.equal(a, b), "not the same bits twice"


def neighborhood(
    size: tuple[int, ...], kernel: Any, *, heads: int = 1, dim: int = 8, dim_v: int | None = None, batch: int = 1,
    bias: bool = True, dilation: Any = 1, stride: Any = 1, is_causal: Any = False,
) -> Case:  # fmt: skip
    sides = kernel if isinstance(kernel, tuple) else (kernel,) * len(size)
    inputs = [
        randn(batch, *size, heads, dim),
        randn(batch, *size, heads, dim),
        randn(batch, *size, heads, dim_v or dim),
    ]
    if bias:
        inputs.append(randn(heads, *(2 * k - 1 for k in sides)))

    def call(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None = None, *, backend: str) -> Tensor:
        return ops.neighborhood_attention(
            q, k, v, kernel, dilation=dilation, stride=stride, is_causal=is_causal, bias=b, backend=backend
        )

    return call, inputs


def window(
    size: tuple[int, int], side: Any, *, heads: int = 1, dim: int = 8, batch: int = 1, bias: bool = True,
    shift: Any = 0, grid: bool = False,
) -> Case:  # fmt: skip
    sides = side if isinstance(side, tuple) else (side, side)
    inputs = [randn(batch, *size, heads, dim) for _ in range(3)]
    if bias:
        inputs.append(randn(heads, 2 * sides[0] - 1, 2 * sides[1] - 1))

    def call(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None = None, *, backend: str) -> Tensor:
        return ops.window_attention(q, k, v, side, shift=shift, grid=grid, bias=b, backend=backend)

    return call, inputs


def halo(
    size: tuple[int, int], block: int, reach: int, *, heads: int = 1, dim: int = 8, dim_v: int | None = None,
    batch: int = 1, stride: int = 1, relative: str = "hw", border: str = "zero",
) -> Case:  # fmt: skip
    query = tuple(-(-s // stride) for s in size)
    inputs = [
        randn(batch, *query, heads, dim),
        randn(batch, *size, heads, dim),
        randn(batch, *size, heads, dim_v or dim),
    ]
    inputs += [randn(2 * (block + 2 * reach) - 1, dim) * dim**-0.5 for _ in relative]  # as timm initializes them

    def call(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor, backend: str) -> Tensor:
        named = {"rel_height" if axis == "h" else "rel_width": t for axis, t in zip(relative, tables, strict=True)}
        return ops.halo_attention(q, k, v, block, reach, border=border, backend=backend, **named)

    return call, inputs


def routing(
    size: tuple[int, int], regions: Any, topk: int, *, heads: int = 1, dim: int = 8, dim_v: int | None = None,
    batch: int = 1, padding: str = "none",
) -> Case:  # fmt: skip
    inputs = [
        randn(batch, *size, heads, dim),
        randn(batch, *size, heads, dim),
        randn(batch, *size, heads, dim_v or dim),
    ]
    index = ops.routing_index(inputs[0], inputs[1], regions, topk, padding=padding).to(DEVICE)

    def call(q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> Tensor:
        return first(ops.routing_attention(q, k, v, regions, topk, index=index, padding=padding, backend=backend))

    return call, inputs


def channel(tokens: int, *, heads: int = 1, dim: int = 8, batch: int = 1) -> Case:
    def call(q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> Tensor:
        return ops.channel_attention(q, k, v, backend=backend)

    return call, [randn(batch, tokens, heads, dim) for _ in range(3)]


def sampling(size: tuple[int, int], cell: Any, *, channels: int = 16, batch: int = 1, n_iter: int = 1) -> Case:
    def call(x: Tensor, *, backend: str) -> Tensor:
        return ops.super_token_sampling(x, cell, n_iter=n_iter, backend=backend)[0]

    return call, [randn(batch, *size, channels)]


def mapping(size: tuple[int, int], cell: int, *, channels: int = 16, batch: int = 1) -> Case:
    cells = [-(-s // cell) for s in size]

    def call(tokens: Tensor, affinity: Tensor, *, backend: str) -> Tensor:
        return ops.super_token_mapping(tokens, affinity, cell, backend=backend)

    return call, [randn(batch, *cells, channels), randn(batch, *size, 9).softmax(-1)]


def large_kernel(
    size: tuple[int, int], channels: int, *, batch: int = 1, kernels: tuple[int, int] = (5, 7), dilation: int = 3
) -> Case:
    inputs = [randn(batch, channels, *size)]
    for shape in (
        (channels, 1, kernels[0], kernels[0]),
        (channels, 1, kernels[1], kernels[1]),
        (channels, channels, 1, 1),
    ):
        inputs += [randn(*shape) / shape[2], randn(channels)]

    def call(*tensors: Tensor, backend: str) -> Tensor:
        return ops.large_kernel_attention(*tensors, dilation=dilation, backend=backend)

    return call, inputs


CASES: dict[str, Callable[[], Case]] = {
    "na-3-odd-map": lambda: neighborhood((9, 11), 3, heads=2, batch=2),
    "na-7-window-equals-map": lambda: neighborhood((7, 7), 7, dim=16),
    "na-even-kernel": lambda: neighborhood((9, 10), (4, 6)),
    "na-no-bias-dim24-dimv40": lambda: neighborhood((8, 9), 5, dim=24, dim_v=40, bias=False),
    "na-dilated-uneven-phases": lambda: neighborhood((13, 11), (3, 5), dilation=(3, 2)),
    "na-stride": lambda: neighborhood((10, 9), 5, stride=(2, 5)),
    "na-causal": lambda: neighborhood((9, 8), 3, is_causal=(True, False), stride=(2, 1)),
    "na-1d": lambda: neighborhood((37,), 5, dilation=2, heads=2),
    "na-1d-causal": lambda: neighborhood((29,), 7, is_causal=True),
    "window": lambda: window((14, 14), 7, heads=2, dim=16),
    "window-odd-shifted": lambda: window((11, 13), (4, 5), shift=(2, 3)),
    "window-larger-than-a-tile": lambda: window((12, 12), 12, bias=False),
    "window-grid": lambda: window((14, 7), 7, grid=True),
    "window-grid-padded": lambda: window((10, 9), 4, grid=True),
    "halo-zero": lambda: halo((16, 16), 8, 3, dim=16),
    "halo-mask-overhang": lambda: halo((9, 14), 4, 1, border="mask", heads=2),
    "halo-strided": lambda: halo((16, 8), 8, 2, stride=2, dim_v=16),
    "halo-block7-rows-only": lambda: halo((14, 7), 7, 2, relative="h"),
    "halo-plain": lambda: halo((8, 9), 4, 2, relative="", batch=2),
    "routing": lambda: routing((14, 14), 7, 4, heads=2),
    "routing-zero-padding": lambda: routing((13, 17), 4, 3, padding="zero", dim_v=16),
    "routing-large-region": lambda: routing((18, 18), 2, 2, batch=2),
    "channel": lambda: channel(77, heads=3, batch=2),
    "channel-dim24": lambda: channel(130, dim=24),
    "sampling": lambda: sampling((16, 16), 4, batch=2),
    "sampling-odd-2-iterations": lambda: sampling((13, 18), 8, n_iter=2, channels=24),
    "mapping": lambda: mapping((13, 10), 4, channels=40),
    "large-kernel": lambda: large_kernel((9, 11), 12, batch=2),
    "large-kernel-33-channels": lambda: large_kernel((7, 8), 33, kernels=(3, 5), dilation=2),
}
