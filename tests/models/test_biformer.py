"""BiFormer: published keys, sizes, features, the dense form, the attention modules."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden import GOLDENS, assert_matches, filled, image, keys, npz, save_checkpoint
from torch import Tensor

from zoo.models.biformer import AttentionLePE, BiFormer, BiLevelRoutingAttention, checkpoint_filter_fn

VARIANTS = {v["name"]: v for v in json.loads((GOLDENS / "biformer/variants.json").read_text())["variants"]}
SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "num_classes": 10}
DENSE: dict[str, Any] = {"features_only": True, "n_win": 16, "out_norms": True}


def load(name: str, path: Path, state_dict: dict[str, Tensor], wrapper: str | None = "model", **kwargs: Any) -> Any:
    file = save_checkpoint(path / "checkpoint.pth", state_dict, wrapper)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": file}, **kwargs)
    return model.double().eval()


def test_recorded_in_float32(tmp_path: Path) -> None:
    data = npz("biformer/biformer_tiny.224x224.npz")
    model = load("biformer_tiny", tmp_path, filled("biformer/biformer_tiny")).float()
    with torch.no_grad():
        logits = model(image(224, 224, seed=int(data["input_seed"])))
    assert_matches(logits, data["logits"], data["logits"].std().item(), 2e-5, "logits")


# checkpoints ----------------------------------------------------------------------------------------------------------


def zeros(entries: list[tuple[str, list[int], str]]) -> dict[str, Tensor]:
    return {k: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for k, shape, dtype in entries}


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_keys(variant: str) -> None:
    published = keys(f"biformer/{variant}")
    model = timm.create_model(variant, device="meta")
    own = model.state_dict()
    assert {v.device.type for v in own.values()} == {"meta"}
    renamed = checkpoint_filter_fn(zeros(published), model)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in own.items()}
    assert len(published) == len(own)
    params = sum(p.numel() for p in model.parameters()) / 1e6
    assert params == pytest.approx(VARIANTS[variant]["params_measured"], abs=1e-3)


def test_published_keys_of_the_dense_form() -> None:
    published = keys("biformer/biformer_small_det_nwin16")
    model = timm.create_model("biformer_small", n_win=16, out_norms=True, num_classes=0, device="meta")
    renamed = checkpoint_filter_fn(zeros(published), model)
    own = model.state_dict()
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in own.items()}
    assert len(published) == len(own)


@pytest.mark.parametrize("variant", ["biformer_tiny", "biformer_stl_nchw"])
def test_own_keys_pass_the_filter(variant: str) -> None:
    model = timm.create_model(variant, **SMALL)
    own = model.state_dict()
    again = checkpoint_filter_fn(dict(own), model)
    assert list(again) == list(own)
    assert all(again[k] is own[k] for k in own)


def test_dense_form_starts_from_a_classification_checkpoint(tmp_path: Path) -> None:
    weights = filled("biformer/biformer_tiny")
    model = load("biformer_tiny", tmp_path, weights, **DENSE)
    loaded = model.model.state_dict()
    assert torch.equal(loaded["stages.2.blocks.7.attn.proj.weight"], weights["stages.2.7.attn.wo.weight"].double())
    assert torch.equal(loaded["stages.3.out_norm.weight"], torch.ones(512, dtype=torch.float64))
    assert not any(k.startswith(("norm.", "head.")) for k in loaded)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_ema"])
def test_wrappers(wrapper: str | None, tmp_path: Path) -> None:
    source = timm.create_model("biformer_tiny", depths=(1, 1, 1, 1))
    weights = {f"module.{k}": v for k, v in source.state_dict().items()}
    model = load("biformer_tiny", tmp_path, weights, wrapper, depths=(1, 1, 1, 1))
    assert torch.equal(model.head.fc.weight, source.head.fc.weight.double())


def test_head_of_another_size(tmp_path: Path) -> None:
    weights = timm.create_model("biformer_tiny", **SMALL).state_dict()
    with pytest.raises(RuntimeError, match="head has 10 classes, the model's 1000"):
        load("biformer_tiny", tmp_path, weights, depths=(1, 1, 1, 1))
    model = load("biformer_tiny", tmp_path, weights, depths=(1, 1, 1, 1), num_classes=7)
    assert model.head.fc.out_features == 7
    assert torch.equal(model.stem[0].weight, weights["stem.0.weight"].double())


def test_wrong_keys(tmp_path: Path) -> None:
    weights = filled("biformer/biformer_det_nwin16_depth1121")
    with pytest.raises(RuntimeError, match=r"norm.weight[\s\S]*stages.0.out_norm.weight"):
        load("biformer_tiny", tmp_path, weights, depths=(1, 1, 2, 1))
    weights = filled("biformer/biformer_tiny")
    del weights["stages.0.0.attn.wo.bias"]
    with pytest.raises(RuntimeError, match="1 keys of the model are not in the file.*stages.0.blocks.0.attn.proj.bias"):
        load("biformer_tiny", tmp_path, weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_configurations(variant: str) -> None:
    cfg = timm.get_pretrained_cfg(f"{variant}.in1k")
    published = VARIANTS[variant]
    assert cfg.url == published["url"]
    assert (cfg.crop_pct, cfg.interpolation, cfg.license) == (0.875, "bicubic", "mit")
    assert cfg.paper_ids == ("arXiv:2303.08810",)
    assert f"top1: {published['top1']}" in cfg.notes


# any size -------------------------------------------------------------------------------------------------------------

ARCHITECTURES = ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (96, 96), (75, 131)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_sizes(variant: str, size: tuple[int, int]) -> None:
    model = timm.create_model(variant, **SMALL)
    x = torch.randn(3, 3, *size)
    logits = model(x)
    assert logits.shape == (3, 10)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("variant", ["biformer_tiny", "biformer_stl"])
def test_padding_changes_nothing_where_none_is_needed(variant: str) -> None:
    model = timm.create_model(variant, **SMALL).eval()
    plain = timm.create_model(variant, auto_pad=False, **SMALL).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 112, 224)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        with pytest.raises(ValueError, match=r"without auto_pad the map must be a multiple of n_win=7.*got 24 x 56"):
            plain(torch.randn(1, 3, 96, 224))


def test_batch_members_are_independent() -> None:
    model = timm.create_model("biformer_tiny", **SMALL).double().eval()
    x = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(i) for i in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


# timm's contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_features(variant: str) -> None:
    model = timm.create_model(variant, features_only=True, depths=(1, 1, 1, 1), out_indices=(1, 3))
    maps = model(torch.randn(1, 3, 64, 64))
    assert [tuple(x.shape[1:]) for x in maps] == list(zip(model.feature_info.channels(), (8, 2), (8, 2), strict=True))
    assert model.feature_info.reduction() == [8, 32]


def test_dense_outputs_are_normalised_for_the_reader_only() -> None:
    model = timm.create_model("biformer_tiny", out_norms=True, **SMALL).eval()
    plain = timm.create_model("biformer_tiny", **SMALL).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        dense, maps = (m.forward_intermediates(x, intermediates_only=True) for m in (model, plain))
        for i, (a, b) in enumerate(zip(dense, maps, strict=True)):
            torch.testing.assert_close(a, model.stages[i].out_norm(b))
        assert torch.equal(model.forward_features(x), dense[-1])
    assert model.train() is model


def test_prune() -> None:
    model = timm.create_model("biformer_tiny", out_norms=True, **SMALL).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model.forward_intermediates(x, indices=[1], intermediates_only=True)
        assert model.prune_intermediate_layers([1]) == [1]
        assert len(model.stages) == 2
        assert model.num_features == 128
        after = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert torch.equal(before[0], after[0])


def test_reset_classifier() -> None:
    model = timm.create_model("biformer_tiny", **SMALL).eval()
    x = torch.randn(1, 3, 32, 32)
    model.reset_classifier(5)
    assert model(x).shape == (1, 5)
    model.reset_classifier(0, "")
    assert model(x).shape == (1, 512, 1, 1)


def test_arguments() -> None:
    with pytest.raises(TypeError, match="window"):
        timm.create_model("biformer_tiny", window=7)
    with pytest.raises(ValueError, match="differ in length"):
        timm.create_model("biformer_tiny", topks=(1, 4, 16))
    with pytest.raises(ValueError, match="num_heads 2 must divide dim 65"):
        BiLevelRoutingAttention(65, num_heads=2)
    with pytest.raises(ValueError, match="diff_routing needs soft_routing"):
        BiLevelRoutingAttention(64, diff_routing=True)
    model = timm.create_model(
        "biformer_tiny", n_win=(8, 8, 4, 1), topks=(2, 8, 64, 0), side_dwconv=0, before_attn_dwconv=0, **SMALL
    )
    assert [s.blocks[0].attn.n_win for s in model.stages[:3]] == [8, 8, 4]
    assert isinstance(model.stages[3].blocks[0].attn, AttentionLePE)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_backend_reaches_the_op() -> None:
    model = timm.create_model("biformer_tiny", attn_backend="reference", **SMALL).double().eval()
    fast = timm.create_model("biformer_tiny", attn_backend="cpu", **SMALL).double().eval()
    fast.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), fast(x), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        timm.create_model("biformer_tiny", attn_backend="fast", **SMALL)(x.float())


def test_drop_path_rises_over_all_blocks() -> None:
    model = timm.create_model("biformer_tiny", depths=(1, 2, 1, 1), drop_path_rate=0.4)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for s in model.stages for b in s.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_checkpointing_gives_the_same_gradients() -> None:
    model = timm.create_model("biformer_tiny", **SMALL).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model(x).sum().backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    for k, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[k], rtol=1e-10, atol=1e-12, msg=k)


@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_scripted_and_compiled(variant: str) -> None:
    model = timm.create_model(variant, **SMALL).eval()
    x = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_layer_groups_cover_every_parameter() -> None:
    model = timm.create_model("biformer_tiny", out_norms=True, **SMALL)
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {k for k, _ in model.named_parameters()}
    assert groups["stem.0.weight"] == 0
    assert groups["stages.1.downsample.0.weight"] == groups["stages.1.blocks.0.mlp.fc1.weight"]
    assert groups["stages.1.out_norm.weight"] == groups["stages.1.blocks.0.mlp.fc1.weight"]
    assert isinstance(model, BiFormer)


# recorded attention modules -------------------------------------------------------------------------------------------

NHWC: dict[str, dict[str, Any]] = {
    "bra_legacy_topk4_21x14": {},
    "bra_legacy_autopad_topk4_13x17": {},
    "bra_legacy_topk8_14x14": {},
    "bra_legacy_qkdim8_topk4_14x14": {"qk_dim": 8},
    "bra_legacy_adaavg_kv2_topk4_28x28": {"kv_per_win": 2},
    "bra_legacy_softrouting_topk4_14x14": {"soft_routing": True, "diff_routing": True},
}
NCHW = ("bra_nchw_topk1_14x14", "bra_nchw_topk8_14x14", "bra_nchw_autopad_topk4_13x17", "bra_nchw_autopad_topk4_20x15")
OWN = {"qkv.qkv": "qkv", "qkv_linear": "qkv", "wo": "proj", "output_linear": "proj"}


def check_module(module: torch.nn.Module, data: dict[str, Any], channels_first: bool) -> None:
    weights = {k[2:]: v for k, v in data.items() if k.startswith("w/")}
    own = {k: f"{OWN.get(k.rsplit('.', 1)[0], k.rsplit('.', 1)[0])}.{k.rsplit('.', 1)[1]}" for k in weights}
    linear = {own[k]: v.flatten(1) if v.shape[2:] == (1, 1) else v for k, v in weights.items()}
    module.double().load_state_dict(linear)
    x = data["x"].requires_grad_()
    y = module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if channels_first else module(x)
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(y, [x, *(parameters[own[k]] for k in weights)], data["grad_y"])
    expected = {"y": data["y"], "x": data["grad_x"], **{k: data[f"g/{k}"] for k in weights}}
    for (what, value), actual in zip(expected.items(), (y, *grads), strict=True):
        assert (actual.reshape(value.shape) - value).abs().max() <= 1e-9 * value.abs().max(), what


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", [*NHWC, *NCHW], ids=lambda n: n[4:])
def test_recorded_routing_module(name: str, backend: str) -> None:
    data = npz(f"ops/{name}.npz")
    kwargs = NHWC.get(name, {"pad_keys": True})
    topk = data["routing_index"].shape[-1]
    module = BiLevelRoutingAttention(16, num_heads=2, topk=topk, attn_backend=backend, **kwargs)
    check_module(module, data, channels_first=name in NCHW)


@pytest.mark.parametrize("name", ["biformer_attention_lepe_7x7", "biformer_nchw_attention_lepe_7x7"])
def test_recorded_global_module(name: str) -> None:
    nchw = "nchw" in name
    data = npz(f"ops/{name}.npz")
    check_module(AttentionLePE(16, num_heads=4, lepe_of_value=nchw), data, channels_first=nchw)


def test_soft_routing_without_gradient_through_the_choice() -> None:
    soft, hard = (
        BiLevelRoutingAttention(16, num_heads=2, topk=4, soft_routing=True, diff_routing=d).double()
        for d in (True, False)
    )
    hard.load_state_dict(soft.state_dict())
    x = torch.randn(1, 15, 14, 16, dtype=torch.float64)
    outs = [m(x) for m in (soft, hard)]
    assert torch.equal(*outs)
    grads = [torch.autograd.grad(o.square().sum(), m.qkv.weight)[0] for o, m in zip(outs, (soft, hard), strict=True)]
    assert not torch.allclose(*grads)
