"""The definition against NATTEN's recorded results and against a loop; the CPU path against the definition."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import GOLDENS, assert_matches, npz
from torch import Tensor

from zoo.ops.neighborhood import cpu, neighborhood_attention, neighborhood_attention_qkvpacked

RECORDED = sorted(p.stem for p in (GOLDENS / "ops").glob("na[12]d_*.npz"))
RECORDED_MODULES = sorted(p.stem for p in (GOLDENS / "ops").glob("namodule2d_*.npz"))
BACKENDS = ("reference", "cpu")

# spatial, kernel_size, dilation, stride, is_causal
CASES: dict[str, tuple[tuple[int, ...], Any, Any, Any, Any]] = {
    "L29-k7": ((29,), 7, 1, 1, False),
    "L30-k4-even": ((30,), 4, 1, 1, False),
    "L23-k3-d4-uneven": ((23,), 3, 4, 1, False),
    "L21-k7-s3": ((21,), 7, 1, 3, False),
    "L22-k6-s4-incomplete-group": ((22,), 6, 1, 4, False),
    "L23-k5-d2-s3-causal": ((23,), 5, 2, 3, True),
    "L17-k5-d3-causal": ((17,), 5, 3, 1, True),
    "L150-k9": ((150,), 9, 1, 1, False),
    "L61-k60-wide": ((61,), 60, 1, 7, False),
    "7x7-k7-whole": ((7, 7), 7, 1, 1, False),
    "1x9-k1x3": ((1, 9), (1, 3), 1, 1, False),
    "9x11-k3": ((9, 11), 3, 1, 1, False),
    "13x10-k3x7": ((13, 10), (3, 7), 1, 1, False),
    "12x9-k4x2-even": ((12, 9), (4, 2), 1, 1, False),
    "17x20-k3x5-d5x3-uneven": ((17, 20), (3, 5), (5, 3), 1, False),
    "15x16-k7x3-d2x5-uneven": ((15, 16), (7, 3), (2, 5), 1, False),
    "12x12-k4-s4-blocked": ((12, 12), 4, 1, 4, False),
    "13x14-k5x6-s2x5": ((13, 14), (5, 6), 1, (2, 5), False),
    "14x11-k5x3-d2x3-s3x2": ((14, 11), (5, 3), (2, 3), (3, 2), False),
    "9x13-k3-causal-rows": ((9, 13), 3, 1, 1, (True, False)),
    "11x13-k4x5-d2x1-s3x2-causal-columns": ((11, 13), (4, 5), (2, 1), (3, 2), (False, True)),
    "10x12-k5x4-s5x4-causal": ((10, 12), (5, 4), 1, (5, 4), True),
    "25x23-k7": ((25, 23), 7, 1, 1, False),
    "31x8-k5x8": ((31, 8), (5, 8), 1, 1, False),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def per_axis(value: Any, axes: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * axes


def inputs(
    spatial: Sequence[int],
    kernel_size: Any,
    batch: int = 2,
    heads: int = 2,
    dim: int = 4,
    dim_v: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """q, k, v, bias and the upstream gradient."""
    shape = batch, *spatial, heads
    bias = heads, *(2 * k - 1 for k in per_axis(kernel_size, len(spatial)))
    q, k, b = (torch.randn(s, dtype=dtype) for s in ((*shape, dim), (*shape, dim), bias))
    v, g = (torch.randn(*shape, dim_v or dim, dtype=dtype) for _ in range(2))
    return [q, k, v, b, g]


def run(function: Callable[..., Tensor], tensors: Sequence[Tensor | None], grad: Tensor) -> list[Tensor]:
    """The output of function(*tensors) and the gradient of each tensor."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


def op(case: tuple[Any, ...], backend: str | None, **extra: Any) -> Callable[..., Tensor]:
    _, kernel_size, dilation, stride, is_causal = case

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        options = {"dilation": dilation, "stride": stride, "is_causal": is_causal, "bias": bias, "backend": backend}
        return neighborhood_attention(q, k, v, kernel_size, **(options | extra))

    return function


