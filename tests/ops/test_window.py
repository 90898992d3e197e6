"""window_attention: recorded cases, the definition itself, the CPU path against it, registration, errors."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import npz
from torch import Tensor

from zoo.ops._flash import attend
from zoo.ops.window import cpu, window_attention, window_attention_qkvpacked

BACKENDS = ("reference", "cpu")

# (H, W), window, shift, grid
CASES: dict[str, tuple[tuple[int, int], Any, Any, bool]] = {
    "blocks": ((14, 14), 7, 0, False),
    "padded": ((13, 9), 7, 0, False),
    "smaller-than-window": ((3, 5), 7, 0, False),
    "one-row": ((1, 6), (1, 4), 0, False),
    "shift": ((14, 14), 7, 3, False),
    "shift-padded": ((13, 9), 4, 3, False),
    "shift-small": ((2, 3), 7, 5, False),
    "shift-per-axis": ((12, 10), (4, 5), (0, 2), False),
    "grid": ((14, 21), 7, 0, True),
    "grid-padded": ((13, 9), 7, 0, True),
    "grid-sparse": ((8, 15), (7, 4), 0, True),
    "grid-small": ((3, 5), 7, 0, True),
    "single-tokens": ((4, 5), 1, 0, False),
}
HEADS, DIM = 2, 8


def pair(x: Any) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else x


def inputs(
    case: str, dtype: torch.dtype = torch.float64, bias: bool = True, batch: int = 2
) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """Leaves q, k, v (and bias), the upstream gradient, and the options."""
    (height, width), window, shift, grid = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = {name: randn(batch, height, width, HEADS, DIM).requires_grad_() for name in "qkv"}
    if bias:
        wh, ww = pair(window)
        leaves["bias"] = randn(HEADS, 2 * wh - 1, 2 * ww - 1).requires_grad_()
    grad = randn(batch, height, width, HEADS, DIM)
    return leaves, grad, {"window_size": window, "shift": shift, "grid": grid}


def forward_and_grads(leaves: dict[str, Tensor], grad: Tensor, packed: bool = False, **options: Any) -> list[Tensor]:
    tensors = list(leaves.values())
    if packed:
        qkv = torch.stack(tensors[:3], 3)
        out = window_attention_qkvpacked(qkv, bias=leaves.get("bias"), **options)
    else:
        q, k, v = tensors[:3]
        out = window_attention(q, k, v, bias=leaves.get("bias"), **options)
    assert out.is_contiguous()
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))]


def assert_close(actual: list[Tensor], expected: list[Tensor], relative: float) -> None:
    sizes = [e.double().abs().max().item() for e in expected]
    for a, e, size in zip(actual, expected, sizes, strict=True):
        assert a.shape == e.shape
        error = (a.double() - e.double()).abs().max().item()
        # A gradient may be exactly zero, as that of the scores is where a window holds one token.
        assert error <= relative * max(size, 0.01 * max(sizes)), error


def naive(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: Any, shift: Any, grid: bool) -> Tensor:
    """Query by query from the words of the docstring: which tokens share a window, and how far apart they are."""
    _, height, width, heads, dim = q.shape
    steps = [-(-n // w) for n, w in zip((height, width), pair(window), strict=True)]

    def window_of(y: int, x: int) -> tuple[tuple[int, int], tuple[int, int]]:  # (its window, the place inside)
        where, place = [], []
        for i, w, s, step in zip((y, x), pair(window), pair(shift), steps, strict=True):
            where.append(i % step if grid else (i - s) // w)
            place.append(i // step if grid else (i - s) % w)
        return (where[0], where[1]), (place[0], place[1])

    out = torch.zeros_like(q)
    tokens = list(itertools.product(range(height), range(width)))
    wh, ww = pair(window)
    for y, x in tokens:
        mine, at = window_of(y, x)
        keys = [(t, window_of(*t)[1]) for t in tokens if window_of(*t)[0] == mine]
        for h in range(heads):
            terms = torch.stack([bias[h, p[0] - at[0] + wh - 1, p[1] - at[1] + ww - 1] for _, p in keys])
            rows = torch.tensor([t[0] for t, _ in keys]), torch.tensor([t[1] for t, _ in keys])
            scores = torch.einsum("bd,bnd->bn", q[:, y, x, h], k[:, rows[0], rows[1], h]) * dim**-0.5 + terms
            out[:, y, x, h] = torch.einsum("bn,bnd->bd", scores.softmax(-1), v[:, rows[0], rows[1], h])
    return out


# recorded outputs of the original modules -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_recorded_core(backend: str) -> None:
    data = npz("ops/maxvit_core_block_p4_12x20.npz")
    leaves = {n: data[n].permute(0, 2, 3, 1, 4).contiguous().requires_grad_() for n in "qkv"}
    leaves["bias"] = data["bias_table"].requires_grad_()
    grad = data["grad_out"].permute(0, 2, 3, 1, 4)
    actual = forward_and_grads(
        leaves, grad, window_size=int(data["partition"]), scale=float(data["scale"]), backend=backend
    )
    expected = [data[n].permute(0, 2, 3, 1, 4) for n in ("out", "grad_q", "grad_k", "grad_v")]
    assert_close(actual, [*expected, data["grad_bias_table"]], 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", ["p4_12x20", "p7_14x14"])
@pytest.mark.parametrize("kind", ["tf", "bias"])
@pytest.mark.parametrize("partition", ["block", "grid"])
def test_recorded_module(partition: str, kind: str, size: str, backend: str) -> None:
    data = npz(f"ops/maxvit_{partition}_{kind}_{size}.npz")
    names = [k[2:] for k in data if k.startswith("w.")]
    w = {n: data[f"w.{n}"].requires_grad_() for n in names}
    x = data["x"].requires_grad_()
    heads, window = int(data["num_heads"]), int(data["partition"])
    table = w["attn.rel_pos.relative_position_bias_table"]
    if kind == "bias":  # flat and query - key
        table = table.view(2 * window - 1, 2 * window - 1, heads).permute(2, 0, 1).flip(1, 2)
    qkv = F.linear(x, w["attn.qkv.weight"], w["attn.qkv.bias"]).unflatten(-1, (3, heads, -1))
    out = window_attention_qkvpacked(qkv, window, grid=partition == "grid", bias=table, backend=backend).flatten(3)
    out = F.linear(out, w["attn.proj.weight"], w["attn.proj.bias"])
    grads = torch.autograd.grad(out, [x, *w.values()], data["grad_out"])
    expected = [data["out"], data["grad_x"], *(data[f"g.{n}"] for n in names)]
    assert_close([out.detach(), *grads], expected, 1e-9)


# the definition, and the CPU path against it --------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["padded", "shift-padded", "grid-padded", "grid-sparse", "shift-small"])
def test_reference_is_the_definition(case: str) -> None:
    leaves, _, options = inputs(case, batch=1)
    q, k, v, bias = (x.detach() for x in leaves.values())
    expected = naive(q, k, v, bias, *options.values())
    assert_close([window_attention(q, k, v, bias=bias, backend="reference", **options)], [expected], 1e-12)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("packed", [False, True], ids=["qkv", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_cpu_matches_reference(case: str, packed: bool, bias: bool) -> None:
    leaves, grad, options = inputs(case, bias=bias)
    expected = forward_and_grads(leaves, grad, backend="reference", **options)
    assert_close(forward_and_grads(leaves, grad, packed=packed, backend="cpu", **options), expected, 1e-12)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, grad, options = inputs("shift-padded", batch=3)
    whole = forward_and_grads(leaves, grad, backend="cpu", **options)
    for chunk in (1, 1 << 10, 1 << 13):
        monkeypatch.setattr(cpu, "_CHUNK", chunk)
        assert_close(forward_and_grads(leaves, grad, backend="cpu", **options), whole, 1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_one_head(batch: int) -> None:
    leaves, grad, options = inputs("grid-padded", batch=batch)
    one = {n: (x[:1] if n == "bias" else x[:, :, :, :1]).detach().requires_grad_() for n, x in leaves.items()}
    expected = forward_and_grads(one, grad[:, :, :, :1], backend="reference", **options)
    assert_close(forward_and_grads(one, grad[:, :, :, :1], backend="cpu", **options), expected, 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_segments_hold_every_position_once(case: str) -> None:
    size, window, shift, grid = CASES[case]
    for n, w, s in zip(size, pair(window), pair(shift), strict=True):
        found = [
            part.start + i * part.stride + j * part.step
            for part in cpu.segments(n, w, s, grid)
            for i in range(part.windows)
            for j in range(part.size)
        ]
        assert sorted(found) == list(range(n))


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["flash", "plain"])
def test_tile_attention_off_the_cpu_is_the_same(devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.ops._flash._DEVICES", devices)
    q, k, v = torch.randn(3, 6, 2, 9, 4, dtype=torch.float64)
    pairs = torch.randn(2, 9, 9, dtype=torch.float64)
    for bias in (None, pairs):
        out, lse = attend(q, k, v, None if bias is None else bias[None], 0.3)
        scores = 0.3 * q @ k.mT + (0 if bias is None else bias)
        assert_close([out, lse], [scores.softmax(-1) @ v, scores.logsumexp(-1)], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["padded", "shift", "grid-padded"])
def test_low_precision(case: str, backend: str, dtype: torch.dtype) -> None:
    """At most twice the error of the same arithmetic left in the dtype by plain PyTorch."""
    leaves, grad, options = inputs(case, dtype)
    exact = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    expected = forward_and_grads(exact, grad.double(), backend="reference", **options)
    actual = forward_and_grads(leaves, grad, backend=backend, **options)
    eps = torch.finfo(dtype).eps
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        rounded = (e.to(dtype).double() - e).abs().max().item()
        allowed = 2 * rounded + 8 * eps * e.abs().max().item()
        assert (a.double() - e).abs().max().item() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["smaller-than-window", "shift-small", "grid-small"])
def test_gradcheck(case: str, backend: str) -> None:
    leaves, _, options = inputs(case, batch=1)
    tensors = tuple(x.detach()[..., :2].clone().requires_grad_() if n != "bias" else x for n, x in leaves.items())

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return window_attention(q, k, v, bias=bias, backend=backend, **options)

    assert torch.autograd.gradcheck(call, tensors)


def test_scale_and_bias_of_another_dtype() -> None:
    leaves, grad, options = inputs("padded", torch.float32)
    leaves["bias"] = leaves["bias"].detach().double().requires_grad_()
    results = [forward_and_grads(leaves, grad, backend=b, scale=0.7, **options) for b in BACKENDS]
    assert results[1][4].dtype == torch.float64
    assert_close(results[1], results[0], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    leaves, grad, options = inputs("shift-padded")
    expected = forward_and_grads(leaves, grad, backend=backend, **options)
    odd = dict(leaves)
    odd["q"] = leaves["q"].detach().permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0).requires_grad_()
    odd["k"] = torch.stack([leaves["k"].detach()] * 2, -1)[..., 1].requires_grad_()
    odd["v"] = leaves["v"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert odd["q"].stride(-1) != 1
    assert odd["k"].stride(-1) != 1
    strided_grad = grad.transpose(2, 3).contiguous().transpose(2, 3)
    assert_close(forward_and_grads(odd, strided_grad, backend=backend, **options), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    leaves, grad, options = inputs("padded", batch=0)
    out, *grads = forward_and_grads(leaves, grad, backend=backend, **options)
    assert out.shape == grad.shape
    assert grads[0].shape == grad.shape
    assert not grads[3].any()


def test_repeats_bitwise() -> None:
    leaves, grad, options = inputs("shift-padded", torch.float32)
    runs = [forward_and_grads(leaves, grad, backend="cpu", **options) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# registration ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, bias: bool) -> None:
    leaves, _, _ = inputs("shift-padded", dtype, bias=bias, batch=1)
    options = (4, 4, 3, 3, False, 0.3, "cpu")
    table = leaves.get("bias")
    q, k, v = (leaves[n] for n in "qkv")
    torch.library.opcheck(torch.ops.zoo.window_attention.default, (q, k, v, table, *options))
    qkv = torch.stack([q, k, v], 3).detach().requires_grad_()
    torch.library.opcheck(torch.ops.zoo.window_attention_qkvpacked.default, (qkv, table, *options))


@pytest.mark.parametrize("packed", [False, True], ids=["qkv", "packed"])
def test_compiles_without_breaks(packed: bool) -> None:
    leaves, grad, options = inputs("shift-padded", torch.float32)

    def step(leaves: dict[str, Tensor]) -> Tensor:
        q, k, v, bias = leaves.values()
        if packed:
            return window_attention_qkvpacked(torch.stack([q, k, v], 3), bias=bias, **options)
        return window_attention(q, k, v, bias=bias, **options)

    out = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)(leaves)
    actual = [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad)]
    assert_close(actual, forward_and_grads(leaves, grad, packed=packed, **options), 1e-6)


class Window(torch.nn.Module):
    def forward(self, qkv: Tensor, bias: Tensor) -> Tensor:
        return window_attention_qkvpacked(qkv, 3, shift=1, bias=bias)


class Scripted(torch.nn.Module):
    def forward(self, qkv: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.zoo.window_attention_qkvpacked(qkv, bias, 3, 3, 1, 1, False, 0.5, "")[0]


def test_export_and_torchscript() -> None:
    qkv, bias = torch.randn(2, 7, 8, 3, 2, 4), torch.randn(2, 5, 5)
    expected = Window()(qkv, bias)
    exported = torch.export.export(Window(), (qkv, bias)).module()
    assert torch.equal(exported(qkv, bias), expected)
    assert torch.equal(torch.jit.script(Scripted())(qkv, bias), expected)


def test_meta_tensors() -> None:
    qkv = torch.empty(2, 7, 8, 3, 2, 4, device="meta", dtype=torch.float16)
    out = window_attention_qkvpacked(qkv, 3)
    assert out.shape == (2, 7, 8, 2, 4)
    assert out.dtype == torch.float16
    assert out.is_meta


def test_autocast() -> None:
    leaves, grad, options = inputs("shift-padded", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, *grads = forward_and_grads(leaves, grad, backend="cpu", **options)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in grads)
    assert_close([out, *grads], forward_and_grads(leaves, grad, backend="cpu", **options), 0.05)


def test_double_backward_on_the_reference() -> None:
    leaves, _, options = inputs("grid-small", batch=1)
    q, k, v = (leaves[n] for n in "qkv")
    out = window_attention(q, k, v, backend="reference", **options)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q)
    assert second.abs().max() > 0


# errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.zeros(2, 8, 8, 4)},
            r"window_attention: q must be \[B, H, W, heads, dim\], got shape \(2, 8, 8, 4\)",
        ),
        ({"k": torch.zeros(1, 8, 7, 2, 4)}, r"window_attention: k must have q's shape .* got \(1, 8, 7, 2, 4\)"),
        (
            {"v": torch.zeros(1, 8, 8, 2, 4).double()},
            "window_attention: v has dtype torch.float64, q has torch.float32",
        ),
        ({"k": torch.zeros(1, 8, 8, 2, 4, device="meta")}, "window_attention: k is on meta, q on cpu"),
        ({"window_size": 0}, "window_attention: window_size must be an int of at least 1 or 2 of them, got 0"),
        ({"window_size": (4, 4, 4)}, r"window_attention: window_size must be an int .* got \(4, 4, 4\)"),
        ({"window_size": (4, 2.5)}, r"window_attention: window_size must be an int .* got \(4, 2.5\)"),
        ({"shift": 4}, r"window_attention: shift must be below window_size \(4, 4\), got \(4, 4\)"),
        ({"shift": (0, -1)}, r"window_attention: shift must be an int of at least 0 or 2 of them, got \(0, -1\)"),
        ({"shift": 1, "grid": True}, r"window_attention: shift must be 0 when grid is True, got \(1, 1\)"),
        ({"bias": torch.zeros(2, 7, 8)}, r"window_attention: bias must be .* = \[2, 7, 7\], got \(2, 7, 8\)"),
        ({"bias": torch.zeros(2, 7, 7, dtype=torch.int)}, "window_attention: bias must be float16, .* got torch.int32"),
        ({"backend": "fast"}, "window_attention: unknown backend 'fast'"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {**dict.fromkeys("qkv", torch.zeros(1, 8, 8, 2, 4)), "window_size": 4, **change}
    with pytest.raises(ValueError, match=message):
        window_attention(**call)


def test_other_errors() -> None:
    q = torch.zeros(1, 8, 8, 2, 4)
    with pytest.raises(ValueError, match="q must be float16, bfloat16, float32 or float64, got torch.int64"):
        window_attention(q.long(), q.long(), q.long(), 4)
    with pytest.raises(ValueError, match="only the batch may be empty"):
        window_attention(q[:, :0], q[:, :0], q[:, :0], 4)
    with pytest.raises(ValueError, match=r"window_attention_qkvpacked: qkv must be \[B, H, W, 3, heads, dim\]"):
        window_attention_qkvpacked(q, 4)
    with pytest.raises(RuntimeError, match="window_attention: backend 'triton' cannot run this call"):
        window_attention(q.double(), q.double(), q.double(), 4, backend="triton")
