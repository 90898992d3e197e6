"""HaloNet: timm's numbers from timm's weights, every size, and the model contract."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden import GOLDENS, assert_matches, filled, image, keys, npz, save_checkpoint
from timm.layers.bottleneck_attn import BottleneckAttn
from torch import Tensor, nn

import zoo  # noqa: F401
from zoo.models.halonet import BottleneckAttention, HaloAttention, resize_relative

NAMES = [
    "eca_halonext26ts", "halo2botnet50ts_256", "halonet26t", "halonet50ts", "halonet_h1", "haloregnetz_b",
    "lamhalobotnet50ts_256", "sehalonet33ts",
]  # fmt: skip
GAIN = {"haloregnetz_b": 1.5, "halonet50ts": 1.3, "halo2botnet50ts_256": 1.4}


def weights(name: str, gain: float) -> dict[str, Tensor]:
    return filled(f"halonet/{name}", lambda k, v: v * gain if k.endswith("bn.weight") else v)


def variant(name: str) -> dict[str, Any]:
    data = json.loads((GOLDENS / "halonet" / "variants.json").read_text())
    return next(v for v in data["variants_timm"] if v["name"] == name)


def pair(name: str, gain: float, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """timm's model and ours in float64 with the same weights."""
    models = []
    for model_name in (name, f"zoo_{name}"):
        model = timm.create_model(model_name, **(kwargs if model_name.startswith("zoo") else {})).double().eval()
        missing, unexpected = model.load_state_dict(weights(name, gain), strict=False)
        assert not unexpected
        assert all("num_batches_tracked" in k for k in missing)
        models.append(model)
    return models[0], models[1]


