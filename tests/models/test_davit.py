"""DaViT: published keys, timm's own models, every variant's parameters, Florence-2's files, odd sizes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden import GOLDENS, assert_matches, image, keys, save_checkpoint
from torch import Tensor, nn

import zoo.models.davit as davit

NAMES = timm.list_models("davit*")
TINY: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (2, 2, 4, 4)}
PUBLISHED = json.loads((GOLDENS / "davit" / "variants.json").read_text())
PARAMS = {v["name"]: v["params_measured"] for v in PUBLISHED["variants_timm"]}


def load(name: str, path: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path}, **kwargs).eval()


def assert_same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert_matches(actual, expected, expected.double().std().item(), tolerance, "output")


# the originals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("original", "name"),
    [
        ("DaViT_tiny", "zoo_davit_tiny"),
        ("DaViT_small", "zoo_davit_small"),
        ("DaViT_base", "zoo_davit_base"),
        ("DaViT_large_window12_384", "zoo_davit_large_window12_384"),
        ("timm_davit_tiny", "zoo_davit_tiny"),
    ],
)
def test_recorded_keys(original: str, name: str) -> None:
    """Every key of the original has its place, and the filter leaves our own names alone."""
    model = timm.create_model(name, device="meta")
    original_keys = {k: torch.empty(shape, device="meta") for k, shape, _ in keys(f"davit/{original}")}
    renamed = davit.checkpoint_filter_fn(original_keys, model)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert davit.checkpoint_filter_fn(renamed, model) == renamed


def test_published_figures() -> None:
    original = PUBLISHED["original_constructor"]["DaViT_large_window12_384"]["params_comment"]
    model = timm.create_model("zoo_davit_large_window12_384", device="meta")
    assert sum(p.numel() for p in model.parameters()) == original
    cfg = timm.get_pretrained_cfg("zoo_davit_large_window12_384")
    assert cfg.input_size == (3, 384, 384)
    assert cfg.crop_pct == PUBLISHED["original_preprocess"]["crop_pct_384"]
    rows = {row[0]: row for row in PUBLISHED["published"][0]["rows"]}
    for size, row in (("tiny", "DaViT-T"), ("small", "DaViT-S"), ("base", "DaViT-B")):
        cfg = timm.get_pretrained_cfg(f"zoo_davit_{size}.msft_in1k")
        assert cfg.hf_hub_id == f"timm/davit_{size}.msft_in1k"
        assert cfg.url == rows[row][7]
        assert set(cfg.notes) == {f"top1: {rows[row][3]}", f"params: {rows[row][5]}", f"flops: {rows[row][6]}"}
        assert cfg.crop_pct == PUBLISHED["original_preprocess"]["crop_pct"]
        assert cfg.license == "mit"


# timm's models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_timm(name: str) -> None:
    theirs, ours = (timm.create_model(n, device="meta") for n in (name, f"zoo_{name}"))
    states = davit.checkpoint_filter_fn(theirs.state_dict(), ours), ours.state_dict()
    shapes = [[(k, v.shape) for k, v in state.items()] for state in states]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) == PARAMS[name]
    assert ours.feature_info == theirs.feature_info


@pytest.mark.parametrize(
    ("name", "size"), [("davit_tiny", (75, 64)), ("davit_base_fl", (96, 101)), ("davit_small", (224, 64))]
)
def test_numbers_of_timm(name: str, size: tuple[int, int]) -> None:
    theirs = timm.create_model(name, **TINY).double()
    ours = timm.create_model(f"zoo_{name}", **TINY).double()
    ours.load_state_dict(davit.checkpoint_filter_fn(theirs.state_dict(), ours))
    x = image(*size, dtype=torch.float64)
    results = [model(x) for model in (theirs, ours)]
    assert_same(results[1], results[0].detach(), 1e-9)
    theirs_grads, ours_grads = (
        torch.autograd.grad(y.square().sum(), list(m.parameters()), allow_unused=True)
        for m, y in zip((theirs, ours), results, strict=True)
    )
    largest = max(g.abs().max() for g in theirs_grads if g is not None)
    for (k, _), a, b in zip(ours.named_parameters(), ours_grads, theirs_grads, strict=True):
        if b is None:
            assert a is None, k
        else:
            assert (a - b).abs().max() <= 1e-9 * max(b.abs().max(), 1e-4 * largest), k


def test_florence_file(tmp_path: Path) -> None:
    """The keys of Florence-2's image tower, with the language model beside it and without a head."""
    model = timm.create_model("zoo_davit_base_fl", **TINY)
    weights = model.state_dict()
    tower = {"language_model.final_logits_bias": torch.zeros(3), "image_projection": torch.zeros(2, 2)}
    for k, v in weights.items():
        for ours, theirs in (
            (r"^stem\.conv", "convs.0.proj"),
            (r"^stem", "convs.0"),
            (r"^stages\.(\d+)\.downsample\.conv", r"convs.\1.proj"),
            (r"^stages\.(\d+)\.downsample", r"convs.\1"),
            (r"^stages\.(\d+)\.blocks", r"blocks.\1"),
            (r"(blocks\.\d+\.\d+)\.0\.", r"\1.spatial_block."),
            (r"(blocks\.\d+\.\d+)\.1\.", r"\1.channel_block."),
            (r"(spatial)_block\.norm1", r"\1_block.window_attn.norm"),
            (r"(channel)_block\.norm1", r"\1_block.channel_attn.norm"),
            (r"spatial_block\.attn", "spatial_block.window_attn.fn"),
            (r"channel_block\.attn", "channel_block.channel_attn.fn"),
            (r"norm2", "ffn.norm"),
            (r"\.mlp\.", ".ffn.fn.net."),
            (r"cpe([12])\.proj", r"conv\1.fn.dw"),
        ):
            k = re.sub(ours, theirs, k)
        if not k.startswith("head."):
            tower[f"vision_tower.{k}"] = v
    path = save_checkpoint(tmp_path / "w.pth", tower, None)
    loaded = load("zoo_davit_base_fl", path, **TINY).state_dict()
    assert {k for k in weights if not k.startswith("head.fc")} == set(loaded)
    assert all(torch.equal(v, weights[k]) for k, v in loaded.items())


