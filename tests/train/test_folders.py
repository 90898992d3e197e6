"""Folders: what is a class, what is ignored, and in which order images stand."""

import os
from pathlib import Path

import pytest
import timm.data
from PIL import Image

from zoo.errors import UserError
from zoo.train.config import DataConfig
from zoo.train.data import open_dataset
from zoo.train.folders import FolderReader, is_ignored


def image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 0, 0)).save(path)


def read(folder: Path, **options: object) -> FolderReader:
    return FolderReader(folder, folder, **options)  # type: ignore[arg-type]


def labels(reader: FolderReader) -> dict[str, str]:
    names = {index: name for name, index in reader.class_to_idx.items()}
    return {reader.filename(i): names[reader.samples[i][1]] for i in range(len(reader))}


def test_top_level_folders_are_the_classes(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/deep/b.png", "cat/dog/er/c.png", "dog/x/y/z/d.png", "dog/cat.png"):
        image(tmp_path / name)
    reader = read(tmp_path)
    assert reader.class_to_idx == {"cat": 0, "dog": 1}
    assert labels(reader) == {
        "cat/a.png": "cat", "cat/deep/b.png": "cat", "cat/dog/er/c.png": "cat", "dog/cat.png": "dog",
        "dog/x/y/z/d.png": "dog",
    }  # fmt: skip


def test_the_order_is_timms(tmp_path: Path) -> None:
    """Runs that were made with timm's reader go on with the same images under the same numbers."""
    for name in ("n2", "n10", "N1", "b"):
        for file in ("9.png", "10.png", "x2.jpg", "x10.jpeg"):
            image(tmp_path / name / file)
    theirs = timm.data.create_dataset("", root=str(tmp_path), search_split=False).reader
    ours = read(tmp_path)
    assert ours.class_to_idx == theirs.class_to_idx
    assert ours.samples == theirs.samples
    for name in ("a1", "a01", "A1"):  # equal in natural order
        image(tmp_path / name / "x.png")
    assert list(read(tmp_path).class_to_idx)[:3] == ["A1", "a01", "a1"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a.png", "b.TIF"), ("2 images", "a.png", "no class folders", "CLASS/")),
        (("cat/a.png", "dog/b.png", "x.webp"), ("1 images", "beside", "x.webp")),
        ((), ("no images",)),
        (("cat/a.txt",), ("no images", "1 .txt")),
        (("cat/a.png", "dog/.hidden.png"), ("without images", "dog")),
        (("cat/a.png", "dog/notes/b.txt", "emu/.x/y.png"), ("without images", "dog, emu")),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, names: tuple[str, ...], words: tuple[str, ...]) -> None:
    for name in names:
        image(tmp_path / "other.png")
        (tmp_path / "split" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "other.png").rename(tmp_path / "split" / name)
    (tmp_path / "split").mkdir(exist_ok=True)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "split")
    for word in words:
        assert word in str(caught.value)


def test_what_systems_leave_is_ignored(tmp_path: Path) -> None:
    left = (
        ".ipynb_checkpoints/a-checkpoint.png", ".thumbnails/a.png", "@eaDir/a.png", "__MACOSX/cat/._a.png",
        "lost+found/a.png", ".DS_Store", "Thumbs.db", "cat/._x.png", "cat/thumbs.DB", "cat/.hidden.jpg",
        "cat/@eaDir/x.png", "dog/deep/.DS_Store", "._y.png", "dog/.nomedia/z.png", "$RECYCLE.BIN/x.png",
    )  # fmt: skip
    for name in (*left, "cat/a.png", "dog/b.png"):
        image(tmp_path / "x.png")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x.png").rename(tmp_path / name)
    reader = read(tmp_path)
    assert labels(reader) == {"cat/a.png": "cat", "dog/b.png": "dog"}
    assert len(reader.notes) == 1
    assert f"ignored {len(left)} hidden or system entries" in reader.notes[0]
    assert not is_ignored("cat.dog")


@pytest.mark.parametrize("suffix", [".bmp", ".webp", ".tif", ".tiff", ".gif", ".jfif", ".ppm", ".jp2", ".JPEG"])
def test_every_suffix_of_pillows_in_any_case(tmp_path: Path, suffix: str) -> None:
    for name, ending in (("cat", suffix), ("dog", suffix.upper()), ("emu", suffix.title())):
        (tmp_path / "train" / name).mkdir(parents=True)
        kind = {".jfif": "JPEG", ".tif": "TIFF", ".jp2": "JPEG2000"}.get(suffix.lower(), suffix[1:].upper())
        Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "train" / name / f"x{ending}", kind)
    dataset = open_dataset(DataConfig(name="imagefolder", root=str(tmp_path)), True)
    assert [target for _, target in (dataset[i] for i in range(3))] == [0, 1, 2]
    assert all(abs(dataset[i][0].getpixel((4, 4))[0] - 200) < 8 for i in range(3))