@pytest.mark.parametrize("name", ["halonet26t", "haloregnetz_b"])
def test_timm_in_float64(name: str) -> None:
    """The very numbers of timm's own model, stage by stage."""
    size = 224 if name == "haloregnetz_b" else 256
    theirs, ours = pair(name, GAIN.get(name, 1.3))
    x = image(size, size, dtype=torch.float64)[:1]
    with torch.no_grad():
        expected, actual = theirs.forward_intermediates(x), ours.forward_intermediates(x)
        head = theirs(x)
        assert_matches(ours(x), head, head.std().item(), 1e-9, "logits")
    for i, (a, b) in enumerate(zip(actual[1], expected[1], strict=True)):
        assert_matches(a, b, b.std().item(), 1e-9, f"feature {i}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("halonet26t", "haloregnetz_b")])
def test_timm_in_float64_others(name: str) -> None:
    test_timm_in_float64(name)


@pytest.mark.parametrize("name", NAMES)
def test_keys_parameters_and_configuration(name: str) -> None:
    model = timm.create_model(f"zoo_{name}", device="meta")
    assert [(k, list(v.shape)) for k, v in model.state_dict().items()] == [
        (k, s) for k, s, _ in keys(f"halonet/{name}")
    ]
    published = variant(name)
    assert sum(p.numel() for p in model.parameters()) == published["params_measured"]
    cfg, theirs = model.pretrained_cfg, timm.get_pretrained_cfg(name).to_dict()
    for field in ("url", "hf_hub_id", "tag", "input_size", "mean", "std", "crop_pct", "interpolation", "first_conv"):
        assert cfg.get(field) == theirs.get(field) or (field == "url" and not cfg["url"]), field
    assert cfg["paper_ids"] == ("arXiv:2103.12731",)
    assert cfg["license"] == "apache-2.0"
    for checkpoint in published["pretrained"]:
        assert f"top1: {float(checkpoint['timm_in1k_top1'])}" in cfg["notes"]
        assert cfg["url"] == checkpoint["url"]


def test_timm_itself_is_untouched() -> None:
    assert type(timm.create_model("halonet26t", device="meta").stages[3][1].self_attn).__module__.startswith("timm.")


@pytest.mark.parametrize(
    ("case", "heads"),
    [("b7_h2_qk", 2), ("b7_h2_s2_avg", 2), ("b8_h2_dh16_sp", 2), ("b8_h2_s2", 2), ("b8_h3", 2)],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_recorded_layer(case: str, heads: int, backend: str) -> None:
    data = npz(f"ops/haloattn_{case}.npz")
    names = ("num_heads", "block_size", "halo_size", "qk_ratio", "dim_head", "stride", "scale_pos_embed")
    arguments = {n: data[n].item() for n in names if n in data}
    layer = HaloAttention(int(data["dim"]), **arguments, attn_backend=backend, dtype=torch.float64)
    layer.load_state_dict({k[2:]: v for k, v in data.items() if k.startswith("w.")})
    x = data["x"].clone().requires_grad_()
    out = layer(x)
    assert_matches(out, data["out"], 1.0, 1e-12, "out")
    out.backward(data["grad_out"])
    assert_matches(x.grad, data["grad_x"], 1.0, 1e-12, "grad_x")
    for name, parameter in layer.named_parameters():
        expected = data[f"g.{name}"]
        assert_matches(parameter.grad, expected, expected.abs().max().item(), 1e-9, name)


def test_masked_border_differs_only_where_the_halo_leaves_the_map() -> None:
    layer = HaloAttention(16, num_heads=2, block_size=4, halo_size=1, dtype=torch.float64)
    masked = HaloAttention(16, num_heads=2, block_size=4, halo_size=1, border="mask", dtype=torch.float64)
    masked.load_state_dict(layer.state_dict())
    x = torch.randn(1, 16, 12, 12, dtype=torch.float64)
    a, b = layer(x), masked(x)
    torch.testing.assert_close(a[..., 4:8, 4:8], b[..., 4:8, 4:8])
    assert (a - b)[..., :4, :].abs().min() > 0


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (75, 130)])
@pytest.mark.parametrize("name", ["halonet26t", "haloregnetz_b", "halo2botnet50ts_256", "lamhalobotnet50ts_256"])
def test_any_size(name: str, size: tuple[int, int]) -> None:
    model = timm.create_model(f"zoo_{name}", num_classes=3)
    x = torch.randn(3, 3, *size)
    out = model(x)
    assert out.shape == (3, 3)
    out.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_padding_continues_the_border() -> None:
    """A map that no block divides: the numbers of the map padded with zero keys, cropped."""
    layer = HaloAttention(16, num_heads=2, block_size=4, halo_size=1, dtype=torch.float64)
    x = torch.randn(1, 16, 6, 9, dtype=torch.float64)
    padded = nn.functional.pad(x, (0, 3, 0, 2))
    torch.testing.assert_close(layer(x), layer(padded)[..., :6, :9])


@pytest.mark.parametrize("size", [(4, 4), (7, 5), (1, 1), (8, 8)])
def test_bottleneck_attention_at_other_sizes(size: tuple[int, int]) -> None:
    """Tables made for one size, interpolated to another, are those of a layer made for the other."""
    layer = BottleneckAttention(16, feat_size=(8, 8), num_heads=2, dtype=torch.float64)
    theirs = BottleneckAttn(16, feat_size=size, num_heads=2, dtype=torch.float64)
    state = layer.state_dict()
    state["pos_embed.height_rel"] = resize_relative(state["pos_embed.height_rel"], size[0])
    state["pos_embed.width_rel"] = resize_relative(state["pos_embed.width_rel"], size[1])
    theirs.load_state_dict(state)
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), theirs(x))


def test_interpolated_tables_keep_the_centre_and_the_ends() -> None:
    table = torch.arange(15.0)[:, None] - 7
    assert torch.equal(resize_relative(table, 8), table)
    for size in (1, 2, 5, 16):
        resized = resize_relative(table, size)[:, 0]
        assert resized.shape == (2 * size - 1,)
        assert resized[size - 1] == 0
        if size > 1:
            assert torch.allclose(resized[[0, -1]], torch.tensor([-7.0, 7.0]))