# sizes, checkpoints, timm's contract ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zoo_davit_tiny", "zoo_davit_base_fl"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (97, 64)])
def test_any_size(name: str, size: tuple[int, int]) -> None:
    model = timm.create_model(name, **TINY, num_classes=5).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(image(*size), intermediates_only=True)
        assert model(image(*size)).isfinite().all()
    sides = [tuple(-(-s // r) for s in size) for r in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in maps] == sides


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_wrappers_and_prefix(wrapper: str | None, tmp_path: Path) -> None:
    model = timm.create_model("zoo_davit_tiny", **TINY)
    weights = {f"module.{k}": v for k, v in model.state_dict().items()}
    loaded = load("zoo_davit_tiny", save_checkpoint(tmp_path / "w.pth", weights, wrapper), **TINY)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_wrong_head_and_wrong_keys(tmp_path: Path) -> None:
    weights = timm.create_model("zoo_davit_tiny", num_classes=7, **TINY).state_dict()
    path = save_checkpoint(tmp_path / "w.pth", weights, None)
    with pytest.raises(RuntimeError, match="head has 7 classes, the model's 1000"):
        load("zoo_davit_tiny", path, **TINY)
    assert load("zoo_davit_tiny", path, num_classes=7, **TINY).head.fc.out_features == 7
    assert load("zoo_davit_tiny", path, num_classes=3, **TINY).head.fc.out_features == 3
    weights.pop("stages.1.downsample.norm.weight")
    with pytest.raises(RuntimeError, match="stages.1.downsample.norm.weight"):
        load("zoo_davit_tiny", save_checkpoint(tmp_path / "w.pth", weights, None), num_classes=7, **TINY)


def test_features_and_heads() -> None:
    model = timm.create_model("zoo_davit_tiny", features_only=True, out_indices=(0, 3), **TINY)
    assert [x.shape[1] for x in model(image(64, 64))] == model.feature_info.channels() == [16, 64]
    model = timm.create_model("zoo_davit_tiny", **TINY, num_classes=0)
    assert model(image(64, 64)).shape == (2, 64)
    model.reset_classifier(4)
    assert model(image(64, 64)).shape == (2, 4)
    assert model.forward_head(model.forward_features(image(64, 64)), pre_logits=True).shape == (2, 64)


@pytest.mark.parametrize("name", ["zoo_davit_tiny", "zoo_davit_base_fl"])
def test_gradients_reach_every_parameter(name: str) -> None:
    model = timm.create_model(name, **TINY, num_classes=3, drop_path_rate=0.1)
    model.set_grad_checkpointing()
    model(image(64, 64)).square().sum().backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []


def test_backends_agree_and_options_are_checked() -> None:
    model = timm.create_model("zoo_davit_tiny", **TINY, window_size=4, attn_backend="reference").eval()
    other = timm.create_model("zoo_davit_tiny", **TINY, window_size=4, attn_backend="cpu").eval()
    other.load_state_dict(model.state_dict())
    assert_same(other(image(70, 96)), model(image(70, 96)).detach(), 1e-5)
    for wrong in ({"num_heads": (3, 3, 3, 3)}, {"depths": (1, 1)}):
        with pytest.raises(ValueError, match="DaViT: "):
            timm.create_model("zoo_davit_tiny", **{**TINY, **wrong})
    with pytest.raises(TypeError):
        timm.create_model("zoo_davit_tiny", window=3)
