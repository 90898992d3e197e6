"""NAT, DiNAT, DiNAT_s and the isotropic nets: published keys and configurations, arguments, sizes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden import GOLDENS, filled, image, keys, save_checkpoint
from timm.models import get_arch_pretrained_cfgs
from torch import nn

import zoo  # noqa: F401
from zoo.models._tables import check_image_size
from zoo.models.checkpoints import published_figures
from zoo.models.nat import NAT, NeighborhoodAttention, checkpoint_filter_fn, per_block, per_stage
from zoo.models.nat_isotropic import GlobalAttention, relative_bias

VARIANTS: dict[str, dict[str, Any]] = {
    v["name"]: {**v, "family": family}
    for family in ("nat", "dinat", "dinat_s")
    for v in json.loads((GOLDENS / family / "variants.json").read_text())["variants"]
}
LISTED = sorted(p for family in ("nat", "dinat", "dinat_s") for p in (GOLDENS / family).glob("*.keys.json"))

# the smallest of each kind that still has every part
SMALL = {
    "nat_mini": {"depths": (1, 1, 2, 1), "embed_dim": 32},
    "dinat_mini": {"depths": (2, 2, 2, 1), "embed_dim": 32},
    "dinat_s_tiny": {"depths": (2, 2, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)},
    "dinat_isotropic_small": {"depth": 4, "embed_dim": 48, "num_heads": 3},
    "vitrpb_small": {"depth": 4, "embed_dim": 48, "num_heads": 3},
}

SLOW_KINDS = [pytest.param(name, marks=pytest.mark.slow) for name in ("dinat_s_tiny", "vitrpb_small")]


def _is_isotropic(name: str) -> bool:
    return "isotropic" in name or "vitrpb" in name


def _load(name: str, path: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path}, **kwargs).eval()


def _small(name: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, **{"num_classes": 7, **SMALL[name], **kwargs}).eval()


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("nat") / "nat_mini.pth", filled("nat/nat_mini"), None)


@pytest.mark.parametrize("path", LISTED, ids=[p.name.removesuffix(".keys.json") for p in LISTED])
def test_keys(path: Path) -> None:
    """Every published key has its place, and our own names pass the filter."""
    name = path.name.removesuffix(".keys.json")
    model = timm.create_model(name, device="meta")
    convert = sys.modules[type(model).__module__].checkpoint_filter_fn
    published = {k: torch.empty(s, device="meta") for k, s, _ in keys(f"{path.parent.name}/{name}")}
    renamed = convert(published, model)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert convert(renamed, model) == renamed


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str) -> None:
    recorded = VARIANTS[name]
    constructor = recorded["constructor"]
    model = timm.create_model(name, device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == recorded["params_measured"]

    cfg = model.pretrained_cfg
    assert cfg["url"] == recorded["checkpoint_url_in_code"]
    assert cfg["input_size"] == (3, recorded["input_size"], recorded["input_size"])
    assert cfg["crop_pct"] == (1.0 if recorded["input_size"] == 384 else 0.875)
    assert cfg["interpolation"] == "bicubic"
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    assert cfg["std"] == (0.229, 0.224, 0.225)
    assert cfg["license"] == "mit"
    assert cfg["origin_url"] == "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
    assert cfg["paper_ids"] == ("arXiv:2204.07143" if recorded["family"] == "nat" else "arXiv:2209.15001",)
    figures = published_figures(cfg)
    assert figures.get("params") == recorded.get("published_params")
    assert figures.get("flops") == recorded.get("published_flops")
    assert figures.get("top1") == (recorded["in1k_top1"].removesuffix("%") if "in1k_top1" in recorded else None)

    attentions = [m for m in model.modules() if isinstance(m, NeighborhoodAttention)]
    if constructor["kernel_size"] is None:
        assert len([m for m in model.modules() if isinstance(m, GlobalAttention)]) == constructor["depth"]
        assert not attentions
    elif _is_isotropic(name):
        assert [m.dilation for m in attentions] == [1, constructor["dilation"]] * (constructor["depth"] // 2)
    else:
        expected = [d for level in constructor.get("dilations", []) for d in level] or [1] * sum(constructor["depths"])
        assert [m.dilation for m in attentions] == expected
        assert {m.kernel_size for m in attentions} == {constructor["kernel_size"]}
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in model.modules() if hasattr(m, "drop_path")]
    assert rates == pytest.approx(torch.linspace(0, constructor["drop_path_rate"], len(rates)).tolist(), abs=1e-7)


def test_tags() -> None:
    assert list(get_arch_pretrained_cfgs("nat_tiny")) == ["nat_tiny.in1k"]
    for name in ("dinat_large", "dinat_s_large"):
        assert list(get_arch_pretrained_cfgs(name)) == [f"{name}.in22k_ft_in1k", f"{name}.in22k"]
        assert timm.create_model(name, device="meta").num_classes == 1000
        assert timm.create_model(f"{name}.in22k", device="meta").num_classes == 21841
    for name in ("dinat_large_21k", "dinat_large_21k_11x11", "dinat_s_large_21k"):
        assert list(get_arch_pretrained_cfgs(name)) == [f"{name}.in22k"]
        assert timm.create_model(name, device="meta").num_classes == 1000


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "state_dict_ema", "model_ema", "module."])
def test_wrappers(wrapper: str | None, tmp_path: Path) -> None:
    weights = {k: v.clone() for k, v in _small("dinat_s_tiny", num_classes=1000).state_dict().items()}
    stored = weights
    if wrapper == "module.":
        stored, wrapper = {f"module.{k}": v for k, v in weights.items()}, None
    path = save_checkpoint(tmp_path / "x.pth", stored, wrapper)
    model = _load("dinat_s_tiny", path, **SMALL["dinat_s_tiny"])
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_wrong_head(tmp_path: Path) -> None:
    weights = _small("nat_mini", num_classes=21841).state_dict()
    path = save_checkpoint(tmp_path / "x.pth", weights, None)
    with pytest.raises(RuntimeError, match=r"21841.*1000"):
        _load("nat_mini", path, **SMALL["nat_mini"])
    assert torch.equal(
        _load("nat_mini", path, num_classes=21841, **SMALL["nat_mini"]).head.fc.weight, weights["head.fc.weight"]
    )
    assert _load("nat_mini", path, num_classes=5, **SMALL["nat_mini"]).head.fc.weight.shape[0] == 5
    small = {"depths": (1, 1, 1, 1), "embed_dim": 48, "num_heads": (1, 2, 4, 8)}
    weights = timm.create_model("dinat_s_large_21k", num_classes=11, **small).state_dict()
    path = save_checkpoint(tmp_path / "y.pth", weights, None)
    for name in ("dinat_s_large_21k", "dinat_s_large.in22k"):
        assert torch.equal(_load(name, path, **small).head.fc.weight, weights["head.fc.weight"]), "follows the file"


def test_foreign_keys(tmp_path: Path) -> None:
    weights = dict(_small("nat_mini", num_classes=1000).state_dict())
    weights["stages.9.blocks.0.attn.rpb"] = weights.pop("stages.0.blocks.0.attn.rpb")
    with pytest.raises(RuntimeError, match=r"(?s)stages\.0\.blocks\.0\.attn\.rpb.*stages\.9"):
        _load("nat_mini", save_checkpoint(tmp_path / "x.pth", weights, None), **SMALL["nat_mini"])


def test_other_kernel_size(mini: str) -> None:
    # offset 0 is the middle of both tables and keeps its value; the sizes are those of the published 11x11 models
    model = _load("nat_mini", mini, kernel_size=11)
    weights = checkpoint_filter_fn(filled("nat/nat_mini"), timm.create_model("nat_mini", device="meta"))
    for key, value in model.state_dict().items():
        if key.endswith(".rpb"):
            assert value.shape[1:] == (21, 21)
            torch.testing.assert_close(value[:, 10, 10], weights[key][:, 6, 6])
        else:
            assert torch.equal(value, weights[key])


def test_kernel_size_of_each_level(mini: str) -> None:
    model = _load("nat_mini", mini, kernel_size=(7, 5, 7, 3))
    assert [stage.blocks[0].attn.rpb.shape[1] for stage in model.stages] == [13, 9, 13, 5]
    assert model(image(64, 64)).isfinite().all()


def test_input_channels(mini: str) -> None:
    weights = filled("nat/nat_mini")["patch_embed.proj.0.weight"]
    grey = _load("nat_mini", mini, in_chans=1)
    torch.testing.assert_close(grey.stem.proj[0].weight, weights.sum(1, keepdim=True))
    assert _load("nat_mini", mini, in_chans=4)(torch.randn(1, 4, 33, 47)).shape == (1, 1000)


def test_vitrpb_table(tmp_path: Path) -> None:
    """Global attention is the original's table and index; at other sizes it is the interpolated table's."""
    published = filled("dinat/vitrpb_small")
    y, x = torch.meshgrid(torch.arange(14), torch.arange(14), indexing="ij")
    y, x = y.flatten(), x.flatten()
    index = (y[:, None] - y[None, :] + 13) * 27 + x[:, None] - x[None, :] + 13
    index = index.fliplr().flipud()  # isotropic.py:54
    published.update({f"layers.{i}.attn.relative_position_index": index for i in range(12)})
    assert {k for k, _, _ in keys("dinat/vitrpb_small")} == set(published)
    path = save_checkpoint(tmp_path / "x.pth", published, None)
    attn = _load("vitrpb_small", path).stages[0].blocks[0].attn
    assert torch.equal(relative_bias(attn.rpb, 14, 14), published["layers.0.attn.rpb"].flatten(1)[:, index])
    assert relative_bias(attn.rpb, 5, 9).shape == (12, 45, 45)
    # a model made for another size has the same bias as this one resized at run time
    large = _load("vitrpb_small", path, img_size=(112, 160)).stages[0].blocks[0].attn
    assert large.rpb.shape == (12, 13, 19)
    assert torch.equal(relative_bias(large.rpb, 7, 10), relative_bias(attn.rpb, 7, 10))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (201, 130)])
def test_any_size(name: str, size: tuple[int, int]) -> None:
    model = _small(name)
    with torch.no_grad():
        features = model.forward_features(torch.randn(3, 3, *size))
    reduction = model.feature_info[-1]["reduction"]
    assert features.shape == (3, model.num_features, -(-size[0] // reduction), -(-size[1] // reduction))


@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini", "dinat_s_tiny", "dinat_isotropic_small"])
def test_backends_agree(name: str) -> None:
    outputs, gradients = [], []
    for backend in ("reference", "cpu", None):
        torch.manual_seed(0)
        model = _small(name, attn_backend=backend, dtype=torch.float64)
        x = image(72, 56, dtype=torch.float64)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for y, g in zip(outputs[1:], gradients[1:], strict=True):
        torch.testing.assert_close(y, outputs[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(g, gradients[0], rtol=1e-8, atol=1e-8)


def test_backend_reaches_the_op() -> None:
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        _small("nat_mini", attn_backend="fast")(image(32, 32))


def test_padding_of_small_maps() -> None:
    """Padding precedes the projections: its keys and values are the bias of qkv, and no query is hidden from it."""
    attn = NeighborhoodAttention(8, 2, 5, dilation=2, dtype=torch.float64)
    nn.init.normal_(attn.qkv.bias)
    x = torch.randn(2, 7, 12, 8, dtype=torch.float64)
    padded = torch.zeros(2, 10, 12, 8, dtype=torch.float64)
    padded[:, :7] = x
    torch.testing.assert_close(attn(x), attn(padded)[:, :7], rtol=1e-12, atol=1e-12)


def test_dilations() -> None:
    x = image(128, 128)
    torch.manual_seed(0)
    plain = _small("nat_mini")
    outputs = {None: plain(x)}
    for dilations in (1, 2, (2, 1, 1, 1), ((1,), (1,), (1, 2), (1,))):
        model = _small("nat_mini", dilations=dilations)
        model.load_state_dict(plain.state_dict())
        outputs[dilations] = model(x)
    assert torch.equal(outputs[None], outputs[1])
    values = list(outputs.values())
    for i, y in enumerate(values[1:]):
        assert all(not torch.allclose(y, z) for z in values[i + 2 :])
    torch.manual_seed(0)
    twins = [_small("dinat_isotropic_small", **args) for args in ({"dilations": (1, 3)}, {"dilation": 3})]
    assert [m.attn.dilation for m in twins[0].stages[0].blocks] == [1, 3, 1, 3]
    assert [m.attn.dilation for m in twins[1].stages[0].blocks] == [1, 3, 1, 3]


def test_per_block() -> None:
    assert per_block(None, (1, 2)) == [[1], [1, 1]]
    assert per_block(3, (1, 2)) == [[3], [3, 3]]
    assert per_block((2, (1, 8)), (1, 3)) == [[2], [1, 8, 1]]
    for wrong in (0, -1, True, 1.5, (1,), (1, 0), (1.5, 1), ((), 1), ((1, 1.5), 1)):
        with pytest.raises(ValueError, match=r"dilations must be .* got"):
            per_block(wrong, (1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("nat_mini", {"kernel_size": (7, 7)}, "kernel_size must be a positive int or 4 of them"),
        ("nat_mini", {"kernel_size": 0}, "kernel_size must be a positive int"),
        ("nat_mini", {"num_heads": (2, 4)}, "num_heads must be a positive int or 4 of them"),
        ("nat_mini", {"num_heads": (3, 4, 8, 16)}, "dim 64 is not divisible by num_heads 3"),
        ("nat_mini", {"img_size": (224,)}, "img_size must be a positive int or a pair"),
        ("dinat_s_tiny", {"dilations": (1, 2)}, "dilations must be"),
        ("nat_isotropic_small", {"dilations": 2, "dilation": 2}, "give dilations or dilation, not both"),
        ("vitrpb_small", {"dilations": 2}, "need a kernel_size"),
        ("vitrpb_small", {"num_heads": 7}, "dim 384 is not divisible by num_heads 7"),
    ],
)
def test_bad_arguments(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, device="meta", **args)


def test_sizes() -> None:
    assert per_stage("kernel_size", 7, 3) == [7, 7, 7]
    assert check_image_size(7) == (7, 7)
    assert check_image_size([7, 8]) == (7, 8)
    assert timm.create_model("nat_mini", device="meta", img_size=(64, 96)).img_size == (64, 96)


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="dilatoins"):
        timm.create_model("nat_mini", device="meta", dilatoins=2)


def test_initialisation() -> None:
    model = timm.create_model("nat_small", depths=(1, 1, 1, 1))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
        elif isinstance(module, NeighborhoodAttention):
            assert module.rpb.std().item() == pytest.approx(0.02, rel=0.15), name
    assert all((p == 1e-5).all() for n, p in model.named_parameters() if n.endswith(".gamma"))
    assert sum(n.endswith(".gamma") for n, _ in model.named_parameters()) == 8


def test_attention_dropout() -> None:
    """The path with dropout is the op's function where nothing is dropped, and drops weights where something is."""
    torch.manual_seed(0)
    attn = NeighborhoodAttention(12, 3, 5, dilation=2, dtype=torch.float64, attn_drop=1e-12)
    nn.init.normal_(attn.rpb)
    x = torch.randn(2, 13, 11, 12, dtype=torch.float64)
    torch.testing.assert_close(attn.train()(x), attn.eval()(x), rtol=1e-9, atol=1e-9)
    attn.attn_drop = 0.5
    assert torch.equal(attn(x), attn(x)), "no dropout in evaluation"
    attn.train()
    assert not torch.allclose(attn(x), attn(x))
    attn.proj = nn.Identity()  # type: ignore[assignment]
    mean = torch.stack([attn(x) for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, attn.eval()(x), rtol=0, atol=0.25)
    with pytest.raises(Exception, match="attention dropout is not available in TorchScript"):
        torch.jit.script(attn.train())(x)


def test_dropout_arguments() -> None:
    model = _small("nat_mini", drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.4)
    block = model.stages[-1].blocks[-1]
    assert model.head.drop.p == 0.1
    assert block.attn.proj_drop.p == block.mlp.drop1.p == block.mlp.drop2.p == 0.2
    assert block.attn.attn_drop == 0.3
    assert block.drop_path.drop_prob == pytest.approx(0.4)


def test_weight_decay_and_layer_decay() -> None:
    model = _small("nat_mini", layer_scale=1e-5)
    assert model.no_weight_decay() == {n for n, _ in model.named_parameters() if n.endswith("rpb")}
    by_name = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert by_name["stages.0.blocks.0.norm1.weight"] == 1
    assert by_name["stages.1.downsample.reduction.weight"] == by_name["stages.1.blocks.0.norm1.weight"] == 2
    assert by_name["stages.2.blocks.1.attn.rpb"] == 4
    assert by_name["norm.weight"] == by_name["stages.3.blocks.0.norm1.weight"] == 5
    assert by_name["head.fc.weight"] == 6
    isotropic = _small("vitrpb_small")
    by_name = timm.models.group_parameters(isotropic, isotropic.group_matcher(), reverse=True)
    assert [by_name[f"stages.0.blocks.{i}.attn.rpb"] for i in range(4)] == [1, 2, 3, 4]
    assert by_name["norm.weight"] == 4


def test_isotropic_features() -> None:
    model = timm.create_model("nat_isotropic_small", features_only=True, device="meta")
    assert model.feature_info.out_indices == (2, 5, 8, 11)
    assert model.feature_info.reduction() == [16] * 4
    outputs = _small("dinat_isotropic_small", features_only=True, out_indices=(0, 3))(image(64, 80))
    assert [tuple(y.shape) for y in outputs] == [(2, 48, 4, 5)] * 2


def test_patch_merging_order() -> None:
    """Of four pixels the rows vary first, as in Swin."""
    merge = _small("dinat_s_tiny").stages[1].downsample
    merge.norm, merge.reduction = nn.Identity(), nn.Identity()
    x = torch.arange(2 * 3).reshape(1, 2, 3, 1).float()
    assert merge(x).squeeze(0).squeeze(0).tolist() == [[0.0, 3.0, 1.0, 4.0], [2.0, 5.0, 0.0, 0.0]]


def test_depth_override() -> None:
    model = timm.create_model("dinat_large_384", depths=(1, 1, 1, 1), device="meta")
    assert isinstance(model, NAT)
    assert [len(stage.blocks) for stage in model.stages] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["dinat_mini", *SLOW_KINDS])
