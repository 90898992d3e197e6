"""`zoo predict`: names, numbers and pictures for images of a run's classes, and one line for each mistake."""

import csv
from pathlib import Path

import pytest
import timm
import torch
from pictures import CLASSES, FOLDER, class_folders, picture
from PIL import Image
from training import train

from zoo.cli import main
from zoo.train.evaluate import Source
from zoo.train.predict import COLUMNS, class_titles


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("predict")
    class_folders(root / "data")
    return train(root / "run", *FOLDER, f"data.root={root / 'data'}", "epochs=6")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "more of them").mkdir(parents=True)
    for index, name in enumerate(CLASSES):
        picture(index, 7).save(folder / f"{name}.png")
        picture(index, 8).save(folder / "more of them" / f"{name}.jpg", quality=95)
    return folder


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "predictions.csv") as file:
        return list(csv.DictReader(file))


def test_a_folder(run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "broken.png").write_text("no image")
    out = tmp_path / "out"
    assert main(["predict", f"model={run}", f"image={images}", f"out={out}", "device=cpu", "batch_size=4"]) == 0
    printed = capsys.readouterr().out
    rows = table(out)
    assert tuple(rows[0]) == COLUMNS
    (bad,) = (row for row in rows if row["error"])
    assert bad["image"] == "broken.png"
    assert "unreadable: broken.png: no image format that Pillow reads" in printed
    by_image: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if not row["error"]:
            by_image.setdefault(row["image"], []).append(row)
    assert set(by_image) == {f"{n}.png" for n in CLASSES} | {f"more of them/{n}.jpg" for n in CLASSES}
    for image, found in by_image.items():
        assert [row["rank"] for row in found] == ["1", "2", "3"], "as many as there are classes"
        assert found[0]["class"] == Path(image).stem, "the run has learnt these"
        assert CLASSES[int(found[0]["index"])] == found[0]["class"]
        shares = [float(row["probability"]) for row in found]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-5)
    with Image.open(out / "predictions.png") as drawn:
        assert min(drawn.size) > 300


def test_it_prepares_images_as_the_run_did(run: Path, images: Path, tmp_path: Path) -> None:
    """Its numbers are those of the run's model on the image in the run's size, crop and statistics."""
    from zoo.train.build import build_model
    from zoo.train.compose import from_container
    from zoo.train.config import EVAL
    from zoo.train.runs import load_run

    assert main(["predict", f"model={run}", f"image={images / 'bee.png'}", f"out={tmp_path}", "device=cpu"]) == 0
    found = load_run(run)
    cfg = from_container({"model": found.config["model"], "data": found.config["data"]}, EVAL)
    model = build_model(cfg.model, 3, pretrained=False).eval()
    model.load_state_dict(found.checkpoint()[1]["state_dict"])
    options = timm.data.resolve_data_config({"img_size": 32}, pretrained_cfg=model.pretrained_cfg)
    transform = timm.data.create_transform(**options)
    with torch.inference_mode(), Image.open(images / "bee.png") as image:
        expected = model(transform(image.convert("RGB"))[None]).softmax(-1)[0]
    for row in table(tmp_path):
        assert float(row["probability"]) == pytest.approx(expected[int(row["index"])].item(), abs=2e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("image={images}",), "needs model=NAME|RUN_FOLDER"),
        (("model={run}",), "needs image=FILE|FOLDER"),
        (("model={run}", "image={images}/nowhere.png"), "no image at"),
        (("model={run}", "image={images}/broken.png"), "cannot be read: no image format that Pillow reads"),
        (("model={run}", "image={empty}"), "no images under"),
        (("model={empty}", "image={images}"), "is not a run folder"),
        (("model=nat_tinny", "image={images}"), "unknown model 'nat_tinny'"),
        (("model={run}", "image={images}", "pretrained=x.pth"), "pretrained= conflicts with a run"),
        (("model=nat_tiny", "pretrained=/none.pth", "image={images}"), "no checkpoint file at /none.pth"),
        (("model={run}", "image={images}", "top=0"), "top=0 is out of range"),
        (("model={run}", "image={images}", "tops=3"), "unknown key 'tops'"),
    ],
)
def test_mistakes_are_one_line(
    run: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (images / "broken.png").write_text("no image")
    given = [a.format(run=run, images=images, empty=tmp_path / "empty") for a in arguments]
    assert main(["predict", *given]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not list(tmp_path.rglob("predictions.csv"))


def test_imagenets_classes_have_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model("van_b0").state_dict(), tmp_path / "w.pth")
    picture(0, 0).save(tmp_path / "a.png")
    arguments = [f"pretrained={tmp_path / 'w.pth'}", f"image={tmp_path / 'a.png'}", f"out={tmp_path}", "img_size=64"]
    assert main(["predict", "model=van_b0", *arguments]) == 0
    assert "taken to be those of imagenet-1k" in capsys.readouterr().out
    rows = table(tmp_path)
    assert len(rows) == 5
    known = timm.data.ImageNetInfo("imagenet-1k")
    for row in rows:
        assert row["class"] == known.index_to_label_name(int(row["index"]))
        assert known.index_to_description(int(row["index"])).startswith(row["description"])


def test_classes_without_names_are_numbered() -> None:
    names, titles, note = class_titles(Source(timm.create_model("van_b0", num_classes=7), {"weights": "x"}))
    assert names == titles == [str(i) for i in range(7)]
    assert note is not None
    names, titles, note = class_titles(Source(timm.create_model("van_b0", num_classes=2), {}, ["cat", "dog"]))
    assert (names, titles, note) == (["cat", "dog"], ["cat", "dog"], None)
