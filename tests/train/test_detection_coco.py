"""COCO files as people have them: other orders and ids, missing and damaged entries, images of any mode."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mmdet")

from mmdet.utils import register_all_modules
from PIL import Image
from pycocotools import mask as rle

from zoo.errors import UserError
from zoo.train.detection import CocoMetric, LoadImage, SeededDataset, coco_average_precision
from zoo.train.detection.app import main
from zoo.train.detection.coco_data import CocoFiles, Known, open_coco
from zoo.train.detection.config import DetectDataConfig
from zoo.train.detection.digits_coco import CLASSES, DigitsCoco, build_digits_coco
from zoo.train.images import find_ranges
from zoo.train.runs import load_checkpoint

Content = dict[str, Any]
DETECT = [
    "data=coco", "detector=retinanet", "detector.channels=16", "detector.anchor_scale=4", "data.scale=[64,64]",
    "data.augment=flip", "data.num_workers=0", "model=nat_digits", "schedule=digits", "schedule.epochs=1",
    "schedule.warmup_steps=1", "detector.overrides.test_cfg.score_thr=0.0",
    "batch_size=2", "val_batch_size=2", "threads=1", "pictures=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small digits_coco laid out as COCO is, all ten classes in both splits."""
    root = tmp_path_factory.mktemp("coco")
    spec = DigitsCoco(canvas=64, train_images=8, val_images=12, size=(24, 28), digits=(3, 4))
    source = build_digits_coco(root / "cache", spec)
    for split in ("train", "val"):
        (root / "data/annotations").mkdir(parents=True, exist_ok=True)
        shutil.copytree(source / split, root / f"data/{split}2017")
        shutil.copy(source / f"annotations/{split}.json", root / f"data/annotations/instances_{split}2017.json")
    return root / "data"


@pytest.fixture
def data(digits: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "data"))


def edit(data: Path, split: str, change: Callable[[Content], Any]) -> Path:
    file = data / f"annotations/instances_{split}2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def opened(data: Path, folder: Path, **options: Any) -> CocoFiles:
    folder.mkdir(exist_ok=True)
    return open_coco(DetectDataConfig("coco", str(data)), **options).written(folder, True)


def dataset(files: CocoFiles, split: str) -> SeededDataset:
    register_all_modules()
    return SeededDataset(
        {
            "type": "CocoDataset",
            "metainfo": {"classes": files.classes},
            "ann_file": getattr(files, f"{split}_annotations"),
            "data_prefix": {"img": getattr(files, f"{split}_images")},
            "test_mode": True,
            "pipeline": [{"type": "zoo.LoadImage", "ranges": files.ranges.state()}],
        }
    )


def drawn(found: SeededDataset) -> dict[tuple[str, ...], str]:
    """The name by which every object would be drawn, by its image and box."""
    names = {}
    for info in (found.get_data_info(i) for i in range(len(found))):
        for instance in info["instances"]:
            key = (Path(info["img_path"]).name, *(f"{v:.2f}" for v in instance["bbox"]))
            names[key] = found.metainfo["classes"][instance["bbox_label"]]
    return names


def perfect_precision(files: CocoFiles, truth: dict[tuple[str, ...], str]) -> float:
    """The AP of a detector that finds every object by its name, in the order of classes that training gives."""
    metric = CocoMetric(ann_file=files.val_annotations)
    found = dataset(files, "val")
    metric.dataset_meta = found.metainfo
    results = []
    for info in (found.get_data_info(i) for i in range(len(found))):
        own = {k[1:]: n for k, n in truth.items() if k[0] == Path(info["img_path"]).name}
        boxes = np.array([[float(v) for v in box] for box in own]).reshape(-1, 4)
        labels = np.array([files.classes.index(n) for n in own.values()], int)
        results.append(({}, {"img_id": info["img_id"], "bboxes": boxes, "scores": np.ones(len(own)), "labels": labels}))
    return metric.compute_metrics(results)["bbox_mAP"]


