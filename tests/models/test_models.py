"""What holds for every model that the package registers, whatever its family."""

import copy
import functools
import re
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from families import FAMILIES as ROWS
from families import file_of
from golden import save_checkpoint
from timm.models import get_arch_pretrained_cfgs
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

import zoo  # noqa: F401
from zoo.models.checkpoints import published_figures
from zoo.registry import model_class, package_models

NAMES = package_models()

# the model of each file that stands for its family where numbers are computed
SMALLEST = {row.file: row.smallest for row in ROWS.values() if row.smallest is not None}
FAMILIES = sorted({file_of(name) for name in NAMES})
ORDERED = {row.file for row in ROWS.values() if row.ordered}


@functools.cache
def _shared(family: str) -> nn.Module:
    """A model that no test changes."""
    torch.manual_seed(0)
    return timm.create_model(SMALLEST[family], num_classes=10).eval()


def _fresh(family: str) -> nn.Module:
    return copy.deepcopy(_shared(family))


def _side(family: str) -> int:
    """A small image side; where the size is fixed, that one."""
    cfg = _shared(family).pretrained_cfg
    return cfg["input_size"][-1] if cfg.get("fixed_input_size") else 64


def _image(family: str, batch: int = 2) -> Tensor:
    side = _side(family)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_every_file_has_its_model() -> None:
    assert set(FAMILIES) <= set(SMALLEST)
    assert {file_of(SMALLEST[family]) for family in FAMILIES} == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_meta(name: str) -> None:
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert all(t.is_meta for t in tensors)
    assert all(t.dtype == torch.bfloat16 for t in model.parameters())
    assert model.num_classes == model.pretrained_cfg["num_classes"]
    assert getattr(model.get_classifier(), "out_features", 0) == model.num_classes  # an Identity without classes
    assert model.num_features == model.head_hidden_size  # what a program that takes the classifier off relies on
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()}
    modules = dict(model.named_modules())
    for field in ("first_conv", "classifier"):
        named = model.pretrained_cfg[field]
        for module in (named,) if isinstance(named, str) else named or ():
            assert module in modules, f"{field} names {module}"
    for info in model.feature_info:
        assert info["num_chs"] > 0
        assert info["reduction"] > 0
        assert info["module"] in modules

    model.reset_classifier(3)
    assert model.num_classes == model.get_classifier().out_features == 3
    assert next(model.get_classifier().parameters()).is_meta
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_names(name: str) -> None:
    """One scheme for all; HaloNet's are those of timm's ByobNet."""
    model = timm.create_model(name, device="meta")
    if file_of(name) == "halonet":
        scheme = r"(stem|stages\.\d+\.\d+|final_conv|head\.fc)\."
    else:
        scheme = (
            r"(stem|stages\.\d+\.(downsample|blocks\.\d+|norm|out_norm)|norm"
            r"|head\.(norm|proj|class_block|pre_logits\.fc|fc|aux))\."
        )
        assert not any(k.startswith("stages.0.downsample.") for k in model.state_dict())
    assert [k for k in model.state_dict() if not re.match(scheme, k)] == []


def test_family_facts() -> None:
    """What training reads off a model's class."""
    facts = {
        family: (cls.out_norms, cls.out_norm_eps, cls.slow_parameters, cls.no_decay)
        for family, name in SMALLEST.items()
        if (cls := cast(Any, model_class(name))) is type(_shared(family))
    }
    assert facts == {row.file: tuple(row.facts) for row in ROWS.values() if row.smallest is not None}
    for family, (_, _, slow, exempt) in facts.items():
        names = [n for n, _ in _shared(family).named_parameters()]
        assert all(any(part in n for n in names) for part in slow), family
        assert _shared(family).no_weight_decay() == {n for n in names if any(part in n for part in exempt)}


