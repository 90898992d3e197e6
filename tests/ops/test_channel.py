"""channel_attention: recorded cases, the definition itself, the CPU path against it, registration, errors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import npz
from torch import Tensor

from zoo.ops.channel import channel_attention, channel_attention_qkvpacked

BACKENDS = ("reference", "cpu")
SHAPES = {"image": (2, 49, 3, 8), "one-token": (1, 1, 2, 4), "one-channel": (2, 7, 3, 1), "odd": (3, 35, 1, 5)}


def inputs(name: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, *SHAPES[name], generator=generator, dtype=torch.float64).to(dtype)
    return [x.clone().requires_grad_() for x in (q, k, v)], grad


def forward_and_grads(tensors: list[Tensor], grad: Tensor, packed: bool = False, **options: Any) -> list[Tensor]:
    if packed:
        out = channel_attention_qkvpacked(torch.stack(tensors, 2), **options)
    else:
        out = channel_attention(*tensors, **options)
    assert out.is_contiguous()
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))]


def assert_close(actual: list[Tensor], expected: list[Tensor], relative: float) -> None:
    scale = max(e.double().abs().max().item() for e in expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a.double() - e.double()).abs().max().item() <= relative * scale


# recorded outputs of the original modules -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_recorded_core(backend: str) -> None:
    data = npz("ops/davit_channel_core_n35.npz")
    tensors = [data[n].transpose(1, 2).contiguous().requires_grad_() for n in "qkv"]
    grad = data["grad_out"].transpose(1, 2)
    actual = forward_and_grads(tensors, grad, scale=float(data["scale"]), backend=backend)
    assert_close(actual, [data[n].transpose(1, 2) for n in ("out", "grad_q", "grad_k", "grad_v")], 1e-9)
    assert_close(forward_and_grads(tensors, grad, backend=backend), actual, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["n35_c24_g3", "n77_c32_g4"])
def test_recorded_module(name: str, backend: str) -> None:
    data = npz(f"ops/davit_channel_{name}.npz")
    names = [k[2:] for k in data if k.startswith("w.")]
    w = {n: data[f"w.{n}"].requires_grad_() for n in names}
    x = data["x"].requires_grad_()
    qkv = F.linear(x, w["qkv.weight"], w["qkv.bias"]).unflatten(-1, (3, int(data["num_heads"]), -1))
    out = channel_attention_qkvpacked(qkv, backend=backend).flatten(2)
    out = F.linear(out, w["proj.weight"], w["proj.bias"])
    grads = torch.autograd.grad(out, [x, *w.values()], data["grad_out"])
    for a, e in zip(
        [out.detach(), *grads], [data["out"], data["grad_x"], *(data[f"g.{n}"] for n in names)], strict=True
    ):
        assert_close([a], [e], 1e-9)


# the definition, and the CPU path against it --------------------------------------------------------------------------


def test_reference_is_the_definition() -> None:
    (q, k, v), _ = inputs("image")
    out = channel_attention(q, k, v, scale=0.3, backend="reference")
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = 0.3 * k[b, :, h].T @ v[b, :, h]
            assert torch.allclose(out[b, :, h], q[b, :, h] @ scores.softmax(-1).T, rtol=1e-12, atol=1e-13)


def test_second_version_by_other_roles() -> None:
    """Florence-2's block: the map of q and k, scaled by the number of tokens, mixes v."""
    (q, k, v), _ = inputs("image")
    n = q.shape[1]
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    maps = ((qh * n**-0.5).mT @ kh).softmax(-1)
    expected = (maps @ vh.mT).mT.transpose(1, 2)
    assert_close([channel_attention(v, q, k, scale=n**-0.5)], [expected], 1e-12)


@pytest.mark.parametrize("packed", [False, True], ids=["qkv", "packed"])
@pytest.mark.parametrize("name", SHAPES)
def test_cpu_matches_reference(name: str, packed: bool) -> None:
    tensors, grad = inputs(name)
    expected = forward_and_grads(tensors, grad, backend="reference")
    assert_close(forward_and_grads(tensors, grad, packed=packed, backend="cpu"), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend: str, dtype: torch.dtype) -> None:
    """At most twice the rounding of the exact result, plus a few units of the dtype."""
    tensors, grad = inputs("image", dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = forward_and_grads(exact, grad.double(), backend="reference")
    for a, e in zip(forward_and_grads(tensors, grad, backend=backend), expected, strict=True):
        assert a.dtype == dtype
        rounded = (e.to(dtype).double() - e).abs().max().item()
        allowed = 2 * rounded + 8 * torch.finfo(dtype).eps * e.abs().max().item()
        assert (a.double() - e).abs().max().item() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["one-token", "one-channel", "odd"])
