"""LITv2: published keys and configurations, and timm's contract on shrunken models."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from dialects import written
from golden import GOLDENS, filled, keys, save_checkpoint
from timm.models._manipulate import group_parameters
from torch import Tensor

from zoo.models.litv2 import DIALECTS, LITv2, checkpoint_filter_fn, deform_conv

VARIANTS = {v["name"]: v for v in json.loads((GOLDENS / "litv2/variants.json").read_text())["variants"]}
KEYS = sorted(path.name.removesuffix(".keys.json") for path in (GOLDENS / "litv2").glob("*.keys.json"))


def arguments(recorded: str) -> tuple[str, dict[str, Any]]:
    """The model's name and constructor arguments behind a recorded name."""
    found = re.fullmatch(r"(litv2_[smb](?:_384)?)(?:_alpha([\d.]+)|_(det|seg)_ws(\d))?", recorded)
    assert found is not None
    name, alpha, dense, window = found.groups()
    if dense:
        return name, {"dense": True, "local_ws": int(window), "num_classes": 0}
    return name, {"alpha": float(alpha)} if alpha else {}


def shrunken(name: str = "litv2_s", **kwargs: Any) -> LITv2:
    args = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    return timm.create_model(name, **(args | kwargs))


def published(name: str) -> dict[str, Tensor]:
    weights = filled(f"litv2/{name}")
    return {key: weights.get(key, torch.tensor(0)) for key, *_ in keys(f"litv2/{name}")}


@pytest.mark.parametrize("recorded", KEYS)
def test_published_keys(recorded: str) -> None:
    """Every published tensor has its place and shape."""
    name, args = arguments(recorded)
    model = timm.create_model(name, device="meta", **args)
    entries = {k: torch.empty(shape, device="meta") for k, shape, _ in keys(f"litv2/{recorded}")}
    renamed = checkpoint_filter_fn(entries, model)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert checkpoint_filter_fn(renamed, model) == renamed


@pytest.mark.parametrize("recorded", VARIANTS)
def test_variant(recorded: str) -> None:
    facts = VARIANTS[recorded]
    name, args = arguments(recorded)
    model = timm.create_model(name, device="meta", **args)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == facts["params_measured"]
    if "lofi_heads_stage3" in facts:
        attn = model.stages[2].blocks[0].attn
        assert (attn.l_heads, attn.h_heads) == (facts["lofi_heads_stage3"], facts["hifi_heads_stage3"])
        return
    cfg = model.pretrained_cfg
    assert (cfg["url"], cfg["input_size"][-1]) == (facts["url"], facts["img_size"])
    assert (cfg["crop_pct"], cfg.get("crop_mode")) == (
        (1.0, "squash") if facts["img_size"] == 384 else (0.875, "center")
    )
    assert {f"top1: {facts['top1']}", f"flops: {facts['flops_G']}G"} <= set(cfg["notes"])


def test_detector_file(tmp_path: Path) -> None:
    """A detector's file gives its backbone; a segmentor's has a norm on the first output too."""
    norms = (0, 1, 2, 3)
    source = shrunken(dense=True, dense_norms=norms, local_ws=4)
    for p in source.parameters():
        nn.init.normal_(p, std=0.1)
    weights = {k: v.clone() for k, v in source.state_dict().items()}
    entries = {f"backbone.{k}": v for k, v in written(weights, DIALECTS[1]).items()}
    path = save_checkpoint(tmp_path / "segmentor.pth", entries | {"neck.conv.weight": torch.zeros(3)}, "state_dict")
    loaded = shrunken(
        pretrained=True, pretrained_cfg_overlay={"file": path}, dense=True, dense_norms=norms, local_ws=4,
        features_only=True,
    )  # fmt: skip
    x = torch.randn(2, 3, 70, 91)
    for got, want in zip(
        loaded.eval()(x), source.eval().forward_intermediates(x, intermediates_only=True), strict=True
    ):
        assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="keys of the file are not in the model"):
        shrunken(pretrained=True, pretrained_cfg_overlay={"file": path}, dense=True, local_ws=4)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "state_dict_ema", None])
def test_wrappers(wrapper: str | None, tmp_path: Path) -> None:
    source = shrunken()
    for p in source.parameters():
        nn.init.normal_(p, std=0.1)
    path = save_checkpoint(tmp_path / "own.pth", {f"module.{k}": v for k, v in source.state_dict().items()}, wrapper)
    loaded = shrunken(pretrained=True, pretrained_cfg_overlay={"file": path})
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in source.state_dict().items())


