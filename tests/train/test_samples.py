"""augmented.png, sweep.csv, and labels of reduced models: what a run folder tells a reader."""

import csv
from pathlib import Path

import pytest
import torch
from pictures import CLASSES, FOLDER, class_folders
from PIL import Image
from training import TINY, summary, train

from zoo.train import engine
from zoo.train.app import main
from zoo.train.samples import draw_samples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("samples"), train=8, held_out=2)


def test_the_picture_shows_what_is_trained_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn, trained = [], []
    monkeypatch.setattr(engine, "draw_samples", lambda *args: (drawn.append(args), draw_samples(*args)))
    step = engine.Trainer._micro_step

    def recorded(self: engine.Trainer, images: torch.Tensor, targets: torch.Tensor, batch: int) -> object:
        trained.append((images.clone(), targets.clone()))
        return step(self, images, targets, batch)

    monkeypatch.setattr(engine.Trainer, "_micro_step", recorded)
    run = train(
        tmp_path / "run", *FOLDER, f"data.root={data}", "augment=timm", "augment.auto_augment=rand-m9", "max_steps=1"
    )
    ((path, images, targets, names, _),) = drawn
    assert path == run / "augmented.png"
    assert torch.equal(images, trained[0][0])
    assert torch.equal(targets, trained[0][1])
    assert names == list(CLASSES)
    with Image.open(path) as picture:
        assert picture.width > 400
    path.unlink()
    assert main("train", [f"resume={run}", "max_steps=2"]) == 0
    assert not path.exists(), "of a run's beginning only"


def test_mixed_and_grey_images(tmp_path: Path) -> None:
    shares = torch.tensor([[0.7, 0.3, 0.0], [0.97, 0.02, 0.01]])
    shape = {"mean": (0.5,), "std": (0.5,)}
    draw_samples(tmp_path / "a.png", torch.zeros(2, 1, 8, 8), shares, ["a", "b", "$c"], shape)
    with Image.open(tmp_path / "a.png") as picture:
        grey = picture.convert("L").getcolors(2**20)
    assert any(value in (127, 128) for _, value in grey), "zero is the mean"


def test_a_sweep_has_a_table(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*FOLDER, f"data.root={data}", "epochs=1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    options = [o for o in options if not o.startswith("optim.lr=")]
    assert main("train", ["--multirun", *options, "optim.lr=1e-3,2e-3", "model.drop_rate=0.0,0.1"]) == 0
    with open(tmp_path / "sweep" / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["job", "run", "optim.lr", "model.drop_rate", "top1", "error"]
    assert [(r["optim.lr"], r["model.drop_rate"]) for r in rows] == [
        ("0.001", "0.0"), ("0.001", "0.1"), ("0.002", "0.0"), ("0.002", "0.1"),
    ]  # fmt: skip
    for row in rows:
        assert float(row["top1"]) == pytest.approx(summary(Path(row["run"]))["top1"])
    assert "sweep: 4 jobs, the best top1" in capsys.readouterr().out


def test_a_reduced_model_does_not_look_like_the_published_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("train", ["model=nat_digits", *TINY, "max_steps=1"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("nat_digits-digits-")
    assert summary(run)["model"] == "nat_mini"
    assert summary(run)["label"] == "nat_digits"
    assert "model: nat_digits, a nat_mini reduced to 0.02 M parameters" in capsys.readouterr().out
    assert main("eval", [f"run={run}"]) == 0
    assert "(nat_digits, raw weights)" in capsys.readouterr().out


def test_every_reduced_model_has_a_label() -> None:
    import yaml

    folder = Path(__file__).parents[2] / "configs/model"
    for file in folder.glob("*_digits.yaml"):
        assert yaml.safe_load(file.read_text())["model"]["label"] == file.stem
