"""data.val_fraction: which images are held out of a folder without a split, and that nothing moves them."""

import shutil
from pathlib import Path

import pytest
from pictures import CLASSES, FOLDER, class_folders
from PIL import Image
from training import assert_same_run, resume, summary, train

from zoo.errors import UserError
from zoo.train.app import main
from zoo.train.config import DataConfig
from zoo.train.data import open_dataset


def folder(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(root / name / f"{i}.png")
    return root


def names(root: Path, training: bool, fraction: float = 0.25) -> set[str]:
    data = open_dataset(DataConfig(name="imagefolder", root=str(root), val_fraction=fraction), training)
    return {str(Path(path).relative_to(root)) for path, _ in data.reader.samples}


def test_the_division(tmp_path: Path) -> None:
    root = folder(tmp_path, ant=40, bee=8, cow=2, dog=1)
    trained, held_out = names(root, True), names(root, False)
    assert not trained & held_out
    assert len(trained | held_out) == 51
    count = {name: sum(path.startswith(f"{name}/") for path in held_out) for name in ("ant", "bee", "cow", "dog")}
    assert count == {"ant": 10, "bee": 2, "cow": 1, "dog": 0}
    assert names(root, False) == held_out
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    shutil.copytree(root, moved)
    assert names(moved, False) == held_out, "where the folder lies does not matter"
    Image.new("RGB", (8, 8)).save(root / "bee" / "new.png")
    assert {p for p in names(root, False) if not p.startswith("bee/")} == {
        p for p in held_out if not p.startswith("bee/")
    }


def test_it_is_said_in_one_line(tmp_path: Path) -> None:
    data = open_dataset(
        DataConfig(name="imagefolder", root=str(folder(tmp_path, ant=8, dog=1)), val_fraction=0.25), True
    )
    (line,) = data.notes
    assert line.startswith("data.val_fraction=0.25: 2 of 9 images in")
    assert "1 with a single image" in line


@pytest.mark.parametrize(
    ("name", "counts", "words"),
    [
        ("imagefolder", {"ant": 1, "bee": 1}, "every class has one image"),
        ("digits", {"ant": 3, "bee": 3}, "has splits of its own"),
    ],
)
def test_mistakes(tmp_path: Path, name: str, counts: dict[str, int], words: str) -> None:
    cfg = DataConfig(name=name, root=str(folder(tmp_path, **counts)), val_fraction=0.5)
    with pytest.raises(UserError, match=words):
        open_dataset(cfg, True)


def test_a_folder_with_a_split_is_left_alone(tmp_path: Path) -> None:
    class_folders(tmp_path, train=4, held_out=4)
    cfg = DataConfig(name="imagefolder", root=str(tmp_path), val_fraction=0.5)
    with pytest.raises(UserError, match="leave it out"):
        open_dataset(cfg, True)
    shutil.rmtree(tmp_path / "val")
    assert len(open_dataset(cfg, True)) == len(open_dataset(cfg, False)) == 6


def test_out_of_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", [*FOLDER, f"data.root={tmp_path}", "data.val_fraction=1.5"]) == 2
    assert "give a share between 0 and 1" in capsys.readouterr().err


def test_a_run_and_its_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders(tmp_path / "d", train=16, held_out=0)
    shutil.rmtree(tmp_path / "d/val")
    root = tmp_path / "d/train"
    options = (*FOLDER, f"data.root={root}", "data.val_fraction=0.25")
    whole = train(tmp_path / "whole", *options, "epochs=2", "seed=3")
    lines = [line for line in capsys.readouterr().out.splitlines() if "val_fraction" in line]
    assert lines == [lines[0]]
    assert "12 of 48 images" in lines[0]
    assert summary(whole)["held_out"] == 12
    parts = train(tmp_path / "parts", *options, "epochs=2", "seed=3", "max_steps=5")
    resume(parts, "max_steps=null")
    assert_same_run(whole, parts, ignore=(".config",))
    assert main("eval", [f"run={parts}", "device=cpu"]) == 0
    assert "12 images" in capsys.readouterr().out
    (root / CLASSES[0] / "extra.png").write_bytes((root / CLASSES[0] / "0.png").read_bytes())
    resume(parts, "epochs=3", expect=2)
    assert "images" in capsys.readouterr().err
