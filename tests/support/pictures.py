"""Folders of small images whose class is seen in their colour, and a network that learns them in a second."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from training import TINY

# the tiny NAT of `training` on folders of images
FOLDER = (
    "data=imagefolder", "data.img_size=32", "data.num_workers=0", "augment=none", "optim.lr=3e-3", *TINY,
    "batch_size=8",
)  # fmt: skip
CLASSES = ("ant", "bee", "cow")


def picture(index: int, seed: int) -> Image.Image:
    """A noisy image of class `index`: one channel is bright."""
    pixels = np.random.default_rng((index, seed)).integers(0, 60, (36, 40, 3))
    pixels[..., index] += 180
    return Image.fromarray(pixels.astype(np.uint8))


def class_folders(root: Path, train: int = 16, held_out: int = 10, classes: Sequence[str] = CLASSES) -> Path:
    """root/train/CLASS/N.png and root/val/CLASS/N.png."""
    for split, count, first in (("train", train, 0), ("val", held_out, 1000)):
        for index, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(index, first + i).save(folder / f"{i}.png")
    return root
