"""VAN: the original's files and modules, every size, and the model contract."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden import GOLDENS, assert_matches, filled, image, keys, npz, samples, save_checkpoint
from torch import Tensor, nn

import zoo  # noqa: F401
from zoo.models.van import Attention, VANBlock, checkpoint_filter_fn

NAMES = [f"van_b{i}" for i in range(7)]
TINY = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_classes": 5}


def variant(name: str) -> dict[str, Any]:
    data = json.loads((GOLDENS / "van" / "variants.json").read_text())
    return next(v for v in data["variants"] if v["name"] == name)


def check_stages(features: list[Tensor], data: dict[str, Any], suffix: str = "") -> None:
    for i, feature in enumerate(features):
        key = f"stage{i + 1}{suffix}"
        assert list(feature.shape) == data[f"{key}.shape"].tolist()
        actual = samples(feature, data[f"{key}.idx"])
        assert_matches(actual, data[f"{key}.val_f64"], float(data[f"{key}.std"]), 1e-9, key)


@pytest.mark.parametrize("how", [{"features_only": True}, {"num_classes": 0}])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_recorded_segmentation_backbone(how: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    """The backbone of VAN-Segmentation has no head, and another epsilon; a segmentor's file has it under a prefix."""
    data = npz("van/van_b0_seg_backbone.192x256.npz")
    state = {prefix + k: v for k, v in filled("van/van_b0_seg_backbone").items()}
    if prefix:
        state["decode_head.conv_seg.weight"] = torch.zeros(150, 512, 1, 1)
    overlay = {"file": save_checkpoint(tmp_path / "file.pth", state, "state_dict")}
    model = timm.create_model("van_b0", pretrained=True, pretrained_cfg_overlay=overlay, norm_eps=1e-5, **how)
    model = model.double().eval()
    x = image(192, 256, dtype=torch.float64)
    with torch.no_grad():
        check_stages(model(x) if "features_only" in how else model.forward_intermediates(x)[1], data)


@pytest.mark.parametrize("name", NAMES)
def test_keys_parameters_and_configuration(name: str) -> None:
    model = timm.create_model(name, device="meta")
    original = {k: torch.empty(shape, device="meta") for k, shape, _ in keys(f"van/{name}")}
    converted = checkpoint_filter_fn(original, model)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert checkpoint_filter_fn(converted, model).keys() == converted.keys()

    published = variant(name)
    parameters = sum(p.numel() for p in model.parameters())
    assert round(parameters / 1e6, 3) == published["params_measured"]
    cfg = model.pretrained_cfg
    assert cfg["url"] == (published["url"] or "")
    assert cfg["license"] == "apache-2.0"
    assert cfg["crop_pct"] == 0.9
    assert (f"top1: {published['top1']}" in cfg["notes"]) == (published["top1"] is not None)
    assert cfg["tag"] == ("in1k" if published["url"] else "in22k")


def test_an_in22k_file_brings_its_own_head(tmp_path: Path) -> None:
    model = timm.create_model("van_b4", **{**TINY, "num_classes": 17})
    overlay = {"file": save_checkpoint(tmp_path / "van_b4_22k.pth", model.state_dict(), "state_dict")}
    small = {k: v for k, v in TINY.items() if k != "num_classes"}
    assert timm.create_model("van_b4", pretrained=True, pretrained_cfg_overlay=overlay, **small).num_classes == 17
    asked = timm.create_model("van_b4", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, **small)
    assert asked.get_classifier().out_features == 3
    assert torch.equal(asked.stages[0].norm.weight, model.stages[0].norm.weight)


def test_wrong_files_say_why(tmp_path: Path) -> None:
    state = filled("van/van_b0")
    state["head.weight"], state["head.bias"] = torch.zeros(10, 256), torch.zeros(10)
    overlay = {"file": save_checkpoint(tmp_path / "ten.pth", state, "state_dict")}
    with pytest.raises(RuntimeError, match="van_b0: the checkpoint's head has 10 classes, the model's 1000"):
        timm.create_model("van_b0", pretrained=True, pretrained_cfg_overlay=overlay)
    with pytest.raises(RuntimeError, match="keys of the file are not in the model"):
        timm.create_model("van_b1", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)


def own_name(key: str) -> str:
    """Of a parameter of a recorded block."""
    return re.sub(r"layer_scale_(\d)$", r"ls\1.gamma", key.replace("dwconv.dwconv", "dwconv"))


def load_recorded(module: nn.Module, data: dict[str, Any]) -> nn.Module:
    state = {own_name(k[2:]): v for k, v in data.items() if k.startswith("w/")}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("num_batches_tracked" in k for k in missing)
    return module.double().eval()


