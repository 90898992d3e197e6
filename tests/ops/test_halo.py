"""Halo attention: the recorded cases, the paths against the definition, and what torch asks of an op."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import npz
from torch import Tensor

from zoo.ops.halo import halo_attention

OP = torch.ops.zoo.halo_attention.default
PATHS = ["reference", "cpu"]

# B, H, W, heads, dim, dim_v, block, halo, stride
SHAPES = {
    "aligned": (2, 8, 16, 2, 4, 4, 4, 1, 1),
    "odd": (2, 9, 13, 2, 4, 6, 4, 1, 1),
    "wide_halo_stride2": (2, 9, 13, 2, 4, 6, 4, 3, 2),
    "smaller_than_block": (1, 5, 3, 1, 8, 8, 8, 5, 1),
    "no_halo_stride3": (2, 11, 7, 2, 8, 3, 6, 0, 3),
    "one_pixel": (2, 1, 1, 1, 4, 4, 8, 2, 2),
    "block1": (1, 4, 5, 1, 4, 4, 1, 2, 1),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, rel: str = "both", seed: int = 0) -> list[Any]:
    """q, k, v, rel_height, rel_width with gradients required."""
    B, H, W, heads, d, dv, block, halo, stride = shape
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * (block + 2 * halo) - 1
    sizes = [(B, -(-H // stride), -(-W // stride), heads, d), (B, H, W, heads, d), (B, H, W, heads, dv)]
    sizes += [(rows, d), (rows, d)]
    tensors: list[Any] = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes
    ]
    if rel not in ("both", "height"):
        tensors[3] = None
    if rel not in ("both", "width"):
        tensors[4] = None
    return tensors


def call(tensors: list[Any], shape: tuple[int, ...], **kwargs: Any) -> Tensor:
    q, k, v, rel_height, rel_width = tensors
    return halo_attention(q, k, v, shape[6], shape[7], rel_height=rel_height, rel_width=rel_width, **kwargs)


def upstream(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)


def outputs(tensors: list[Any], shape: tuple[int, ...], **kwargs: Any) -> list[Tensor]:
    """The output and every gradient."""
    leaves = [t for t in tensors if t is not None]
    out = call(tensors, shape, **kwargs)
    return [out, *torch.autograd.grad(out, leaves, upstream(out))]


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    scale = max(expected.abs().max().item(), 1e-3)  # the gradient of one key's softmax is zero but for rounding
    error = (actual - expected).abs().max().item() / scale
    assert error < 1e-9, f"{what}: {error:.2e}"


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("name", ["halo_core_b4_h1_8x12", "halo_core_b8_h3_16x24"])
def test_recorded(name: str, backend: str) -> None:
    data = npz(f"ops/{name}.npz")
    names = ("q", "k", "v", "height_rel", "width_rel")
    leaves = [data[n].clone().requires_grad_() for n in names]
    q, k, v = (x.permute(0, 2, 3, 1, 4) for x in leaves[:3])
    out = halo_attention(
        q, k, v, int(data["block_size"]), int(data["halo_size"]),
        rel_height=leaves[3], rel_width=leaves[4], scale=float(data["scale"]), backend=backend,
    )  # fmt: skip
    close(out, data["out"].permute(0, 2, 3, 1, 4), "out")
    out.backward(data["grad_out"].permute(0, 2, 3, 1, 4))
    for leaf, n in zip(leaves, names, strict=True):
        close(leaf.grad, data[f"grad_{n}"], f"grad_{n}")


@pytest.mark.parametrize("backend", PATHS)
def test_recorded_masked_border(backend: str) -> None:
    """The layer of lucidrains/halonet-pytorch: masked padding, and relative positions on the scaled q."""
    data = npz("ops/haloattn_lucidrains_masked_b8_h3.npz")
    heads, d = int(data["num_heads"]), int(data["dim_head"])
    x = data["x"].clone().requires_grad_()
    weights = {k: data[f"w.{k}"].clone().requires_grad_() for k in (n[2:] for n in data if n.startswith("w."))}
    tokens = x.permute(0, 2, 3, 1)
    q = F.linear(tokens, weights["to_q.weight"]).unflatten(-1, (heads, d)) * d**-0.5
    k, v = F.linear(tokens, weights["to_kv.weight"]).unflatten(-1, (2, heads, d)).unbind(-3)
    out = halo_attention(
        q, k, v, int(data["block_size"]), int(data["halo_size"]), border="mask", scale=1.0, backend=backend,
        rel_height=weights["rel_pos_emb.rel_height"], rel_width=weights["rel_pos_emb.rel_width"],
    )  # fmt: skip
    y = F.linear(out.flatten(3), weights["to_out.weight"], weights["to_out.bias"]).permute(0, 3, 1, 2)
    close(y, data["out"], "out")
    y.backward(data["grad_out"])
    close(x.grad, data["grad_x"], "grad_x")
    for name, weight in weights.items():
        close(weight.grad, data[f"g.{name}"], name)


@pytest.mark.parametrize("rel", ["both", "height", "width", "none"])
@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_cpu_is_the_reference(shape: tuple[int, ...], border: str, rel: str) -> None:
    tensors = inputs(shape, rel=rel)
    expected = outputs(tensors, shape, border=border, backend="reference")
    for a, b in zip(outputs(tensors, shape, border=border, backend="cpu"), expected, strict=True):
        close(a, b, f"{shape}")


@pytest.mark.parametrize("border", ["zero", "mask"])
def test_reference_is_a_loop_over_queries(border: str) -> None:
    """The definition written out, one query and one key at a time, on a map that no block divides."""
    shape = (1, 5, 7, 1, 4, 3, 4, 1, 2)
    q, k, v, rel_h, rel_w = (t.detach() for t in inputs(shape))
    block, halo, stride = 4, 1, 2
    window, step = block + 2 * halo, block // stride
    out = call([q, k, v, rel_h, rel_w], shape, border=border, backend="reference")
    for row in range(q.shape[1]):
        for col in range(q.shape[2]):
            query, i, j = q[0, row, col, 0], row % step, col % step
            logits, values = [], []
            for y in range(window):
                for x in range(window):
                    key_row, key_col = row // step * block - halo + y, col // step * block - halo + x
                    inside = 0 <= key_row < 5 and 0 <= key_col < 7
                    if not inside and border == "mask":
                        continue
                    position = query @ rel_h[y - i + window - 1] + query @ rel_w[x - j + window - 1]
                    logits.append(position + (query @ k[0, key_row, key_col, 0] / 2 if inside else 0))
                    values.append(v[0, key_row, key_col, 0] if inside else torch.zeros(3, dtype=v.dtype))
            expected = torch.stack(logits).softmax(0) @ torch.stack(values)
            close(out[0, row, col, 0], expected, f"query {row}, {col}")


def test_chunks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps larger than a chunk are cut into images, then into rows of blocks."""
    shape = (3, 21, 10, 2, 4, 4, 4, 3, 1)
    tensors = inputs(shape)
    expected = outputs(tensors, shape, border="mask", backend="reference")
    for chunk in (1, 20_000, 100_000):
        monkeypatch.setattr("zoo.ops.halo.cpu._CHUNK", chunk)
        for a, b in zip(outputs(tensors, shape, border="mask", backend="cpu"), expected, strict=True):
            close(a, b, f"chunk {chunk}")


