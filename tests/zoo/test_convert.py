"""`zoo convert`: what is written, which model and dialect are named, and what is refused with nothing half written."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from dialects import written
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo  # noqa: F401
from zoo.cli import main
from zoo.models.dialects import dialects_of
from zoo.train.runs import save_checkpoint


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("van_b0", num_classes=7)


def spelt(model: nn.Module, dialect: str) -> dict[str, Tensor]:
    return written(model.state_dict(), next(d for d in dialects_of(model) if d.name == dialect))


def run(*arguments: Any) -> int:
    return main(["convert", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    return found.err


def test_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: nn.Module) -> None:
    """The model is found, the file holds our names, and it loads where the source did."""
    source, out = tmp_path / "w.pth", tmp_path / "new/x.safetensors"
    extra = {"van.layernorm.weight": torch.ones(256), "van.layernorm.bias": torch.ones(256)}
    torch.save({"state_dict": {**spelt(model, "transformers' VanForImageClassification"), **extra}}, source)
    assert run(source, f"out={out}") == 0
    found = capsys.readouterr().out
    assert "van_b0; dialect: transformers' VanForImageClassification, under state_dict" in found
    assert "left out: van.layernorm.weight, van.layernorm.bias" in found
    state = load_file(out)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with safe_open(out, "pt") as file:
        facts = file.metadata()
    assert (facts["model"], facts["num_classes"]) == ("van_b0", "7")
    assert facts["dialect"] == "transformers' VanForImageClassification"
    assert [path.name for path in out.parent.iterdir()] == ["x.safetensors"]
    assert out.stat().st_mode & 0o777 == source.stat().st_mode & 0o777
    again = timm.create_model("van_b0", pretrained=True, pretrained_cfg_overlay={"file": str(out)}, num_classes=7)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_refusals_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: nn.Module) -> None:
    source, out = tmp_path / "w.pth", tmp_path / "x.safetensors"
    torch.save(spelt(model, "mmpretrain"), source)
    lost = {k: v for k, v in spelt(model, "mmpretrain").items() if k != "backbone.norm1.bias"}
    torch.save(lost, tmp_path / "lost.pth")
    torch.save({"student": model.state_dict(), "teacher": model.state_dict()}, tmp_path / "two.pth")
    (tmp_path / "text.pth").write_text("no")
    for arguments, words in (
        ((source,), "out=X.safetensors"),
        ((source, source, f"out={out}"), "one FILE"),
        ((source, f"out={out}", "modle=van_b0"), "unknown key 'modle'"),
        ((source, "out=x.pth"), "must end in .safetensors"),
        ((source, f"out={out}", "model=van_b9"), "van_b6"),
        ((source, f"out={out}", "model=resnet18"), "none of this package's"),
        ((source, f"out={out}", "model=van_b1"), "does not fit van_b1"),
        ((source, f"out={out}", "model=nat_mini"), "does not fit nat_mini"),
        ((source, f"out={out}", "overwrite=maybe"), "overwrite=maybe"),
        ((source, f"out={out}", "part=head.neck"), "nothing under part=head.neck"),
        ((tmp_path / "lost.pth", f"out={out}", "model=van_b0"), "stages.0.norm.bias"),
        ((tmp_path / "two.pth", f"out={out}", "model=van_b0"), "two models"),
        ((tmp_path / "text.pth", f"out={out}"), "text file"),
        ((tmp_path / "none.pth", f"out={out}"), "no checkpoint file"),
        ((source, f"out={source}/x.safetensors", "model=van_b0"), "cannot be written"),
    ):
        assert words in refused(capsys, *arguments)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["lost.pth", "text.pth", "two.pth", "w.pth"]
    assert run(tmp_path / "two.pth", f"out={out}", "model=van_b0", "part=teacher") == 0
    assert "overwrite=true" in refused(capsys, source, f"out={out}", "model=van_b0")
    assert run(source, f"out={out}", "model=van_b0", "overwrite=true") == 0


def test_which_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of models that differ in nothing but their dilation the names are said; a family's sizes are told apart."""
    source, out = tmp_path / "w.pth", f"out={tmp_path / 'x.safetensors'}"
    torch.save({"model": spelt(timm.create_model("nat_mini", num_classes=2), "the original")}, source)
    assert "fits dinat_mini, nat_mini; say which with model=NAME" in refused(capsys, source, out)
    torch.save({"conv1.weight": torch.ones(64, 3, 7, 7)}, source)
    found = refused(capsys, source, out)
    assert all(word in found for word in ("is of no model that is known", "conv1.weight", "the model's"))
    shapes = spelt(timm.create_model("nat_mini", mlp_ratio=1), "the original")
    torch.save({"model": shapes}, source)
    assert "levels.0.blocks" not in (found := refused(capsys, source, out))
    assert "another shape in" in found
    assert "stages.0.blocks.0.mlp.fc1.weight: (64, 64) in the file, (192, 64) in the model" in found


