"""`digits_coco`: a detection data set that needs no download, composed from scikit-learn's 1797 handwritten digits.

The digits are split before any canvas is composed, and as `data=digits` splits them: no digit of the validation
canvases was ever seen in training, nor in a pretraining on `data=digits`.
Written once per set of parameters into a cache, in COCO's format: PNG images, boxes, masks (RLE), true areas.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo.train.data import Digits

__all__ = ["CLASSES", "DigitsCoco", "build_digits_coco"]

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_VERSION = 1  # part of the cache's name: raise it when the composition changes


@dataclass(frozen=True)
class DigitsCoco:
    """What is composed: sizes in pixels, counts per canvas, canvases per split."""

    canvas: int = 128
    train_images: int = 600
    val_images: int = 100
    digits: tuple[int, int] = (2, 5)  # fewest and most digits on a canvas
    size: tuple[int, int] = (24, 48)  # smallest and largest side of a digit's square field
    noise: float = 12.0  # standard deviation of the background, of 255
    seed: int = 0

    def __post_init__(self) -> None:
        if self.canvas < 32 or self.size[1] > self.canvas or not 8 <= self.size[0] <= self.size[1]:
            raise ValueError(
                f"digits_coco: canvas {self.canvas} cannot hold digits of {self.size[0]}..{self.size[1]} pixels"
            )
        if not 1 <= self.digits[0] <= self.digits[1]:
            raise ValueError(f"digits_coco: {self.digits[0]}..{self.digits[1]} digits on a canvas is no range")
        if min(self.train_images, self.val_images) < 1:
            raise ValueError("digits_coco: both splits need at least one canvas")


def build_digits_coco(root: str | Path | None = None, spec: DigitsCoco | None = None) -> Path:
    """The folder of a composed data set, composing it on first use.

    Layout: `train/`, `val/` with PNG images, `annotations/train.json`, `annotations/val.json`.

    Args:
        root: where the folder goes; by default `zoo/digits_coco` in the user's cache (XDG_CACHE_HOME, ~/.cache).
        spec: what to compose.
    """
    spec = spec or DigitsCoco()
    cache = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoo/digits_coco"
    key = hashlib.sha256(json.dumps([_VERSION, asdict(spec)], sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / f"{spec.canvas}px-{key}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".composing-", dir=cache))
    try:
        _compose(unfinished, spec)
        os.replace(unfinished, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _compose(folder: Path, spec: DigitsCoco) -> None:
    (folder / "annotations").mkdir()
    splits = (("train", Digits("train", "L"), spec.train_images), ("val", Digits("validation", "L"), spec.val_images))
    for stream, (split, digits, count) in enumerate(splits):
        (folder / split).mkdir()
        rng = np.random.default_rng([spec.seed, stream])
        records: dict[str, list[Any]] = {"images": [], "annotations": []}
        for number in range(1, count + 1):
            name = f"{number:06d}.png"
            canvas, found = _canvas(rng, digits, spec)
            Image.fromarray(canvas).save(folder / split / name)
            records["images"].append({"id": number, "file_name": name, "height": spec.canvas, "width": spec.canvas})
            for annotation in found:
                records["annotations"].append({"id": len(records["annotations"]) + 1, "image_id": number, **annotation})
        dataset = {
            "info": {"description": "canvases of scikit-learn's digits", "split": split, **asdict(spec)},
            **records,
            "categories": [{"id": i + 1, "name": name, "supercategory": "digit"} for i, name in enumerate(CLASSES)],
        }
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(dataset))


def _canvas(rng: np.random.Generator, digits: Digits, spec: DigitsCoco) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One canvas [H, W, 3] and its annotations. Digits do not touch, so every mask is complete."""
    from pycocotools import mask as rle

    side = spec.canvas
    ink = np.zeros((side, side))
    taken = np.zeros((side, side), dtype=bool)
    found = []
    for _ in range(rng.integers(spec.digits[0], spec.digits[1] + 1)):
        index = int(rng.integers(len(digits)))
        extent = int(rng.integers(spec.size[0], spec.size[1] + 1))
        image, label = digits[index]
        glyph = np.asarray(image.resize((extent, extent), Image.Resampling.BICUBIC)).astype(float)
        shape = glyph > 96
        rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
        for _ in range(20):  # places to try before the digit is left out
            top, left = (int(v) for v in rng.integers(0, side - extent + 1, size=2))
            y0, y1 = top + int(rows[0]), top + int(rows[-1]) + 1
            x0, x1 = left + int(columns[0]), left + int(columns[-1]) + 1
            if not taken[y0:y1, x0:x1].any():
                break
        else:
            continue
        taken[y0:y1, x0:x1] = True
        field = (slice(top, top + extent), slice(left, left + extent))
        ink[field] = np.maximum(ink[field], glyph)
        mask = np.zeros((side, side), dtype=np.uint8, order="F")
        mask[field] = shape
        code = rle.encode(mask)
        found.append(
            {
                "category_id": label + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [side, side], "counts": code["counts"].decode()},
                "digit": index,
            }
        )
    canvas = np.clip(ink + rng.normal(40, spec.noise, (side, side)), 0, 255).astype(np.uint8)
    return np.repeat(canvas[..., None], 3, axis=2), found
