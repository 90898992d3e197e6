"""The first images of an evaluation: predictions beside the ground truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.train.images import ImageError
from zoo.train.plot import new_figure, save_figure

__all__ = ["DPI", "Gallery"]

DPI = 110
_SHOWN = 0.5  # predictions of a lower score are not drawn


class Gallery:
    """The first images of an evaluation with their predictions.

    Args:
        size: how many images to keep.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.samples: list[dict[str, Any]] = []

    def clear(self) -> None:
        """Forget all samples."""
        self.samples.clear()

    def add(self, outputs: Sequence[Any]) -> None:
        """Keep the detector's outputs (DetDataSample) until there are enough."""
        for output in outputs[: max(0, self.size - len(self.samples))]:
            found = output.pred_instances
            shown = found.scores >= _SHOWN
            masks = found.masks[shown] if "masks" in found else None
            self.samples.append(
                {
                    "path": output.img_path,
                    "id": output.img_id,
                    "boxes": found.bboxes[shown].cpu().numpy(),
                    "labels": found.labels[shown].tolist(),
                    "scores": found.scores[shown].tolist(),
                    "masks": None if masks is None else np.asarray(masks.cpu()),
                }
            )

    def write(self, path: str | Path, dataset: Any) -> None:
        """Draw ground truth (left) beside predictions (right); nothing where no image was kept."""
        if not self.samples:
            return
        classes = dataset.metainfo["classes"]
        truth = {info["img_id"]: info for info in (dataset.get_data_info(i) for i in range(len(dataset)))}
        columns = 2 if len(self.samples) > 1 else 1
        rows = -(-len(self.samples) // columns)
        figure = new_figure(figsize=(5.2 * columns, 2.7 * rows))
        grid = figure.subplots(rows, 2 * columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for number, sample in enumerate(self.samples):
            left, right = grid[number // columns][2 * (number % columns) :][:2]
            try:
                image = dataset.picture(sample["path"])
            except ImageError:
                left.set_title("unreadable image", fontsize=8)
                continue
            image = image[..., ::-1]
            instances = [i for i in truth[sample["id"]]["instances"] if not i.get("ignore_flag")]
            boxes = np.array([i["bbox"] for i in instances]).reshape(-1, 4)
            names = [classes[i["bbox_label"]] for i in instances]
            masks = [_decode(i["mask"], image.shape[:2]) for i in instances if i.get("mask") is not None]
            _draw(left, image, boxes, names, masks if len(masks) == len(instances) else [])
            left.set_title("ground truth", fontsize=8)
            names = [f"{classes[c]} {s:.2f}" for c, s in zip(sample["labels"], sample["scores"], strict=True)]
            _draw(right, image, sample["boxes"], names, [] if sample["masks"] is None else list(sample["masks"]))
            right.set_title("prediction", fontsize=8)
        save_figure(path, figure, DPI)


def _decode(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    from pycocotools import mask as rle

    if isinstance(mask, list):
        mask = rle.merge(rle.frPyObjects(mask, *shape[:2]))
    elif isinstance(mask["counts"], list):
        mask = rle.frPyObjects(mask, *shape[:2])
    return rle.decode(mask).astype(bool)


def _draw(axes: Any, image: np.ndarray, boxes: np.ndarray, names: Sequence[str], masks: Sequence[np.ndarray]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours = [colormaps["tab10"](i % 10)[:3] for i in range(len(boxes))]
    canvas = image.astype(float)
    for colour, mask in zip(colours, masks, strict=False):
        canvas[mask] = 0.5 * canvas[mask] + 127.5 * np.array(colour)
    axes.imshow(canvas.astype(np.uint8))
    for colour, (x1, y1, x2, y2), name in zip(colours, boxes, names, strict=True):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1))
        axes.text(x1, y1 - 1, name, color="white", fontsize=5, va="bottom", bbox={"color": colour, "pad": 0.4})
