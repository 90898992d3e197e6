"""HiLo attention and deformable token merging of LITv2: recorded cases with every gradient, and their contracts."""

import re
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from golden import GOLDENS, npz
from torch import Tensor

from zoo.models.litv2 import DTM, HiLo

RECORDED = sorted(p.stem for p in (GOLDENS / "ops").glob("hilo_*.npz"))
MERGED = sorted(p.stem for p in (GOLDENS / "ops").glob("litv2_dtm_*.npz"))


def grid(name: str) -> tuple[int, int]:
    height, width = name.rsplit("_", 1)[1].split("x")
    return int(height), int(width)


def check_recorded(module: nn.Module, data: dict[str, Any], name: str) -> None:
    """Compare output and gradients of a module on [B, H, W, C] with a record on [B, N, C]."""
    module.double().load_state_dict({k[2:]: v for k, v in data.items() if k.startswith("w/")})
    module.eval()
    x = data["x"].requires_grad_()
    y = module(x.unflatten(1, grid(name))).flatten(1, 2)
    y.backward(data["grad_y"])
    torch.testing.assert_close(y, data["y"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(x.grad, data["grad_x"], rtol=1e-9, atol=1e-10)
    assert {f"g/{k}" for k, _ in module.named_parameters()} == {k for k in data if k.startswith("g/")}
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, data[f"g/{key}"], rtol=1e-9, atol=1e-10, msg=key)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded(name: str, backend: str | None) -> None:
    alpha = re.search(r"alpha([\d.]+)_", name)
    window = re.search(r"_ws(\d)", name)
    assert window is not None
    module = HiLo(24, 6, int(window[1]), alpha=float(alpha[1]) if alpha else 0.5, attn_backend=backend)
    check_recorded(module, npz(f"ops/{name}.npz"), name)


@pytest.mark.parametrize("name", MERGED)
def test_recorded_merging(name: str) -> None:
    data = {key.replace("norm_layer.", "norm."): value for key, value in npz(f"ops/{name}.npz").items()}
    module = DTM(12, 24)
    check_recorded(module, data, name)
    x = data["x"].unflatten(1, grid(name)).permute(0, 3, 1, 2)
    torch.testing.assert_close(module.dconv.conv_offset(x), data["offsets"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("alpha", "low"), [(0, 0), (0.2, 2), (0.4, 4), (0.5, 6), (0.7, 8), (0.9, 10), (1, 12)])
def test_heads(alpha: float, low: int) -> None:
    module = HiLo(48, 12, 2, alpha=alpha)
    assert (module.l_heads, module.h_heads) == (low, 12 - low)
    names = {k.split(".")[0] for k in module.state_dict()}
    assert names == ({"l_q", "l_kv", "l_proj"} if low else set()) | ({"h_qkv", "h_proj"} if low < 12 else set())
    assert HiLo(48, 12, 1, alpha=alpha).h_heads == 0


def plain(m: HiLo, x: Tensor) -> Tensor:
    """The definition with windows cut out by hand, padding included."""
    B, H, W, C = x.shape
    ws, d = m.window_size, m.head_dim
    x = F.pad(x, (0, 0, 0, -W % ws, 0, -H % ws))
    Hp, Wp = x.shape[1:3]
    parts = []
    if m.h_heads:
        qkv = m.h_qkv(x).view(B, Hp // ws, ws, Wp // ws, ws, 3, m.h_heads, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = qkv.flatten(5, 6)  # (B, rows, columns, nh, ws * ws, d)
        y = ((q @ k.mT) * d**-0.5).softmax(-1) @ v
        y = y.view(B, Hp // ws, Wp // ws, m.h_heads, ws, ws, d).permute(0, 1, 4, 2, 5, 3, 6)
        parts.append(m.h_proj(y.reshape(B, Hp, Wp, m.h_heads * d)))
    if m.l_heads:
        q = m.l_q(x).view(B, Hp * Wp, m.l_heads, d).transpose(1, 2)
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), ws).flatten(2).mT if ws > 1 else x.flatten(1, 2)
        k, v = m.l_kv(pooled).view(B, -1, 2, m.l_heads, d).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT) * d**-0.5).softmax(-1) @ v
        parts.append(m.l_proj(y.transpose(1, 2).reshape(B, Hp, Wp, m.l_heads * d)))
    return torch.cat(parts, -1)[:, :H, :W]


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 10), (1, 1)], ids=str)
@pytest.mark.parametrize("window", [1, 2, 3, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_plain(alpha: float, window: int, size: tuple[int, int]) -> None:
    module = HiLo(20, 5, window, alpha=alpha).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(3, *size, 20, dtype=torch.float64, requires_grad=True)
    y, expected = module(x), plain(module, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(y)
    inputs = [x, *module.parameters()]
    pairs = zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_gradcheck() -> None:
    module = HiLo(6, 3, 2, alpha=0.5).double()
    x = torch.randn(1, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)


@pytest.mark.parametrize("module", [HiLo(16, 4, 2, alpha=0.5), HiLo(16, 4, 1), DTM(16, 8)], ids=["hilo", "ws1", "dtm"])
def test_graphs(module: nn.Module) -> None:
    module = module.eval()
    x = torch.randn(3, 6, 9, 16, requires_grad=True)
    y = module(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, y)
    torch.testing.assert_close(torch.autograd.grad(compiled.square().sum(), x)[0], dx)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), y)
    torch.testing.assert_close(torch.jit.script(module)(x), y)
    assert module.to("meta")(x.to("meta")).shape == y.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(3, 7, 9, 16)
    for module in (HiLo(16, 4, 2, alpha=0.5), DTM(16, 8).eval()):
        exact = module.double()(x.double())
        y = module.to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        assert (y.double() - exact).abs().max() <= 40 * torch.finfo(dtype).eps * exact.abs().max()
        module.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert (module(x).double() - exact).abs().max() <= 40 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_strides_and_empty_batch() -> None:
    for module in (HiLo(8, 2, 2, alpha=0.5), DTM(8, 8).eval()):
        base = torch.randn(2, 9, 10, 16)
        torch.testing.assert_close(module(base[..., ::2]), module(base[..., ::2].contiguous()))
        nchw = torch.randn(2, 8, 9, 10).permute(0, 2, 3, 1)
        torch.testing.assert_close(module(nchw), module(nchw.contiguous()))
    assert HiLo(8, 2, 2, alpha=0.5)(base[:0, ..., :8]).shape == (0, 9, 10, 8)


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_heads 3 does not divide 8 channels"):
        HiLo(8, 3, 2)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 1.5"):
        HiLo(8, 2, 2, alpha=1.5)
    with pytest.raises(ValueError, match="window_size must be at least 1, got 0"):
        HiLo(8, 2, 0)
