"""timm's arguments that ask for another form of a model: feature_cls, global_pool="", output_stride."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, Small
from golden import save_checkpoint
from timm.layers import ClassifierHead
from torch import Tensor, nn

import zoo  # noqa: F401

CASES: dict[str, Small] = {name: row.shrunk for name, row in FAMILIES.items()}
# timm's "list" and "dict" find modules of two levels; the features of an isotropic model are blocks of its stage
FEATURES = [
    (family, feature_cls)
    for family in CASES
    for feature_cls in ("getter", "hook", "fx", "list", "dict")
    if FAMILIES[family].blocks is None or feature_cls not in ("list", "dict")
]
every_family = pytest.mark.parametrize("family", CASES)


def built(family: str, **kwargs: Any) -> nn.Module:
    name, _, args = CASES[family]
    torch.manual_seed(0)
    return timm.create_model(name, **{**args, **kwargs}).eval()


def image(family: str) -> Tensor:
    return torch.randn(2, 3, *CASES[family].size, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
@pytest.mark.parametrize(("family", "feature_cls"), FEATURES)
def test_features(family: str, feature_cls: str) -> None:
    """However timm takes them: the maps of the default, in the layout that the extractor declares."""
    x, options = image(family), {"features_only": True, "num_classes": 0}
    default, asked = built(family, **options), built(family, feature_cls=feature_cls, **options)
    with torch.no_grad():
        expected, maps = default(x), asked(x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert asked.feature_info.channels() == default.feature_info.channels()
    assert asked.feature_info.reduction() == default.feature_info.reduction()
    for y, reference, channels in zip(maps, expected, asked.feature_info.channels(), strict=True):
        y = y.permute(0, 3, 1, 2) if asked.output_fmt == "NHWC" else y
        assert y.shape[1] == channels
        torch.testing.assert_close(y, reference)


@pytest.mark.parametrize(("family", "options"), [("biformer", {"out_norms": True}), ("litv2", {"dense": True})])
def test_normed_features(family: str, options: dict[str, Any]) -> None:
    """Nothing but `forward_intermediates` applies the norms of a dense backbone."""
    options = {"features_only": True, "num_classes": 0, **options}
    built(family, feature_cls="getter", **options)
    for feature_cls in ("hook", "fx"):
        with pytest.raises(ValueError, match=r"^\w+: only feature_cls 'getter', the default, applies the norms"):
            built(family, feature_cls=feature_cls, **options)


@every_family
def test_classifier_of_pixels(family: str, tmp_path: Path) -> None:
    """Without pooling the logits are a map, or tokens, from the same weights; pooling can come back."""

    def unpooled(features: Tensor, channels: int) -> tuple[int, ...]:
        return (2, features.shape[1], channels) if FAMILIES[family].tokens else (2, channels, *features.shape[2:])

    x, pooled = image(family), built(family, num_classes=5)
    path = save_checkpoint(tmp_path / "pooled.pth", pooled.state_dict(), None)
    overlay = {"file": path}
    model = built(family, num_classes=5, global_pool="", pretrained=True, pretrained_cfg_overlay=overlay)
    with torch.no_grad():
        features, logits = model.forward_features(x), model(x)
        assert logits.shape == unpooled(features, 5)
        if isinstance(model.head, ClassifierHead):  # others have a norm behind the pooling
            torch.testing.assert_close(logits.mean((2, 3)), pooled(x), rtol=1e-4, atol=1e-5)
        hidden = model.forward_head(features, pre_logits=True)
        assert hidden.shape == unpooled(features, model.head_hidden_size)
        model.reset_classifier(4, "avg")
        assert model(x).shape == (2, 4)
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        model.reset_classifier(6, "")
        assert model(x).shape == unpooled(features, 6)
        model.reset_classifier(7)
        assert model(x).shape == unpooled(features, 7)


@every_family
def test_output_stride(family: str) -> None:
    """The model's own is taken; where timm's network dilates, so does ours; else one line says which there is."""
    x = image(family)
    own = built(family).feature_info[-1]["reduction"]
    assert torch.equal(built(family, output_stride=own)(x), built(family)(x))
    for stride in (8, 16, 64):
        if family == "halonet" and stride < 32:
            maps = built(family, output_stride=stride, features_only=True)
            theirs = timm.create_model("halonet26t", features_only=True, output_stride=stride, device="meta")
            assert maps.feature_info.reduction() == theirs.feature_info.reduction()
            assert [x.shape[2] // y.shape[2] for y in maps(x)] == maps.feature_info.reduction()
        elif stride != own:
            with pytest.raises(ValueError, match=rf"^\w+: output_stride {stride} is not available, .* is {own}$"):
                built(family, output_stride=stride)