def window(i: int, length: int, k: int, d: int, s: int, causal: bool) -> list[tuple[int, int]]:
    """The keys of query i and their bias indices, read off the definition one query at a time."""
    phase = list(range(i % d, length, d))
    me = phase.index(i)
    group = [p for p in range(len(phase)) if p // s == me // s]
    if causal:
        leader = group[-1]
        positions = [p for p in range(leader - k + 1, me + 1) if p >= 0]
    else:
        first = group[0]
        leader = min(first + s // 2, len(phase) - 1)
        left, right = leader - k // 2, leader + (k - 1) // 2
        while left < 0:
            left, right = left + 1, right + 1
        while right >= len(phase):
            left, right = left - 1, right - 1
        positions = list(range(left, right + 1))
    return [(phase[p], p - me + k - 1) for p in positions]


def loop(case: tuple[Any, ...], scale: float) -> Callable[..., Tensor]:
    """Neighborhood attention written as loops over the queries."""
    spatial, *rest = case
    axes = list(zip(spatial, *(per_axis(x, len(spatial)) for x in rest), strict=True))

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        rows = []
        for query in itertools.product(*(range(n) for n in spatial)):
            keys = list(itertools.product(*(window(i, *axis) for i, axis in zip(query, axes, strict=True))))
            where = [[key[a][0] for key in keys] for a in range(len(spatial))]
            rel = [[key[a][1] for key in keys] for a in range(len(spatial))]
            at = (slice(None), *query)
            ks, vs = k[(slice(None), *where)], v[(slice(None), *where)]  # (B, keys, nh, d)
            logits = (q[at][:, None] * ks).sum(-1) * scale + bias[(slice(None), *rel)].t()
            rows.append((logits.softmax(1)[..., None] * vs).sum(1))
        return torch.stack(rows, 1).unflatten(1, spatial)

    return function


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill uninitialized memory with NaN, and let nondeterministic PyTorch functions raise."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RECORDED)
def test_recorded(name: str, backend: str) -> None:
    data = npz(f"ops/{name}.npz")
    q, k, v, grad = (data[key].movedim(1, -2) for key in ("q", "k", "v", "grad_out"))
    causal = data.get("is_causal", False)
    case = (None, int(data["kernel_size"]), int(data["dilation"]), 1, causal if causal is False else _tolist(causal))
    tensors = [q, k, v, data["rpb"]] if "rpb" in data else [q, k, v]
    actual = run(op(case, backend, scale=float(data["scale"])), tensors, grad)
    for x, key in zip(actual, ("out", "grad_q", "grad_k", "grad_v", "grad_rpb"), strict=False):
        expected = data[key] if key == "grad_rpb" else data[key].movedim(1, -2)
        assert_matches(x, expected, expected.std().item(), 1e-9, key)


def _tolist(causal: Any) -> Any:
    return tuple(bool(c) for c in causal) if getattr(causal, "ndim", 0) else bool(causal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RECORDED_MODULES)
def test_recorded_module(name: str, backend: str) -> None:
    """NATTEN 0.15's module: small maps are zero-padded before qkv, and the padding is attended to."""
    data = npz(f"ops/{name}.npz")
    k, d, heads = (int(data[key]) for key in ("kernel_size", "dilation", "num_heads"))

    def module(x: Tensor, rpb: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, max(0, k * d - w), 0, max(0, k * d - h)))
        qkv = F.linear(x, w1, b1).unflatten(-1, (3, heads, -1))
        x = neighborhood_attention_qkvpacked(qkv, k, dilation=d, bias=rpb, backend=backend)
        return F.linear(x.flatten(-2)[:, :h, :w], w2, b2)

    names = ("rpb", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    actual = run(module, [data["x"], *(data[f"w.{n}"] for n in names)], data["grad_out"])
    for x, key in zip(actual, ("out", "grad_x", *(f"g.{n}" for n in names)), strict=True):
        assert_matches(x, data[key], data[key].std().item(), 1e-9, key)


@cases
def test_reference_is_the_loop(case: tuple[Any, ...]) -> None:
    q, k, v, bias, grad = inputs(case[0], case[1], batch=1)
    scale = 0.3
    actual = run(op(case, "reference", scale=scale), [q, k, v, bias], grad)
    for x, y in zip(actual, run(loop(case, scale), [q, k, v, bias], grad), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "nobias"])
@cases
def test_cpu_is_the_reference(case: tuple[Any, ...], with_bias: bool) -> None:
    q, k, v, bias, grad = inputs(case[0], case[1], batch=3)
    tensors = [q, k, v, bias] if with_bias else [q, k, v]
    expected = run(op(case, "reference"), tensors, grad)
    for x, y in zip(run(op(case, "cpu"), tensors, grad), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("block", [1, 3000, 1 << 30])
@pytest.mark.parametrize("tile", [1, 2, 4, 8, 1000])
@pytest.mark.parametrize("name", ["L150-k9", "25x23-k7", "17x20-k3x5-d5x3-uneven", "13x14-k5x6-s2x5"])
def test_every_tiling(name: str, tile: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.setattr(cpu, "_TILES", (tile,))
    # the whole map is always a candidate: make it lose
    monkeypatch.setattr(
        cpu, "_cost", lambda rows, columns, dim: sum(abs(n - tile) for c in (rows, columns) for n, _ in c)
    )
    monkeypatch.setattr(cpu, "_BLOCK", block)
    cpu._regions.cache_clear()
    try:
        *tensors, grad = inputs(case[0], case[1])
        expected = run(op(case, "reference"), tensors, grad)
        for x, y in zip(run(op(case, "cpu"), tensors, grad), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    finally:
        cpu._regions.cache_clear()


def plain(case: tuple[Any, ...]) -> Callable[..., Tensor]:
    """Dense masked attention in the dtype of its arguments throughout, as a PyTorch user would write it."""
    spatial, *rest = case
    axes = list(zip(spatial, *(per_axis(x, len(spatial)) for x in rest), strict=True))
    tables = []
    for axis in axes:
        table = torch.full((axis[0], axis[0]), -1)
        for i in range(axis[0]):
            for key, rel in window(i, *axis):
                table[i, key] = rel
        tables.append(table)
    grid = tables if len(axes) == 1 else [tables[0][:, None, :, None], tables[1][None, :, None, :]]
    n = math.prod(spatial)
    grid = [x.reshape(n, n) for x in torch.broadcast_tensors(*grid)]
    outside = torch.stack([x < 0 for x in grid]).any(0)

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
        logits = q * q.shape[-1] ** -0.5 @ k.mT + bias[(slice(None), *(x.clamp(min=0) for x in grid))]
        out = logits.masked_fill(outside, float("-inf")).softmax(-1) @ v
        return out.transpose(1, 2).unflatten(1, spatial)

    return function


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("name", "dim"), [("25x23-k7", 32), ("17x20-k3x5-d5x3-uneven", 16), ("L150-k9", 24), ("7x7-k7-whole", 128)]
)
def test_precision(name: str, dim: int, dtype: torch.dtype, backend: str) -> None:
    """At most twice the error of the same computation in plain PyTorch of the same dtype."""
    case = CASES[name]
    *tensors, grad = (x.to(dtype) for x in inputs(case[0], case[1], batch=3, dim=dim))
    exact = run(plain(case), [t.double() for t in tensors], grad.double())
    usual = run(plain(case), tensors, grad)
    for x, y, z in zip(run(op(case, backend), tensors, grad), usual, exact, strict=True):
        assert x.dtype == dtype
        unit = torch.finfo(dtype).eps * z.abs().max().item()
        assert (x - z).abs().max().item() <= 2 * (y - z).abs().max().item() + unit
        assert (x - z).square().mean().sqrt().item() <= 2 * (y - z).square().mean().sqrt().item() + 0.1 * unit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_bias_beside_low_precision(dtype: torch.dtype) -> None:
    case = CASES["9x11-k3"]
    q, k, v, bias, grad = (x.to(dtype) for x in inputs(case[0], case[1]))
    out, dq, dk, dv, dbias = run(op(case, "cpu"), [q, k, v, bias.float()], grad)
    assert (out.dtype, dq.dtype, dk.dtype, dv.dtype, dbias.dtype) == (*[dtype] * 4, torch.float32)
    expected = run(op(case, "reference"), [q, k, v, bias.float()], grad)[-1]
    torch.testing.assert_close(dbias, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dim", [1, 8, 24, 80])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_shapes(batch: int, dim: int, heads: int) -> None:
    case = CASES["13x10-k3x7"]
    *tensors, grad = inputs(case[0], case[1], batch, heads, dim)
    expected = run(op(case, "reference"), tensors, grad)
    for x, y in zip(run(op(case, "cpu"), tensors, grad), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_value_dimension_may_differ(dtype: torch.dtype) -> None:
    case = CASES["14x11-k5x3-d2x3-s3x2"]
    *tensors, grad = (x.to(dtype) for x in inputs(case[0], case[1], dim=8, dim_v=5))
    expected = run(op(case, "reference"), tensors, grad)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    for x, y in zip(run(op(case, "cpu"), tensors, grad), expected, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def test_whole_map_is_full_attention() -> None:
    q, k, v, _, grad = inputs((9, 12), 9)
    full = lambda q, k, v: F.scaled_dot_product_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)))  # noqa: E731
    expected = run(lambda *x: full(*x).transpose(1, 2).unflatten(1, (9, 12)), [q, k, v], grad)
    for backend in BACKENDS:
        actual = run(lambda *x, b=backend: neighborhood_attention(*x, (9, 12), backend=b), [q, k, v], grad)
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_stride_of_the_kernel_is_blocked_attention() -> None:
    q, k, v, _, _ = inputs((12, 8), 4)
    blocks = [x.unflatten(2, (2, 4)).unflatten(1, (3, 4)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*blocks).unflatten(4, (4, 4)).permute(0, 1, 4, 2, 5, 3, 6)
    actual = neighborhood_attention(q, k, v, 4, stride=4)
    torch.testing.assert_close(actual, expected.flatten(1, 2).flatten(2, 3), rtol=1e-10, atol=1e-12)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values with other strides."""
    wide, other = (torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype) for _ in range(2))
    return {
        "heads-first": x.transpose(1, -2).contiguous().transpose(1, -2),
        "channels-first": x.movedim(-1, 1).contiguous().movedim(1, -1),
        "every-other": wide[..., ::2].copy_(x),
        "slice": other[..., : x.shape[-1]].copy_(x),
        "flipped-axes": x.transpose(1, 2).contiguous().transpose(1, 2),
    }


@pytest.mark.parametrize("layout", ["heads-first", "channels-first", "every-other", "slice", "flipped-axes"])
def test_strides(layout: str) -> None:
    case = CASES["15x16-k7x3-d2x5-uneven"]
    *tensors, grad = inputs(case[0], case[1])
    expected = run(op(case, "cpu"), tensors, grad)
    q, k, v = (layouts(x)[layout] for x in tensors[:3])
    for x, y in zip(run(op(case, "cpu"), [q, k, v, tensors[3]], layouts(grad)[layout]), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_expanded_gradient() -> None:
    case = CASES["9x11-k3"]
    q, k, v, bias, grad = inputs(case[0], case[1])
    ones = grad.new_ones(()).expand_as(grad)
    expected = run(op(case, "reference"), [q, k, v, bias], ones)
    for x, y in zip(run(op(case, "cpu"), [q, k, v, bias], ones), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["25x23-k7", "L23-k5-d2-s3-causal"])
def test_packed(name: str, dtype: torch.dtype, backend: str) -> None:
    spatial, kernel_size, dilation, stride, is_causal = case = CASES[name]
    q, k, v, bias, grad = (x.to(dtype) for x in inputs(spatial, kernel_size))
    out, dq, dk, dv, dbias = run(op(case, backend), [q, k, v, bias], grad)
    expected = [out, torch.stack([dq, dk, dv], -3), dbias]

    def packed(qkv: Tensor, bias: Tensor) -> Tensor:
        return neighborhood_attention_qkvpacked(
            qkv, kernel_size, dilation=dilation, stride=stride, is_causal=is_causal, bias=bias, backend=backend
        )

    qkv = torch.stack([q, k, v], -3)
    for tensor in (qkv, qkv.flip(0).flip(0), qkv.movedim(-3, 0).contiguous().movedim(0, -3)):
        actual = run(packed, [tensor, bias], grad)
        assert actual[1].is_contiguous() or backend == "reference"
        for x, y in zip(actual, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic(dtype: torch.dtype, threads: int) -> None:
    case = CASES["25x23-k7"]
    *tensors, grad = (x.to(dtype) for x in inputs(case[0], case[1], batch=4, heads=4, dim=16))
    torch.set_num_threads(threads)
    try:
        first, second = (run(op(case, "cpu"), tensors, grad) for _ in range(2))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["L22-k6-s4-incomplete-group", "9x11-k3", "11x13-k4x5-d2x1-s3x2-causal-columns", "12x9-k4x2-even"]
)
def test_gradcheck(name: str, backend: str) -> None:
    case = CASES[name]
    tensors = [x.requires_grad_() for x in inputs(case[0], case[1], batch=1, heads=1, dim=2)[:4]]
    assert torch.autograd.gradcheck(op(case, backend), tensors, fast_mode=True)


def test_differentiated_twice() -> None:
    case = CASES["L29-k7"]
    tensors = [x.requires_grad_() for x in inputs(case[0], case[1], batch=1, heads=1, dim=2)[:4]]
    assert torch.autograd.gradgradcheck(op(case, "reference"), tensors, fast_mode=True)
    (dq,) = torch.autograd.grad(op(case, "cpu")(*tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        dq.sum().backward()


ARGUMENTS = ([3, 4], [2, 1], [1, 2], [0, 1], 0.5)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "nobias"])
def test_opcheck(with_bias: bool) -> None:
    q, k, v, bias, grad = inputs((7, 8), (3, 4))
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    bias = leaves[3] if with_bias else None
    zoo = torch.ops.zoo
    torch.library.opcheck(zoo.neighborhood_attention.default, (q, k, v, bias, *ARGUMENTS, ""))
    qkv = torch.stack([q, k, v], -3).detach().requires_grad_()
    torch.library.opcheck(zoo.neighborhood_attention_qkvpacked.default, (qkv, bias, *ARGUMENTS, "cpu"))
    q, k, v, qkv = (x.detach() for x in (q, k, v, qkv))
    bias = None if bias is None else bias.detach()
    saved = zoo.neighborhood_attention(q, k, v, bias, *ARGUMENTS, "")
    backward = zoo.neighborhood_attention_backward.default
    torch.library.opcheck(backward, (grad, q, k, v, bias, *saved, *ARGUMENTS, ""))
    packed_backward = zoo.neighborhood_attention_qkvpacked_backward.default
    torch.library.opcheck(packed_backward, (grad, qkv, bias, *saved, *ARGUMENTS, ""))


def test_log_sum_exp() -> None:
    q, k, v, bias, _ = inputs((7, 7), 7)
    lse = torch.ops.zoo.neighborhood_attention(q, k, v, None, [7, 7], [1, 1], [1, 1], [0, 0], 0.5, "")[1]
    expected = torch.einsum("bqhd,bkhd->bqhk", q.flatten(1, 2), k.flatten(1, 2)).mul(0.5).logsumexp(-1)
    torch.testing.assert_close(lse.flatten(1, 2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(compiler: str, dynamic: bool) -> None:
    case = CASES["11x13-k4x5-d2x1-s3x2-causal-columns"]
    *tensors, grad = inputs(case[0], case[1])
    torch._dynamo.reset()
    compiled = torch.compile(op(case, None), fullgraph=True, backend=compiler, dynamic=dynamic)
    for x, y in zip(run(compiled, tensors, grad), run(op(case, None), tensors, grad), strict=True):
        assert torch.equal(x, y)


def test_compile_once_for_all_sizes() -> None:
    graphs = []

    def count(module: Any, _: Any) -> Any:
        graphs.append(module)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: neighborhood_attention_qkvpacked(x, 3), fullgraph=True, backend=count)
    for height in (8, 9, 15):
        qkv = torch.randn(2, height, height + 3, 3, 2, 8)
        torch._dynamo.mark_dynamic(qkv, 1)
        torch._dynamo.mark_dynamic(qkv, 2)
        assert torch.equal(compiled(qkv), neighborhood_attention_qkvpacked(qkv, 3))
    assert len(graphs) == 1


class Attention(torch.nn.Module):
    def forward(self, qkv: Tensor, bias: Tensor) -> Tensor:
        return neighborhood_attention_qkvpacked(qkv, 3, dilation=2, bias=bias)


def test_export() -> None:
    height, width = (torch.export.Dim(name, min=6, max=64) for name in ("height", "width"))
    example = torch.randn(2, 8, 9, 3, 2, 8), torch.randn(2, 5, 5)
    program = torch.export.export(Attention(), example, dynamic_shapes=({1: height, 2: width}, None))
    qkv = torch.randn(2, 13, 10, 3, 2, 8)
    assert torch.equal(program.module()(qkv, example[1]), Attention()(qkv, example[1]))


def scripted(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    out, _ = torch.ops.zoo.neighborhood_attention(q, k, v, bias, [3, 4], [2, 1], [1, 2], [0, 1], 0.5, "")
    return out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript() -> None:
    q, k, v, bias, _ = inputs((7, 8), (3, 4))
    assert torch.equal(torch.jit.script(scripted)(q, k, v, bias), scripted(q, k, v, bias))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trace() -> None:
    """TorchScript's tracer takes no list of bools, so the schema has none."""
    q, k, v, bias, _ = inputs((7, 8), (3, 4))

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, (3, 4), is_causal=(False, True), bias=bias)

    assert torch.equal(torch.jit.trace(function, (q, k, v, bias))(q + 1, k, v, bias), function(q + 1, k, v, bias))


def test_meta() -> None:
    q, k, v = (torch.empty(2, 8, 9, 4, 16, device="meta", requires_grad=True) for _ in range(3))
    out = neighborhood_attention(q, k, v, 3)
    assert out.shape == (2, 8, 9, 4, 16)
    assert out.device.type == "meta"
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape


def test_autocast() -> None:
    case = CASES["9x11-k3"]
    q, k, v, bias, _ = (x.float() for x in inputs(case[0], case[1], dim=8))
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = op(case, "cpu")(q, k.bfloat16(), v, bias)
        out.float().square().sum().backward()
        reference = op(case, "reference")(*leaves)
    assert out.dtype == reference.dtype == torch.bfloat16
    torch.testing.assert_close(out, reference, rtol=2e-2, atol=2e-2)
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves)
    packed = torch.stack([q, k, v], -3).detach()
    with torch.autocast("cpu", dtype=torch.float16):
        assert neighborhood_attention_qkvpacked(packed, 3, bias=bias).dtype == torch.float16
        assert neighborhood_attention(*(x.detach().double() for x in (q, k, v)), 3).dtype == torch.float64


@pytest.mark.parametrize("mapped", [(0, 0, 0, 0), (0, None, 1, None), (None, None, None, 0)])
def test_vmap(mapped: tuple[int | None, ...]) -> None:
    case = CASES["9x11-k3"]
    stacks = [
        torch.stack(x, d or 0)
        for x, d in zip(zip(*(inputs(*case[:2])[:4] for _ in range(3)), strict=True), mapped, strict=False)
    ]
    tensors = [(x if d is not None else x[0]).requires_grad_() for x, d in zip(stacks, mapped, strict=True)]
    singles = [[x if d is None else x.select(d, i) for x, d in zip(tensors, mapped, strict=True)] for i in range(3)]
    expected = torch.stack([op(case, "cpu")(*x) for x in singles])
    actual = torch.vmap(op(case, "cpu"), in_dims=mapped)(*tensors)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad(x, tensors, weight) for x in (actual, expected))
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "nobias"])
def test_batched_gradients(with_bias: bool) -> None:
    case = CASES["9x11-k3"]
    tensors = [x.requires_grad_() for x in inputs(case[0], case[1])[: 4 if with_bias else 3]]
    out = op(case, "cpu")(*tensors)
    weights = torch.randn(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, tensors, weights, is_grads_batched=True, retain_graph=True)
    for i, weight in enumerate(weights):
        for x, y in zip(batched, torch.autograd.grad(out, tensors, weight, retain_graph=True), strict=True):
            torch.testing.assert_close(x[i], y, rtol=1e-11, atol=1e-12)


