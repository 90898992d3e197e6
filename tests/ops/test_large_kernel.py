"""Large kernel attention: the recorded cases, the paths against the definition, and what torch asks of an op."""

from typing import Any

import pytest
import torch
from golden import npz
from torch import Tensor

from zoo.ops.large_kernel import large_kernel_attention

OP = torch.ops.zoo.large_kernel_attention.default
PATHS = ["reference", "cpu"]
NAMES = [f"{conv}.{part}" for conv in ("conv0", "conv_spatial", "conv1") for part in ("weight", "bias")]

# B, C, H, W, kernel of conv0, kernel of conv_spatial, dilation
SHAPES = {
    "van": (2, 4, 14, 12, (5, 5), (7, 7), 3),
    "odd": (2, 3, 9, 13, (5, 5), (7, 7), 3),
    "smaller_than_dilation": (1, 2, 2, 1, (5, 5), (7, 7), 3),
    "dense": (2, 3, 6, 7, (3, 3), (5, 5), 1),
    "oblong": (2, 3, 7, 6, (1, 5), (7, 3), 2),
    "one_channel": (2, 1, 5, 5, (3, 3), (3, 3), 4),
    "one_pixel": (2, 3, 1, 1, (5, 5), (7, 7), 3),
}


def inputs(shape: tuple[Any, ...], dtype: torch.dtype = torch.float64, bias: bool = True) -> list[Any]:
    B, C, H, W, small, large, _ = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(B, C, H, W), (C, 1, *small), (C,), (C, 1, *large), (C,), (C, C, 1, 1), (C,)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]
    return [t if bias or i not in (2, 4, 6) else None for i, t in enumerate(tensors)]