def renumber(numbers: dict[int, int]) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for category in content["categories"]:
            category["id"] = numbers[category["id"]]
        for annotation in content["annotations"]:
            annotation["category_id"] = numbers[annotation["category_id"]]

    return change


def shuffle(content: Content) -> None:
    random.Random(0).shuffle(content["categories"])


def drop_nine(content: Content) -> None:
    content["categories"] = [c for c in content["categories"] if c["name"] != "nine"]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 10]


def as_text(content: Content) -> None:
    for category in content["categories"]:
        category["id"] = str(category["id"])
    for annotation in content["annotations"]:
        annotation["category_id"] = float(annotation["category_id"])
        annotation["image_id"] = str(annotation["image_id"])


REVERSED = renumber({i: 11 - i for i in range(1, 11)})  # every id is another category's
GAPS = renumber({i: 7 * i + 3 for i in range(1, 11)})
ZERO = renumber({i: i - 1 for i in range(1, 11)})
ORDERS: dict[str, list[tuple[str, Callable[[Content], Any]]]] = {
    "as they are": [],
    "unsorted in both": [("train", shuffle), ("val", shuffle)],
    "unsorted in train": [("train", shuffle)],
    "unsorted in val": [("val", shuffle)],
    "reversed in val": [("val", lambda c: c["categories"].reverse())],
    "one lacks in val": [("val", drop_nine), ("val", shuffle)],
    "ids are other names in val": [("val", REVERSED)],
    "ids are other names in train": [("train", REVERSED), ("train", shuffle)],
    "other ids in val": [("val", GAPS), ("val", shuffle)],
    "ids from 0": [("train", ZERO), ("val", ZERO), ("val", shuffle)],
    "ids as text": [("val", as_text), ("train", shuffle)],
    "listed twice": [("val", lambda c: c["categories"].append(dict(c["categories"][0])))],
}


@pytest.mark.parametrize("changes", ORDERS.values(), ids=ORDERS)
def test_categories_are_matched_by_name(
    changes: list[tuple[str, Callable[[Content], Any]]], digits: Path, data: Path, tmp_path: Path
) -> None:
    before = opened(digits, tmp_path / "before")
    assert not before.mended, "a whole file is used as it stands"
    for split, change in changes:
        edit(data, split, change)
    files = opened(data, tmp_path / "run")
    for split in ("train", "val"):
        truth = drawn(dataset(before, split))
        if any(change is drop_nine for other, change in changes if other == split):
            truth = {k: n for k, n in truth.items() if n != "nine"}
        assert drawn(dataset(files, split)) == truth
        if split == "val":
            assert perfect_precision(files, truth) == 1.0
    assert sorted(files.classes) == sorted(CLASSES)


def test_classes_of_a_run_settle_the_order(data: Path, tmp_path: Path) -> None:
    edit(data, "val", REVERSED)
    order = tuple(reversed(CLASSES))
    known = Known(order, "the run")
    files = opened(data, tmp_path / "run", need_train=False, known=known)
    assert files.classes == order
    assert perfect_precision(files, drawn(dataset(files, "val"))) == 1.0
    fewer = Known(order[1:], "the run")
    with pytest.raises(UserError, match=r"the run and the data have different categories: only in validation 1 'nine'"):
        opened(data, tmp_path / "run", need_train=False, known=fewer)
    edit(data, "train", drop_nine)
    with pytest.raises(UserError, match="only in the run 'nine'"):
        opened(data, tmp_path / "run", known=Known(order, "the run", whole=True))


def rename(content: Content) -> None:
    content["categories"][3]["name"] = "drei"


def entry(key: str, number: int, **changes: Any) -> Callable[[Content], None]:
    """Change one entry; a value of ... removes the key."""

    def change(content: Content) -> None:
        target = content[key][number]
        for name, value in changes.items():
            target.pop(name, None)
            if value is not ...:
                target[name] = value

    return change