def test_caches_survive_inference_mode() -> None:
    case = ((19, 18), 3, 1, 1, False)
    cpu._regions.cache_clear()
    *tensors, grad = inputs(case[0], case[1])
    with torch.inference_mode():
        expected = op(case, "cpu")(*tensors)
    assert torch.equal(run(op(case, "cpu"), tensors, grad)[0], expected)


def test_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v, bias, grad = inputs((9, 11), 3, batch=2, heads=2, dim=4)
    with FlopCounterMode(display=False) as counter:
        run(op(CASES["9x11-k3"], "cpu"), [q, k, v, bias], grad)
    product = 2 * (2 * 9 * 11 * 2) * 9 * 4
    assert counter.get_total_flops() == (2 + 5) * product


def peak_extra_memory(function: Callable[[], Any]) -> int:
    """Largest number of bytes that PyTorch's CPU allocator held at once during function(), above the start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dilation", [1, 2])
def test_memory(dilation: int) -> None:
    """Beside the results there is only a buffer of tiles, of a size that does not depend on the map's."""
    q, k, v = (torch.randn(1, 112, 112, 4, 32, requires_grad=True) for _ in range(3))
    bias = torch.randn(4, 13, 13, requires_grad=True)

    def forward() -> Tensor:
        return neighborhood_attention(q, k, v, 7, dilation=dilation, bias=bias)

    out = forward()
    size = q.numel() * q.element_size()
    assert peak_extra_memory(lambda: forward().detach()) <= 3 * size
    assert peak_extra_memory(lambda: torch.autograd.grad(out, (q, k, v, bias), out)) <= 3 * size + (12 << 20)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "dims": ({"q": torch.randn(2, 8, 4)}, r"q must be \[B, L, heads, dim\].*\(2, 8, 4\)"),
    "k-shape": ({"k": torch.randn(2, 8, 7, 2, 4)}, r"k must have the shape of q.*\(2, 8, 7, 2, 4\)"),
    "v-shape": ({"v": torch.randn(2, 8, 8, 3, 4)}, r"v must have the shape of q.*\(2, 8, 8, 3, 4\)"),
    "head-dim": ({"v": torch.randn(2, 8, 8, 2, 0)}, r"v: only the batch may be empty, got shape \(2, 8, 8, 2, 0\)"),
    "dtype": ({"k": torch.randn(2, 8, 8, 2, 4).double()}, "k has dtype torch.float64, q has torch.float32"),
    "integer": ({n: torch.ones(2, 8, 8, 2, 4).int() for n in "qkv"}, "q must be float16.*torch.int32"),
    "kernel-float": ({"kernel_size": 3.0}, "kernel_size"),
    "kernel-zero": ({"kernel_size": 0}, "kernel_size must be an int of at least 1 or 2 of them, got 0"),
    "kernel-axes": (
        {"kernel_size": (3, 3, 3)},
        r"kernel_size must be an int of at least 1 or 2 of them, got \(3, 3, 3\)",
    ),
    "dilation": ({"dilation": (1, -1)}, r"dilation must be an int of at least 1 or 2 of them, got \(1, -1\)"),
    "stride-zero": ({"stride": 0}, "stride must be an int of at least 1 or 2 of them, got 0"),
    "stride": ({"stride": (1, 4)}, "stride 4 exceeds kernel_size 3 along the width"),
    "causal": ({"is_causal": (True,)}, r"is_causal must be a bool or 2 of them, got \(True,\)"),
    "causal-int": ({"is_causal": (1, 0)}, "is_causal must be a bool"),
    "too-small": ({"kernel_size": 9}, "kernel_size 9 x dilation 1 = 9 exceeds the height 8.*pad the height to 9"),
    "too-dilated": (
        {"dilation": (1, 3)},
        "kernel_size 3 x dilation 3 = 9 exceeds the width 8: a dilation phase would have 2 tokens for 3 keys",
    ),
    "bias-shape": ({"bias": torch.randn(2, 5, 3)}, r"bias must be \[heads.*= \[2, 5, 5\], got \(2, 5, 3\)"),
    "bias-dtype": ({"bias": torch.ones(2, 5, 5).int()}, "bias must be float16.*torch.int32"),
    "bias-device": ({"bias": torch.ones(2, 5, 5, device="meta")}, "bias is on meta, q on cpu"),
    "device": ({"k": torch.randn(2, 8, 8, 2, 4, device="meta")}, "k is on meta, q on cpu"),
    "backend": ({"backend": "cuda"}, "unknown backend 'cuda'"),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(change: dict[str, Any], message: str, backend: str | None) -> None:
    valid = {n: torch.randn(2, 8, 8, 2, 4) for n in "qkv"} | {"kernel_size": 3, "backend": backend}
    with pytest.raises((ValueError, TypeError), match=f"neighborhood_attention.*{message}"):
        neighborhood_attention(**(valid | change))


