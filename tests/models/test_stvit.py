"""STViT: published keys and configurations, and timm's contract on shrunken models."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from golden import GOLDENS, filled, keys, npz, save_checkpoint
from timm.models import FeatureInfo
from timm.models._manipulate import group_parameters
from torch import Tensor

from zoo.models.stvit import Block, STViT, checkpoint_filter_fn

VARIANTS = {v["name"]: v for v in json.loads((GOLDENS / "svit/variants.json").read_text())["variants"]}


def shrunken(name: str = "stvit_small", **kwargs: Any) -> STViT:
    args = {"embed_dim": (16, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "projection": 40}
    return timm.create_model(name, **(args | kwargs))


def published(name: str) -> dict[str, Tensor]:
    """A state_dict as the original saves it, with its constant kernels and counters."""
    weights = filled(f"svit/{name}")
    identity = torch.eye(9).view(9, 1, 3, 3)
    entries = (
        (key, weights.get(key, identity if "fold" in key else torch.tensor(0))) for key, *_ in keys(f"svit/{name}")
    )
    return dict(entries)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str) -> None:
    """Every published tensor has its place and shape, and the configuration is the published one."""
    facts = VARIANTS[name]
    model = timm.create_model(name, device="meta")
    entries = {k: torch.empty(shape, device="meta") for k, shape, _ in keys(f"svit/{name.removesuffix('_384')}")}
    renamed = checkpoint_filter_fn(entries, model)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert checkpoint_filter_fn(renamed, model) == renamed
    params = sum(p.numel() for p in model.parameters())
    assert round(params / 1e6, 3) == facts["params_measured_trainable"]
    cfg = model.pretrained_cfg
    assert (cfg["url"], cfg["input_size"]) == (facts["url"], (3, facts["img_size"], facts["img_size"]))
    assert cfg["crop_pct"] == (0.875 if facts["img_size"] == 224 else 1.0)
    assert f"top1: {facts['top1']}" in cfg["notes"]
    assert f"flops: {facts['flops_G']}G" in cfg["notes"]


def test_recorded_block() -> None:
    """A block with layer scale, in evaluation mode, with every gradient."""
    data = npz("ops/svit_layer_s4_ls_13x18.npz")
    block = Block(12, num_heads=3, stoken_size=4, layer_scale=True).double().eval()
    block.load_state_dict(checkpoint_filter_fn({k[2:]: v for k, v in data.items() if k.startswith("w/")}, block))
    x = data["x"].requires_grad_()
    y = block(x)
    y.backward(data["grad_y"])
    torch.testing.assert_close(y, data["y"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(x.grad, data["grad_x"], rtol=1e-9, atol=1e-10)
    gradients = checkpoint_filter_fn({k[2:]: v for k, v in data.items() if k.startswith("g/")}, block)
    for key, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-9, atol=1e-10, msg=key)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema", None])
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
    assert torch.equal(fresh.norm.proj.weight, source.norm.proj.weight)
    with pytest.raises(RuntimeError, match="another shape"):
        shrunken(pretrained=True, pretrained_cfg_overlay={"file": path}, num_classes=7, projection=48)


def test_published_folder() -> None:
    """The published address is a folder: the message says so, and what to do."""
    with pytest.raises(RuntimeError, match="stvit_small: .*drive.google.com.*pretrained_cfg_overlay"):
        timm.create_model("stvit_small", pretrained=True)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 32), (61, 90)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_sizes(size: tuple[int, int], batch: int) -> None:
    model = shrunken().eval()
    features = model.forward_features(torch.randn(batch, 3, *size))
    assert features.shape == (batch, 40, -(-size[0] // 32), -(-size[1] // 32))
    assert model.forward_head(features).shape == (batch, 1000)


def test_features() -> None:
    x = torch.randn(2, 3, 64, 96)
    model = shrunken(features_only=True, out_indices=(1, 3)).eval()
    assert [f.shape[1:] for f in model(x)] == [(16, 8, 12), (32, 2, 3)]
    assert model.feature_info.reduction() == [8, 32]
    whole = shrunken().eval()
    info = FeatureInfo(whole.feature_info, (0, 1, 2, 3))
    final, taps = whole.forward_intermediates(x)
    assert [t.shape[1] for t in taps] == info.channels()
    assert torch.equal(final, whole.forward_features(x))
    assert torch.equal(
        whole.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)[0], taps[0]
    )


def test_width() -> None:
    """The projection is part of the features, as in timm's EfficientNet, until pruning takes it away."""
    x = torch.randn(2, 3, 64, 96)
    model = shrunken(num_classes=0).eval()
    assert model(x).shape == (2, 40)
    assert model.forward_features(x).shape == (2, 40, 2, 3)
    assert model.num_features == model.head_hidden_size == 40
    info = FeatureInfo(model.feature_info, (0, 1, 2, 3))
    final, taps = model.forward_intermediates(x, norm=True)
    assert torch.equal(final, taps[-1])
    assert [t.shape[1] for t in taps] == [*info.channels()[:-1], model.feature_info[-1]["num_chs_norm"]]
    model.prune_intermediate_layers([3], prune_norm=True, prune_head=False)
    assert model.num_features == model.head_hidden_size == model(x).shape[1] == 32


def test_overrides() -> None:
    x = torch.randn(2, 4, 64, 64)
    model = shrunken(in_chans=4, num_classes=0, global_pool="", n_iter=(2, 1, 1, 1), drop_path_rate=0.2).eval()
    assert model(x).shape == (2, 40, 2, 2)
    model.reset_classifier(6, "avg")
    assert model(x).shape == (2, 6)
    assert shrunken(projection=None, in_chans=4).eval()(x).shape == (2, 1000)
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
    x = torch.randn(3, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = shrunken("stvit_base").train()
        model.set_grad_checkpointing(checkpointing)
        model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None and g.isfinite().all() for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_layer_groups() -> None:
    """Layer decay goes from the stem through every block in order; a downsampling counts with the block behind it."""
    model = shrunken(depths=(2, 1, 1, 1))
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    order = ["stem.0.weight"] + [f"stages.{i}.blocks.{j}.norm1.weight" for i, j in ((0, 0), (0, 1), (1, 0))]
    assert [groups[name] for name in order] == [0, 1, 2, 3]
    assert groups["stages.1.downsample.0.weight"] == groups["stages.1.blocks.0.norm1.weight"]
    assert groups["norm.proj.weight"] == groups["norm.norm.weight"] == groups["stages.3.blocks.0.norm1.weight"]
    assert groups["head.fc.weight"] == max(groups.values())


def test_compile_and_export() -> None:
    model = shrunken().eval()
    x = torch.randn(2, 3, 64, 80)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