def test_a_file_for_another_image_size_is_interpolated(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "file.pth", weights("halo2botnet50ts_256", 1.0), "state_dict")
    overlay = {"file": path}
    at_256 = timm.create_model("zoo_halo2botnet50ts_256", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    at_128 = timm.create_model(
        "zoo_halo2botnet50ts_256", pretrained=True, pretrained_cfg_overlay=overlay, img_size=128
    ).eval()
    assert at_128.stages[3][1].self_attn.pos_embed.height_rel.shape == (7, 128)
    x = image(128, 128)[:1]
    with torch.no_grad():
        torch.testing.assert_close(at_128(x), at_256(x), rtol=1e-4, atol=1e-4)


def test_own_files_load_and_wrong_ones_say_why(tmp_path: Path) -> None:
    model = timm.create_model("zoo_eca_halonext26ts")
    own = save_checkpoint(tmp_path / "own.pth", model.state_dict(), "model")
    again = timm.create_model("zoo_eca_halonext26ts", pretrained=True, pretrained_cfg_overlay={"file": own})
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))

    state = dict(model.state_dict())
    state["head.fc.weight"], state["head.fc.bias"] = torch.zeros(7, 2048), torch.zeros(7)
    seven = {"file": save_checkpoint(tmp_path / "seven.pth", state, None)}
    with pytest.raises(RuntimeError, match="head has 7 classes, the model's 1000"):
        timm.create_model("zoo_eca_halonext26ts", pretrained=True, pretrained_cfg_overlay=seven)
    fresh = timm.create_model("zoo_eca_halonext26ts", pretrained=True, pretrained_cfg_overlay=seven, num_classes=4)
    assert fresh.get_classifier().out_features == 4

    del state["stages.0.0.conv1_1x1.conv.weight"]
    broken = {"file": save_checkpoint(tmp_path / "broken.pth", state, None)}
    with pytest.raises(RuntimeError, match="keys of the model are not in the file.*conv1_1x1"):
        timm.create_model("zoo_eca_halonext26ts", pretrained=True, pretrained_cfg_overlay=broken, num_classes=7)


def test_features_match_timm() -> None:
    theirs = timm.create_model("halonet26t", features_only=True, device="meta")
    ours = timm.create_model("zoo_halonet26t", features_only=True)
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    shapes = [tuple(f.shape[1:]) for f in ours(torch.randn(1, 3, 96, 64))]
    assert shapes == [(64, 48, 32), (256, 24, 16), (512, 12, 8), (1024, 6, 4), (2048, 3, 2)]
    last = timm.create_model("zoo_halonet26t", features_only=True, out_indices=(3,), device="meta")
    assert last.feature_info.channels() == [1024]


def test_constructor_arguments() -> None:
    model = timm.create_model(
        "zoo_halonet26t", in_chans=1, num_classes=0, drop_path_rate=0.1, drop_rate=0.2, global_pool="max",
        attn_backend="reference", border="mask",
    )  # fmt: skip
    halos = [m for m in model.modules() if isinstance(m, HaloAttention)]
    assert len(halos) == 3
    assert all(m.attn_backend == "reference" and m.border == "mask" for m in halos)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 2048)
    with pytest.raises(TypeError, match="no_such"):
        timm.create_model("zoo_halonet26t", no_such=1)
    with pytest.raises(ValueError, match="border must be 'zero' or 'mask', got 'wrap'"):
        timm.create_model("zoo_halonet26t", border="wrap")
    model = timm.create_model("zoo_halonet26t", attn_backend="triton").eval().double()
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run"):
        model(torch.randn(1, 3, 32, 32).double())


def test_backends_agree() -> None:
    models = [timm.create_model("zoo_halonet26t", attn_backend=b).eval() for b in ("reference", "cpu")]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(1, 3, 97, 64)
    with torch.no_grad():
        torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-4, atol=1e-5)


def test_channels_last_and_bfloat16() -> None:
    model = timm.create_model("zoo_halonet26t", num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
        assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