NAN = float("nan")
FAULTS: dict[str, tuple[Callable[[Content], Any], str]] = {
    "renamed": (rename, r"'drei'.*'three'"),
    "one id, two names": (lambda c: c["categories"].append({"id": 1, "name": "x"}), "category id 1 is both"),
    "one name, two ids": (lambda c: c["categories"].append({"id": 77, "name": "one"}), "'one' has the ids 2 and 77"),
    "category without id": (entry("categories", 0, id=...), "the category with id None and name 'zero'"),
    "category without name": (entry("categories", 0, name=...), "the category with id 1 and name None"),
    "category of another kind": (lambda c: c["categories"].append("x"), "entry 11 of categories is 'x'"),
    "image without id": (entry("images", 0, id=...), "image '000001.png' has the id None"),
    "image with another id": (entry("images", 0, id="a"), "image '000001.png' has the id 'a'"),
    "image without file": (entry("images", 0, file_name=...), "image 1 has the file_name None"),
    "two images of one id": (entry("images", 1, id=1), "image id 1 is both '000001.png' and '000002.png'"),
    "image of another kind": (lambda c: c["images"].append(5), "entry 13 of images is '5'"),
    "no images": (lambda c: c.update(images=[]), "is empty: 0 images"),
    "no annotations": (lambda c: c.update(annotations=[]), "is empty: 12 images, 0 annotations"),
    "no categories": (lambda c: c.update(categories=[]), "is empty.* 0 categories"),
    "crowds alone": (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "is empty"),
    "annotation without image": (entry("annotations", 4, image_id=...), "annotation 5 has the image_id None"),
    "annotation without category": (entry("annotations", 4, category_id=None), "annotation 5 has the category_id None"),
    "unknown category": (entry("annotations", 4, category_id=99), r"categories \[99\]"),
    "no box": (entry("annotations", 4, bbox=..., segmentation=...), "annotation 5 has the bbox None"),
    "NaN box": (entry("annotations", 4, bbox=[1, NAN, 4, 4], segmentation=...), r"annotation 5 has the bbox \[1, nan"),
    "infinite box": (entry("annotations", 4, bbox=[1, 1, 1e999, 4], segmentation=...), "annotation 5 has the bbox"),
    "negative side": (entry("annotations", 4, bbox=[9, 9, -4, 4], segmentation=...), "annotation 5 has the bbox"),
    "three numbers": (entry("annotations", 4, bbox=[9, 9, 4], segmentation=[]), "annotation 5 has the bbox"),
    "text in a box": (entry("annotations", 4, bbox=["9", 9, 4, 4], segmentation=...), "annotation 5 has the bbox"),
    "no box, no id": (entry("annotations", 4, id=..., bbox=None, segmentation=...), "annotation number 5 has the bbox"),
    "NaN polygon": (entry("annotations", 4, segmentation=[[1, 1, 5, NAN, 5, 5]]), "annotation 5 has a polygon"),
    "text for a mask": (entry("annotations", 4, segmentation="x"), "annotation 5 has the segmentation 'x'"),
    "mask of another size": (
        entry("annotations", 4, segmentation={"size": [9, 9], "counts": [81]}), "annotation 5 has a mask of size"
    ),
    "a crowd of three": (entry("annotations", 4, iscrowd=3), "annotation 5 has iscrowd 3"),
}  # fmt: skip


