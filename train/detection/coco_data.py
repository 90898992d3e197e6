"""Data sets in COCO's format: found, checked and completed before a start, and described for mmdet."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset

from zoo.errors import UserError, first_line
from zoo.train.images import ImageError, PixelRanges, find_ranges
from zoo.train.runs import write_atomic

from .annotations import Annotations, arrange, categories, complete
from .config import DetectDataConfig
from .digits_coco import DigitsCoco, build_digits_coco
from .loading import read_bgr

__all__ = ["MIN_SIDE", "CocoFiles", "Known", "open_coco"]

MIN_SIDE = 32  # pixels; training leaves smaller images out

_COCO_CLASSES: tuple[str, ...] = CocoDataset.METAINFO["classes"]


@dataclass(frozen=True)
class Known:
    """What is settled before the data are looked at: what a run or a detector was trained on.

    classes: the names in the order of the detector's outputs; None where nobody says them.
    who: as in "the run was trained on other categories".
    whole: every class must be in the training file, which is the one that the run was begun with.
    ranges: of pixels with more than 8 bits.
    """

    classes: tuple[str, ...] | None = None
    who: str = "the detector"
    whole: bool = False
    ranges: PixelRanges | None = None


@dataclass(frozen=True)
class CocoFiles:
    """A data set on disk: absolute paths, class names in the order of the detector's outputs."""

    classes: tuple[str, ...]
    train_annotations: str
    val_annotations: str
    train_images: str
    val_images: str
    present: bool = True  # False: the files are not there, and only the model can be built
    ranges: PixelRanges = field(default_factory=PixelRanges)  # of pixels with more than 8 bits
    mended: Mapping[str, Any] = field(default_factory=dict)  # by "train" and "val": contents that the files lack
    notes: tuple[str, ...] = ()  # what the user should be told

    def written(self, folder: Path, write: bool) -> "CocoFiles":
        """The data set with its completed annotations under `folder`/annotations, written in one process."""
        paths = {split: folder / f"annotations/{split}.json" for split in self.mended}
        if write and paths:
            (folder / "annotations").mkdir(exist_ok=True)
            for split, path in paths.items():
                write_atomic(path, json.dumps(self.mended[split]))
        return replace(
            self,
            train_annotations=str(paths.get("train", self.train_annotations)),
            val_annotations=str(paths.get("val", self.val_annotations)),
        )


def open_coco(
    cfg: DetectDataConfig,
    *,
    need_train: bool = True,
    may_lack: bool = False,
    masks: bool = False,
    known: Known | None = None,
) -> CocoFiles:
    """Find a data set, check its annotations and complete them; `digits_coco` is composed on first use.

    Classes are matched by name: the ids and the order of the categories may differ between the files.

    Args:
        cfg: the data section of the configuration.
        need_train: the training half is wanted too.
        may_lack: do not complain when data.root is not set.
        masks: the detector predicts masks.
        known: what a run or a detector was trained on.

    Raises:
        UserError: a file is missing or damaged, the splits have different categories, or there is nothing in them.
    """
    known = known or Known()
    if cfg.name == "digits_coco":
        try:
            spec = DigitsCoco(canvas=cfg.canvas, train_images=cfg.train_count, val_images=cfg.val_count)
        except ValueError as error:
            raise UserError(f"{error}; set data.canvas, data.train_count, data.val_count") from error
        root = build_digits_coco(cfg.root, spec)
        names = ("annotations/train.json", "annotations/val.json", "train", "val")
    else:
        names = (cfg.train_annotations, cfg.val_annotations, cfg.train_images, cfg.val_images)
        if cfg.root is None:
            if may_lack:
                return CocoFiles(known.classes or _COCO_CLASSES, *names, present=False)
            raise UserError("data.root is not set; give the folder that holds annotations/, train2017/ and val2017/")
        root = Path(cfg.root).expanduser().resolve()
        if not root.is_dir():
            raise UserError(
                f"no data folder at {root}; give data.root=FOLDER with {cfg.val_annotations} and {cfg.val_images}/"
            )
    folders = {"train": root / names[2], "val": root / names[3]}
    found = {"val": _read(root / names[1], folders["val"], "val")}
    if need_train:
        found["train"] = _read(root / names[0], folders["train"], "train")
    classes = _agree(found, known)
    ranges, notes = _ranges(cfg, found, folders, known)
    for split, annotations in found.items():

        def measure(name: str, folder: Path = folders[split]) -> tuple[int, int] | None:
            try:
                height, width = read_bgr(folder / name, PixelRanges.given(0, 1)).shape[:2]
            except ImageError:
                return None
            return int(height), int(width)

        complete(annotations, measure, masks, split == "val")
        arrange(annotations, classes)
    if need_train:
        _check_sides(found["train"])
    return CocoFiles(
        classes,
        str(root / names[0]),
        str(root / names[1]),
        str(root / names[2]),
        str(root / names[3]),
        ranges=ranges,
        mended={split: a.content for split, a in found.items() if a.changed},
        notes=(*notes, *(note for a in found.values() for note in a.notes)),
    )