def test_skipped_files_are_counted_by_suffix(tmp_path: Path) -> None:
    for name in ("cat/a.png", "dog/b.png"):
        image(tmp_path / name)
    for name in ("README.md", "cat/a.xml", "cat/deep/b.XML", "dog/c.heic", "dog/noname"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (note,) = read(tmp_path).notes
    for word in ("skipped 5 files", "2 .xml", "1 .md", "1 .heic", "1 without a suffix"):
        assert word in note


def test_links(tmp_path: Path) -> None:
    image(tmp_path / "store" / "a.png")
    split = tmp_path / "split"
    image(split / "dog" / "b.png")
    (split / "cat").symlink_to(tmp_path / "store")
    (split / "dog" / "again").symlink_to(split / "dog")  # does not end
    (split / "dog" / "gone.png").symlink_to("missing.png")
    (split / "dog" / "gone").symlink_to("missing")
    assert labels(read(split)) == {"cat/a.png": "cat", "dog/b.png": "dog", "dog/gone.png": "dog"}


def test_a_folder_called_like_an_image(tmp_path: Path) -> None:
    """With images inside it is a folder; without, it is named where it is read."""
    image(tmp_path / "cat" / "tiles.tif" / "a.png")
    (tmp_path / "cat" / "b.png").mkdir()
    image(tmp_path / "dog" / "c.png")
    assert list(labels(read(tmp_path))) == ["cat/b.png", "cat/tiles.tif/a.png", "dog/c.png"]


def test_classes_that_are_numbered_already(tmp_path: Path) -> None:
    image(tmp_path / "dog" / "a.png")
    (tmp_path / "cat").mkdir()
    known = {"ant": 0, "cat": 1, "dog": 2}
    reader = read(tmp_path, class_map=known, complete=False)
    assert [target for _, target in reader.samples] == [2]
    assert reader.class_to_idx == known
    assert "no images in the class folders cat" in reader.notes[0]
    image(tmp_path / "emu" / "a.png")
    with pytest.raises(UserError, match=r"classes that the run lack: emu \(which have ant\)"):
        read(tmp_path, class_map=known, complete=False, known_as="the run")


def test_an_empty_class_keeps_its_number(tmp_path: Path) -> None:
    for name in ("ant", "cat"):
        image(tmp_path / name / "a.png")
    (tmp_path / "bee").mkdir()
    assert [target for _, target in read(tmp_path, complete=False).samples] == [0, 2]


def test_a_single_class_says_what_may_be_meant(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        image(tmp_path / "train" / "images" / name / "a.png")
    with pytest.raises(UserError, match=r"single class, images.*cat, dog.*data\.train_split=train/images"):
        open_dataset(DataConfig(name="imagefolder", root=str(tmp_path)), True)
    cfg = DataConfig(name="imagefolder", root=str(tmp_path), train_split="train/images")
    assert open_dataset(cfg, True).reader.class_to_idx == {"cat": 0, "dog": 1}


def test_names_with_any_character(tmp_path: Path) -> None:
    for name in ("a b", "c,d=[e]", "²", "日本", os.fsdecode(b"\xff")):
        image(tmp_path / "train" / name / "x\n1.png")
    dataset = open_dataset(DataConfig(name="imagefolder", root=str(tmp_path)), True)
    assert len(dataset) == 5
    assert all(dataset[i][0].size == (8, 8) for i in range(5))


def test_torchvisions_folders(tmp_path: Path) -> None:
    """torch/folder reads through the same decoder and takes no system folder for a class."""
    cfg = DataConfig(name="torch/folder", root=str(tmp_path))
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("I;16", (8, 8), 257 * 77).save(tmp_path / "train" / name / "a.PNG")
        (tmp_path / "train" / name / "._a.PNG").touch()
    dataset = open_dataset(cfg, True)
    assert len(dataset) == 2
    assert dataset[0][0].getpixel((0, 0)) == (77, 77, 77)
    image(tmp_path / "train" / ".ipynb_checkpoints" / "a.png")
    with pytest.raises(UserError, match="ipynb_checkpoints"):
        open_dataset(cfg, True)