@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, border: str) -> None:
    """At most twice the error of plain PyTorch in the same dtype, measured against float64."""
    shape = (2, 18, 13, 2, 16, 16, 8, 3, 1)
    rounded = [t.detach().to(dtype) for t in inputs(shape)]
    exact = outputs([t.double().requires_grad_() for t in rounded], shape, border=border, backend="reference")
    plain = outputs([t.clone().requires_grad_() for t in rounded], shape, border=border, backend="reference")
    fast = outputs([t.clone().requires_grad_() for t in rounded], shape, border=border, backend="cpu")
    for a, b, truth in zip(fast, plain, exact, strict=True):
        assert a.dtype == dtype
        atol = torch.finfo(dtype).eps * truth.abs().max().item()
        assert (a.double() - truth).abs().max() <= 2 * (b.double() - truth).abs().max() + atol


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("border", ["zero", "mask"])
def test_gradcheck(backend: str, border: str) -> None:
    shape = (1, 3, 5, 1, 2, 3, 2, 1, 2)
    tensors = inputs(shape)
    assert torch.autograd.gradcheck(lambda *t: call(list(t), shape, border=border, backend=backend), tensors)


def test_double_backward_through_the_reference() -> None:
    shape = (1, 3, 2, 1, 2, 2, 2, 1, 1)
    function = lambda *t: call(list(t), shape, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(function, inputs(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rel", ["both", "none"])
def test_opcheck(rel: str, dtype: torch.dtype) -> None:
    shape = SHAPES["wide_halo_stride2"]
    torch.library.opcheck(OP, (*inputs(shape, dtype, rel), *shape[6:], True, 0.5, "cpu"))
    torch.library.opcheck(OP, (*inputs(SHAPES["aligned"], dtype, rel), 4, 1, 1, False, 0.5, "cpu"))


@pytest.mark.parametrize("stride", [1, 2])
def test_compile_and_export(stride: int) -> None:
    shape = (2, 9, 10, 2, 4, 4, 4, 1, stride)
    tensors = inputs(shape, torch.float32)
    expected = outputs(tensors, shape)

    class Layer(torch.nn.Module):
        def forward(self, *t: Any) -> Tensor:
            return call(list(t), shape)

    out = torch.compile(Layer(), fullgraph=True, backend="aot_eager")(*tensors)
    grads = torch.autograd.grad(out, tensors, upstream(out))
    for a, b in zip([out, *grads], expected, strict=True):
        assert torch.equal(a, b)
    program = torch.export.export(Layer(), tuple(t.detach() for t in tensors))
    assert torch.equal(program.module()(*[t.detach() for t in tensors]), expected[0])


def test_torchscript() -> None:
    shape = SHAPES["odd"]
    q, k, v, rel_h, rel_w = inputs(shape, torch.float32)

    @torch.jit.script
    def scripted(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        return torch.ops.zoo.halo_attention(q, k, v, rel_h, rel_w, 4, 1, 1, False, 0.5, "cpu")[0]

    assert torch.equal(scripted(q, k, v, rel_h, rel_w), call([q, k, v, rel_h, rel_w], shape))


def test_meta_and_empty_batch() -> None:
    shape = SHAPES["wide_halo_stride2"]
    tensors = [t.detach().to("meta") for t in inputs(shape)]
    out = call(tensors, shape)
    assert out.device.type == "meta"
    assert out.shape == (2, 5, 7, 2, 6)
    empty = inputs((0, *shape[1:]))
    for backend in PATHS:
        out, dq, _, _, d_rel, _ = outputs(empty, shape, backend=backend)
        assert out.shape == (0, 5, 7, 2, 6)
        assert dq.shape == empty[0].shape
        assert torch.equal(d_rel, torch.zeros_like(empty[3]))


@pytest.mark.parametrize("backend", PATHS)
def test_autocast(backend: str) -> None:
    shape = SHAPES["odd"]
    tensors = inputs(shape, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = call([tensors[0].bfloat16(), *tensors[1:]], shape, backend=backend)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert tensors[3].grad.dtype == torch.float32
    assert (out.float() - call(tensors, shape)).abs().max() < 0.05


@pytest.mark.parametrize("backend", PATHS)
def test_strides(backend: str) -> None:
    """Views into one projection, and tensors whose last stride is not 1, give the numbers of contiguous ones."""
    shape = SHAPES["odd"]
    q, k, v, rel_h, rel_w = (t.detach() for t in inputs(shape))
    expected = call([q, k, v, rel_h, rel_w], shape, backend=backend)
    kv = torch.cat([k, v], -1)
    views = [q.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2), kv[..., :4], kv[..., 4:]]
    views += [rel_h.t().contiguous().t(), rel_w]
    views = [t.requires_grad_() for t in views]
    out, *grads = outputs(views, shape, backend=backend)
    close(out, expected, "out")
    assert out.is_contiguous()
    for grad, reference in zip(grads, outputs(inputs(shape), shape, backend=backend)[1:], strict=True):
        close(grad, reference, "gradient")


def test_same_bits_twice() -> None:
    shape = (2, 18, 13, 2, 16, 16, 8, 3, 1)
    first, second = (outputs(inputs(shape, torch.float32), shape, border="mask") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_logits_stay_finite() -> None:
    """The mask is a finite number; it must outweigh any logit of a trained model."""
    shape = SHAPES["odd"]
    tensors = [(t.detach().float() * 100).requires_grad_() for t in inputs(shape)]
    expected = call([t.double() for t in tensors], shape, border="mask", backend="reference")
    out, *grads = outputs(tensors, shape, border="mask")
    assert (out - expected).abs().max() <= 1e-2 * expected.abs().max()
    assert all(torch.isfinite(g).all() for g in grads)


def test_peak_memory_does_not_hold_every_logit() -> None:
    """What is allocated at one time stays far below the logits of the whole map."""
    shape = (1, 64, 64, 4, 16, 16, 8, 3, 1)
    tensors = [t.detach() for t in inputs(shape, torch.float32)]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    from zoo.ops.halo.cpu import halo_attention_cpu

    with Watch():
        halo_attention_cpu(*tensors, 8, 3, 1, False, 0.25)
    logits = 64 * 64 * 4 * 14 * 14
    assert largest <= logits / 4


def test_stride_is_seen_from_the_map_of_q() -> None:
    """A stride is never ambiguous: where two strides give one size, the whole map is one block."""
    for block in (2, 4, 6, 8, 12):
        strides = [s for s in range(1, block + 1) if block % s == 0]
        for size in range(1, 4 * block):
            for s in strides:
                twins = [t for t in strides if math.ceil(size / t) == math.ceil(size / s)]
                assert len(twins) == 1 or size <= block


GOOD = (1, 4, 4, 2, 4, 4, 4, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 4, 8)}, r"q must be \[B, H, W, heads, dim\], got shape \(1, 4, 4, 8\)"),
        ({"k": torch.zeros(1, 4, 4, 2, 3)}, r"q has \(heads, dim\) \(2, 4\), k has \(2, 3\)"),
        ({"v": torch.zeros(1, 4, 5, 2, 4)}, r"v has .*\(1, 4, 5, 2\), k has \(1, 4, 4, 2\)"),
        ({"q": torch.zeros(2, 4, 4, 2, 4)}, "q has batch 2, k has 1"),
        ({"q": torch.zeros(1, 3, 4, 2, 4)}, r"q has the map \(3, 4\), k has \(4, 4\).*divides block_size 4"),
        (
            {"q": torch.zeros(1, 4, 4, 2, 4, dtype=torch.long)},
            "q must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        ({"v": torch.zeros(1, 4, 4, 2, 0)}, r"v: only the batch may be empty, got shape \(1, 4, 4, 2, 0\)"),
        ({"k": torch.zeros(1, 4, 4, 2, 4).double()}, "k has dtype torch.float64, q has torch.float32"),
        ({"block_size": 0}, "block_size must be an int >= 1, got 0"),
        ({"halo_size": -1}, "halo_size must be an int >= 0, got -1"),
        ({"rel_height": torch.zeros(10, 4)}, r"rel_height must be .* = \[11, 4\], got \(10, 4\)"),
        ({"rel_width": torch.zeros(11, 3)}, r"rel_width must be .* = \[11, 4\], got \(11, 3\)"),
        ({"border": "wrap"}, "border must be 'zero' or 'mask', got 'wrap'"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    q, k, v, rel_height, rel_width = (t.detach() for t in inputs(GOOD, torch.float32))
    arguments = {"q": q, "k": k, "v": v, "block_size": 4, "halo_size": 1}
    arguments |= {"rel_height": rel_height, "rel_width": rel_width, **change}
    with pytest.raises(ValueError, match=f"halo_attention: .*{message}"):
        halo_attention(**arguments)


def test_a_named_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match="halo_attention: backend 'triton' cannot run this call"):
        call(inputs(GOOD, torch.float64), GOOD, backend="triton")
