"""digits_coco and COCO average precision: known answers, and pycocotools as the oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mmdet")

from PIL import Image
from pycocotools import mask as rle

from zoo.train.data import Digits
from zoo.train.detection import coco_average_precision
from zoo.train.detection.digits_coco import CLASSES, DigitsCoco, build_digits_coco

ENGINES = ["faster_coco_eval", "pycocotools"]
SMALL = DigitsCoco(canvas=96, train_images=12, val_images=6)
BOX = [10.0, 10.0, 40.0, 40.0]


def truth(*objects: tuple[Any, ...]) -> dict[str, Any]:
    """(image, category, box[, crowd]) as a COCO data set of two categories."""
    annotations = []
    for number, (image, category, box, *crowd) in enumerate(objects, 1):
        left, top, width, height = (int(v) for v in box)
        mask = np.zeros((100, 100), np.uint8, order="F")
        mask[top : top + height, left : left + width] = 1
        code = rle.encode(mask)
        annotations.append(
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(bool(crowd)),
                "segmentation": {"size": [100, 100], "counts": code["counts"].decode()},
            }
        )
    images = [{"id": i, "width": 100, "height": 100} for i in sorted({o[0] for o in objects})]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


def found(*objects: tuple[Any, ...]) -> list[dict[str, Any]]:
    """(image, category, box, score)."""
    return [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in objects]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "objects", "predictions", "expected"),
    [
        (
            "perfect",
            [(1, 1, BOX), (1, 2, BOX), (2, 1, BOX)],
            [(1, 1, BOX, 0.9), (1, 2, BOX, 0.8), (2, 1, BOX, 0.7)],
            {"mAP": 1, "mAP_50": 1, "mAP_75": 1},
        ),
        (
            "IoU 0.6 everywhere",
            [(1, 1, [0, 0, 10, 10])],
            [(1, 1, [0, 0, 10, 6], 0.9)],
            {"mAP": 0.3, "mAP_50": 1, "mAP_75": 0},
        ),
        (
            "a false positive above a hit",
            [(1, 1, BOX)],
            [(1, 1, [60, 60, 5, 5], 0.95), (1, 1, BOX, 0.9)],
            {"mAP_50": 0.5},
        ),
        ("one of two found", [(1, 1, BOX), (2, 1, BOX)], [(1, 1, BOX, 0.9)], {"mAP_50": 51 / 101}),
        ("a lower-scored duplicate", [(1, 1, BOX)], [(1, 1, BOX, 0.9), (1, 1, BOX, 0.8)], {"mAP_50": 1, "mAP": 1}),
        (
            "inside a crowd",
            [(1, 1, BOX), (1, 1, [60, 60, 30, 30], True)],
            [(1, 1, [62, 62, 20, 20], 0.95), (1, 1, BOX, 0.9)],
            {"mAP": 1},
        ),
        ("a category without objects", [(1, 1, BOX)], [(1, 1, BOX, 0.9), (1, 2, BOX, 0.99)], {"mAP": 1, "mAP_50": 1}),
        (
            "another category's box",
            [(1, 1, BOX), (1, 2, [60, 60, 20, 20])],
            [(1, 2, BOX, 0.9), (1, 1, BOX, 0.9)],
            {"mAP": 0.5},
        ),
        ("nothing found", [(1, 1, BOX)], [], {"mAP": 0, "mAP_50": 0}),
    ],
    ids=lambda v: v.replace(" ", "-") if isinstance(v, str) else "",
)
def test_known_answers(engine: str, name: str, objects: Any, predictions: Any, expected: dict[str, float]) -> None:
    result = coco_average_precision(truth(*objects), found(*predictions), engine=engine)
    for key, value in expected.items():
        assert result[key] == pytest.approx(value, abs=1e-9), key


@pytest.mark.parametrize("engine", ENGINES)
def test_masks_are_measured_by_their_pixels(engine: str) -> None:
    data = truth((1, 1, [0, 0, 10, 10]))
    mask = np.zeros((100, 100), np.uint8, order="F")
    mask[:6, :10] = 1
    code = {"size": [100, 100], "counts": rle.encode(mask)["counts"].decode()}
    prediction = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.9, "segmentation": code}]
    assert coco_average_precision(data, prediction, "segm", engine=engine)["mAP"] == pytest.approx(0.3)
    assert coco_average_precision(data, prediction, "bbox", engine=engine)["mAP"] == pytest.approx(1)


def test_engines_agree_on_random_predictions() -> None:
    rng = np.random.default_rng(0)

    def box() -> list[float]:
        return [float(v) for v in (*rng.integers(0, 60, 2), *rng.integers(4, 40, 2))]

    objects = [(int(i), int(rng.integers(1, 3)), box()) for i in rng.integers(1, 8, 40)]
    guesses = [
        (
            i,
            c,
            [v + float(rng.normal(0, 2)) for v in b[:2]] + [max(1.0, v + float(rng.normal(0, 3))) for v in b[2:]],
            float(rng.random()),
        )
        for i, c, b in objects * 2
    ]
    results = [coco_average_precision(truth(*objects), found(*guesses), engine=e) for e in ENGINES]
    assert 0.05 < results[0]["mAP"] < 0.95
    assert results[0] == pytest.approx(results[1], abs=1e-12)


def test_sizes_without_objects_have_no_precision() -> None:
    for predictions in ([], found((1, 1, [60, 60, 5, 5], 0.9))):
        result = coco_average_precision(truth((1, 1, BOX)), predictions)
        assert {k: result[k] for k in ("mAP", "mAP_s", "mAP_m", "mAP_l")} == {
            "mAP": 0,
            "mAP_s": -1,
            "mAP_m": 0,
            "mAP_l": -1,
        }


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match="engine is 'coco'"):
        coco_average_precision(truth((1, 1, BOX)), found((1, 1, BOX, 1.0)), engine="coco")
    with pytest.raises(ValueError, match="iou_type is 'mask'"):
        coco_average_precision(truth((1, 1, BOX)), found((1, 1, BOX, 1.0)), "mask")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_digits_coco(tmp_path_factory.mktemp("cache"), SMALL)


@pytest.mark.parametrize(("split", "count"), [("train", 12), ("val", 6)])
def test_annotations_are_true(folder: Path, split: str, count: int) -> None:
    data = json.loads((folder / f"annotations/{split}.json").read_text())
    assert [c["name"] for c in data["categories"]] == list(CLASSES)
    assert len(data["images"]) == count
    assert len({a["id"] for a in data["annotations"]}) == len(data["annotations"]) >= 2 * count
    digits = Digits({"train": "train", "val": "validation"}[split], "L")
    covered: dict[int, np.ndarray] = {}
    for annotation in data["annotations"]:
        assert annotation["iscrowd"] == 0
        mask = rle.decode(annotation["segmentation"]).astype(bool)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        assert annotation["bbox"] == [int(v) for v in box]
        assert annotation["area"] == mask.sum() > 0
        assert digits.targets[annotation["digit"]] + 1 == annotation["category_id"]
        before = covered.setdefault(annotation["image_id"], np.zeros_like(mask))
        assert not (before & mask).any(), "masks overlap"
        covered[annotation["image_id"]] |= mask
    for image in data["images"]:
        pixels = np.asarray(Image.open(folder / split / image["file_name"]))
        assert pixels.shape == (96, 96, 3)
        mask = covered[image["id"]]
        assert pixels[mask].mean() > 150 > 60 > pixels[~mask].mean()


def test_composition_is_seeded_and_cached(folder: Path, tmp_path: Path) -> None:
    again = build_digits_coco(tmp_path, SMALL)
    for file in sorted(p.relative_to(folder) for p in folder.rglob("*.*") if p.is_file()):
        assert (again / file).read_bytes() == (folder / file).read_bytes()
    stamp = (again / "annotations/val.json").stat().st_mtime_ns
    assert build_digits_coco(tmp_path, SMALL) == again
    assert (again / "annotations/val.json").stat().st_mtime_ns == stamp
    other = build_digits_coco(tmp_path, DigitsCoco(canvas=96, train_images=12, val_images=6, seed=1))
    assert other != again
    assert (other / "annotations/val.json").read_text() != (again / "annotations/val.json").read_text()
    assert not list(tmp_path.glob(".composing-*"))


def test_impossible_canvases_are_refused() -> None:
    with pytest.raises(ValueError, match="canvas 16 cannot hold"):
        DigitsCoco(canvas=16)
    with pytest.raises(ValueError, match="5..2 digits"):
        DigitsCoco(digits=(5, 2))
