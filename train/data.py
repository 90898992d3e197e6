"""Data sets by name: scikit-learn's digits, folders, timm.data's; in an order that a resumed run finds again."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from zoo.errors import UserError
from zoo.train.augment import create_mixup, resolve_transform
from zoo.train.config import DataConfig
from zoo.train.folders import FolderReader, is_ignored, is_image_file
from zoo.train.images import (
    ImageError,
    PixelRanges,
    convert_image,
    find_ranges,
    is_machine_trouble,
    read_image,
    shown,
)
from zoo.train.labels import class_count
from zoo.train.loaders import EvalLoader, TrainLoader
from zoo.train.views import View

__all__ = [
    "Digits",
    "EvalLoader",
    "ReaderImages",
    "TrainLoader",
    "class_count",
    "create_mixup",
    "open_dataset",
    "resolve_transform",
]

FOLDERS = ("imagefolder", "folder", "")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation", "test"),
}
_MISSING_PACKAGES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow-datasets"}


class Digits(Dataset[tuple[Image.Image, int]]):
    """scikit-learn's 1797 handwritten digits, 8 x 8, as 32 x 32 images.

    One fifth of each class is held out, always the same images: `split` is "train" (1438) or "validation" (359).
    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (the test set).
    """

    classes = [str(i) for i in range(10)]

    def __init__(self, split: str, mode: str = "RGB") -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        held_out = np.zeros(len(bunch.target), dtype=bool)
        order = np.random.RandomState(0).permutation(len(bunch.target))  # a stream that NumPy keeps unchanged
        for digit in range(10):
            members = order[bunch.target[order] == digit]
            held_out[members[: round(len(members) / 5)]] = True
        chosen = held_out if split in SPLITS["validation"] else ~held_out
        grey = np.rint(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
        self.images = [Image.fromarray(i).resize((32, 32), Image.Resampling.BICUBIC).convert(mode) for i in grey]
        self.targets = bunch.target[chosen].tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.targets[index]


class ReaderImages(Dataset[tuple[Image.Image, int]]):
    """The images that a reader of timm's kind names, decoded by `read_image`; none stands in for another.

    Args:
        reader: reader[i] is (path or open file, class); it has a length and `filename(i)`.
        mode: "RGB" or "L".
        ranges: of pixels with more than 8 bits.
        notes: lines about the data set that the user should see once.
    """

    def __init__(self, reader: Any, mode: str, ranges: PixelRanges | None = None, notes: Sequence[str] = ()) -> None:
        self.reader, self.mode, self.ranges, self.notes = reader, mode, ranges or PixelRanges(), list(notes)

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        """How messages call an image."""
        try:
            found = self.reader.filename(index)
        except Exception:  # a reader need not know
            found = None
        return shown(str(found)) if found else f"image {index}"

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            source, target, *_ = self.reader[index]
            return read_image(source, self.mode, self.ranges), -1 if target is None else target
        except ImageError as error:
            raise ImageError(error.reason, self.name(index)) from error
        except OSError as error:  # the reader's own open
            if is_machine_trouble(error):
                raise
            raise ImageError(error.strerror or str(error), self.name(index)) from error


class _Converted(View, Dataset[tuple[Any, int]]):
    """A data set of Pillow's images in any mode, as images of one mode."""

    def __init__(self, dataset: Any, mode: str, ranges: PixelRanges) -> None:
        super().__init__(dataset)
        self.mode, self.ranges = mode, ranges

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.dataset[index]
        if isinstance(image, Image.Image):
            image = convert_image(image, self.mode, self.ranges)
        return image, target


class _ConvertedStream(View, IterableDataset[Any]):
    """The same for a stream; an image that cannot be read comes as its ImageError."""

    def __init__(self, dataset: Any, mode: str, ranges: PixelRanges) -> None:
        super().__init__(dataset)
        self.mode, self.ranges = mode, ranges

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for image, target in self.dataset:
            try:
                converted = convert_image(image, self.mode, self.ranges) if isinstance(image, Image.Image) else image
            except ImageError as error:
                converted = error
            except (OSError, ValueError, SyntaxError) as error:  # Pillow decodes as late as here
                converted = ImageError((str(error).splitlines() or [type(error).__name__])[0])
            yield converted, target


