"""Weights of other programs at every door: training, evaluation, a detector's backbone and an export."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
from dialects import written
from safetensors.torch import save_file
from torch import Tensor, nn
from training import checkpoint

from zoo.cli import main
from zoo.models.dialects import dialects_of
from zoo.train.detection.backbone import Backbone

SMALL: dict[str, Any] = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16, "kernel_size": 3}
OVERRIDES = (
    "model=nat_mini",
    "model.in_chans=1",
    "model.kwargs={depths:[1,1],num_heads:[1,2],embed_dim:16,kernel_size:3}",
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("nat_mini", **SMALL, in_chans=1, num_classes=10).eval()


def dinat_of_transformers(model: nn.Module) -> dict[str, Tensor]:
    dialect = next(d for d in dialects_of(model) if "DinatForImage" in d.name)
    return {f"model.{k}": v for k, v in written(model.state_dict(), dialect).items()}


@pytest.fixture(scope="module", params=["Lightning", "shards", "distributed"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: nn.Module) -> Path:
    """transformers' names, in what Lightning, the hub and torch's distributed checkpoints write."""
    folder, state = tmp_path_factory.mktemp("weights"), dinat_of_transformers(model)
    if request.param == "Lightning":
        torch.save({"state_dict": state, "hyper_parameters": {"lr": 0.1}}, folder / "epoch=3-step=9.ckpt")
        return folder / "epoch=3-step=9.ckpt"
    if request.param == "shards":
        places = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(state)}
        for file in set(places.values()):
            save_file({k: v.contiguous() for k, v in state.items() if places[k] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return folder
    dcp.save({"model": state}, checkpoint_id=folder, no_dist=True)
    return folder


def test_evaluation_and_training(weights: Path, tmp_path: Path, model: nn.Module) -> None:
    out = tmp_path / "out.json"
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    found = []
    for source in (weights, tmp_path / "ours.pth"):
        argv = [*OVERRIDES, "model.num_classes=10", "data=digits", f"out={out}", f"pretrained='{source}'"]
        assert main(["eval", *argv]) == 0
        found.append({k: v for k, v in json.loads(out.read_text()).items() if k in ("loss", "top1")})
    assert found[0] == found[1]
    options = ("max_steps=1", "schedule.warmup_epochs=1", "schedule.warmup_lr=1e-30", "batch_size=64", "device=cpu")
    run = tmp_path / "run"
    assert main(["train", f"run_dir={run}", *OVERRIDES, *options, f"model.pretrained='{weights}'"]) == 0
    torch.testing.assert_close(checkpoint(run)["state_dict"], dict(model.state_dict()))


def test_backbone(weights: Path, tmp_path: Path, model: nn.Module) -> None:
    backbone = Backbone("nat_mini", (0, 1), weights, in_chans=1, **SMALL)
    own = model.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in backbone.body.state_dict().items())


@pytest.fixture(scope="module")
def van() -> nn.Module:
    return timm.create_model("van_b0", num_classes=7).eval()


def test_export(van: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = written(van.state_dict(), next(d for d in dialects_of(van) if d.name == "mmpretrain"))
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    argv = ["export", "model=van_b0", f"pretrained={tmp_path / 'w.pth'}", f"out={tmp_path / 'out'}"]
    assert main(argv) == 2
    assert "pass num_classes=7" in capsys.readouterr().err
    assert main([*argv, "num_classes=9"]) == 2
    assert "a fresh one has nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*argv, "num_classes=7"]) == 0
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), van(x))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["pretrained_cfg"]["description"] == "weights of w.pth"
    assert "top-1 | not measured" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=x", "model=van_b0", "out=x"], "model= conflicts with run="),
        (["pretrained=x", "out=x"], "run=FOLDER or model=NAME"),
        (["model=van_b0", "pretrained=/no/such", "out=x"], "no checkpoint file at /no/such"),
        (["model=vann_b0", "out=x"], "nearest names are van_b0"),
    ],
)
def test_mistakes_of_an_export(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_norms_of_a_detector(model: nn.Module, tmp_path: Path) -> None:
    """A detector of the original's gives its norms on the outputs too."""
    original = written(model.state_dict(), next(d for d in dialects_of(model) if d.name == "the original"))
    body = {f"backbone.{k}": v for k, v in original.items() if not k.startswith(("norm.", "head."))}
    norms = {f"backbone.norm{i}.{p}": torch.randn(16 * 2**i) for i in range(2) for p in ("weight", "bias")}
    torch.save({"state_dict": {**body, **norms, "neck.x": torch.ones(1)}}, tmp_path / "d.pth")
    backbone = Backbone("nat_mini", (0, 1), tmp_path / "d.pth", in_chans=1, **SMALL)
    assert torch.equal(backbone.norm1.weight, norms["backbone.norm1.weight"])
    assert torch.equal(backbone.norm0.bias, norms["backbone.norm0.bias"])