def _read(file: Path, folder: Path, split: str) -> Annotations:
    if not file.is_file():
        raise UserError(f"no annotation file at {file}; set data.{split}_annotations, relative to data.root")
    if not folder.is_dir():
        raise UserError(f"no image folder at {folder}; set data.{split}_images, relative to data.root")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} is not readable JSON ({first_line(error)}); restore it") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(k), list) for k in lists):
        raise UserError(f"{file} is not in COCO's format: it needs the lists images, annotations and categories")
    if not content["images"] or not content["annotations"] or not content["categories"]:
        raise UserError(
            f"{file} is empty: {len(content['images'])} images, {len(content['annotations'])} annotations, "
            f"{len(content['categories'])} categories; set data.{split}_annotations to one that is not"
        )
    first = content["images"][0]
    name = first.get("file_name") if isinstance(first, dict) else None
    if isinstance(name, str) and not (folder / name).exists():
        raise UserError(f"no image {folder / name}, which {file.name} names; set data.{split}_images")
    return Annotations(file, content)


def _agree(found: Mapping[str, Annotations], known: Known) -> tuple[str, ...]:
    """The class names in the order of the detector's outputs: a run's, else that of the training file's ids."""
    own = {split: categories(a.content, a.file) for split, a in found.items()}
    classes = known.classes
    if classes is None:
        classes = tuple(own["train" if "train" in own else "val"].values())
        who, title = "the splits have", "training"
    else:
        who, title = f"{known.who} and the data have", known.who
    for split, names in own.items():
        extra = [f"{i} {n!r}" for i, n in names.items() if n not in classes]
        lacking = [repr(n) for n in classes if n not in names.values()]
        if extra or (lacking and known.whole and split == "train"):
            where = "validation" if split == "val" else "training"
            parts = [f"only in {where} {', '.join(extra[:4])}"] if extra else []
            parts += [f"only in {title} {', '.join(lacking[:4])}"] if lacking else []
            raise UserError(
                f"{who} different categories: {'; '.join(parts)}; name them alike in {found[split].file}, or remove "
                "those that are foreign"
            )
    return classes


def _ranges(
    cfg: DetectDataConfig, found: Mapping[str, Annotations], folders: Mapping[str, Path], known: Known
) -> tuple[PixelRanges, list[str]]:
    """The ranges of pixels with more than 8 bits: the user's, the run's, or those of the images, and what to say."""
    if cfg.value_range is not None:
        return PixelRanges.given(cfg.value_range[0], cfg.value_range[1]), []
    if known.ranges is not None:
        return known.ranges, []
    split = "train" if "train" in found else "val"
    images = [i.get("file_name") for i in found[split].content["images"] if isinstance(i, dict)]
    try:
        return find_ranges(str(folders[split] / name) for name in images if isinstance(name, str))
    except ImageError as error:
        raise UserError(str(error)) from error


def _check_sides(train: Annotations) -> None:
    """Raise UserError where training would leave every image out; say where it leaves some out."""
    marked = {a["image_id"] for a in train.content["annotations"]}
    images = [i for i in train.content["images"] if i["id"] in marked]
    small = [i for i in images if min(i["width"], i["height"]) < MIN_SIDE]
    if len(small) == len(images):
        raise UserError(
            f"{train.file}: all {len(images)} images with annotations have a side below {MIN_SIDE} pixels, too small "
            f"to train on; enlarge them (the first is {small[0]['file_name']}, {small[0]['width']} x "
            f"{small[0]['height']})"
        )
    if small:
        train.notes.append(
            f"{train.file}: {len(small)} images with a side below {MIN_SIDE} pixels are left out of training, the "
            f"first is {small[0]['file_name']}"
        )