def _split_folder(root: Path, split: str) -> Path:
    names = next((names for names in SPLITS.values() if split in names), (split,))
    for name in dict.fromkeys((split, *names)):
        if (root / name).is_dir():
            return root / name
    raise UserError(f"no folder {root / split} (nor {', '.join(n for n in names if n != split) or 'another name'}); "
                    f"put the {split} images in {root}/{names[0]}/CLASS/, set the split's name, or hold out a share of "
                    "a folder without splits with data.val_fraction=0.2")  # fmt: skip


def _split_at_hand(root: Path, split: str) -> Path | None:
    """The folder of a split, where there is one."""
    names = next((names for names in SPLITS.values() if split in names), (split,))
    return next((root / name for name in dict.fromkeys((split, *names)) if (root / name).is_dir()), None)


def _undivided(cfg: DataConfig, root: Path) -> Path:
    """The folder whose images are divided by data.val_fraction: that of the training images, or the root itself.

    Raises:
        UserError: held-out images have a folder of their own.
    """
    training, held_out = _split_at_hand(root, cfg.train_split), _split_at_hand(root, cfg.val_split)
    if training is not None and held_out is not None:
        raise UserError(
            f"data.val_fraction={cfg.val_fraction:g} divides a folder without a split, and {shown(held_out)} holds "
            "held-out images; leave it out"
        )
    return training or root


def _divide(reader: FolderReader, fraction: float, training: bool) -> str:
    """Leave a reader the training images of every class, or the held-out ones; returns a line on the division.

    Which images are held out depends on the fraction and on their names alone, so that a resumed run, an evaluation and
    a run of another seed find the same ones.
    """
    start = len(str(reader.folder)) + 1
    by_class: dict[int, list[tuple[str, int]]] = {}
    for sample in reader.samples:
        by_class.setdefault(sample[1], []).append(sample)
    held_out: set[str] = set()
    for samples in by_class.values():
        order = sorted(
            (path for path, _ in samples),
            key=lambda path: (hashlib.sha256(os.fsencode(path[start:])).digest(), path),
        )
        held_out.update(order[: min(max(1, round(fraction * len(order))), len(order) - 1)])
    total = len(reader.samples)
    if not held_out:
        raise UserError(
            f"data.val_fraction={fraction:g} of {shown(reader.folder)} leaves nothing to hold out: every class has one "
            "image; add images"
        )
    reader.samples = [sample for sample in reader.samples if (sample[0] in held_out) != training]
    alone = sum(len(samples) == 1 for samples in by_class.values())
    note = f"; {alone} with a single image hold none" if alone else ""
    return (
        f"data.val_fraction={fraction:g}: {len(held_out)} of {total} images in {shown(reader.folder)} are held out, "
        f"the same share of each of {len(by_class)} classes{note}"
    )


def _pixel_ranges(cfg: DataConfig) -> PixelRanges | None:
    return None if cfg.value_range is None else PixelRanges.given(cfg.value_range[0], cfg.value_range[1])


def _open_folder(
    cfg: DataConfig, training: bool, mode: str, class_map: Any, known_as: str, ranges: PixelRanges | None
) -> ReaderImages:
    root = Path(str(cfg.root))
    split = cfg.train_split if training else cfg.val_split
    folder = _split_folder(root, split) if cfg.val_fraction is None else _undivided(cfg, root)
    reader = FolderReader(folder, root, class_map, complete=training, known_as=known_as)
    notes = list(reader.notes)
    if cfg.val_fraction is not None:
        notes.append(_divide(reader, cfg.val_fraction, training))
    if training and len(reader.class_to_idx) == 1:
        only, inner = next(iter(reader.class_to_idx)), reader.inner_folders()
        hint = ""
        if inner:
            folders = ", ".join(map(shown, inner[:3]))
            hint = (
                f"; if its folders ({folders}) are meant, set data.train_split={split}/{only} and data.val_split alike"
            )
        raise UserError(
            f"{shown(reader.folder)} has a single class, {shown(only)}, and there is nothing to tell apart; "
            f"give at least two class folders{hint}"
        )
    if ranges is None:
        try:
            ranges, lines = find_ranges(path for path, _ in reader.samples)
        except ImageError as error:
            raise UserError(str(error)) from error
        notes += lines
    return ReaderImages(reader, mode, ranges, notes)


