"""Data sets in COCO's format: found, checked before a start, and described for mmdet."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset

from zoo.errors import UserError

from .config import DetectDataConfig
from .digits_coco import CLASSES, DigitsCoco, build_digits_coco

__all__ = ["CocoFiles", "open_coco"]

_COCO_CLASSES: tuple[str, ...] = CocoDataset.METAINFO["classes"]


@dataclass(frozen=True)
class CocoFiles:
    """A data set on disk: absolute paths, class names in the order of their ids."""

    classes: tuple[str, ...]
    train_annotations: str
    val_annotations: str
    train_images: str
    val_images: str
    present: bool = True  # False: the files are not there, and only the model can be built


def open_coco(cfg: DetectDataConfig, *, need_train: bool = True, may_lack: bool = False) -> CocoFiles:
    """Find a data set and check its annotations; `digits_coco` is composed on first use.

    Args:
        cfg: the data section of the configuration.
        need_train: the training half is wanted too.
        may_lack: do not complain when data.root is not set.

    Raises:
        UserError: a file is missing or unreadable, the splits have different categories, or there is nothing in them.
    """
    if cfg.name == "digits_coco":
        try:
            spec = DigitsCoco(canvas=cfg.canvas, train_images=cfg.train_count, val_images=cfg.val_count)
        except ValueError as error:
            raise UserError(f"{error}; set data.canvas, data.train_count, data.val_count") from error
        folder = build_digits_coco(cfg.root, spec)
        return CocoFiles(
            CLASSES,
            str(folder / "annotations/train.json"),
            str(folder / "annotations/val.json"),
            str(folder / "train"),
            str(folder / "val"),
        )
    if cfg.root is None:
        if may_lack:
            return CocoFiles(
                _COCO_CLASSES, cfg.train_annotations, cfg.val_annotations, cfg.train_images, cfg.val_images, False
            )
        raise UserError("data.root is not set; give the folder that holds annotations/, train2017/ and val2017/")
    root = Path(cfg.root).expanduser().resolve()
    if not root.is_dir():
        raise UserError(
            f"no data folder at {root}; give data.root=FOLDER with {cfg.val_annotations} and {cfg.val_images}/"
        )
    val = _read(root, "val", cfg.val_annotations, cfg.val_images)
    classes = _names(val)
    if need_train:
        train = _read(root, "train", cfg.train_annotations, cfg.train_images)
        if _categories(train) != _categories(val):
            raise UserError(
                f"the splits have different categories: {_difference(_categories(train), _categories(val))}"
            )
        classes = _names(train)
    return CocoFiles(
        classes,
        str(root / cfg.train_annotations),
        str(root / cfg.val_annotations),
        str(root / cfg.train_images),
        str(root / cfg.val_images),
    )


def _read(root: Path, split: str, annotations: str, images: str) -> dict[str, Any]:
    file, folder = root / annotations, root / images
    if not file.is_file():
        raise UserError(f"no annotation file at {file}; set data.{split}_annotations, relative to data.root")
    if not folder.is_dir():
        raise UserError(f"no image folder at {folder}; set data.{split}_images, relative to data.root")
    try:
        content = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is not readable JSON ({error}); restore it") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(k), list) for k in lists):
        raise UserError(f"{file} is not in COCO's format: it needs the lists images, annotations and categories")
    if not content["images"] or not any(not a.get("iscrowd") for a in content["annotations"]):
        raise UserError(f"{file} is empty: {len(content['images'])} images, {len(content['annotations'])} annotations")
    known = {c["id"] for c in content["categories"]}
    strange = sorted({a["category_id"] for a in content["annotations"]} - known)
    if strange:
        raise UserError(f"{file} has annotations of categories {strange[:5]}, which its categories do not list")
    missing = [i["file_name"] for i in content["images"][:1] if not (folder / i["file_name"]).is_file()]
    if missing:
        raise UserError(f"no image {folder / missing[0]}, which {file.name} names; set data.{split}_images")
    return content


def _categories(content: Mapping[str, Any]) -> dict[int, str]:
    return {c["id"]: c["name"] for c in content["categories"]}


def _names(content: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for _, name in sorted(_categories(content).items()))


def _difference(train: Mapping[int, str], val: Mapping[int, str]) -> str:
    lines = []
    for title, own, other in (("only in training", train, val), ("only in validation", val, train)):
        extra = [f"{i} {n!r}" for i, n in sorted(own.items()) if other.get(i) != n]
        if extra:
            lines.append(f"{title} {', '.join(extra[:4])}")
    return "; ".join(lines)
