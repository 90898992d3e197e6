"""Unreadable images: passed over and listed in training, missed and named in evaluation, alike when resumed."""

import json
import os
from pathlib import Path

import pytest
import torch
from pictures import FOLDER, class_folders, picture
from training import assert_same_run, checkpoint, metrics, summary

import zoo.train.data as data
from zoo.errors import UserError
from zoo.train.app import main
from zoo.train.config import DataConfig
from zoo.train.state import World


def spoil(folder: Path, names: tuple[str, ...]) -> None:
    """Put unreadable images into a class folder."""
    folder.mkdir(parents=True, exist_ok=True)
    picture(0, 5).save(folder / "whole.jpg")
    content = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    for name in names:
        if "fifo" in name:
            os.mkfifo(folder / name)
        elif "link" in name:
            (folder / name).symlink_to("missing")
        elif "folder" in name:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes({"e": b"", "h": b"<html>", "t": content[: len(content) // 2]}[name[0]])


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = class_folders(tmp_path_factory.mktemp("spoiled"))
    spoil(root / "train" / "ant", ("empty.png", "fifo.png"))
    spoil(root / "train" / "cow", ("h.jpg", "trunc.jpg"))
    spoil(root / "val" / "ant", ("empty.png", "trunc.jpg", "link.png"))
    spoil(root / "val" / "bee", ("h.jpg", "fifo.jpg", "folder.png"))
    return root


def train(run: Path, root: Path, *more: str, expect: int = 0) -> Path:
    assert main("train", [*FOLDER, f"data.root={root}", f"run_dir={run}", *more]) == expect
    return run


@pytest.fixture(scope="module")
def run(spoiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run") / "r", spoiled, "epochs=4", "augment.enabled=true", "augment.mixup=0.2")


def test_training_lists_what_it_passes_over(run: Path) -> None:
    lines = (run / "bad_images.csv").read_text().splitlines()
    assert lines[0] == "split,image,reason"
    assert [line.split(",")[:2] for line in lines[1:]] == [
        ["held-out", "val/ant/empty.png"], ["held-out", "val/ant/link.png"], ["held-out", "val/ant/trunc.jpg"],
        ["held-out", "val/bee/fifo.jpg"], ["held-out", "val/bee/folder.png"], ["held-out", "val/bee/h.jpg"],
        ["train", "train/ant/empty.png"], ["train", "train/ant/fifo.png"], ["train", "train/cow/h.jpg"],
        ["train", "train/cow/trunc.jpg"],
    ]  # fmt: skip


def test_the_figure_counts_them_as_wrong(
    run: Path, spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = summary(run)
    assert (found["held_out"], found["unreadable"]) == (36, 6)
    right = round(found["top1"] * 36 / 100)
    assert right <= 30
    assert found["top1"] == pytest.approx(100 * right / 36)
    out = tmp_path / "out.json"
    for batch in (1, 7, 64):
        capsys.readouterr()
        assert main("eval", [f"run={run}", f"out={out}", f"batch_size={batch}"]) == 0
        record = json.loads(out.read_text())
        assert record["top1"] == pytest.approx(found["top1"])
        assert (record["images"], record["unreadable"]) == (36, 6)
        assert [entry["image"] for entry in record["unreadable_images"]][0] == "val/ant/empty.png"
        lines = capsys.readouterr().out.splitlines()
        assert "36 images, 6 of them unreadable and counted as wrong" in lines[-1]
        assert "unreadable: val/bee/fifo.jpg: a fifo, not a file" in lines
    for name in ("ant", "bee", "cow"):  # without them: as many right, of 30
        for path in (spoiled / "val" / name).iterdir():
            if path.stem.isdecimal():
                (tmp_path / "clean" / "val" / name).mkdir(parents=True, exist_ok=True)
                (tmp_path / "clean" / "val" / name / path.name).write_bytes(path.read_bytes())
    assert main("eval", [f"run={run}", f"out={out}", f"data.root={tmp_path / 'clean'}"]) == 0
    assert json.loads(out.read_text())["top1"] == pytest.approx(100 * right / 30)


def test_last_line(spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "r", spoiled, "epochs=1")
    line = capsys.readouterr().out.splitlines()[-1]
    top1 = summary(run)["top1"]
    assert line == (
        f"top-1 {top1:.2f} % on 36 held-out images, 6 of them unreadable and counted as wrong; run folder: {run}"
    )


@pytest.mark.parametrize("step", [3, 9])
def test_resume_is_bitwise(run: Path, spoiled: Path, tmp_path: Path, step: int) -> None:
    more = ("epochs=4", "augment.enabled=true", "augment.mixup=0.2", f"max_steps={step}")
    part = train(tmp_path / "part", spoiled, *more)
    assert main("train", [f"resume={part}", "max_steps=null", f"data.num_workers={step % 2 * 2}"]) == 0
    assert_same_run(run, part, ignore=(".config.max_steps", ".config.data.num_workers"))
    assert metrics(run) == metrics(part)
    assert (run / "bad_images.csv").read_bytes() == (part / "bad_images.csv").read_bytes()


@pytest.mark.parametrize("limit", ["0", "2", "0.03"])
def test_more_than_max_bad(spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str) -> None:
    run = train(tmp_path / "r", spoiled, f"data.max_bad={limit}", expect=2)
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    for word in ("of 52 training images are unreadable", f"data.max_bad={limit}", "train/", "mend", "resume"):
        assert word in line
    assert (run / "bad_images.csv").is_file()
    assert 0 < checkpoint(run)["step"] < 6  # saved as far as it came
    assert main("train", [f"resume={run}", "data.max_bad=4", "epochs=1"]) == 0


def test_nothing_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            spoil(tmp_path / "d" / split / name, tuple(f"e{i}.png" for i in range(6)))
    train(tmp_path / "r", tmp_path / "d", expect=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "training images are unreadable" in line
    train(tmp_path / "r2", tmp_path / "d", "data.max_bad=1e9", expect=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "no readable image" in line


def test_no_held_out_image_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = class_folders(tmp_path / "d", held_out=0)
    for name in ("ant", "bee", "cow"):
        spoil(root / "val" / name, ("empty.png",))
    train(tmp_path / "r", root, expect=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "none of the 3 held-out images can be read (such as val/ant/empty.png: an empty file)" in line


def test_a_mended_image_is_forgotten(spoiled: Path, tmp_path: Path) -> None:
    root = class_folders(tmp_path / "d")
    spoil(root / "train" / "ant", ("empty.png", "h.png"))
    run = train(tmp_path / "r", root, "epochs=2", "max_steps=7")
    assert len((run / "bad_images.csv").read_text().splitlines()) == 3
    picture(0, 99).save(root / "train" / "ant" / "empty.png")
    assert main("train", [f"resume={run}", "max_steps=null", "data.max_bad=1"]) == 0
    assert (run / "bad_images.csv").read_text().splitlines()[1:] == [
        'train,train/ant/h.png,"HTML or XML, not an image"'
    ]


def test_narrow_pictures_need_no_memory(tmp_path: Path) -> None:
    from PIL import Image

    root = class_folders(tmp_path)
    Image.new("RGB", (1, 60000)).save(root / "val" / "ant" / "narrow.png")
    dataset = data.open_dataset(DataConfig(name="imagefolder", root=str(root)), False)
    shape = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    shape |= {"crop_pct": 0.9, "crop_mode": "center"}
    loader = data.EvalLoader(dataset, DataConfig(name="imagefolder"), shape, 8, World(torch.device("cpu")))
    assert sum(len(images) for images, _ in loader) == 30
    assert loader.unreadable == [("val/ant/narrow.png", "1 x 60000 pixels, too long for its width")]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_its_last_line(
    spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def broken(self: object, index: int) -> None:
        raise KeyError("the cause")

    monkeypatch.setattr(data.ReaderImages, "__getitem__", broken)
    train(tmp_path / "r", spoiled, f"data.num_workers={workers}", expect=1)
    (line,) = capsys.readouterr().err.splitlines()
    if workers:
        assert line.split("; debug=true")[0].endswith("the cause'")
        assert "Traceback" not in line
        assert "KeyError" in line


def test_users_mistake_in_a_worker(
    spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, index: int) -> None:
        raise UserError("the disk is not there; mount it")

    monkeypatch.setattr(data.ReaderImages, "__getitem__", broken)
    train(tmp_path / "r", spoiled, "data.num_workers=1", expect=2)
    assert capsys.readouterr().err == "zoo train: the disk is not there; mount it\n"


def test_a_worker_that_is_killed(
    spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    def killed(self: object, index: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(data.ReaderImages, "__getitem__", killed)
    train(tmp_path / "r", spoiled, "data.num_workers=1", expect=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "memory" in line
    assert "data.num_workers" in line