@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize(("change", "words"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named_by_file_and_id(
    change: Callable[[Content], Any], words: str, split: str, data: Path, tmp_path: Path
) -> None:
    if split == "train":
        words = words.replace("entry 13", "entry 9").replace("12 images", "8 images")
        words = words.replace("'drei'.*'three'", "'three'.*'drei'")
    file = edit(data, split, change)
    with pytest.raises(UserError, match=words) as error:
        opened(data, tmp_path / "run")
    assert str(data) in str(error.value)
    assert file.name in str(error.value) or "different categories" in str(error.value)
    assert "\n" not in str(error.value)


def every(**changes: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for number in range(len(content["annotations"])):
            entry("annotations", number, **changes)(content)

    return change


def sizes(value: Any) -> Callable[[Content], None]:
    return lambda c: [entry("images", i, height=value, width=value)(c) for i in range(len(c["images"]))]


DERIVED: dict[str, Callable[[Content], Any]] = {
    "area": every(area=...),
    "area none": every(area=None),
    "area NaN": every(area=NAN),
    "area zero": every(area=0),
    "area text": every(area="9"),
    "iscrowd": every(iscrowd=...),
    "iscrowd none": every(iscrowd=None),
    "iscrowd boolean": every(iscrowd=False),
    "ids": every(id=...),
    "ids twice": every(id=7),
    "id zero": entry("annotations", 0, id=0),
    "ids text": lambda c: [a.update(id=f"a{a['id']}") for a in c["annotations"]],
    "sizes": sizes(...),
    "sizes none": sizes(None),
    "sizes zero": sizes(0),
    "sizes text": sizes("64"),
    "boxes": every(bbox=...),
    "boxes NaN": every(bbox=[NAN] * 4),
    "boxes of no area": every(bbox=[3, 3, 0, 9]),
    "boxes outside": every(bbox=[100, 100, 9, 9]),
    "image ids text": lambda c: [i.update(id=str(i["id"])) for i in c["images"]],
}


@pytest.mark.parametrize("change", DERIVED.values(), ids=DERIVED)
def test_what_lacks_is_derived(change: Callable[[Content], Any], digits: Path, data: Path, tmp_path: Path) -> None:
    before = opened(digits, tmp_path / "before")
    for split in ("train", "val"):
        edit(data, split, change)
    files = opened(data, tmp_path / "run", masks=True)
    assert set(files.mended) >= {"val"}
    for split in ("train", "val"):
        truth = drawn(dataset(before, split))
        assert drawn(dataset(files, split)) == truth
        found = json.loads(Path(getattr(files, f"{split}_annotations")).read_text())
        original = json.loads((digits / f"annotations/instances_{split}2017.json").read_text())
        for a, b in zip(found["annotations"], original["annotations"], strict=True):
            assert a == b | {"id": a["id"], "bbox": [float(v) for v in b["bbox"]]}
        assert len({a["id"] for a in found["annotations"]}) == len(found["annotations"])
        assert [(i["id"], i["height"], i["width"]) for i in found["images"]] == [
            (i["id"], 64, 64) for i in original["images"]
        ]
    assert perfect_precision(files, truth) == 1.0


def test_area_without_a_mask_is_the_box_s(data: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        edit(data, split, every(area=..., segmentation=...))
    found = json.loads(Path(opened(data, tmp_path / "run").val_annotations).read_text())
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in found["annotations"])
    with pytest.raises(UserError, match="annotation 1 has no segmentation.*detector=faster_rcnn"):
        opened(data, tmp_path / "run", masks=True)


def test_boxes_that_hold_nothing_are_left_out_and_said(digits: Path, data: Path, tmp_path: Path) -> None:
    before = opened(digits, tmp_path / "before")
    truth = drawn(dataset(before, "val"))

    def spoil(content: Content) -> None:
        first = content["annotations"][0]
        for number, box in enumerate(([5, 5, 0, 9], [5, 5, 9, 0], [64, 0, 9, 9], [-9, -9, 9, 9]), 1000):
            content["annotations"].append({**first, "id": number, "bbox": box, "segmentation": []})
        content["annotations"].append({**first, "id": 2000, "image_id": 4711})

    file = edit(data, "val", spoil)
    files = opened(data, tmp_path / "run")
    assert files.notes == (
        f"{file}: 1 annotations belong to no image of the file and are left out, the first is annotation 2000",
        f"{file}: 4 annotations have a box of no area inside their image and are left out, the first is annotation "
        "1000",
    )
    assert perfect_precision(files, truth) == 1.0


def test_a_box_that_reaches_out_is_cut(data: Path, tmp_path: Path) -> None:
    file = edit(data, "val", entry("annotations", 0, bbox=[-20, 10, 40, 100], segmentation=...))
    files = opened(data, tmp_path / "run")
    assert json.loads(Path(files.val_annotations).read_text())["annotations"][0]["bbox"] == [0, 10, 20, 54]
    assert files.notes == (
        f"{file}: 1 annotations have a box that reaches out of its image and is cut, the first is annotation 1",
    )


def test_images_too_small(data: Path, tmp_path: Path) -> None:
    def small(content: Content) -> None:
        sizes(16)(content)
        every(bbox=[1, 1, 9, 9], segmentation=...)(content)

    file = edit(data, "train", small)
    with pytest.raises(
        UserError, match=r"all \d images with annotations have a side below 32 pixels.*000001.png, 16"
    ) as e:
        opened(data, tmp_path / "run")
    assert str(file) in str(e.value)


def test_precision_of_incomplete_ground_truth(digits: Path) -> None:
    truth = json.loads((digits / "annotations/instances_val2017.json").read_text())
    predictions = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in truth["annotations"]
    ]
    for annotation in truth["annotations"]:
        for key in ("id", "area", "iscrowd", "segmentation"):
            del annotation[key]
    for engine in ("faster_coco_eval", "pycocotools"):
        assert coco_average_precision(truth, predictions, engine=engine)["mAP"] == 1.0
    assert coco_average_precision(truth, [])["mAP"] == 0.0


def grey(folder: Path, number: int = 1) -> np.ndarray:
    return np.array(Image.open(folder / f"train2017/{number:06d}.png").convert("L"))


@pytest.mark.parametrize("kind", ["I;16", "I", "F", "F255", "LA", "P", "RGBA", "webp", "bmp", "gif"])
def test_pixels_of_any_mode_are_the_8_bit_twin_s(kind: str, digits: Path, tmp_path: Path) -> None:
    pixels = grey(digits)
    pixels[0, :2] = 0, 255  # the whole range
    image = Image.fromarray(pixels)
    file = tmp_path / "x.png"
    if kind == "I;16":
        Image.fromarray(pixels.astype(np.uint16) * 257).save(file)
    elif kind in ("I", "F", "F255"):
        file = tmp_path / "x.tif"
        scaled = {"I": pixels.astype(np.int32) * 257, "F": pixels / np.float32(255), "F255": pixels.astype(np.float32)}
        Image.fromarray(scaled[kind]).save(file)
    elif kind in ("webp", "bmp", "gif"):
        file = tmp_path / f"x.{kind.upper()}"
        image.save(file, kind, **({"lossless": True} if kind == "webp" else {}))
    else:
        image.convert(kind).save(file)
    ranges, _ = find_ranges([str(file)])
    found = LoadImage(ranges.state())({"img_path": str(file)})
    assert found["img"].dtype == np.uint8
    assert np.array_equal(found["img"], np.repeat(pixels[..., None], 3, 2))
    assert found["ori_shape"] == found["img_shape"] == (64, 64)


def test_orientation_and_channel_order(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :, 0] = 200
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    image = LoadImage()({"img_path": str(tmp_path / "x.png")})["img"]
    assert image.shape == (16, 8, 3)
    assert image[0, 0].tolist() == [0, 0, 200]


def test_ranges_are_those_of_the_data_set(data: Path, tmp_path: Path) -> None:
    for split, scale in (("train", 1000.0), ("val", 100.0)):
        for file in list((data / f"{split}2017").glob("*.png")):
            Image.fromarray(np.asarray(Image.open(file).convert("L")).astype(np.float32) * scale / 255).save(
                file.with_suffix(".tif")
            )
            file.unlink()
        edit(data, split, lambda c: [i.update(file_name=i["file_name"].replace(".png", ".tif")) for i in c["images"]])
    files = opened(data, tmp_path / "run")
    assert files.ranges.by_mode == {"F": (0.0, 65535.0)}
    assert "floating-point images" in files.notes[0]
    cfg = DetectDataConfig("coco", str(data), value_range=[0.0, 1000.0])
    assert open_coco(cfg).ranges.by_mode["F"] == (0.0, 1000.0)
    alone = opened(data, tmp_path / "run", need_train=False, known=Known(ranges=files.ranges))
    assert alone.ranges is files.ranges


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main([*DETECT, f"data.root={digits}", f"run_dir={folder}", "schedule.epochs=2"]) == 0
    return folder


def precision(folder: Path) -> float:
    return json.loads((folder / "summary.json").read_text())["bbox_mAP"]


def test_a_run_is_evaluated_by_name(trained: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert precision(trained) > 0
    for change in (shuffle, REVERSED, every(id=..., area=..., iscrowd=...), sizes(...)):
        edit(data, "val", change)
    assert main(["eval=true", f"run={trained}", f"data.root={data}"]) == 0
    assert precision(trained / "evaluation-last") == precision(trained)
    weights = trained / "checkpoints/last.pt"
    assert main([*DETECT, "eval=true", f"weights={weights}", f"data.root={data}", f"run_dir={data / 'out'}"]) == 0
    assert precision(data / "out") == precision(trained)
    capsys.readouterr()
    edit(data, "val", lambda c: c["categories"][0].update(name="other"))
    assert main(["eval=true", f"run={trained}", f"data.root={data}"]) == 2
    error = capsys.readouterr().err
    assert "different categories: only in validation" in error
    assert "'other'" in error
    assert len(error.splitlines()) == 1


def test_a_run_is_resumed_by_name(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for split in ("train", "val"):
        edit(data, split, REVERSED)
        edit(data, split, shuffle)
    assert main([f"resume={run}", f"data.root={data}"]) == 0
    assert load_checkpoint(run / "checkpoints/last.pt")["meta"]["dataset_meta"]["classes"] == CLASSES
    capsys.readouterr()
    edit(data, "train", lambda c: c.update(images=c["images"][:-1]))
    assert main([f"resume={run}", f"data.root={data}"]) == 2
    assert "was made with 8 training images and there are 7 now" in capsys.readouterr().err
    edit(data, "train", rename)
    assert main([f"resume={run}", f"data.root={data}"]) == 2
    assert "different categories" in capsys.readouterr().err


def test_16_bit_images_give_the_same_precision(trained: Path, data: Path) -> None:
    for file in (data / "val2017").glob("*.png"):
        Image.fromarray(np.asarray(Image.open(file).convert("L")).astype(np.uint16) * 257).save(file)
    assert main(["eval=true", f"run={trained}", f"data.root={data}"]) == 0
    assert precision(trained / "evaluation-last") == precision(trained)


def test_run_without_eval_says_what_to_do(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"run={trained}"]) == 2
    error = capsys.readouterr().err
    assert f"zoo detect eval=true run={trained}" in error
    assert f"zoo detect resume={trained}" in error


def test_polygons_count_as_masks(data: Path, tmp_path: Path) -> None:
    """A box from polygons, and their area."""
    square = [[8.0, 8.0, 24.0, 8.0, 24.0, 40.0, 8.0, 40.0]]
    edit(data, "val", entry("annotations", 0, segmentation=square, bbox=..., area=...))
    first = json.loads(Path(opened(data, tmp_path / "run", masks=True).val_annotations).read_text())["annotations"][0]
    assert first["bbox"] == [8, 8, 16, 32]
    assert first["area"] == float(rle.area(rle.merge(rle.frPyObjects(square, 64, 64)))) == 512


def test_out_is_tried_before_the_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "a, file (1).pth"  # which is not there, and is looked for later
    assert main(["eval=true", f"weights={weights}", f"out={tmp_path}"]) == 2
    assert f"out={tmp_path} cannot be written: it is a folder" in capsys.readouterr().err
    assert main(["eval=true", f"weights={weights}"]) == 2
    assert str(weights) in capsys.readouterr().err