@pytest.mark.parametrize("name", ["van_attention_14x14", "van_block_14x14"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_recorded_modules(name: str, backend: str) -> None:
    data = npz(f"ops/{name}.npz")
    double = {"dtype": torch.float64, "attn_backend": backend}
    module = Attention(8, **double) if "attention" in name else VANBlock(8, 4, **double)
    load_recorded(module, data)
    x = data["x"].clone().requires_grad_()
    out = module(x)
    assert_matches(out, data["y"], 1.0, 1e-12, "y")
    out.backward(data["grad_y"])
    assert_matches(x.grad, data["grad_x"], data["grad_x"].abs().max().item(), 1e-9, "grad_x")
    gradients = {own_name(k[2:]): v for k, v in data.items() if k.startswith("g/")}
    for key, parameter in module.named_parameters():
        expected = gradients[key]
        assert_matches(parameter.grad, expected, expected.abs().max().item(), 1e-9, key)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (65, 96), (197, 251)])
def test_any_size(size: tuple[int, int]) -> None:
    model = timm.create_model("van_b0", **TINY)
    out = model(torch.randn(3, 3, *size))
    assert out.shape == (3, 5)
    out.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    features = model.forward_intermediates(torch.randn(3, 3, *size), intermediates_only=True)
    for feature, info in zip(features, model.feature_info, strict=True):
        assert feature.shape[1] == info["num_chs"]
        assert feature.shape[2:] == tuple(-(-s // info["reduction"]) for s in size)


def test_features_and_pruning() -> None:
    x = torch.randn(2, 3, 64, 96)
    backbone = timm.create_model("van_b0", features_only=True, **{k: v for k, v in TINY.items() if k != "num_classes"})
    assert backbone.feature_info.channels() == [8, 16, 24, 32]
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    assert [f.shape[-1] for f in backbone(x)] == [24, 12, 6, 3]
    model = timm.create_model("van_b0", **TINY).eval()
    final, taken = model.forward_intermediates(x, indices=[1, 3])
    assert len(taken) == 2
    assert torch.equal(taken[-1], final)
    assert torch.equal(model.forward_head(final), model(x))
    early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) == 2
    assert model(x).shape == (2, 16, 8, 12)
    assert torch.equal(model.forward_intermediates(x, indices=[0], intermediates_only=True)[0], early[0])


def test_reset_classifier_and_pooling() -> None:
    model = timm.create_model("van_b0", **TINY)
    x = torch.randn(2, 3, 64, 64)
    model.reset_classifier(9)
    assert model(x).shape == (2, 9)
    model.reset_classifier(4, "max")
    assert model(x).shape == (2, 4)
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 32, 2, 2)


def test_constructor_arguments() -> None:
    model = timm.create_model(
        "van_b0", **{**TINY, "num_classes": 0}, in_chans=1, drop_path_rate=0.2, drop_rate=0.1, proj_drop_rate=0.1,
        layer_scale_init=0.5, norm_eps=1e-5, attn_backend="reference", mlp_ratios=(2, 2, 2, 2),
    )  # fmt: skip
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 32)
    block = model.stages[3].blocks[0]
    assert block.drop_path.drop_prob == pytest.approx(0.2)
    assert block.ls1.gamma.unique().tolist() == [0.5]
    assert block.attn.spatial_gating_unit.attn_backend == "reference"
    assert model.stages[0].norm.eps == 1e-5
    assert {"stages.0.blocks.0.ls1.gamma"} < model.no_weight_decay()
    with pytest.raises(TypeError, match="no_such"):
        timm.create_model("van_b0", no_such=1)
    with pytest.raises(ValueError, match="must have one length"):
        timm.create_model("van_b0", depths=(1, 1))


def test_gradient_checkpointing_changes_nothing() -> None:
    model = timm.create_model("van_b0", **TINY)
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_layer_groups_are_ordered_and_complete() -> None:
    from timm.models import group_parameters

    model = timm.create_model("van_b0", **{**TINY, "depths": (1, 2, 1, 1)})
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert len(groups) == sum(1 for _ in model.parameters())
    order = ["stem.proj.weight", "stages.0.blocks.0.norm1.weight", "stages.1.blocks.0.norm1.weight"]
    order += ["stages.1.blocks.1.norm1.weight", "stages.2.blocks.0.norm1.weight", "head.fc.weight"]
    layers = [groups[k] for k in order]
    assert layers == sorted(set(layers))
    assert groups["stages.1.downsample.proj.weight"] <= groups["stages.1.blocks.0.norm1.weight"]
    assert groups["stages.1.norm.weight"] >= groups["stages.1.blocks.1.norm1.weight"]
    assert groups["stages.1.norm.weight"] < groups["stages.2.blocks.0.norm1.weight"]


def test_backends_channels_last_and_bfloat16() -> None:
    model = timm.create_model("van_b0", **TINY).eval()
    reference = timm.create_model("van_b0", **TINY, attn_backend="reference").eval()
    reference.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
        assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
