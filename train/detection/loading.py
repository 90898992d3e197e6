"""Images for a detector, read as everything else in training reads them: any mode and format, upright."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from PIL import Image, ImageOps

from zoo.train.images import PixelRanges, read_image

from .registry import TRANSFORMS

__all__ = ["LoadImage", "read_bgr"]


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata name no orientation
        return image


def read_bgr(path: str | os.PathLike[str], ranges: PixelRanges | None = None) -> np.ndarray:
    """An image as mmdet takes it: [H, W, 3], 8 bits, blue first, turned as its EXIF orientation says.

    Raises:
        ImageError: it cannot be read.
    """
    image = _upright(read_image(path, "RGB", ranges or PixelRanges()))
    return np.ascontiguousarray(np.asarray(image)[..., ::-1])


@TRANSFORMS.register_module()
class LoadImage(BaseTransform):
    """In place of mmdet's LoadImageFromFile, which cuts off the values of images with more than 8 bits.

    Args:
        ranges: of the pixels of such images, as `PixelRanges.state` returns them.
    """

    def __init__(self, ranges: Mapping[str, Any] | None = None) -> None:
        self.ranges = PixelRanges.from_state(ranges)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Read `img_path`.

        Raises:
            ImageError: it cannot be read.
        """
        image = read_bgr(results["img_path"], self.ranges)
        return {**results, "img": image, "img_shape": image.shape[:2], "ori_shape": image.shape[:2]}