def test_gradcheck(name: str, backend: str) -> None:
    tensors, _ = inputs(name)
    assert torch.autograd.gradcheck(lambda q, k, v: channel_attention(q, k, v, backend=backend), tuple(tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    tensors, grad = inputs("image")
    expected = forward_and_grads(tensors, grad, backend=backend)
    q, k, v = (x.detach() for x in tensors)
    odd = [
        q.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_(),
        torch.stack([k, k], -1)[..., 1].requires_grad_(),
        v.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
    ]
    assert odd[0].stride(-1) != 1
    strided_grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(forward_and_grads(odd, strided_grad, backend=backend), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    q = torch.zeros(0, 5, 2, 4, requires_grad=True)
    out, dq = forward_and_grads([q, q, q], torch.zeros(0, 5, 2, 4), backend=backend)[:2]
    assert out.shape == dq.shape == q.shape


def test_repeats_bitwise() -> None:
    tensors, grad = inputs("image", torch.float32)
    runs = [forward_and_grads(tensors, grad, backend="cpu") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# registration ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    tensors, _ = inputs("image", dtype)
    torch.library.opcheck(torch.ops.zoo.channel_attention.default, (*tensors, 0.3, "cpu"))
    qkv = torch.stack(tensors, 2).detach().requires_grad_()
    torch.library.opcheck(torch.ops.zoo.channel_attention_qkvpacked.default, (qkv, 0.3, "cpu"))


@pytest.mark.parametrize("packed", [False, True], ids=["qkv", "packed"])
def test_compiles_without_breaks(packed: bool) -> None:
    tensors, grad = inputs("image", torch.float32)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if packed:
            return channel_attention_qkvpacked(torch.stack([q, k, v], 2))
        return channel_attention(q, k, v)

    out = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)(*tensors)
    actual = [out.detach(), *torch.autograd.grad(out, tensors, grad)]
    assert_close(actual, forward_and_grads(tensors, grad, packed=packed), 1e-6)


class Channel(torch.nn.Module):
    def forward(self, qkv: Tensor) -> Tensor:
        return channel_attention_qkvpacked(qkv, scale=0.5)


class Scripted(torch.nn.Module):
    def forward(self, qkv: Tensor) -> Tensor:
        return torch.ops.zoo.channel_attention_qkvpacked(qkv, 0.5, "")[0]


def test_export_and_torchscript() -> None:
    qkv = torch.randn(2, 9, 3, 2, 4)
    expected = Channel()(qkv)
    assert torch.equal(torch.export.export(Channel(), (qkv,)).module()(qkv), expected)
    assert torch.equal(torch.jit.script(Scripted())(qkv), expected)


def test_meta_tensors() -> None:
    out = channel_attention_qkvpacked(torch.empty(2, 9, 3, 2, 4, device="meta", dtype=torch.float16))
    assert out.shape == (2, 9, 2, 4)
    assert out.dtype == torch.float16
    assert out.is_meta


def test_autocast() -> None:
    tensors, grad = inputs("image", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, *grads = forward_and_grads(tensors, grad, backend="cpu")
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in grads)
    assert_close([out, *grads], forward_and_grads(tensors, grad, backend="cpu"), 0.05)


def test_double_backward_on_the_reference() -> None:
    (q, k, v), _ = inputs("odd")
    (first,) = torch.autograd.grad(channel_attention(q, k, v, backend="reference").square().sum(), k, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), k)
    assert second.abs().max() > 0


# errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 8, 4)}, r"channel_attention: q must be \[B, N, heads, dim\], got shape \(2, 8, 4\)"),
        ({"k": torch.zeros(1, 7, 2, 4)}, r"channel_attention: k must have q's shape .* got \(1, 7, 2, 4\)"),
        ({"v": torch.zeros(1, 8, 2, 4).double()}, "channel_attention: v has dtype torch.float64, q has torch.float32"),
        ({"k": torch.zeros(1, 8, 2, 4, device="meta")}, "channel_attention: k is on meta, q on cpu"),
        ({"backend": "fast"}, "channel_attention: unknown backend 'fast'"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        channel_attention(**{**dict.fromkeys("qkv", torch.zeros(1, 8, 2, 4)), **change})


def test_other_errors() -> None:
    q = torch.zeros(1, 8, 2, 4)
    with pytest.raises(ValueError, match="q must be float16, bfloat16, float32 or float64, got torch.int64"):
        channel_attention(q.long(), q.long(), q.long())
    with pytest.raises(ValueError, match="only the batch may be empty"):
        channel_attention(q[:, :0], q[:, :0], q[:, :0])
    with pytest.raises(ValueError, match=r"channel_attention_qkvpacked: qkv must be \[B, N, 3, heads, dim\]"):
        channel_attention_qkvpacked(q)
    with pytest.raises(RuntimeError, match="channel_attention: backend 'triton' cannot run this call"):
        channel_attention(q.double(), q.double(), q.double(), backend="triton")
