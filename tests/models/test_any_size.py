"""One traced, compiled or exported program for every size: padding that comes and goes is no branch in it."""

from typing import Any

import pytest
import timm
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torchvision.models.feature_extraction import create_feature_extractor

import zoo
from zoo.ops.maps import crop_map, pad_map, pad_same

# sides that are multiples of patch, merging, window, region and kernel x dilation, and that are none of one or another
SIZES = [(2, 72, 56), (3, 64, 96), (2, 100, 75), (4, 128, 128), (3, 61, 224), (2, 33 + 32, 200)]
# forms of a family that pad, resize or scale in other ways than its row in FAMILIES
FORMS: dict[str, dict[str, Any]] = {
    "vitrpb_small": {"depth": 1, "embed_dim": 24, "num_heads": 2},
    "zoo_davit_base_fl": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 4)},
    "zoo_maxvit_pico_rw_256": {"depths": (1, 1, 1, 1), "embed_dims": (32, 32, 32, 64)},
    "zoo_maxvit_tiny_tv_224": {"depths": (1, 1, 1, 1), "embed_dims": (32, 32, 32, 64)},
    "zoo_haloregnetz_b": {},
    "zoo_lamhalobotnet50ts_256": {},
    "biformer_stl_nchw": {"depths": (1, 1, 1, 1), "embed_dims": (32, 32, 32, 32), "num_classes": 7},
}
# the smallest side whose last map has more than one pixel: PyTorch compiles and exports sides of 1 apart
SMALLEST = {"litv2": 61, "biformer_stl_nchw": 64, "soft": 61, "soft_norm": 61, "sgformer": 61}


def built(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    small = FAMILIES[name].shrunk if name in FAMILIES else None
    if small is None:
        return timm.create_model(name, **{**FORMS[name], **kwargs}).eval()
    return timm.create_model(small.name, **{**small.args, **kwargs}).eval()


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def exported(model: nn.Module, smallest: int) -> nn.Module:
    sides = [torch.export.Dim(name, min=smallest, max=4096) for name in ("height", "width")]
    dynamic = {0: torch.export.Dim("batch", min=1), 2: sides[0], 3: sides[1]}
    return torch.export.export(model, (images(2, 160, 224),), dynamic_shapes=(dynamic,)).module()


@pytest.mark.parametrize("name", [*FAMILIES, *FORMS])
def test_export_serves_every_size(name: str) -> None:
    model, smallest = built(name), SMALLEST.get(name, 33)
    program = exported(model, smallest)
    with torch.no_grad():
        for batch, height, width in [*SIZES, (1, smallest, smallest + 4), (1, 224, 224)]:
            if min(height, width) >= smallest:
                x = images(batch, height, width)
                torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_at_most_twice(family: str) -> None:
    model = built(family)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for size in SIZES:
            torch.testing.assert_close(compiled(images(*size)), model(images(*size)), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes of symbolic algebra and of a C++ compiler
@pytest.mark.parametrize("family", FAMILIES)
def test_inductor(family: str) -> None:
    model = built(family, drop_path_rate=0.0)
    torch._dynamo.reset()
    # without the option PyTorch 2.14 cannot order strides that are symbols, of timm's ConvNeXt either
    compiled = torch.compile(model, dynamic=True, options={"strict_output_strides": True})
    with torch.no_grad():
        for size in SIZES[:2]:
            torch.testing.assert_close(compiled(images(*size)), model(images(*size)), rtol=1e-4, atol=1e-5)
    for size in SIZES[:2]:
        losses = [f(images(*size)).square().sum() for f in (compiled, model)]
        grads = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in losses]
        for ours, theirs in zip(*grads, strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max() + 1e-6))


@pytest.mark.parametrize("name", [*FAMILIES, *FORMS])
def test_plain_fx(name: str) -> None:
    model = built(name)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        for size in SIZES[:3]:
            torch.testing.assert_close(traced(images(*size)), model(images(*size)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*FAMILIES, *FORMS])
def test_jit_trace(name: str) -> None:
    model, x = built(name), images(2, 72, 100)
    traced = torch.jit.trace(model, x)  # traces twice and compares
    torch.testing.assert_close(traced(x.flip(0)), model(x.flip(0)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_torchvision_features(family: str) -> None:
    model = built(family, drop_path_rate=0.1)
    nodes = {info["module"]: str(i) for i, info in enumerate(model.feature_info)}  # type: ignore[union-attr, arg-type]
    extractor = create_feature_extractor(model, nodes)
    with torch.no_grad():
        hooked = built(family, features_only=True, feature_cls="hook", out_indices=tuple(range(len(nodes))))
        for ours, theirs in zip(extractor(images(2, 72, 56)).values(), hooked(images(2, 72, 56)), strict=True):
            torch.testing.assert_close(ours, theirs)
    extractor.train()
    sum(v.sum() for v in extractor(images(2, 72, 56)).values()).backward()  # type: ignore[union-attr]
    assert any(p.grad is not None for p in extractor.parameters())


@pytest.mark.parametrize("op", ["neighborhood_attention_qkvpacked", "window_attention_qkvpacked"])
def test_fx_sees_a_call_of_the_public_op(op: str) -> None:
    function = getattr(zoo.ops, op)

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x, 3)

    traced = torch.fx.symbolic_trace(Module())
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [function]
    x = torch.randn(1, 6, 6, 3, 2, 4)
    torch.testing.assert_close(traced(x), function(x, 3))


def test_ops_obey_the_default_device() -> None:
    with torch.device("cpu"):  # a mode, which every public function asks first
        x = torch.randn(1, 6, 6, 3, 2, 4)
        compiled = torch.compile(zoo.ops.window_attention_qkvpacked, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, 3), zoo.ops.window_attention_qkvpacked(x, 3))


@pytest.mark.parametrize("size", [(14, 21), (15, 20), (1, 7)])
def test_pad_and_crop(size: tuple[int, int]) -> None:
    x = torch.arange(2.0 * size[0] * size[1] * 3).reshape(2, *size, 3) + 1
    for padded in (pad_map(x, 7), pad_map(x, least=17), pad_map(x)):
        assert torch.equal(crop_map(padded, *size), x)
        assert padded.sum() == x.sum()
    assert pad_map(x, 7).shape[1:3] == tuple(-(-n // 7) * 7 for n in size)
    assert pad_map(x, least=17).shape[1:3] == tuple(max(n, 17) for n in size)
    assert pad_map(x) is x
    ours = pad_same(x, 3, 2).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, timm.layers.padding.pad_same(x.permute(0, 3, 1, 2), [3, 3], [2, 2]))


@pytest.mark.parametrize("op", ["pad_map", "crop_map"])
def test_opaque_padding(op: str) -> None:
    x = torch.randn(2, 5, 6, 3, dtype=torch.float64, requires_grad=True)
    box = (8, 9, 2, 1) if op == "pad_map" else (3, 4, 1, 2)
    function = getattr(torch.ops.zoo, op)
    torch.library.opcheck(function.default, (x, *box))
    torch.autograd.gradcheck(lambda x: function(x, *box), x)
    torch.autograd.gradgradcheck(lambda x: function(x, *box), x)