def test_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run says which model it trained, and with which arguments."""
    small = {"depths": [1, 1, 1, 1]}
    model = timm.create_model("dinat_mini", num_classes=3, **small)
    config = {"model": {"name": "dinat_mini", "kwargs": small}}
    save_checkpoint(
        tmp_path / "run/checkpoints/last.pt", {"state_dict": model.state_dict(), "config": config, "step": 1}
    )
    out = tmp_path / "x.safetensors"
    assert run(tmp_path / "run", f"out={out}") == 0
    assert "dinat_mini; dialect: ours" in capsys.readouterr().out
    assert all(torch.equal(v, load_file(out)[k]) for k, v in model.state_dict().items())


def test_backbone_and_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A detector's norms are kept for zoo.Backbone; a tower without our head's norm gets its initial values."""
    nat = timm.create_model("nat_mini")
    body = {k: v for k, v in spelt(nat, "the original").items() if not k.startswith(("norm.", "head."))}
    norms = {f"norm{i}.{p}": torch.randn(64 * 2**i) for i in range(4) for p in ("weight", "bias")}
    state = {f"backbone.{k}": v for k, v in {**body, **norms}.items()}
    torch.save({"state_dict": {**state, "neck.0.weight": torch.ones(1)}}, tmp_path / "det.pth")
    out = tmp_path / "det.safetensors"
    assert run(tmp_path / "det.pth", f"out={out}", "model=nat_mini") == 0
    found = capsys.readouterr().out
    assert "left out: neck.*.weight" in found
    assert "not there: norm.weight, norm.bias, head.fc.weight, head.fc.bias" in found
    assert torch.equal(load_file(out)["stages.2.out_norm.bias"], norms["norm2.bias"])
    overlay = {"file": str(out)}
    features = timm.create_model("nat_mini", pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(features.model.stem.norm.weight, nat.stem.norm.weight)

    davit = timm.create_model("zoo_davit_base_fl")
    tower = written(davit.state_dict(), next(d for d in dialects_of(davit) if d.name == "Florence-2's own code"))
    tower = {f"vision_tower.{k}": v for k, v in tower.items() if not k.startswith("head.")}
    torch.save({**tower, "image_projection": torch.ones(2)}, tmp_path / "fl.pth")
    out = tmp_path / "fl.safetensors"
    assert run(tmp_path / "fl.pth", f"out={out}", "model=zoo_davit_base_fl") == 0
    assert "zoo_davit_base_fl; dialect: Florence-2's own code" in capsys.readouterr().out
    loaded = timm.create_model("zoo_davit_base_fl", pretrained=True, pretrained_cfg_overlay={"file": str(out)})
    assert all(
        torch.equal(v, loaded.state_dict()[k]) for k, v in davit.state_dict().items() if k in loaded.state_dict()
    )