def outputs(tensors: list[Any], shape: tuple[Any, ...], **kwargs: Any) -> list[Tensor]:
    """The output and every gradient."""
    out = large_kernel_attention(*tensors, dilation=shape[6], **kwargs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, [t for t in tensors if t is not None], upstream)]


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    error = (actual - expected).abs().max().item() / max(expected.abs().max().item(), 1e-3)
    assert error < 1e-9, f"{what}: {error:.2e}"


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("name", ["lka_14x14", "lka_28x12"])
def test_recorded(name: str, backend: str) -> None:
    data = npz(f"ops/{name}.npz")
    leaves = [data["x"].clone().requires_grad_(), *(data[f"w/{n}"].clone().requires_grad_() for n in NAMES)]
    out = large_kernel_attention(*leaves, backend=backend)
    close(out, data["y"], "y")
    out.backward(data["grad_y"])
    for leaf, expected, n in zip(
        leaves, [data["grad_x"], *(data[f"g/{n}"] for n in NAMES)], ["x", *NAMES], strict=True
    ):
        close(leaf.grad, expected, n)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_cpu_is_the_reference(shape: tuple[Any, ...], bias: bool) -> None:
    tensors = inputs(shape, bias=bias)
    expected = outputs(tensors, shape, backend="reference")
    for a, b in zip(outputs(tensors, shape, backend="cpu"), expected, strict=True):
        close(a, b, f"{shape}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """At most twice the error of plain PyTorch in the same dtype, measured against float64.

    In float32 what is left is the rounding of plain sums over 420 pixels, whose order differs between processors.
    """
    slack = 8 if dtype == torch.float32 else 1
    shape = (2, 16, 15, 14, (5, 5), (7, 7), 3)
    rounded = [t.detach().to(dtype) for t in inputs(shape)]
    exact = outputs([t.double().requires_grad_() for t in rounded], shape, backend="reference")
    plain = outputs([t.clone().requires_grad_() for t in rounded], shape, backend="reference")
    fast = outputs([t.clone().requires_grad_() for t in rounded], shape, backend="cpu")
    for a, b, truth in zip(fast, plain, exact, strict=True):
        assert a.dtype == dtype
        atol = slack * torch.finfo(dtype).eps * truth.abs().max().item()
        assert (a.double() - truth).abs().max() <= 2 * (b.double() - truth).abs().max() + atol


@pytest.mark.parametrize("backend", PATHS)
def test_gradcheck(backend: str) -> None:
    shape = (1, 2, 4, 3, (3, 3), (3, 3), 2)
    function = lambda *t: large_kernel_attention(*t, dilation=2, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs(shape))


def test_double_backward_through_the_reference() -> None:
    shape = (1, 2, 3, 2, (1, 1), (3, 3), 2)
    function = lambda *t: large_kernel_attention(*t, dilation=2, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(function, inputs(shape))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, channels_last: bool) -> None:
    tensors = inputs(SHAPES["odd"], dtype)
    if channels_last:
        tensors[0] = tensors[0].detach().to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(OP, (*tensors, 3, "cpu"))
    torch.library.opcheck(OP, (*[t if i not in (2, 4, 6) else None for i, t in enumerate(tensors)], 3, "cpu"))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", PATHS)
def test_memory_formats(backend: str, memory_format: torch.memory_format) -> None:
    """Numbers do not depend on the strides of x; the output keeps its memory format."""
    shape = SHAPES["van"]
    tensors = inputs(shape)
    expected = outputs(tensors, shape, backend="reference")
    tensors[0] = tensors[0].detach().to(memory_format=memory_format).requires_grad_()
    actual = outputs(tensors, shape, backend=backend)
    assert actual[0].is_contiguous(memory_format=memory_format)
    for a, b in zip(actual, expected, strict=True):
        close(a, b, "value")


@pytest.mark.parametrize("backend", PATHS)
def test_strides(backend: str) -> None:
    shape = SHAPES["van"]
    tensors = inputs(shape)
    expected = outputs(tensors, shape, backend="reference")
    wide = torch.zeros(2, 8, 14, 24, dtype=torch.float64)
    wide[:, ::2, :, ::2] = tensors[0].detach()
    tensors[0] = wide[:, ::2, :, ::2].requires_grad_()
    for a, b in zip(outputs(tensors, shape, backend=backend), expected, strict=True):
        close(a, b, "value")


@pytest.mark.parametrize("channels_last", [False, True])
def test_compile_and_export(channels_last: bool) -> None:
    shape = SHAPES["odd"]
    tensors = inputs(shape, torch.float32)
    if channels_last:
        tensors[0] = tensors[0].detach().to(memory_format=torch.channels_last).requires_grad_()
    expected = outputs(tensors, shape)

    class Layer(torch.nn.Module):
        def forward(self, *t: Any) -> Tensor:
            return large_kernel_attention(*t)

    out = torch.compile(Layer(), fullgraph=True, backend="aot_eager")(*tensors)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).float()
    for a, b in zip([out, *torch.autograd.grad(out, tensors, upstream)], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    program = torch.export.export(Layer(), tuple(t.detach() for t in tensors))
    assert torch.equal(program.module()(*[t.detach() for t in tensors]), expected[0])


def test_torchscript() -> None:
    tensors = inputs(SHAPES["odd"], torch.float32)

    @torch.jit.script
    def scripted(x: Tensor, w0: Tensor, b0: Tensor, w: Tensor, b: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
        return torch.ops.zoo.large_kernel_attention(x, w0, b0, w, b, w1, b1, 3, "cpu")[0]

    assert torch.equal(scripted(*tensors), large_kernel_attention(*tensors))


def test_meta_and_empty_batch() -> None:
    shape = SHAPES["odd"]
    meta = [t.detach().to("meta") for t in inputs(shape)]
    assert large_kernel_attention(*meta).shape == (2, 3, 9, 13)
    tensors = inputs((0, *shape[1:]))
    for backend in PATHS:
        out, dx, dw0, *_ = outputs(tensors, shape, backend=backend)
        assert out.shape == dx.shape == (0, 3, 9, 13)
        assert torch.equal(dw0, torch.zeros_like(tensors[1]))


@pytest.mark.parametrize("backend", PATHS)
def test_autocast(backend: str) -> None:
    tensors = inputs(SHAPES["van"], torch.float32)
    expected = large_kernel_attention(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        out = large_kernel_attention(tensors[0].bfloat16(), *tensors[1:], backend=backend)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert tensors[1].grad.dtype == torch.float32
    assert (out.float() - expected).abs().max() < 0.03 * expected.abs().max()


def test_same_bits_twice() -> None:
    shape = (2, 16, 15, 14, (5, 5), (7, 7), 3)
    first, second = (outputs(inputs(shape, torch.float32), shape) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 3, 9), r"x must be \[B, C, H, W\], got shape \(2, 3, 9\)"),
        (
            0,
            torch.zeros(2, 3, 9, 13, dtype=torch.int32),
            "x must be float16, bfloat16, float32 or float64, got torch.int32",
        ),
        (0, torch.zeros(2, 3, 0, 13), r"x: only the batch may be empty, got shape \(2, 3, 0, 13\)"),
        (1, torch.zeros(3, 1, 4, 4), r"conv0_weight must be \[3, 1, odd, odd\] .* got \(3, 1, 4, 4\)"),
        (3, torch.zeros(2, 1, 7, 7), r"conv_spatial_weight must be \[3, 1, odd, odd\] .* got \(2, 1, 7, 7\)"),
        (5, torch.zeros(3, 3), r"conv1_weight must be \[3, 3, 1, 1\], got \(3, 3\)"),
        (4, torch.zeros(4), r"conv_spatial_bias must be \[3\] or None, got \(4,\)"),
        (1, torch.zeros(3, 1, 5, 5).double(), "conv0_weight has dtype torch.float64, x has torch.float32"),
    ],
)
def test_errors_name_the_argument(index: int, value: Tensor, message: str) -> None:
    tensors = [t.detach() for t in inputs(SHAPES["odd"], torch.float32)]
    tensors[index] = value
    with pytest.raises(ValueError, match=f"large_kernel_attention: {message}"):
        large_kernel_attention(*tensors)


def test_other_errors() -> None:
    tensors = inputs(SHAPES["odd"], torch.float32)
    with pytest.raises(ValueError, match="large_kernel_attention: dilation must be an int >= 1, got 0"):
        large_kernel_attention(*tensors, dilation=0)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        large_kernel_attention(*tensors, backend="gpu")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this call"):
        large_kernel_attention(*(t.double() for t in tensors), backend="triton")
