"""`zoo detect`: the precision of every class, and training on images without objects."""

import csv
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("mmdet")

from zoo.train.detection import coco_average_precision
from zoo.train.detection.app import main
from zoo.train.detection.config import DETECTORS
from zoo.train.detection.digits_coco import DigitsCoco, build_digits_coco

OPTIONS = [
    "data=coco", "model=nat_digits", "schedule=digits", "schedule.epochs=1", "schedule.warmup_steps=1", "batch_size=2",
    "data.num_workers=0", "data.scale=[64,64]", "data.augment=flip", "detector.channels=16", "detector.fc_channels=16",
    "detector.proposals=16", "detector.roi_samples=16", "threads=1", "pictures=1",
]  # fmt: skip


def coco_folder(root: Path) -> Path:
    """A small digits_coco laid out as COCO is, of whose four training images one has objects."""
    source = build_digits_coco(root / "cache", DigitsCoco(canvas=64, train_images=4, val_images=3, size=(24, 40)))
    data = root / "data"
    (data / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(source / split, data / f"{split}2017")
        shutil.copy(source / f"annotations/{split}.json", data / f"annotations/instances_{split}2017.json")
    file = data / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    first = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == first]
    file.write_text(json.dumps(content))
    return data


@pytest.mark.parametrize(
    "detector",
    [pytest.param(d, marks=() if d in ("retinanet", "mask_rcnn") else pytest.mark.slow) for d in DETECTORS],
)
def test_images_without_objects_are_trained_on(detector: str, tmp_path: Path) -> None:
    """Of the two batches of the epoch one has nothing but background at least."""
    run, data = tmp_path / "run", coco_folder(tmp_path)
    options = [*OPTIONS, f"detector={detector}", f"data.root={data}", f"run_dir={run}"]
    assert main([*options, "data.keep_empty=true"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    with open(run / "metrics.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["train_loss"]) > 0
    truth = json.loads((data / "annotations/instances_val2017.json").read_text())
    with open(run / "per_class.csv") as file:
        classes = list(csv.DictReader(file))
    assert [c["class"] for c in classes] == [c["name"] for c in truth["categories"]]
    for kind in ("bbox", "segm") if "mask" in detector else ("bbox",):
        for name in ("mAP", "mAP_50", "mAP_75"):
            found = [float(c[f"{kind}_{name}"]) for c in classes if c[f"{kind}_{name}"]]
            assert sum(found) / len(found) == pytest.approx(summary[f"{kind}_{name}"], abs=1e-3)
    for entry, category in zip(classes, truth["categories"], strict=True):
        count = sum(a["category_id"] == category["id"] for a in truth["annotations"])
        assert int(entry["instances"]) == count
        assert bool(entry["bbox_mAP"]) == (count > 0)


def test_images_without_objects_are_left_out_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = coco_folder(tmp_path)
    assert main([*OPTIONS, "detector=retinanet", f"data.root={data}", f"run_dir={tmp_path / 'run'}"]) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 1


@pytest.mark.parametrize("engine", ["faster_coco_eval", "pycocotools"])
def test_precision_of_every_class(engine: str) -> None:
    """A class that is found, one that is found in a wrong place, one that is missed and one that is not there."""
    box = [10.0, 10.0, 40.0, 40.0]
    truth = {
        "images": [{"id": 1, "width": 100, "height": 100}],
        "categories": [{"id": i, "name": n} for i, n in ((1, "a"), (5, "b"), (7, "c"), (9, "d"))],
        "annotations": [{"id": i, "image_id": 1, "category_id": c, "bbox": box} for i, c in ((1, 1), (2, 5), (3, 7))],
    }
    found = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9},
        {"image_id": 1, "category_id": 5, "bbox": [10.0, 10.0, 40.0, 60.0], "score": 0.9},  # IoU 2/3
    ]
    single: dict[int, dict[str, float]] = {}
    whole = coco_average_precision(truth, found, engine=engine, per_class=single)
    assert {i: round(v["mAP"], 6) for i, v in single.items()} == {1: 1.0, 5: 0.4, 7: 0.0, 9: -1.0}
    assert (single[5]["mAP_50"], single[5]["mAP_75"]) == (pytest.approx(1.0), 0.0)
    assert whole["mAP"] == pytest.approx((1.0 + 0.4 + 0.0) / 3)
    single.clear()
    coco_average_precision(truth, [], engine=engine, per_class=single)
    assert {i: v["mAP"] for i, v in single.items()} == {1: 0.0, 5: 0.0, 7: 0.0, 9: -1.0}
