"""routing_attention: recorded cases, the CPU path against the definition, registration, errors."""

import contextlib
import itertools
from typing import Any

import pytest
import torch
from golden import npz
from torch import Tensor
from torch.nn import functional as F
from triton_cases import DEVICE

from zoo.ops.routing import cpu, routing_attention, routing_index

BACKENDS = ("reference", "cpu")
HEADS = 2

# B, (H, W), heads, dim, value dim, regions, topk, padding
CASES = {
    "dense": (2, (14, 14), 3, 8, 8, 7, 16, "none"),
    "gathered": (2, (28, 28), 2, 8, 8, 7, 4, "none"),
    "top1": (3, (21, 14), 2, 5, 5, 7, 1, "none"),
    "all": (2, (6, 9), 2, 4, 4, 3, 9, "none"),
    "one-region": (2, (5, 7), 2, 4, 4, 1, 1, "none"),
    "rows-cols": (1, (8, 15), 1, 6, 6, (2, 5), 3, "none"),
    "value-wider": (2, (12, 12), 2, 4, 7, 3, 2, "none"),
    "value-narrower": (2, (12, 12), 2, 7, 4, 6, 5, "none"),
    "zero-dense": (2, (13, 17), 2, 4, 4, 7, 8, "zero"),
    "zero-gathered": (2, (31, 45), 2, 4, 4, 4, 2, "zero"),
    "zero-small": (1, (3, 5), 2, 4, 4, 7, 4, "zero"),
}


def inputs(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    batch, (height, width), heads, dim, value_dim, regions, topk, padding = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (
        torch.randn(batch, height, width, heads, d, generator=generator, dtype=torch.float64).to(dtype)
        for d in (dim, dim, value_dim, value_dim)
    )
    return [x.requires_grad_() for x in (q, k, v)], grad, {"regions": regions, "topk": topk, "padding": padding}


def forward_and_grads(tensors: list[Tensor], grad: Tensor, **kwargs: Any) -> list[Tensor]:
    out = routing_attention(*tensors, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))]


