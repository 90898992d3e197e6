"""`zoo export`: a run's weights come back through timm, bit for bit."""

import json
from pathlib import Path

import pytest
import timm
import torch

from zoo.cli import main
from zoo.train.export import FORMATS
from zoo.train.runs import load_run, select_weights

SMALL = ["model.kwargs.depths=[1,1]", "model.kwargs.num_heads=[2,4]"]
ARGUMENTS = ["dry_run=true", "batch_size=16", "ema.enabled=true", *SMALL]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    assert main(["train", *ARGUMENTS, f"run_dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_round_trip(run: Path, tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "exported"
    assert main(["export", f"run={run}", f"out={out}", f"weights={weights}"]) == 0
    assert "local-dir:" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "config.json", "README.md"}

    opened = load_run(run)
    state, kind = select_weights(opened.checkpoint("last")[1], weights)
    assert kind == weights
    expected = timm.create_model(
        opened.config["model"]["name"], num_classes=10, in_chans=opened.config["model"]["in_chans"],
        **opened.config["model"]["kwargs"],
    ).eval()  # fmt: skip
    expected.load_state_dict(state)
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    size = opened.config["data"]["img_size"]
    images = torch.randn(4, opened.config["model"]["in_chans"], size, size)
    with torch.no_grad():
        assert torch.equal(loaded(images), expected(images))
    assert loaded.num_classes == 10


def test_configuration_describes_these_weights(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    assert main(["export", f"run={run}", f"out={out}"]) == 0
    data = load_run(run).config["data"]
    config = json.loads((out / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert cfg["input_size"][1:] == [data["img_size"]] * 2
    assert cfg["mean"] == pytest.approx(data["mean"])
    assert cfg.get("notes") is None  # the published checkpoint's accuracy is not this one's
    assert cfg.get("tag") is None
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "digits" in card


def test_overwrite(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "exported"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    assert main(["export", f"run={run}", f"out={out}"]) == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert (out / "mine.txt").exists()
    assert main(["export", f"run={run}", f"out={out}", "overwrite=true"]) == 0
    assert not (out / "mine.txt").exists()


def test_damaged_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "checkpoints" / "last.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["export", f"run={copy}", f"out={tmp_path / 'out'}"]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=x"], "needs run="),
        (["run=x"], "needs out="),
        (["run=/nowhere", "out=x"], "no run folder at /nowhere"),
        (["rnu=x"], "unknown key 'rnu'; the nearest keys are run"),
        (["run"], "arguments are key=value"),
        (["format=onnxx"], "the formats are"),
        (["overwrite=perhaps"], "perhaps"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_run_of_a_detector(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text() + "detector:\n  name: retinanet\n")
    assert main(["export", f"run={tmp_path}", f"out={tmp_path / 'out'}"]) == 2
    assert "zoo detect" in capsys.readouterr().err


def test_every_format_is_one_of_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f" {name}: " in usage for name in FORMATS)