def test_compile(name: str) -> None:
    torch._dynamo.reset()
    model = _small(name, drop_path_rate=0.0).train()
    x = image(48, 72)
    model(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=1e-4, atol=1e-5, msg=n)


@pytest.mark.parametrize("name", ["dinat_mini", *SLOW_KINDS])
def test_export(name: str) -> None:
    model = _small(name)
    shapes = ({0: torch.export.Dim("batch", min=2, max=16)},)
    exported = torch.export.export(model, (image(48, 72),), dynamic_shapes=shapes).module()
    x = torch.randn(5, 3, 48, 72)
    torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dinat_mini", "dinat_s_tiny", "vitrpb_small"])
def test_script(name: str) -> None:
    """One scripted model serves every size, those that need padding included."""
    model = _small(name)
    scripted = torch.jit.script(model)
    for size in ((64, 64), (33, 47), (32, 130)):
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-5)


def test_final_norm_of_intermediates() -> None:
    model = _small("dinat_mini")
    x = image(64, 64)
    features, taps = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(taps[-1], features, rtol=0, atol=0)
    raw = model.forward_intermediates(x, indices=[-1], output_fmt="NHWC", intermediates_only=True)[0]
    torch.testing.assert_close(model.norm(raw).permute(0, 3, 1, 2), features)


def test_stochastic_depth_drops_branches() -> None:
    model = _small("nat_mini", drop_path_rate=0.9).train()
    x = image(64, 64)
    assert not torch.allclose(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
