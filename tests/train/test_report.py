"""The report of `zoo eval`: every figure in it against a count of the images themselves."""

import csv
import json
from pathlib import Path

import pytest
import torch
from pictures import CLASSES, FOLDER, class_folders
from PIL import Image
from training import train

from zoo.cli import main
from zoo.train.report import Outcomes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    class_folders(root / "data")
    (root / "data/val/bee/0.png").write_text("no image")
    return train(root / "run", *FOLDER, f"data.root={root / 'data'}", "epochs=1")


def table(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("workers", [0, 2])
def test_report(run: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    arguments = [f"run={run}", f"report={tmp_path}", "per_image=true", f"out={out}", "device=cpu", "batch_size=4"]
    assert main(["eval", *arguments, f"data.num_workers={workers}"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["top5"] is None, "three classes"
    assert "top-5" not in printed
    images = {row["image"]: row for row in table(tmp_path / "per_image.csv")}
    assert set(images) == {f"val/{name}/{i}.png" for name in CLASSES for i in range(10)}
    assert images["val/bee/0.png"]["error"] == "no image format that Pillow reads"
    readable = [row for row in images.values() if not row["error"]]
    for row in readable:
        assert row["class"] == Path(row["image"]).parent.name
        assert row["predicted"] == row["top1"]
        assert row["correct"] == str(int(row["class"] == row["predicted"]))
        assert sum(float(row[f"probability{i}"]) for i in (1, 2, 3)) == pytest.approx(1, abs=1e-5)
    right = sum(int(row["correct"]) for row in readable)
    assert result["top1"] == pytest.approx(100 * right / 30)
    with open(tmp_path / "confusion.csv") as file:
        header, *lines = list(csv.reader(file))
    for name, *counts in lines:
        for predicted, count in zip(header[1:], counts, strict=True):
            assert int(count) == sum(r["class"] == name and r["predicted"] == predicted for r in readable)
    for row in table(tmp_path / "per_class.csv"):
        mine = [r for r in readable if r["class"] == row["class"]]
        assert int(row["images"]) == len(mine) == (9 if row["class"] == "bee" else 10)
        assert int(row["correct"]) == sum(int(r["correct"]) for r in mine)
        assert float(row["accuracy"]) == pytest.approx(100 * int(row["correct"]) / len(mine), abs=0.01)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300


def test_no_image_table_unless_asked(run: Path, tmp_path: Path) -> None:
    assert main(["eval", f"run={run}", f"report={tmp_path}", "device=cpu"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"per_class.csv", "confusion.csv", "confusion.png"}


def test_training_reports_no_top5_of_three_classes(run: Path) -> None:
    assert json.loads((run / "summary.json").read_text())["top5"] is None
    assert {row["top5"] for row in table(run / "metrics.csv")} == {""}


def test_one_image_table_needs_a_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", f"run={run}", "per_image=true"]) == 2
    assert "give report=FOLDER" in capsys.readouterr().err


def test_classes_that_do_not_occur(tmp_path: Path) -> None:
    outcomes = Outcomes()
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 9, 0, 0], [9, 0, 0, 0]])
    outcomes.add(logits, torch.tensor([0, 1, 1]), [2, 0, 1])
    outcomes.write(tmp_path, ["a", "b", "c", "d"])
    rows = table(tmp_path / "per_class.csv")
    assert [(r["class"], r["images"], r["accuracy"], r["mistaken_for"]) for r in rows] == [
        ("a", "1", "100.00", ""), ("b", "2", "50.00", "a"), ("c", "0", "", ""), ("d", "0", "", ""),
    ]  # fmt: skip