def naive(q: Tensor, k: Tensor, v: Tensor, index: Tensor, region: tuple[int, int], scale: float) -> Tensor:
    """One query at a time; tokens outside the map are zero keys."""
    batch, height, width, heads, _ = q.shape
    cols = -(-width // region[1])
    out = q.new_empty(*q.shape[:4], v.shape[-1])
    for b, y, x, h in itertools.product(range(batch), range(height), range(width), range(heads)):
        keys, values = [], []
        for picked in index[b, (y // region[0]) * cols + x // region[1]].tolist():
            top, left = picked // cols * region[0], picked % cols * region[1]
            for i, j in itertools.product(range(top, top + region[0]), range(left, left + region[1])):
                inside = i < height and j < width
                keys.append(k[b, i, j, h] if inside else k.new_zeros(k.shape[-1]))
                values.append(v[b, i, j, h] if inside else v.new_zeros(v.shape[-1]))
        out[b, y, x, h] = (torch.stack(keys) @ q[b, y, x, h] * scale).softmax(0) @ torch.stack(values)
    return out


# recorded outputs of the original modules -----------------------------------------------------------------------------


def legacy(x: Tensor, w: dict[str, Tensor], topk: int, backend: str, pooled: int = 0) -> tuple[Tensor, Tensor]:
    """The original's NHWC module around the op: padding before the projection, LePE, output projection."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % 7, 0, -height % 7))
    batch, *size, dim = x.shape
    qk_dim = (w["qkv.qkv.weight"].shape[0] - dim) // 2
    qkv = F.linear(x, w["qkv.qkv.weight"], w["qkv.qkv.bias"])
    q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in qkv.split([qk_dim, qk_dim, dim], -1))
    lepe = F.conv2d(v.flatten(3).permute(0, 3, 1, 2), w["lepe.weight"], w["lepe.bias"], padding=2, groups=dim)
    index = None
    if pooled:
        index = routing_index(q, k, 7, topk, backend=backend)
        k, v = (
            F.adaptive_avg_pool2d(t.flatten(3).permute(0, 3, 1, 2), 7 * pooled)
            .permute(0, 2, 3, 1)
            .unflatten(-1, (HEADS, -1))
            for t in (k, v)
        )
    out, index = routing_attention(q, k, v, 7, topk, index=index, return_index=True, backend=backend)
    out = F.linear(out.flatten(3) + lepe.permute(0, 2, 3, 1), w["wo.weight"], w["wo.bias"])
    return out[:, :height, :width], index


def nchw(x: Tensor, w: dict[str, Tensor], topk: int, backend: str) -> tuple[Tensor, Tensor]:
    """The original's NCHW module around the op: no padding before the projection."""
    dim = x.shape[1]
    qkv = F.conv2d(x, w["qkv_linear.weight"], w["qkv_linear.bias"])
    lepe = F.conv2d(qkv[:, 2 * dim :], w["lepe.weight"], w["lepe.bias"], padding=2, groups=dim)
    q, k, v = qkv.permute(0, 2, 3, 1).unflatten(-1, (3, HEADS, -1)).unbind(3)
    out, index = routing_attention(q, k, v, 7, topk, padding="zero", return_index=True, backend=backend)
    out = out.flatten(3).permute(0, 3, 1, 2) + lepe
    return F.conv2d(out, w["output_linear.weight"], w["output_linear.bias"]), index


RECORDED = [
    f"bra_{kind}_{case}"
    for kind in ("legacy", "nchw")
    for case in (
        *(f"topk{t}_14x14" for t in (1, 4, 8)),
        "topk4_21x14",
        *(f"autopad_topk{t}_13x17" for t in (1, 4)),
        "autopad_topk4_20x15",
    )
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", [*RECORDED, "bra_legacy_qkdim8_topk4_14x14", "bra_legacy_adaavg_kv2_topk4_28x28"], ids=lambda n: n[4:]
)
def test_recorded(name: str, backend: str) -> None:
    data = npz(f"ops/{name}.npz")
    x = data["x"].requires_grad_()
    weights = {k[2:]: v.requires_grad_() for k, v in data.items() if k.startswith("w/")}
    topk = data["routing_index"].shape[-1]
    if "nchw" in name:
        y, index = nchw(x, weights, topk, backend)
    else:
        y, index = legacy(x, weights, topk, backend, pooled=2 if "adaavg" in name else 0)
    grads = torch.autograd.grad(y, [x, *weights.values()], data["grad_y"])
    if "autopad" not in name:  # regions that lie in the padding altogether are equal, so their order is free
        assert torch.equal(index.sort().values, data["routing_index"].long().sort().values)
    expected = {"y": data["y"], "x": data["grad_x"], **{k: data[f"g/{k}"] for k in weights}}
    for (what, value), actual in zip(expected.items(), (y, *grads), strict=True):
        assert (actual - value).abs().max() <= 1e-9 * value.abs().max(), what


# the definition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all", "rows-cols", "value-wider", "zero-small"])
def test_definition_by_loops(name: str) -> None:
    (q, k, v), _, kwargs = inputs(name)
    with torch.no_grad():
        out, index = routing_attention(q, k, v, **kwargs, return_index=True, backend="reference")
        regions = kwargs["regions"]
        rows, cols = (regions, regions) if isinstance(regions, int) else regions
        region = (max(q.shape[1] // rows, 1), max(q.shape[2] // cols, 1))
        expected = naive(q, k, v, index, region, (q.shape[3] * q.shape[4]) ** -0.5)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_all_regions_is_plain_attention() -> None:
    (q, k, v), _, kwargs = inputs("all")
    out = routing_attention(q, k, v, **kwargs, scale=0.3)
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*flat, scale=0.3).transpose(1, 2).reshape(out.shape)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_take_the_lower_region(backend: str) -> None:
    x = torch.ones(2, 6, 8, 2, 4)
    index = routing_index(x, x, (3, 4), 5, backend=backend)
    assert index.dtype == torch.int64
    assert torch.equal(index, torch.arange(5).expand(2, 12, 5))


@pytest.mark.parametrize("topk", [1, 7, 60])
def test_selection_is_that_of_a_stable_sort(topk: int) -> None:
    x = torch.randint(-3, 4, (5, 40, 60)).float() / 7  # many ties
    x[0, 0, ::2] = -0.0
    x[1] *= 1e-42  # subnormal
    x[2, :, 3] = float("inf")
    x[3, :, 5] = float("-inf")
    expected = x.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    assert torch.equal(cpu._stable_topk(x, topk), expected)
    assert torch.equal(cpu._stable_topk(x.double(), topk), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_routing_is_in_float32(backend: str) -> None:
    # 256 + 1/256 needs 17 bits: summed or compared in bfloat16 the second region would tie with the first.
    k = torch.zeros(1, 2, 4, 1, 2, dtype=torch.bfloat16)
    k[:, :, :, :, 0] = 256
    k[0, :, 2:, 0, 1] = 1 / 256
    q = torch.ones_like(k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        index = routing_index(q, k, (1, 2), 1, backend=backend)
        wide = routing_index(q.float(), k.float(), (1, 2), 1, backend=backend)
    assert index.flatten().tolist() == wide.flatten().tolist() == [1, 1]


def test_mean_counts_tokens_inside_only() -> None:
    # 3 columns as regions of 2 and 1: a mean over the padded second region would halve it and lose.
    k = torch.tensor([1.0, 1.0, 1.5]).view(1, 1, 3, 1, 1)
    k = torch.cat([k, k, k, k], 1)
    index = routing_index(torch.ones_like(k), k, (2, 1), 1, padding="zero")
    assert index.flatten().tolist() == [0, 0]
    wider = routing_index(
        torch.ones(1, 4, 5, 1, 1),
        torch.tensor([1.0, 1, 1, 1, 1.5]).view(1, 1, 5, 1, 1).expand(1, 4, 5, 1, 1),
        (2, 2),
        1,
        padding="zero",
    )
    assert wider.flatten().tolist() == [2] * 6


# the CPU path against the definition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_cpu_matches_reference(name: str, seed: int) -> None:
    tensors, grad, kwargs = inputs(name, seed=seed)
    expected = forward_and_grads(tensors, grad, **kwargs, backend="reference")
    actual = forward_and_grads(tensors, grad, **kwargs, backend="cpu")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", ["dense", "zero-dense", "value-wider", "zero-small"])
def test_both_cpu_forms(name: str, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_prefers_dense", lambda *args: dense)
    tensors, grad, kwargs = inputs(name)
    expected = forward_and_grads(tensors, grad, **kwargs, backend="reference")
    for a, e in zip(forward_and_grads(tensors, grad, **kwargs, backend="cpu"), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["dense", "gathered", "zero-gathered"])
def test_small_groups_and_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, grad, kwargs = inputs(name)
    expected = forward_and_grads(tensors, grad, **kwargs, backend="reference")
    monkeypatch.setattr(cpu, "_GROUP_ELEMENTS", 1)
    monkeypatch.setattr(cpu, "_CHUNK_ELEMENTS", 1)
    for a, e in zip(forward_and_grads(tensors, grad, **kwargs, backend="cpu"), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_the_cases_use_both_cpu_forms() -> None:
    chosen = {}
    for name in ("dense", "gathered"):
        (q, k, _), _, kwargs = inputs(name)
        index = routing_index(q, k, **kwargs)
        chosen[name] = cpu._prefers_dense(q, k, index, (q.shape[1] // 7, q.shape[2] // 7))
    assert chosen == {"dense": True, "gathered": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dense", "gathered", "value-wider", "zero-dense", "zero-gathered"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """At most twice the error of plain PyTorch in the same dtype, both against float64 on the rounded inputs."""
    tensors, grad, kwargs = inputs(name, dtype)
    index = routing_index(*tensors[:2], **kwargs)
    exact_in = [x.detach().double().requires_grad_() for x in tensors]
    exact = forward_and_grads(exact_in, grad, **kwargs, index=index, backend="reference")
    plain = forward_and_grads(tensors, grad, **kwargs, index=index, backend="reference")
    actual = forward_and_grads(tensors, grad, **kwargs, index=index, backend="cpu")
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert a.dtype == dtype
        allowed = 2 * (p.double() - e).abs().max() + 2 * torch.finfo(dtype).eps * e.abs().max()
        assert (a.double() - e).abs().max() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["rows-cols", "value-wider", "zero-small"])
def test_gradcheck(name: str, backend: str) -> None:
    tensors, _, kwargs = inputs(name)
    index = routing_index(*tensors[:2], **kwargs)
    small = [x[:1, ..., :1, :].detach().requires_grad_() for x in tensors]
    index = index[:1]
    assert torch.autograd.gradcheck(
        lambda *t: routing_attention(*t, **kwargs, index=index, backend=backend), small, fast_mode=True
    )


def test_reference_has_second_derivatives() -> None:
    tensors, _, kwargs = inputs("zero-small")
    index = routing_index(*tensors[:2], **kwargs)
    small = [x[..., :1, :2].detach().requires_grad_() for x in tensors]
    assert torch.autograd.gradgradcheck(
        lambda *t: routing_attention(*t, **kwargs, index=index, backend="reference"), small, fast_mode=True
    )


@pytest.mark.parametrize("name", ["dense", "gathered", "zero-gathered"])
def test_same_bits_twice(name: str) -> None:
    tensors, grad, kwargs = inputs(name, torch.float32)
    first = forward_and_grads(tensors, grad, **kwargs)
    for a, b in zip(first, forward_and_grads(tensors, grad, **kwargs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["dense", "gathered", "zero-dense"])
def test_strided_inputs(name: str) -> None:
    tensors, grad, kwargs = inputs(name)
    expected = forward_and_grads(tensors, grad, **kwargs)
    packed = torch.stack([t.detach() for t in tensors], 3).requires_grad_()
    out = routing_attention(*packed.unbind(3), **kwargs)
    assert out.is_contiguous()
    assert torch.equal(out, expected[0])
    (dpacked,) = torch.autograd.grad(out, packed, grad)
    torch.testing.assert_close(dpacked, torch.stack(expected[1:], 3), rtol=1e-12, atol=1e-12)

    turned = [t.detach().permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0) for t in tensors]
    assert turned[0].stride(-1) != 1
    strided_grad = grad.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0)
    actual = forward_and_grads([t.requires_grad_() for t in turned], strided_grad, **kwargs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_index(backend: str) -> None:
    (q, k, v), grad, kwargs = inputs("dense")
    kwargs["topk"] = 3
    index = torch.tensor([5, 5, 48]).expand(2, 49, 3)  # a region that is named twice counts twice
    out = routing_attention(q, k, v, **kwargs, index=index.int(), backend=backend)
    k_sel = torch.cat([k[:, :2, 10:12]] * 2 + [k[:, 12:, 12:]], 1).flatten(1, 2).transpose(1, 2)
    v_sel = torch.cat([v[:, :2, 10:12]] * 2 + [v[:, 12:, 12:]], 1).flatten(1, 2).transpose(1, 2)
    expected = F.scaled_dot_product_attention(q.flatten(1, 2).transpose(1, 2), k_sel, v_sel, scale=24**-0.5)
    expected = expected.transpose(1, 2).reshape(out.shape)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grads, expected_grads = (torch.autograd.grad(o, (q, k, v), grad) for o in (out, expected))
    for a, e in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("topk", [2, 9])
def test_keys_of_another_resolution(topk: int) -> None:
    q = torch.randn(2, 12, 9, 2, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 6, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    index = torch.stack([torch.randperm(9)[:topk] for _ in range(18)]).view(2, 9, topk)
    grad = torch.randn(2, 12, 9, 2, 4, dtype=torch.float64)
    expected = forward_and_grads([q, k, v], grad, regions=3, topk=topk, index=index, backend="reference")
    actual = forward_and_grads([q, k, v], grad, regions=3, topk=topk, index=index, backend="cpu")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)
    if topk == 9:
        flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
        everything = F.scaled_dot_product_attention(*flat, scale=8**-0.5).transpose(1, 2).reshape(q.shape)
        torch.testing.assert_close(actual[0], everything, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    q = torch.randn(0, 14, 14, 2, 4, requires_grad=True)
    out = routing_attention(q, q, q, 7, 4, backend=backend)
    assert out.shape == q.shape
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert dq.shape == q.shape


def test_no_gradient_through_routing() -> None:
    (q, k, v), grad, kwargs = inputs("gathered")
    free = forward_and_grads([q, k, v], grad, **kwargs)
    fixed = forward_and_grads([q, k, v], grad, **kwargs, index=routing_index(q, k, **kwargs))
    for a, b in zip(free, fixed, strict=True):
        assert torch.equal(a, b)


# registration ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "zero-gathered", "value-wider"])
def test_opcheck(name: str) -> None:
    (q, k, v), grad, kwargs = inputs(name, torch.float32)
    regions = kwargs["regions"]
    region = (q.shape[1] // regions, q.shape[2] // regions)
    index = routing_index(q, k, **kwargs)
    torch.library.opcheck(torch.ops.zoo.routing_index.default, (q.detach(), k.detach(), *region, kwargs["topk"], "cpu"))
    torch.library.opcheck(torch.ops.zoo.routing_attention.default, (q, k, v, index, *region, 0.2, "cpu"))
    out, lse = torch.ops.zoo.routing_attention(q, k, v, index, *region, 0.2, "cpu")
    args = (grad, q, k, v, index, out, lse)
    torch.library.opcheck(
        torch.ops.zoo.routing_attention_backward.default, (*(a.detach() for a in args), *region, 0.2, "cpu")
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gathered", "zero-dense"])
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    tensors, grad, kwargs = inputs(name, torch.float32)
    kwargs["backend"] = backend
    expected = forward_and_grads(tensors, grad, **kwargs)
    compiled = torch.compile(
        lambda q, k, v: routing_attention(q, k, v, **kwargs), backend="aot_eager", fullgraph=True, dynamic=False
    )
    out = compiled(*tensors)
    for a, e in zip([out, *torch.autograd.grad(out, tensors, grad)], expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph_under_autocast(backend: str) -> None:
    tensors, _, kwargs = inputs("gathered", torch.float32)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return routing_attention(q, k, v, **kwargs, backend=backend)

    expected = function(*tensors)
    out = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)(*tensors)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return routing_attention(q, k, v, 7, 4)

    tensors = [torch.randn(2, 14, 21, 2, 4) for _ in range(3)]
    program = torch.export.export(Module(), tuple(tensors), dynamic_shapes=[{0: torch.export.Dim("batch")}] * 3)
    larger = [torch.randn(5, 14, 21, 2, 4) for _ in range(3)]
    assert torch.equal(program.module()(*larger), routing_attention(*larger, 7, 4))


def test_scripts() -> None:
    @torch.jit.script
    def scripted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index = torch.ops.zoo.routing_index(q, k, 2, 3, 4, "cpu")
        out, lse = torch.ops.zoo.routing_attention(q, k, v, index, 2, 3, 0.25, "cpu")
        return out

    tensors = [torch.randn(2, 14, 21, 2, 4) for _ in range(3)]
    assert torch.equal(scripted(*tensors), routing_attention(*tensors, 7, 4, scale=0.25))


@pytest.mark.parametrize("backend", BACKENDS)
def test_meta(backend: str) -> None:
    q = torch.empty(2, 13, 17, 2, 4, device="meta", requires_grad=True)
    out, index = routing_attention(q, q, q, 7, 4, padding="zero", return_index=True, backend=backend)
    assert (out.shape, out.device.type) == (q.shape, "meta")
    assert (index.shape, index.device.type) == ((2, 13 * 9, 4), "meta")
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    tensors, grad, kwargs = inputs("gathered", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = routing_attention(*tensors, **kwargs, backend=backend)
        mixed = routing_attention(tensors[0], tensors[1].bfloat16(), tensors[2], **kwargs, backend=backend)
    grads = torch.autograd.grad(out, tensors, grad.to(out.dtype))
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in grads)
    exact = forward_and_grads(tensors, grad, **kwargs)
    for a, e in zip((out, *grads), exact, strict=True):
        assert (a.float() - e).abs().max() <= 0.03 * e.abs().max()


def test_backward_inside_autocast() -> None:
    tensors, grad, kwargs = inputs("gathered", torch.float32)
    expected = forward_and_grads(tensors, grad, **kwargs)
    out = routing_attention(*tensors, **kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = torch.autograd.grad(out, tensors, grad)
    for a, e in zip(grads, expected[1:], strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("name", ["dense", "gathered", "zero-dense"])
def test_without_flash_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the registered op does off the CPU: the same forms in plain tensor operations."""
    monkeypatch.setattr("zoo.ops._flash._DEVICES", ())
    tensors, grad, kwargs = inputs(name)
    expected = forward_and_grads(tensors, grad, **kwargs, backend="reference")
    for a, e in zip(forward_and_grads(tensors, grad, **kwargs, backend="cpu"), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


# Triton kernels, further than tests/ops/test_triton.py ----------------------------------------------------------------

FORMS = {"listed": ((8, 6), 2, 3), "dense": ((6, 8), (3, 4), 7)}  # size, regions, topk


def triton_case(form: str, key_size: tuple[int, int] | None = None) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """Leaves, gradient and arguments; the given index names regions twice and thrice."""
    size, regions, topk = FORMS[form]
    rows, cols = (regions, regions) if isinstance(regions, int) else regions
    tensors = [torch.randn(2, *s, 2, 8, device=DEVICE) for s in (size, key_size or size, key_size or size)]
    index = torch.randint(0, rows * cols, (2, rows * cols, topk), device=DEVICE)
    index[:, :, 1] = index[:, :, 0]
    index[:, ::2, 2] = index[:, ::2, 0]
    kwargs = {"regions": regions, "topk": topk, "index": index}
    return [x.requires_grad_() for x in tensors], torch.randn(2, *size, 2, 8, device=DEVICE), kwargs


def assert_triton_matches(tensors: list[Tensor], grad: Tensor, kwargs: dict[str, Any]) -> list[Tensor]:
    expected = forward_and_grads(tensors, grad, **kwargs, backend="reference")
    actual = forward_and_grads(tensors, grad, **kwargs, backend="triton")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-5 * float(e.abs().max()) + 1e-9)
    return actual


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Which form the calls took: True is the dense one."""
    kernels = pytest.importorskip("zoo.ops.routing.kernels")
    taken: list[bool] = []
    decide = kernels._is_dense
    monkeypatch.setattr(kernels, "_is_dense", lambda *args: taken.append(decide(*args)) or taken[-1])
    return taken


@pytest.mark.parametrize("scale", [0.3, -0.4, 0.0])
@pytest.mark.parametrize("form", FORMS)
def test_triton_scales_and_repeated_regions(form: str, scale: float, forms: list[bool]) -> None:
    tensors, grad, kwargs = triton_case(form)
    assert_triton_matches(tensors, grad, {**kwargs, "scale": scale})
    assert set(forms) == {form == "dense" and scale != 0}


@pytest.mark.parametrize("key_size", [(4, 2), (12, 12)], ids=str)
def test_triton_keys_of_another_resolution(key_size: tuple[int, int]) -> None:
    assert_triton_matches(*triton_case("listed", key_size))


def test_triton_dense_keys_of_another_resolution(forms: list[bool]) -> None:
    assert_triton_matches(*triton_case("dense", (9, 4)))  # regions of 3 x 1 keys: three of four places are filled
    assert set(forms) == {True}


@pytest.mark.parametrize("form", FORMS)
def test_triton_offsets_of_64_bits(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("zoo.ops.routing.kernels")
    tensors, grad, kwargs = triton_case(form)
    narrow = assert_triton_matches(tensors, grad, kwargs)
    monkeypatch.setattr(kernels, "fits_int32", lambda *tensors: False)
    for a, b in zip(forward_and_grads(tensors, grad, **kwargs, backend="triton"), narrow, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("config", [(32, 32, 8, 1), (128, 128, 2, 3)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_triton_configurations(form: str, config: tuple[int, int, int, int]) -> None:
    """What `zoo tune` may try, in every pass."""
    tuning = pytest.importorskip("zoo.ops.tuning")
    with contextlib.ExitStack() as stack:
        for direction in ("forward", "rows", "columns"):
            stack.enter_context(tuning.forced("routing", direction, tuning.Config(*config)))
        assert_triton_matches(*triton_case(form))


@pytest.mark.parametrize(
    ("size", "regions", "topk", "padding"),
    [((14, 7), 7, 16, "none"), ((13, 11), (4, 3), 5, "zero"), ((5, 3), 7, 15, "zero")],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_index(size: tuple[int, int], regions: Any, topk: int, padding: str, dtype: torch.dtype) -> None:
    """On whole numbers, where every order of summing is exact and ties are frequent, the definition's own choice."""
    pytest.importorskip("triton")
    x = torch.randint(-1, 2, (2, *size, 6, 12), device=DEVICE).to(dtype) * 36  # 36: means are whole numbers too
    q, k = x[..., :3, :], x[..., 3:, :]
    kwargs = {"regions": regions, "topk": topk, "padding": padding}
    index = routing_index(q, k, **kwargs, backend="triton")
    assert torch.equal(index, routing_index(q, k, **kwargs, backend="reference"))
    assert torch.equal(index[1:], routing_index(q[1:], k[1:], **kwargs, backend="triton"))


def test_more_regions_than_the_index_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("zoo.ops.routing.kernels")
    x = torch.randn(2, 6, 6, 1, 8, device=DEVICE)
    expected = routing_index(x, x, 3, 4, backend="triton")
    monkeypatch.setattr(kernels, "_MOST_SORTED", 8)
    assert torch.equal(routing_index(x, x, 3, 4, backend="triton"), expected)


# errors ---------------------------------------------------------------------------------------------------------------


def call(**change: Any) -> Any:
    x = torch.randn(2, 14, 14, 2, 4)
    return routing_attention(**{"q": x, "k": x, "v": x, "regions": 7, "topk": 4, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(2, 14, 14, 8)}, r"routing_attention: q must be \[B, H, W, heads, dim\].*\(2, 14, 14, 8\)"),
        ({"v": torch.randn(2, 14, 14, 8)}, r"v must be \[B, H, W, heads, dim\]"),
        ({"k": torch.randn(2, 14, 14, 2, 5)}, r"q and k must agree.*\(2, 14, 14, 2, 5\)"),
        ({"k": torch.randn(3, 14, 14, 2, 4)}, "q and k must agree in batch"),
        ({"k": torch.randn(2, 7, 7, 2, 4)}, "same size unless index is given"),
        ({"v": torch.randn(2, 14, 13, 2, 4)}, "v must agree with k"),
        ({"k": torch.randn(2, 14, 14, 2, 4).double()}, "k has dtype torch.float64, q has torch.float32"),
        ({"v": torch.randn(2, 14, 14, 2, 4).half()}, "v has dtype torch.float16, q has torch.float32"),
        ({"regions": 5}, "regions 5 x 5 do not divide the map 14 x 14"),
        ({"regions": (7, 0)}, r"regions must be an int of at least 1 or 2 of them, got \(7, 0\)"),
        ({"topk": 0}, r"topk must be in 1..49.*got 0"),
        ({"topk": 50}, "got 50"),
        ({"padding": "mask"}, "padding must be 'none' or 'zero', got 'mask'"),
        ({"index": torch.zeros(2, 49, 3, dtype=torch.int64)}, r"index must be \[B, R, topk\] = \(2, 49, 4\)"),
        ({"index": torch.zeros(2, 49, 4)}, "index must be int32 or int64, got torch.float32"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_value_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**change)


def test_integer_tensors_are_refused() -> None:
    x = torch.ones(2, 14, 14, 2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="q must be float16, bfloat16, float32 or float64, got torch.int64"):
        routing_attention(x, x, x, 7, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [-1, 49])
def test_index_out_of_range(wrong: int, backend: str) -> None:
    index = torch.zeros(2, 49, 4, dtype=torch.int64)
    index[1, 3, 2] = wrong
    with pytest.raises(IndexError, match=f"region {wrong}; there are 49"):
        call(index=index, backend=backend)
