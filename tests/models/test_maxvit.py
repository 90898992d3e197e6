"""MaxViT: published keys, timm's own models, every variant's parameters, sizes that the original refuses."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import GOLDENS, assert_matches, image, keys, save_checkpoint
from torch import Tensor, nn

import zoo.models.maxvit as maxvit

NAMES = [name for name in timm.list_models("zoo_maxvit_*") if "_tv_" not in name]  # which timm does not have
TINY: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 64, 96), "stem_width": 16}
PUBLISHED = json.loads((GOLDENS / "maxvit" / "variants.json").read_text())["variants_timm"]
PARAMS = {v["name"]: v["params_measured"] for v in PUBLISHED}


def load(name: str, path: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path}, **kwargs).eval()


def assert_same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert_matches(actual, expected, expected.double().std().item(), tolerance, "output")


# the original ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({p.name.split(".keys")[0] for p in (GOLDENS / "maxvit").glob("*.keys.json")}))
def test_recorded_keys(name: str) -> None:
    """The original's keys, order and shapes; the head of the ImageNet-21k files has 21843 classes."""
    classes = {"num_classes": 21843} if name.endswith("in21k") else {}
    model = timm.create_model(f"zoo_{name.split('.')[0]}", device="meta", **classes)
    own = [(k, list(v.shape)) for k, v in model.state_dict().items()]
    assert own == [(k, shape) for k, shape, _ in keys(f"maxvit/{name}")]


# timm's models --------------------------------------------------------------------------------------------------------


def test_every_variant_of_timm() -> None:
    assert [f"zoo_{n}" for n in timm.list_models("maxvit_*")] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_configuration_of_timm(name: str) -> None:
    theirs = timm.create_model(name.removeprefix("zoo_"), device="meta")
    ours = timm.create_model(name, device="meta")
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (theirs, ours)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    assert sum(p.numel() for p in ours.parameters()) == PARAMS[name.removeprefix("zoo_")]
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.feature_info == theirs.feature_info
    tags = timm.list_models(name + ".*", pretrained=True) or [name]
    assert [
        f"zoo_{n}" for n in timm.list_models(name.removeprefix("zoo_") + ".*", pretrained=True) or [name[4:]]
    ] == tags
    for tag in tags:
        mine, cfg = (timm.get_pretrained_cfg(n).to_dict() for n in (tag, tag.removeprefix("zoo_")))
        fields = ("url", "hf_hub_id", "num_classes", "input_size", "crop_pct", "crop_mode", "mean", "std")
        assert {k: mine.get(k) for k in fields} == {k: cfg.get(k) for k in fields}
        assert mine["license"] == "apache-2.0"
        assert mine["paper_ids"] == "arXiv:2204.01697"


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("maxvit_tiny_tf_224", (224, 224), {}),
        ("maxvit_tiny_tf_384", (96, 192), {"img_size": 96}),
        ("maxvit_tiny_rw_224", (64, 64), {"img_size": 64}),
        ("maxvit_rmlp_small_rw_224", (128, 64), {"img_size": 64}),
        ("maxvit_tiny_pm_256", (96, 96), {"img_size": 96}),
    ],
)
def test_numbers_of_timm(name: str, size: tuple[int, int], options: dict[str, Any]) -> None:
    sizes = {"embed_dim": TINY["embed_dims"], "depths": TINY["depths"]}
    theirs = timm.create_model(name, **sizes, stem_width=(16, 16), drop_path_rate=0.0, **options).double()
    for k, v in theirs.state_dict().items():
        if k.endswith(("gamma", "running_var")):
            nn.init.uniform_(v, 0.5, 1.5)
    ours = timm.create_model(f"zoo_{name}", **TINY, **options).double()
    ours.load_state_dict(theirs.state_dict())
    x = image(*size, dtype=torch.float64)
    for mode in (False, True):  # both use the same batch statistics in training
        results = []
        for model in (theirs, ours):
            model.train(mode)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            results.append(model(x))
        assert_same(results[1], results[0].detach(), 1e-9)
    grads = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for m, y in zip((theirs, ours), results)]  # noqa: B905
    names = [k for k, _ in ours.named_parameters()]
    largest = max(g.abs().max() for g in grads[0])
    for k, a, b in zip(names, grads[1], grads[0], strict=True):
        assert (a - b).abs().max() <= 1e-9 * max(b.abs().max(), 1e-4 * largest), k


# sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zoo_maxvit_tiny_tf_224", "zoo_maxvit_nano_rw_256", "zoo_maxvit_tiny_pm_256"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (97, 64), (225, 50)])
def test_any_size(name: str, size: tuple[int, int]) -> None:
    model = timm.create_model(name, **TINY, num_classes=5).eval()
    x = image(*size)[:1]
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert model(x).isfinite().all()
    sides = list(itertools.accumulate(range(5), lambda s, _: ((s[0] + 1) // 2, (s[1] + 1) // 2), initial=size))
    assert [tuple(m.shape[2:]) for m in maps] == sides[1:]


def test_padding_is_not_seen() -> None:
    """A map that is no multiple of the partition: the window attention of each real window stands alone."""
    torch.manual_seed(1)
    attn = maxvit.Attention(32, 32, (4, 4), grid=False).double()
    x = torch.randn(1, 6, 5, 32, dtype=torch.float64)
    whole = attn(x)
    assert torch.allclose(whole[:, :4, :4], attn(x[:, :4, :4]), atol=1e-12)
    assert torch.allclose(whole[:, 4:, 4:], attn(x[:, 4:, 4:]), atol=1e-12)


# checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "state_dict_ema"])
def test_wrappers_and_prefix(wrapper: str | None, tmp_path: Path) -> None:
    model = timm.create_model("zoo_maxvit_nano_rw_256", **TINY)
    weights = {f"module.{k}": v for k, v in model.state_dict().items()}
    loaded = load("zoo_maxvit_nano_rw_256", save_checkpoint(tmp_path / "w.pth", weights, wrapper), **TINY)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_table_is_resized_bilinearly(tmp_path: Path) -> None:
    weights = timm.create_model("zoo_maxvit_tiny_tf_224", **TINY).state_dict()
    path = save_checkpoint(tmp_path / "w.pth", weights, None)
    model = load("zoo_maxvit_tiny_tf_224", path, img_size=384, **TINY)
    key = "stages.1.blocks.0.attn_grid.attn.rel_pos.relative_position_bias_table"
    expected = F.interpolate(weights[key][None], size=(23, 23), mode="bilinear", align_corners=False)[0]
    assert torch.equal(model.state_dict()[key], expected)
    assert torch.equal(model.state_dict()["head.fc.weight"], weights["head.fc.weight"])


def test_flat_table_is_resized_as_timm_does(tmp_path: Path) -> None:
    weights = timm.create_model("zoo_maxvit_tiny_rw_224", **TINY).state_dict()
    path = save_checkpoint(tmp_path / "w.pth", weights, None)
    sizes = {"embed_dim": TINY["embed_dims"], "depths": TINY["depths"], "stem_width": (16, 16)}
    overlay = {"file": path, "hf_hub_id": None, "url": ""}
    theirs = timm.create_model(
        "maxvit_tiny_rw_224", pretrained=True, pretrained_cfg_overlay=overlay, img_size=256, **sizes
    ).state_dict()
    ours = load("zoo_maxvit_tiny_rw_224", path, img_size=256, **TINY).state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_wrong_head_and_wrong_keys(tmp_path: Path) -> None:
    weights = timm.create_model("zoo_maxvit_nano_rw_256", num_classes=7, **TINY).state_dict()
    path = save_checkpoint(tmp_path / "w.pth", weights, None)
    with pytest.raises(RuntimeError, match="head has 7 classes, the model's 1000"):
        load("zoo_maxvit_nano_rw_256", path, **TINY)
    assert load("zoo_maxvit_nano_rw_256", path, num_classes=7, **TINY).head.fc.out_features == 7
    assert load("zoo_maxvit_nano_rw_256", path, num_classes=3, **TINY).head.fc.out_features == 3
    weights["stages.0.blocks.0.conv.conv9.weight"] = weights.pop("stages.0.blocks.0.conv.conv1_1x1.weight")
    with pytest.raises(RuntimeError, match="conv1_1x1"):
        load("zoo_maxvit_nano_rw_256", save_checkpoint(tmp_path / "w.pth", weights, None), num_classes=7, **TINY)


# timm's contract ------------------------------------------------------------------------------------------------------


def test_features_and_heads() -> None:
    model = timm.create_model("zoo_maxvit_tiny_tf_224", features_only=True, out_indices=(1, 4), **TINY)
    assert [x.shape[1] for x in model(image(64, 64))] == model.feature_info.channels() == [32, 96]
    model = timm.create_model("zoo_maxvit_tiny_tf_224", **TINY, num_classes=0)
    assert model(image(64, 64)).shape == (2, 512)
    model.reset_classifier(4)
    assert model(image(64, 64)).shape == (2, 4)
    assert model.forward_head(model.forward_features(image(64, 64)), pre_logits=True).shape == (2, 512)


def test_set_input_size() -> None:
    model = timm.create_model("zoo_maxvit_tiny_rw_224", **TINY).eval()
    fresh = timm.create_model("zoo_maxvit_tiny_rw_224", img_size=128, **TINY)
    model.set_input_size(128)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in fresh.state_dict().items()}
    assert model(image(128, 96)).isfinite().all()


@pytest.mark.parametrize("name", ["zoo_maxvit_tiny_tf_224", "zoo_maxvit_rmlp_small_rw_224", "zoo_maxvit_tiny_pm_256"])
def test_gradients_reach_every_parameter(name: str) -> None:
    model = timm.create_model(name, **TINY, num_classes=3, drop_path_rate=0.1)
    model.set_grad_checkpointing()
    model(image(64, 64)).square().sum().backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []


def test_backends_agree_and_options_are_checked() -> None:
    torch.manual_seed(0)
    model = timm.create_model("zoo_maxvit_tiny_rw_224", **TINY, attn_backend="reference").eval()
    other = timm.create_model("zoo_maxvit_tiny_rw_224", **TINY, attn_backend="cpu").eval()
    other.load_state_dict(model.state_dict())
    assert_same(other(image(64, 96)), model(image(64, 96)).detach(), 1e-5)
    for wrong in ({"rel_pos": "cosine"}, {"dim_head": 30}, {"depths": (1, 1)}):
        with pytest.raises(ValueError, match="MaxViT: "):
            timm.create_model("zoo_maxvit_tiny_rw_224", **{**TINY, **wrong})
    with pytest.raises(TypeError):
        timm.create_model("zoo_maxvit_tiny_rw_224", window=3)
