"""Super-token attention: recorded cases, a loop over the definition, and the contract of every op."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from golden import GOLDENS, npz
from torch import Tensor

from zoo.ops.super_token import reference as definition
from zoo.ops.super_token import super_token_attention, super_token_mapping, super_token_sampling

BACKENDS = ("reference", "cpu")
RECORDED = sorted(p.stem for p in (GOLDENS / "ops").glob("stoken_*.npz"))
SHAPES = {"square": (2, 16, 16, 12, (4, 4)), "odd": (1, 13, 18, 8, (8, 8)), "small": (3, 3, 2, 5, (4, 4)),
          "oblong": (2, 9, 14, 6, (2, 3)), "single": (1, 5, 6, 4, (1, 1))}  # fmt: skip


def recorded_output(name: str, x: Tensor, w: dict[str, Tensor], backend: str) -> Tensor:
    size = int(name.split("_s")[1].split("_")[0])
    n_iter = 2 if "iter2" in name else 1
    weights = [w.get(f"stoken_refine.{k}") for k in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")]
    if "convrefine" not in name:
        return super_token_attention(x, *weights, 3, size, n_iter=n_iter, backend=backend)
    tokens, affinity = super_token_sampling(x, size, n_iter=n_iter, backend=backend)
    y = tokens.permute(0, 3, 1, 2)
    for i in sorted({k.split(".")[1] for k in w if k.startswith("stoken_refine.")}):
        weight, bias = w[f"stoken_refine.{i}.weight"], w[f"stoken_refine.{i}.bias"]
        y = F.conv2d(y, weight, bias, padding=weight.shape[-1] // 2, groups=y.shape[1] // weight.shape[1])
    return super_token_mapping(y.permute(0, 2, 3, 1), affinity, size, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RECORDED)
def test_recorded(name: str, backend: str) -> None:
    data = npz(f"ops/{name}.npz")
    x = data["x"].requires_grad_()
    w = {k[2:]: v.requires_grad_("fold" not in k) for k, v in data.items() if k.startswith("w/")}
    y = recorded_output(name, x.permute(0, 2, 3, 1), w, backend).permute(0, 3, 1, 2)
    torch.testing.assert_close(y, data["y"], rtol=1e-9, atol=1e-9 * data["y"].std().item())
    gradients = {"grad_x": x} | {f"g/{k}": v for k, v in w.items() if f"g/{k}" in data}
    assert len(gradients) == 1 + sum(k.startswith("g/") for k in data)
    for (key, _), grad in zip(
        gradients.items(), torch.autograd.grad(y, list(gradients.values()), data["grad_y"]), strict=True
    ):
        torch.testing.assert_close(grad, data[key], rtol=1e-9, atol=1e-9 * data[key].std().item(), msg=key)


def looped_sampling(x: Tensor, th: int, tw: int, n_iter: int, scale: float) -> tuple[Tensor, Tensor]:
    """The definition pixel by pixel."""
    B, H, W, C = x.shape
    hh, ww = -(-H // th), -(-W // tw)
    x = F.pad(x, (0, 0, 0, ww * tw - W, 0, hh * th - H))
    tokens = x.view(B, hh, th, ww, tw, C).mean((2, 4))
    for _ in range(n_iter):
        affinity = torch.zeros(B, hh * th, ww * tw, 9, dtype=x.dtype)
        total, mass = torch.zeros_like(tokens), torch.zeros(B, hh, ww, 1, dtype=x.dtype)
        for b, i, j in itertools.product(range(B), range(hh * th), range(ww * tw)):
            near = [(i // th + di, j // tw + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)]
            inside = [0 <= r < hh and 0 <= c < ww for r, c in near]
            logits = [
                x[b, i, j] @ tokens[b, r, c] if ok else x.new_zeros(()) for (r, c), ok in zip(near, inside, strict=True)
            ]
            affinity[b, i, j] = (torch.stack(logits) * scale).softmax(0)
            for k, (r, c) in enumerate(near):
                if inside[k]:
                    total[b, r, c] += affinity[b, i, j, k] * x[b, i, j]
                    mass[b, r, c] += affinity[b, i, j, k]
        tokens = total / (mass + 1e-12)
    return tokens, affinity[:, :H, :W]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_iter", [1, 3])
def test_loop(n_iter: int, backend: str) -> None:
    x = torch.randn(2, 7, 10, 3, dtype=torch.float64)
    tokens, affinity = super_token_sampling(x, (2, 3), n_iter=n_iter, scale=0.7, backend=backend)
    expected = looped_sampling(x, 2, 3, n_iter, 0.7)
    torch.testing.assert_close((tokens, affinity), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(affinity.sum(-1), torch.ones(2, 7, 10, dtype=torch.float64))


def run(x: Tensor, size: tuple[int, int], backend: str | None, seed: int = 1) -> tuple[Tensor, ...]:
    """Both halves with a nonlinear step between them: outputs and the gradient of x."""
    x = x.detach().requires_grad_()
    tokens, affinity = super_token_sampling(x, size, n_iter=2, backend=backend)
    y = super_token_mapping(tokens.tanh(), affinity, size, backend=backend)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    return tokens, affinity, y, *torch.autograd.grad(y, x, grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dtypes(shape: tuple[int, int, int, int, tuple[int, int]], dtype: torch.dtype) -> None:
    """At most twice the error of plain PyTorch in the same dtype, both against float64."""
    *dims, size = shape
    x = torch.randn(dims, dtype=torch.float64).to(dtype)
    exact = run(x.double(), size, "reference")
    plain_x = x.detach().requires_grad_()
    tokens, affinity = definition.super_token_sampling(plain_x, *size, 2, dims[-1] ** -0.5)
    y = definition.super_token_mapping(tokens.tanh(), affinity, *size)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    plain = (tokens, affinity, y, *torch.autograd.grad(y, plain_x, grad))
    for backend in BACKENDS:
        for got, base, want in zip(run(x, size, backend), plain, exact, strict=True):
            assert got.dtype == dtype
            allowed = 2 * (base.double() - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
            assert (got.double() - want).abs().max() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    x = torch.randn(2, 5, 7, 3, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    affinity = torch.rand(2, 5, 7, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, a: super_token_mapping(t, a, 2, backend=backend), (tokens, affinity))
    # With scale 0 the affinity does not depend on x, so that the stopped gradient and the numerical one agree.
    assert torch.autograd.gradcheck(lambda x: super_token_sampling(x, 2, scale=0.0, backend=backend)[0], x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_affinity_is_constant(backend: str) -> None:
    x = torch.randn(1, 6, 9, 4, dtype=torch.float64, requires_grad=True)
    tokens, affinity = super_token_sampling(x, 3, backend=backend)
    assert tokens.requires_grad
    assert not affinity.requires_grad
    (dx,) = torch.autograd.grad(tokens[0, 1, 1].sum(), x)
    # The token's derivative by a pixel is the pixel's share of the token's mass.
    shares = torch.zeros(6, 9, dtype=torch.float64)
    for i, j in itertools.product(range(6), range(9)):
        k = (1 - i // 3 + 1) * 3 + (1 - j // 3 + 1)
        if abs(1 - i // 3) <= 1 and abs(1 - j // 3) <= 1:
            shares[i, j] = affinity[0, i, j, k]
    torch.testing.assert_close(dx[0], (shares / shares.sum()).unsqueeze(-1).expand(-1, -1, 4))


def test_reference_differentiates_twice() -> None:
    x = torch.randn(1, 4, 6, 3, dtype=torch.float64, requires_grad=True)
    w = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((9, 3), (9,), (3, 3), (3,))]
    y = super_token_attention(x, *w, 1, 2, backend="reference")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert all(g.isfinite().all() for g in torch.autograd.grad(dx.square().sum(), [x, *w]))


def test_opcheck() -> None:
    x = torch.randn(2, 5, 7, 3, requires_grad=True)
    tokens, affinity, mass = torch.ops.zoo.super_token_sampling(x, 2, 3, 2, 0.5, "cpu")
    tokens, soft = tokens.detach().requires_grad_(), affinity.detach().requires_grad_()
    grad = torch.randn(2, 5, 7, 3)
    torch.library.opcheck(torch.ops.zoo.super_token_sampling.default, (x, 2, 3, 2, 0.5, "cpu"))
    torch.library.opcheck(torch.ops.zoo.super_token_mapping.default, (tokens, soft, 2, 3, "cpu"))
    torch.library.opcheck(torch.ops.zoo.super_token_mapping.default, (tokens, affinity.detach(), 2, 3, "cpu"))
    torch.library.opcheck(
        torch.ops.zoo.super_token_sampling_backward.default,
        (torch.randn(2, 3, 3, 3), affinity.detach(), mass.detach(), 2, 3, "cpu"),
    )
    for need in (True, False):
        torch.library.opcheck(
            torch.ops.zoo.super_token_mapping_backward.default,
            (grad, tokens.detach(), affinity.detach(), 2, 3, need, "cpu"),
        )


class Attention(torch.nn.Module):
    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.qkv = torch.nn.Linear(dim, 3 * dim)
        self.proj = torch.nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        w = (self.qkv.weight, self.qkv.bias, self.proj.weight, self.proj.bias)
        return super_token_attention(x, *w, 2, self.size)


def test_compile() -> None:
    module, x = Attention(8, 4), torch.randn(2, 10, 9, 8)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for m in (module, compiled):
        a = x.clone().requires_grad_()
        y = m(a)
        result = (y, *torch.autograd.grad(y.square().sum(), [a, *module.parameters()]))
        if m is module:
            expected = result
    torch.testing.assert_close(result, expected)


def test_export() -> None:
    module, x = Attention(8, 4).eval(), torch.randn(2, 10, 9, 8)
    exported = torch.export.export(module, (x,))
    assert any("super_token_sampling" in str(n.target) for n in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), module(x))


def test_dynamic_shapes() -> None:
    """One exported program for any batch and image size."""
    x, dynamic = torch.randn(2, 10, 13, 8), torch.export.Dim.DYNAMIC
    module = Attention(8, 4).eval()
    program = torch.export.export(module, (x,), dynamic_shapes=({0: dynamic, 1: dynamic, 2: dynamic},)).module()
    other = torch.randn(3, 9, 17, 8)
    torch.testing.assert_close(program(other), module(other))


def test_script() -> None:
    def halves(x: Tensor) -> Tensor:
        tokens, affinity, _ = torch.ops.zoo.super_token_sampling(x, 4, 4, 1, 0.5, "cpu")
        return torch.ops.zoo.super_token_mapping(tokens, affinity.detach(), 4, 4, "cpu")

    x = torch.randn(1, 6, 9, 4)
    tokens, affinity = super_token_sampling(x, 4, scale=0.5)
    torch.testing.assert_close(torch.jit.script(halves)(x), super_token_mapping(tokens, affinity, 4))


def test_meta() -> None:
    tokens, affinity = super_token_sampling(torch.empty(2, 13, 18, 6, device="meta"), (4, 5))
    assert (tokens.shape, affinity.shape) == ((2, 4, 4, 6), (2, 13, 18, 9))
    assert super_token_mapping(tokens, affinity, (4, 5)).shape == (2, 13, 18, 6)


def test_autocast() -> None:
    x = torch.randn(2, 9, 8, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, affinity = super_token_sampling(x, 3)
        y = super_token_mapping(tokens, affinity, 3)
    assert tokens.dtype == affinity.dtype == y.dtype == torch.bfloat16
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert dx.dtype == torch.float32
    exact = super_token_sampling(x, 3)[0]
    torch.testing.assert_close(tokens.float(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    """Channel slices, channels-first views and non-unit last strides give the numbers of contiguous tensors."""
    base = torch.randn(2, 9, 14, 12)
    views = {
        "slice": base[..., 3:9],
        "step": base[..., ::2],
        "nchw": torch.randn(2, 6, 9, 14).permute(0, 2, 3, 1),
        "crop": base[:, 1:8, 2:11, :6],
    }
    for name, x in views.items():
        for got, want in zip(run(x, (3, 4), backend), run(x.contiguous(), (3, 4), backend), strict=True):
            torch.testing.assert_close(got, want, msg=name)


def test_repeats_bitwise() -> None:
    x = torch.randn(5, 56, 48, 32)  # several chunks of images
    first, second = run(x, (8, 8), "cpu"), run(x, (8, 8), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    one = run(x[3:4], (8, 8), "cpu")
    torch.testing.assert_close(one[2], first[2][3:4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    x = torch.randn(0, 9, 8, 4, requires_grad=True)
    tokens, affinity = super_token_sampling(x, 4, backend=backend)
    y = super_token_mapping(tokens, affinity, 4, backend=backend)
    assert (tokens.shape, y.shape) == ((0, 3, 2, 4), (0, 9, 8, 4))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_errors() -> None:
    x = torch.randn(1, 8, 8, 4)
    tokens, affinity = super_token_sampling(x, 4)
    with pytest.raises(
        ValueError, match="super_token_sampling: token_size must be an int of at least 1 or 2 of them, got 0"
    ):
        super_token_sampling(x, 0)
    with pytest.raises(ValueError, match=r"super_token_sampling: x must be \[B, H, W, C\], got shape \(8, 8, 4\)"):
        super_token_sampling(x[0], 4)
    with pytest.raises(ValueError, match="super_token_sampling: n_iter must be at least 1, got 0"):
        super_token_sampling(x, 4, n_iter=0)
    with pytest.raises(
        ValueError, match="super_token_sampling: x must be float16, bfloat16, float32 or float64, got torch.int64"
    ):
        super_token_sampling(x.long(), 4)
    with pytest.raises(ValueError, match=r"super_token_mapping: an affinity of shape .*\(1, 4, 4, 'C'\), got"):
        super_token_mapping(tokens, affinity, 2)
    with pytest.raises(ValueError, match="super_token_mapping: affinity must be"):
        super_token_mapping(tokens, affinity[..., :8], 4)
    with pytest.raises(ValueError, match="super_token_attention: num_heads 3 does not divide 4 channels"):
        super_token_attention(x, torch.randn(12, 4), None, torch.randn(4, 4), None, 3, 4)
    with pytest.raises(ValueError, match="super_token_attention: qkv_weight must be"):
        super_token_attention(x, torch.randn(8, 4), None, torch.randn(4, 4), None, 2, 4)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        super_token_sampling(x, 4, backend="cuda")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run"):
        super_token_sampling(x.double(), 4, backend="triton")