@pytest.mark.parametrize("name", NAMES)
def test_configurations(name: str) -> None:
    assert get_arch_pretrained_cfgs(name)
    for tag, entry in get_arch_pretrained_cfgs(name).items():
        cfg = entry.to_dict()
        assert cfg["license"], tag
        assert cfg["paper_ids"], tag
        assert cfg["paper_name"], tag
        assert cfg["origin_url"].startswith("https://"), tag
        assert len(cfg["input_size"]) == len(cfg["mean"]) == len(cfg["std"]) == 3
        assert 0.8 < cfg["crop_pct"] <= 1.0
        top1 = published_figures(cfg).get("top1")
        assert top1 is None or 60 < float(top1) < 92, tag


@pytest.mark.parametrize("name", SMALLEST.values())
def test_unknown_argument(name: str) -> None:
    if name in NAMES:
        with pytest.raises(TypeError):
            timm.create_model(name, device="meta", no_such_argument=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward(family: str) -> None:
    model, x = _shared(family), _image(family, 3)
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (3, 10)
        assert logits.isfinite().all()
        assert torch.equal(model(x), logits), "the same bits twice"
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), logits)
        assert model.forward_head(features, pre_logits=True).shape == (3, model.head_hidden_size)
        if family in ORDERED:  # other batches round otherwise
            model, x = _fresh(family).double(), x.double()
            logits = model(x)
        torch.testing.assert_close(model(x[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(32, 32), (61, 95)])
def test_any_size(family: str, size: tuple[int, int]) -> None:
    model = _shared(family)
    if model.pretrained_cfg.get("fixed_input_size"):
        pytest.skip("takes one size only")
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_intermediates(family: str) -> None:
    model, x = _shared(family), _image(family)
    last = len(model.feature_info) - 1
    with torch.no_grad():
        features, taps = model.forward_intermediates(x)
        torch.testing.assert_close(features, model.forward_features(x))
        for info, tap in zip(model.feature_info, taps, strict=True):
            side = _side(family) // info["reduction"]
            assert tap.shape == (2, info["num_chs"], side, side)
        early = model.forward_intermediates(x, indices=[0, last - 1], stop_early=True, intermediates_only=True)
        assert torch.equal(early[0], taps[0])
        assert torch.equal(early[1], taps[last - 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_output_formats(family: str) -> None:
    model, x = _shared(family), _image(family)
    with torch.no_grad():
        for norm in (False, True):
            features, nchw = model.forward_intermediates(x, norm=norm)
            same, nhwc = model.forward_intermediates(x, norm=norm, output_fmt="NHWC")
            assert torch.equal(same, features)
            for a, b in zip(nchw, nhwc, strict=True):
                assert torch.equal(a.permute(0, 2, 3, 1), b)
        only = model.forward_intermediates(x, output_fmt="NHWC", norm=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(only, nhwc, strict=True))
        for wrong in ("NLC", "nchw", ""):
            with pytest.raises(ValueError, match=f"^output_fmt must be 'NCHW' or 'NHWC', got '{wrong}'$"):
                model.forward_intermediates(x, output_fmt=wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning(family: str) -> None:
    """What is left gives the same maps, and no parameter of it is without use."""
    model, x = _fresh(family), _image(family)
    middle = len(model.feature_info) // 2
    expected = model.forward_intermediates(x, indices=[0, middle], intermediates_only=True)
    assert model.prune_intermediate_layers([0, middle]) == [0, middle]
    assert model.num_classes == 0
    assert isinstance(model.get_classifier(), nn.Identity)
    maps = model.forward_intermediates(x, indices=[0, middle], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert model(x).shape[:2] == (2, model.num_features)
    assert model.num_features == model.head_hidden_size == model.feature_info[middle]["num_chs"]
    maps[-1].square().sum().backward()
    # an isotropic model keeps its final norm unless asked, as timm's do
    unused = [n for n, p in model.named_parameters() if p.grad is None and not n.startswith("norm.")]
    assert unused == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_scripted_features(family: str, output_fmt: str) -> None:
    getter = FeatureGetterNet(_fresh(family), out_indices=(0, 2), output_fmt=output_fmt).eval()
    x = _image(family)
    with torch.no_grad():
        for scripted, eager in zip(torch.jit.script(getter)(x), getter(x), strict=True):
            torch.testing.assert_close(scripted, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_only(family: str) -> None:
    model = timm.create_model(SMALLEST[family], features_only=True, out_indices=(0, 2)).eval()
    assert model.feature_info.channels() == [_shared(family).feature_info[i]["num_chs"] for i in (0, 2)]
    x = _image(family)
    with torch.no_grad():
        for channels, reduction, y in zip(
            model.feature_info.channels(), model.feature_info.reduction(), model(x), strict=True
        ):
            assert y.shape == (2, channels, _side(family) // reduction, _side(family) // reduction)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_checkpointing(family: str) -> None:
    """Every parameter gets a finite gradient, and the same one when activations are recomputed."""
    found: list[dict[str, Tensor]] = []
    for enable in (False, True):
        model = timm.create_model(SMALLEST[family], num_classes=10, drop_path_rate=0.0)
        model.load_state_dict(_shared(family).state_dict())
        model.train()
        model.set_grad_checkpointing(enable)
        model(_image(family)).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        assert grad is not None, name
        assert grad.isfinite().all(), name
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype(family: str, dtype: torch.dtype) -> None:
    x = _image(family)
    with torch.no_grad():
        expected = _shared(family)(x)
        logits = _fresh(family).to(dtype)(x.to(dtype))
    assert logits.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-2 if family in ORDERED else 1e-4
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=tolerance * float(expected.std()) + 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family: str) -> None:
    x = _image(family)
    model = _fresh(family).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    assert all(
        p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in model.parameters()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_own_weights_come_back(family: str, tmp_path: Path) -> None:
    """A file in our own names loads as strictly as a published one; one with a foreign tensor does not."""
    weights = dict(_shared(family).state_dict())
    arguments: dict[str, Any] = {"pretrained": True, "num_classes": 10}
    path = save_checkpoint(tmp_path / "own.pth", weights, "state_dict")
    model = timm.create_model(SMALLEST[family], pretrained_cfg_overlay={"file": path}, **arguments)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())

    lost = next(k for k in weights if k.endswith("weight"))
    weights["nobody.weight"] = weights.pop(lost)
    path = save_checkpoint(tmp_path / "foreign.pth", weights, None)
    with pytest.raises(RuntimeError, match=r"(?s)keys of the model are not in the file.*nobody\.weight"):
        timm.create_model(SMALLEST[family], pretrained_cfg_overlay={"file": path}, **arguments)


def test_two_keys_of_one_meaning(tmp_path: Path) -> None:
    weights = dict(_shared("nat").state_dict())
    weights["head.weight"] = weights["head.fc.weight"]
    path = save_checkpoint(tmp_path / "both.pth", weights, None)
    with pytest.raises(RuntimeError, match=r"head\.fc\.weight and head\.weight both mean head\.fc\.weight"):
        timm.create_model(SMALLEST["nat"], pretrained=True, num_classes=10, pretrained_cfg_overlay={"file": path})


def test_class_of_a_name() -> None:
    assert model_class("nat_mini") is model_class("dinat_large.in22k") is type(_shared("nat"))
    assert model_class("resnet18") is timm.models.ResNet
    assert model_class("no_such_model") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_constructor(family: str) -> None:
    grey = timm.create_model(SMALLEST[family], in_chans=1, num_classes=0, global_pool="max", drop_rate=0.1).eval()
    side = _side(family)
    with torch.no_grad():
        assert grey(torch.randn(1, 1, side, side)).shape == (1, grey.head_hidden_size)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compile(family: str) -> None:
    torch._dynamo.reset()
    model, x = _shared(family), _image(family)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_export(family: str) -> None:
    model, x = _shared(family), _image(family)
    batch = torch.export.Dim("batch", min=2, max=16)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    x = _image(family, 5)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)