def test_errors_of_other_entries() -> None:
    q, k, v = (torch.randn(2, 8, 8, 2, 4) for _ in range(3))
    with pytest.raises(ValueError, match=r"qkvpacked: qkv must be .* got shape \(2, 8, 8, 2, 4\)"):
        neighborhood_attention_qkvpacked(q, 3)
    with pytest.raises(ValueError, match="qkvpacked: kernel_size 9 x dilation 1 = 9 exceeds the height 8"):
        neighborhood_attention_qkvpacked(torch.stack([q, k, v], -3), 9)
    with pytest.raises(RuntimeError, match="'triton' cannot run this call"):
        neighborhood_attention(q.double(), k.double(), v.double(), 3, backend="triton")
    with pytest.raises(ValueError, match="kernel_size 9 x dilation 1 = 9 exceeds the height 8"):
        torch.ops.zoo.neighborhood_attention(q, k, v, None, [9, 3], [1, 1], [1, 1], [0, 0], 0.5, "")
    with pytest.raises(ValueError, match="backend"):
        torch.ops.zoo.neighborhood_attention(q, k, v, None, [3, 3], [1, 1], [1, 1], [0, 0], 0.5, "fast")
    with pytest.raises(ValueError, match="'length'|the length 8"):
        neighborhood_attention(*(x[:, 0] for x in (q, k, v)), 9)


def test_reference_on_meta_tensors() -> None:
    q = torch.empty(2, 8, 9, 2, 4, device="meta")
    assert neighborhood_attention(q, q, q, 3, backend="reference").shape == q.shape
