"""The Triton kernels, run by the interpreter on a CPU or by the GPU that is there, against the definitions.

The error rule: at most twice the error that plain PyTorch makes in the same dtype, plus a small absolute term.
"""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import ops

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Call = Callable[..., Any]
Case = tuple[Call, list[Tensor]]


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _first(x: Any) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


def run(call: Call, inputs: list[Tensor], backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Output and every gradient, in float64; memory that a path leaves unwritten is NaN."""
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        out = _first(call(*leaves, backend=backend))
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
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        size = float(e.abs().max().clamp(min=1e-3))
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
        _randn(batch, *size, heads, dim),
        _randn(batch, *size, heads, dim),
        _randn(batch, *size, heads, dim_v or dim),
    ]
    if bias:
        inputs.append(_randn(heads, *(2 * k - 1 for k in sides)))

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
    inputs = [_randn(batch, *size, heads, dim) for _ in range(3)]
    if bias:
        inputs.append(_randn(heads, 2 * sides[0] - 1, 2 * sides[1] - 1))

    def call(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None = None, *, backend: str) -> Tensor:
        return ops.window_attention(q, k, v, side, shift=shift, grid=grid, bias=b, backend=backend)

    return call, inputs


def halo(
    size: tuple[int, int], block: int, reach: int, *, heads: int = 1, dim: int = 8, dim_v: int | None = None,
    batch: int = 1, stride: int = 1, relative: str = "hw", border: str = "zero",
) -> Case:  # fmt: skip
    query = tuple(-(-s // stride) for s in size)
    inputs = [
        _randn(batch, *query, heads, dim),
        _randn(batch, *size, heads, dim),
        _randn(batch, *size, heads, dim_v or dim),
    ]
    inputs += [_randn(2 * (block + 2 * reach) - 1, dim) for _ in relative]

    def call(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor, backend: str) -> Tensor:
        named = {"rel_height" if axis == "h" else "rel_width": t for axis, t in zip(relative, tables, strict=True)}
        return ops.halo_attention(q, k, v, block, reach, border=border, backend=backend, **named)

    return call, inputs


def routing(
    size: tuple[int, int], regions: Any, topk: int, *, heads: int = 1, dim: int = 8, dim_v: int | None = None,
    batch: int = 1, padding: str = "none",
) -> Case:  # fmt: skip
    inputs = [
        _randn(batch, *size, heads, dim),
        _randn(batch, *size, heads, dim),
        _randn(batch, *size, heads, dim_v or dim),
    ]
    index = ops.routing_index(inputs[0], inputs[1], regions, topk, padding=padding).to(DEVICE)

    def call(q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> Tensor:
        return _first(ops.routing_attention(q, k, v, regions, topk, index=index, padding=padding, backend=backend))

    return call, inputs


def channel(tokens: int, *, heads: int = 1, dim: int = 8, batch: int = 1) -> Case:
    def call(q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> Tensor:
        return ops.channel_attention(q, k, v, backend=backend)

    return call, [_randn(batch, tokens, heads, dim) for _ in range(3)]


def sampling(size: tuple[int, int], cell: Any, *, channels: int = 16, batch: int = 1, n_iter: int = 1) -> Case:
    def call(x: Tensor, *, backend: str) -> Tensor:
        return ops.super_token_sampling(x, cell, n_iter=n_iter, backend=backend)[0]

    return call, [_randn(batch, *size, channels)]


def mapping(size: tuple[int, int], cell: int, *, channels: int = 16, batch: int = 1) -> Case:
    cells = [-(-s // cell) for s in size]

    def call(tokens: Tensor, affinity: Tensor, *, backend: str) -> Tensor:
        return ops.super_token_mapping(tokens, affinity, cell, backend=backend)

    return call, [_randn(batch, *cells, channels), _randn(batch, *size, 9).softmax(-1)]


def large_kernel(
    size: tuple[int, int], channels: int, *, batch: int = 1, kernels: tuple[int, int] = (5, 7), dilation: int = 3
) -> Case:
    inputs = [_randn(batch, channels, *size)]
    for shape in (
        (channels, 1, kernels[0], kernels[0]),
        (channels, 1, kernels[1], kernels[1]),
        (channels, channels, 1, 1),
    ):
        inputs += [_randn(*shape) / shape[2], _randn(channels)]

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


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    check(CASES[name]())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    "name", ["na-3-odd-map", "window", "halo-zero", "routing", "channel", "sampling", "mapping", "large-kernel"]
)
def test_half(name: str, dtype: torch.dtype) -> None:
    check(CASES[name](), dtype)


def test_packed_views() -> None:
    """q, k and v as views of one packed tensor; the gradient is one dense tensor."""
    qkv = torch.randn(2, 9, 8, 3, 2, 8, device=DEVICE)
    results = []
    for backend in ("reference", "triton"):
        leaf = qkv.clone().requires_grad_()
        out = ops.neighborhood_attention_qkvpacked(leaf, 3, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_independent_of_the_other_images() -> None:
    call, inputs = neighborhood((9, 10), 5, batch=3, heads=2)
    whole = _first(call(*(x.float().to(DEVICE) for x in inputs), backend="triton"))
    alone = _first(
        call(*(x[1:2].float().to(DEVICE) for x in inputs[:3]), inputs[3].float().to(DEVICE), backend="triton")
    )
    assert torch.equal(whole[1:2], alone)


def test_empty_batch() -> None:
    call, inputs = neighborhood((9, 10), 3)
    leaves = [x.float().to(DEVICE)[:0].requires_grad_() for x in inputs[:3]]
    bias = inputs[3].float().to(DEVICE).requires_grad_()
    out = call(*leaves, bias, backend="triton")
    assert out.shape == (0, 9, 10, 1, 8)
    grads = torch.autograd.grad(out.sum(), [*leaves, bias])
    assert not grads[-1].any()


def test_float64_says_why() -> None:
    x = torch.randn(1, 8, 8, 1, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="'triton' cannot run this call: .*float64"):
        ops.neighborhood_attention(x, x, x, 3, backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the reason concerns machines without a GPU")
def test_no_gpu_says_why() -> None:
    code = (
        "import torch; from zoo import ops; x = torch.randn(1, 8, 8, 1, 8)\n"
        "try: ops.window_attention(x, x, x, 4, backend='triton')\n"
        "except RuntimeError as error: print(error)"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert "the tensors are on the CPU" in done.stdout


@pytest.mark.parametrize("target", [("90", "bfloat16"), ("80", "float16")], ids="-".join)
def test_compiles_for_a_gpu_that_is_not_there(target: tuple[str, str]) -> None:
    _compile(*target)


@pytest.mark.slow
@pytest.mark.parametrize("target", [("90", "float32"), ("86", "bfloat16"), ("80", "float32")], ids="-".join)
def test_compiles_for_more_gpus(target: tuple[str, str]) -> None:
    _compile(*target)


def _compile(capability: str, dtype: str) -> None:
    support = ROOT / "tests" / "support"
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{support}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-W", "ignore", str(support / "compile_kernels.py"), capability, dtype]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "TOO MUCH" not in done.stdout, done.stdout


def _random_case(op: str, r: random.Random) -> tuple[str, Case]:
    def side(low: int, high: int) -> int:
        return r.randint(low, high)

    batch, heads, dim = r.choice((1, 1, 2)), r.choice((1, 2)), r.choice((8, 16, 24, 32, 48))
    if op == "neighborhood":
        rank = r.choice((1, 2, 2))
        kernel = tuple(side(1, 7) for _ in range(rank))
        dilation = tuple(side(1, 3) for _ in range(rank))
        size = tuple(k * d + side(0, 6) for k, d in zip(kernel, dilation, strict=True))
        stride = tuple(side(1, k) for k in kernel)
        causal = tuple(r.random() < 0.25 for _ in kernel)
        options: dict[str, Any] = {
            "dilation": dilation,
            "stride": stride,
            "is_causal": causal,
            "bias": r.random() < 0.6,
        }
        call = neighborhood(size, kernel, batch=batch, heads=heads, dim=dim, dim_v=r.choice((None, 8, 20)), **options)
        return f"{size} {kernel} {options}", call
    if op == "window":
        sides = (side(1, 8), side(1, 8))
        size2 = (side(1, 15), side(1, 15))
        grid = r.random() < 0.4
        shift = (r.randrange(sides[0]), r.randrange(sides[1])) if not grid and r.random() < 0.6 else 0
        return f"{size2} {sides} {shift} {grid}", window(
            size2, sides, batch=batch, heads=heads, dim=dim, shift=shift, grid=grid, bias=r.random() < 0.6
        )
    if op == "halo":
        stride = r.choice((1, 1, 2))
        block, reach = stride * side(1, 8 // stride), side(0, 3)
        size2 = (side(1, 17), side(1, 17))
        relative, border = r.choice(("", "h", "w", "hw")), r.choice(("zero", "mask"))
        return f"{size2} {block} {reach} {stride} {relative} {border}", halo(
            size2, block, reach, batch=batch, heads=heads, dim=dim, stride=stride, relative=relative, border=border
        )
    if op == "routing":
        regions, size2 = (side(1, 4), side(1, 4)), (side(4, 18), side(4, 18))
        topk = side(1, regions[0] * regions[1])
        return f"{size2} {regions} {topk}", routing(
            size2, regions, topk, batch=batch, heads=heads, dim=dim, padding="zero", dim_v=r.choice((None, 8, 20))
        )
    if op == "channel":
        return "", channel(side(1, 200), heads=heads, dim=dim, batch=batch)
    if op == "super_token":
        size2, cell = (side(1, 18), side(1, 18)), side(1, 8)
        if r.random() < 0.5:
            return f"{size2} {cell}", mapping(size2, cell, channels=dim, batch=batch)
        return f"{size2} {cell}", sampling(size2, cell, channels=dim, batch=batch, n_iter=r.choice((1, 1, 2)))
    kernels = (r.choice((1, 3, 5)), r.choice((3, 5, 7)))
    return f"{kernels}", large_kernel(
        (side(1, 12), side(1, 12)), side(1, 40), batch=batch, kernels=kernels, dilation=side(1, 3)
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("op", ["neighborhood", "window", "halo", "routing", "channel", "super_token", "large_kernel"])
def test_random_sweep(op: str) -> None:
    """Random calls; ZOO_SWEEP_SEED and ZOO_SWEEP_COUNT choose others. The seed of a failure is in its message."""
    first = int(os.environ.get("ZOO_SWEEP_SEED", "0"))
    for seed in range(first, first + int(os.environ.get("ZOO_SWEEP_COUNT", "300"))):
        torch.manual_seed(seed)
        description, case = _random_case(op, random.Random(seed))
        try:
            check(case)
        except Exception as error:
            raise AssertionError(f"{op}, seed {seed}: {description}") from error
