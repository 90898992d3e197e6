"""Classes are matched by name: held-out data with fewer, reordered or renamed classes, and data that changed."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from pictures import FOLDER, class_folders, picture
from torch.utils.data import Dataset
from training import checkpoint, summary

import zoo.train.evaluate as evaluation
from zoo.errors import UserError
from zoo.train.app import main
from zoo.train.labels import label_names, match_labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on folders and its data."""
    folder = tmp_path_factory.mktemp("named")
    data = class_folders(folder / "data")
    run = folder / "run"
    assert main("train", [*FOLDER, f"data.root={data}", f"run_dir={run}", "epochs=4"]) == 0
    assert summary(run)["top1"] > 90
    return run, data


def score(run: Path, data: Path, out: Path, *more: str) -> tuple[float, int]:
    assert main("eval", [f"run={run}", f"data.root={data}", f"out={out}", *more]) == 0
    record = json.loads(out.read_text())
    return record["top1"], record["images"]


def fails(capsys: pytest.CaptureFixture[str], command: str, *argv: str) -> str:
    capsys.readouterr()
    assert main(command, list(argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_checkpoint_names_its_classes(trained: tuple[Path, Path]) -> None:
    state = checkpoint(trained[0])
    assert state["label_names"] == ["ant", "bee", "cow"]
    assert state["data_set"]["training"]["images"] == 48
    assert state["data_set"]["held-out"]["images"] == 30


@pytest.mark.parametrize("kept", [("cow",), ("bee", "cow"), ("cow", "ant")])
def test_fewer_held_out_classes(trained: tuple[Path, Path], tmp_path: Path, kept: tuple[str, ...]) -> None:
    run, data = trained
    for name in kept:
        shutil.copytree(data / "val" / name, tmp_path / "d" / "val" / name)
    top1, images = score(run, tmp_path / "d", tmp_path / "out.json")
    assert top1 > 90
    assert images == 10 * len(kept)


def test_training_images_at_hand_do_not_renumber(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = trained
    for split in ("train", "val"):
        shutil.copytree(data / split / "bee", tmp_path / "d" / split / "bee")
        shutil.copytree(data / split / "cow", tmp_path / "d" / split / "cow")
    assert score(run, tmp_path / "d", tmp_path / "out.json")[0] > 90


def test_unknown_classes(trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = trained
    shutil.copytree(data / "val", tmp_path / "d" / "val")
    (tmp_path / "d" / "val" / "bee").rename(tmp_path / "d" / "val" / "wasp")
    line = fails(capsys, "eval", f"run={run}", f"data.root={tmp_path / 'd'}")
    assert "wasp (which have bee)" in line
    line = fails(capsys, "eval", f"run={run}", "data=digits")
    assert "lack: 0, 1, 2" in line


def test_exports_name_their_classes(trained: tuple[Path, Path], tmp_path: Path) -> None:
    from zoo.train.export import main as export

    run, data = trained
    assert export([f"run={run}", f"out={tmp_path / 'e'}"]) == 0
    assert json.loads((tmp_path / "e" / "config.json").read_text())["label_names"] == ["ant", "bee", "cow"]
    model = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True)
    assert list(model.pretrained_cfg["label_names"]) == ["ant", "bee", "cow"]
    shutil.copytree(data / "val" / "cow", tmp_path / "d" / "val" / "cow")
    for weights in (tmp_path / "e" / "model.safetensors", run / "checkpoints" / "last.pt"):
        argv = ["model=nat_digits", "model.kwargs.depths=[1,1]", "model.kwargs.num_heads=[1,2]", "data=imagefolder"]
        argv += ["model.kwargs.embed_dim=16", "model.num_classes=3", "data.img_size=32", f"out={tmp_path / 'o.json'}"]
        assert main("eval", [*argv, f"pretrained={weights}", f"data.root={tmp_path / 'd'}"]) == 0
        assert json.loads((tmp_path / "o.json").read_text())["top1"] > 90


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("rename", ("other classes", "without bee", "with the new wasp")),
        ("fewer", ("48 training images", "47 now")),
        ("more", ("48 training images", "49 now")),
        ("other", ("other training images", "names")),
        ("held-out", ("30 held-out images", "29 now")),
    ],
)
def test_resume_on_changed_data(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, words: tuple[str, ...]
) -> None:
    run, data = shutil.copytree(trained[0], tmp_path / "run"), shutil.copytree(trained[1], tmp_path / "d")
    before = {p.name: p.read_bytes() for p in (run / "checkpoints").iterdir()}
    if change == "rename":
        for split in ("train", "val"):
            (data / split / "bee").rename(data / split / "wasp")
    elif change == "fewer":
        (data / "train" / "ant" / "3.png").unlink()
    elif change == "more":
        picture(0, 77).save(data / "train" / "ant" / "77.png")
    elif change == "other":
        (data / "train" / "ant" / "3.png").rename(data / "train" / "ant" / "33.png")
    else:
        (data / "val" / "cow" / "3.png").unlink()
    line = fails(capsys, "train", f"resume={run}", f"data.root={data}", "epochs=5")
    for word in words:
        assert word in line
    assert before == {p.name: p.read_bytes() for p in (run / "checkpoints").iterdir()}


def test_resume_on_moved_data(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = shutil.copytree(trained[0], tmp_path / "run"), shutil.copytree(trained[1], tmp_path / "a b,c=[d]")
    assert main("train", [f"resume={run}", f"data.root={data}", "epochs=5"]) == 0
    assert summary(run)["epochs"] == 5


class Named(Dataset[tuple[str, int]]):
    def __init__(self, names: list[str]) -> None:
        self.classes = names

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.classes[index], index


def test_match_labels() -> None:
    known = ["ant", "bee", "cow"]
    assert [match_labels(Named(["cow", "ant"]), known, "x")[i] for i in range(2)] == [("cow", 2), ("ant", 0)]
    assert label_names(match_labels(Named(["cow"]), known, "x")) == known
    same = Named(known)
    assert match_labels(same, known, "x") is same
    with pytest.raises(UserError, match="emu"):
        match_labels(Named(["emu", "ant"]), known, "x")


def test_published_weights_know_imagenets_names() -> None:
    """A few of ImageNet's folders are scored at their places in a head of 1000."""
    known = timm.data.ImageNetInfo("imagenet-1k").label_names()

    class Head:
        num_classes = 1000
        pretrained_cfg = {"label_names": None}

    names = evaluation.published_labels(Head(), [known[7], known[3]])
    assert names == known
    assert [match_labels(Named([known[7], known[3]]), names, "x")[i][1] for i in range(2)] == [7, 3]
    assert evaluation.published_labels(Head(), ["cat", "dog"]) is None
    assert torch.tensor(len(known)) == 1000