def test_loading_refuses(tmp_path: Path) -> None:
    source = shrunken(num_classes=7)
    path = save_checkpoint(tmp_path / "seven.pth", source.state_dict(), "model")
    with pytest.raises(RuntimeError, match="7 classes.*1000"):
        shrunken(pretrained=True, pretrained_cfg_overlay={"file": path})
    fresh = shrunken(pretrained=True, pretrained_cfg_overlay={"file": path}, num_classes=5)
    assert fresh.head.fc.weight.shape[0] == 5
    assert torch.equal(fresh.norm.weight, source.norm.weight)
    with pytest.raises(RuntimeError, match="keys of the model are not in the file"):
        shrunken(pretrained=True, pretrained_cfg_overlay={"file": path}, num_classes=7, alpha=0.5, depths=(1, 1, 2, 1))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (128, 32), (61, 90)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_sizes(size: tuple[int, int], batch: int) -> None:
    """Maps shrink as the patches round up and the token merging rounds down."""
    model = shrunken().eval()
    features = model.forward_features(torch.randn(batch, 3, *size))
    height, width = (-(-s // 4) // 8 for s in size)
    assert features.shape == (batch, 128, height, width)
    assert model.forward_head(features).shape == (batch, 1000)


def test_batch_consistency() -> None:
    """Odd batches, and the same image at any place of a batch."""
    model = shrunken().eval()
    x = torch.randn(5, 3, 64, 96)
    torch.testing.assert_close(model(x)[3:4], model(x[3:4]), rtol=1e-4, atol=1e-5)


def test_features() -> None:
    x = torch.randn(2, 3, 64, 96)
    model = shrunken(features_only=True, out_indices=(1, 3)).eval()
    assert [f.shape[1:] for f in model(x)] == [(32, 8, 12), (128, 2, 3)]
    assert model.feature_info.reduction() == [8, 32]
    whole = shrunken().eval()
    final, taps = whole.forward_intermediates(x)
    assert torch.equal(final, whole.forward_features(x))
    normed = whole.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[3], final)
    assert torch.equal(normed[2], taps[2])


def test_dense_features() -> None:
    """The first output has no norm, the others have their own; unused norms go when the model is pruned."""
    x = torch.randn(1, 3, 64, 64)
    model = shrunken(dense=True).eval()
    outputs = model.forward_intermediates(x, intermediates_only=True)
    raw = shrunken(dense=True, dense_norms=()).eval()
    raw.load_state_dict({k: v for k, v in model.state_dict().items() if ".out_norm." not in k})
    plain = raw.forward_intermediates(x, intermediates_only=True)
    assert torch.equal(outputs[0], plain[0])
    for i in (1, 2, 3):
        want = model.stages[i].out_norm(plain[i].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(outputs[i], want)
    model.prune_intermediate_layers([0, 2])
    assert [k for k in model.state_dict() if ".out_norm." in k] == [
        f"stages.2.out_norm.{p}" for p in ("weight", "bias")
    ]
    assert torch.equal(model.forward_intermediates(x, [0, 2], intermediates_only=True)[1], outputs[2])
    assert torch.equal(model.forward_features(x), outputs[2])


def test_overrides() -> None:
    x = torch.randn(2, 4, 64, 64)
    model = shrunken(in_chans=4, num_classes=0, global_pool="", local_ws=(0, 0, 3, 2), drop_path_rate=0.2).eval()
    assert model(x).shape == (2, 128, 2, 2)
    model.reset_classifier(6, "avg")
    assert model(x).shape == (2, 6)
    assert model.stages[3].blocks[0].drop_path.drop_prob == pytest.approx(0.2)
    reference = shrunken(in_chans=4, attn_backend="reference").eval()
    chosen = shrunken(in_chans=4).eval()
    chosen.load_state_dict(reference.state_dict())
    torch.testing.assert_close(chosen(x), reference(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="'triton' cannot run"):
        shrunken(attn_backend="triton").double()(x[:, :3].double())
    with pytest.raises(TypeError):
        shrunken(no_such_argument=1)


def test_training_step() -> None:
    """The offsets start at zero, so that a fresh token merging is an ordinary 2x2 convolution, and they learn."""
    x = torch.randn(3, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = shrunken().train()
        model.set_grad_checkpointing(checkpointing)
        model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None and g.isfinite().all() for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    merging = model.stages[1].downsample.dconv
    assert merging.conv_offset.weight.grad.abs().max() > 0
    tokens = torch.randn(2, 16, 9, 8)
    expected = nn.functional.conv2d(tokens, merging.weight, merging.bias, stride=2)
    torch.testing.assert_close(merging(tokens), expected, rtol=1e-4, atol=1e-5)


def test_layer_groups() -> None:
    model = shrunken(depths=(2, 1, 1, 1))
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    order = ["stem.proj.weight"] + [f"stages.{i}.blocks.{j}.norm2.weight" for i, j in ((0, 0), (0, 1), (1, 0))]
    assert [groups[name] for name in order] == [0, 1, 2, 3]
    assert groups["stages.1.downsample.dconv.weight"] == groups["stages.1.blocks.0.norm2.weight"]
    assert groups["head.fc.weight"] == max(groups.values())


def test_low_precision() -> None:
    model = shrunken().eval()
    x = torch.randn(2, 3, 64, 96)
    exact = model(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            mixed = model(x)
        converted = model.to(dtype)(x.to(dtype))
        model.float()
        assert mixed.dtype == converted.dtype == dtype
        for y in (mixed, converted):
            torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.02)


def test_compile_and_export() -> None:
    model = shrunken().eval()
    x = torch.randn(3, 3, 68, 80)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deformable_convolution(dtype: torch.dtype) -> None:
    """torchvision's numbers and gradients, for taps that leave the map too, and a floored odd side."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 13, 22), (2, 8, 6, 11), (5, 6, 2, 2), (5,))
    inputs = [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]
    inputs[1] = (5 * inputs[1]).detach().requires_grad_()
    found = deform_conv(*inputs)
    x, offset, weight, bias = inputs
    wanted = torchvision.ops.deform_conv2d(x, offset, weight, bias, stride=2)
    assert not torch.allclose(wanted, nn.functional.conv2d(x, weight, bias, 2), atol=0.1)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found, wanted, **tolerance)
    out = torch.randn(found.shape, generator=generator, dtype=dtype)
    for a, b in zip(*(torch.autograd.grad(y, inputs, out) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_offsets_of_a_diverged_model(value: float) -> None:
    """They end in numbers that say so, not in the process's end."""
    x, offset = torch.randn(1, 4, 8, 8, requires_grad=True), torch.zeros(1, 8, 4, 4)
    offset[0, 3, 1, 2] = value
    y = deform_conv(x, offset.requires_grad_(), torch.ones(2, 4, 2, 2), torch.zeros(2))
    y.sum().backward()
    assert [tuple(i) for i in y[0, 0].isnan().nonzero().tolist()] == ([] if value == 1e30 else [(1, 2)])
