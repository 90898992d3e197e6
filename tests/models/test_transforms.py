"""torch.func and PyTorch's quantization of graphs over every family."""

import copy

import pytest
import timm
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.func import functional_call, grad, vmap

import zoo  # noqa: F401


def built(family: str) -> nn.Module:
    torch.manual_seed(0)
    small = FAMILIES[family].shrunk
    return timm.create_model(small.name, **small.args).eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 72, 56, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_single_images(family: str) -> None:
    """vmap over grad gives what images give one by one."""
    model, x = built(family).double(), images(3).double()
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, (weights, buffers), (image[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for i, image in enumerate(x):
        expected = torch.autograd.grad(loss(weights, image), list(weights.values()), materialize_grads=True)
        for name, wanted in zip(weights, expected, strict=True):
            torch.testing.assert_close(found[name][i], wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_graph(family: str) -> None:
    model = built(family)
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (images(1),))
    with torch.no_grad():
        for _ in range(2):
            prepared(images(4))
        quantized = convert_fx(prepared)
        expected = model(images(4))
        error = (quantized(images(4)) - expected).norm() / expected.norm()
    assert any("quantized" in type(m).__module__ for m in quantized.modules())
    assert 0 < error < 0.5