def open_dataset(
    cfg: DataConfig,
    training: bool,
    in_chans: int = 3,
    class_map: Any = None,
    *,
    ranges: PixelRanges | None = None,
    known_as: str = "the training images",
    **extra: Any,
) -> Any:
    """Open a split as a dataset of (PIL image, class).

    Args:
        cfg: the data section of the configuration.
        training: the training split, else the held-out one.
        in_chans: 3 reads colour images, 1 grey ones.
        class_map: folder name -> class index, so that both splits number their classes alike.
        ranges: of pixels with more than 8 bits, where another split has settled them; data.value_range comes first.
        known_as: whose classes `class_map` are, for messages.
        extra: handed to timm.data.create_dataset for the streaming schemes.

    Raises:
        UserError: the folder, the scheme or the package it needs is missing.
    """
    split = cfg.train_split if training else cfg.val_split
    mode = "L" if in_chans == 1 else "RGB"
    ranges = _pixel_ranges(cfg) or ranges
    scheme, slash, _ = cfg.name.partition("/")
    if cfg.val_fraction is not None and cfg.name not in FOLDERS:
        raise UserError(
            f"data.val_fraction={cfg.val_fraction:g} divides folders, and data.name={cfg.name} has splits of its own; "
            "leave it out"
        )
    if cfg.name == "digits":
        return Digits("train" if training else "validation", mode)
    if not slash and cfg.name not in FOLDERS:
        raise UserError(
            f"data.name={cfg.name!r} is not known; choose digits, imagefolder, hfds/..., wds/... or torch/..."
        )
    if cfg.root is None and (cfg.name in FOLDERS or scheme in ("torch", "wds")):
        raise UserError(f"data.name={cfg.name} reads a folder and data.root is not set; give data.root=PATH")
    if cfg.root is not None and not cfg.download and not Path(cfg.root).exists():
        raise UserError(f"no data folder at {cfg.root}; give the folder that holds the images as data.root=PATH")
    if cfg.name in FOLDERS:
        return _open_folder(cfg, training, mode, class_map, known_as, ranges)
    options = _timm_options(cfg.name, mode, ranges or PixelRanges(), extra)
    try:
        with redirect_stdout(StringIO()):  # timm prints what it is about to raise
            dataset = timm.data.create_dataset(
                cfg.name, root=cfg.root, split=split, is_training=training, download=cfg.download, **options
            )
    except ImportError as error:
        package = _MISSING_PACKAGES.get(scheme, error.name or "a package")
        raise UserError(f"data.name={cfg.name} needs the package {package}; `pip install {package}`") from error
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data.name={cfg.name} split={split}: {first}; see data.name, data.root, data.download"
        ) from error
    system = [name for name in getattr(dataset, "classes", ()) if is_ignored(str(name))]
    if system and scheme == "torch":
        raise UserError(
            f"data.name={cfg.name} takes every folder for a class, also {', '.join(map(shown, system))}; remove them, "
            "or use data=imagefolder"
        )
    return _decoded(dataset, mode, ranges or PixelRanges())


def _timm_options(name: str, mode: str, ranges: PixelRanges, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What timm.data.create_dataset is told besides the data set: images come as they are where we can convert them."""
    scheme, _, rest = name.partition("/")
    if scheme == "torch":
        folder = rest.lower() in ("folder", "image_folder")
        reading = {"loader": partial(read_image, mode=mode, ranges=ranges), "is_valid_file": is_image_file}
        return reading if folder else {}
    return {"input_img_mode": "" if scheme in ("wds", "hfids") else mode, **extra}


def _decoded(dataset: Any, mode: str, ranges: PixelRanges) -> Any:
    """timm's dataset with our decoder in place of its own, which scores a neighbour for an unreadable image."""
    if isinstance(dataset, timm.data.ImageDataset):
        return ReaderImages(dataset.reader, mode, ranges)
    if isinstance(dataset, IterableDataset):
        return _ConvertedStream(dataset, mode, ranges)
    return _Converted(dataset, mode, ranges)
