"""model.freeze: what is frozen stays to the bit, statistics too, the rest is trained, and a resume changes nothing."""

from pathlib import Path

import pytest
import timm
import torch
from pictures import class_folders
from torch import nn
from training import TINY, assert_same_run, checkpoint, resume, summary

import zoo  # noqa: F401
from zoo.errors import UserError
from zoo.train.app import main
from zoo.train.config import parse_freeze
from zoo.train.freeze import freeze

SMALL = {"depths": [1, 1, 1], "embed_dims": [16, 32, 64], "mlp_ratios": [2, 2, 2], "num_classes": 10}
VAN = (
    "model=van_digits", "model.kwargs.depths=[1,1]", "model.kwargs.embed_dims=[16,32]", "model.kwargs.mlp_ratios=[2,2]",
    "data=imagefolder", "data.img_size=32", "data.num_workers=0", "augment=none", "batch_size=8", "device=cpu",
)  # fmt: skip


def frozen(what: object, name: str = "van_b0", **options: object) -> tuple[nn.Module, set[str]]:
    model = timm.create_model(name, **(options or SMALL))
    freeze(model, what, name)
    return model, {n for n, p in model.named_parameters() if not p.requires_grad}


def test_backbone() -> None:
    model, names = frozen("backbone")
    assert {n for n, _ in model.named_parameters()} - names == {"head.fc.weight", "head.fc.bias"}


@pytest.mark.parametrize("what", [2, "2 stages", ["1 stage", "2 stages"]])
def test_stages(what: object) -> None:
    model, names = frozen(what)
    parts = ("stem.", "stages.0.", "stages.1.")
    assert names == {n for n, _ in model.named_parameters() if n.startswith(parts)}


def test_norms() -> None:
    model, names = frozen("norms")
    kinds = (nn.BatchNorm2d, nn.LayerNorm)
    assert names == {f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, kinds) for p in ("weight", "bias")}
    assert len(names) > 8


@pytest.mark.parametrize("name", ["nat_mini", "zoo_halonet26t", "zoo_davit_tiny", "resnet18", "vit_tiny_patch16_224"])
def test_models_that_divide_otherwise(name: str) -> None:
    model, names = frozen("2 stages", name, num_classes=3)
    first, last = next(iter(dict(model.named_parameters()))), list(dict(model.named_parameters()))[-1]
    assert first in names
    assert last not in names
    held = freeze(model, ["2 stages"], name)
    model.train()
    held.hold()
    for parent, module in model.named_modules():
        own = [f"{parent}.{n}" for n, _ in module.named_parameters(recurse=False)]
        if own and parent:
            assert module.training != all(n in names for n in own), parent


@pytest.mark.parametrize(
    ("what", "words"), [("9 stages", "van_b0 has 3; give 1 to 3"), (["backbone", 4], "has 3")]
)  # fmt: skip
def test_what_a_model_does_not_have(what: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        frozen(what)


@pytest.mark.parametrize("what", ["stem", "0 stages", "two stages", True, ["norms", "x"], 1.5])
def test_names_are_checked(what: object) -> None:
    with pytest.raises(UserError, match="choose backbone, norms"):
        parse_freeze(what)


def test_nothing_left(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="has no head"):
        frozen("backbone", "van_b0", num_classes=0)
    assert main("train", [*TINY, "model.freeze=heads"]) == 2
    assert "model.freeze='heads' is not known" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["backbone", "norms", "1 stage"])
def test_a_run_and_its_resume(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """VAN has batch norms, whose running averages move in training mode."""
    class_folders(tmp_path / "data", train=8, held_out=3)
    options = (*VAN, f"data.root={tmp_path / 'data'}", f"model.freeze={what}", "model.drop_path_rate=0.2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main("train", [f"run_dir={parts}", *options, "epochs=2", "max_steps=1"]) == 0
    before = checkpoint(parts)["state_dict"]
    printed = capsys.readouterr().out
    trained = summary(parts)["trainable"]
    assert 0 < trained < summary(parts)["parameters"]
    assert f"model.freeze={what}: {trained:,} of" in printed
    resume(parts, "max_steps=null")
    assert main("train", [f"run_dir={whole}", *options, "epochs=2"]) == 0
    assert_same_run(whole, parts, ignore=(".config",))
    after = checkpoint(parts)["state_dict"]
    stays = {
        "backbone": lambda n: not n.startswith("head."),
        "1 stage": lambda n: n.startswith(("stem.", "stages.0.")),
        "norms": lambda n: ".norm" in n or n.endswith(("running_mean", "running_var")),
    }[what]
    kept = {n for n in before if torch.equal(before[n], after[n])}
    assert {n for n in before if stays(n)} <= kept
    assert "head.fc.weight" not in kept
