"""augmented.png: training images as the model will see them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.train.plot import new_figure, save_figure

__all__ = ["draw_samples"]

_PER_ROW, _DPI = 8, 110


def draw_samples(path: Path, images: Tensor, targets: Tensor, names: Sequence[str] | None, shape: Any) -> None:
    """Draw images with their classes.

    Args:
        path: the file.
        images: [B, C, H, W], normalized.
        targets: classes [B], or their shares [B, classes] where images were mixed.
        names: of the classes; None numbers them.
        shape: with the mean and std by which the images were normalized.
    """
    mean, std = (images.new_tensor(shape[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    pixels = (images.float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    columns = min(_PER_ROW, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(figsize=(1.6 * columns, 1.85 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, picture, target in zip(grid.flat, pixels, targets, strict=False):
        axes.imshow(picture if picture.shape[-1] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
        axes.set_title(_title(target, names), fontsize=7, parse_math=False)
    save_figure(path, figure, _DPI)


def _title(target: Tensor, names: Sequence[str] | None) -> str:
    def name(index: int) -> str:
        text = str(index) if names is None or index >= len(names) else names[index]
        return text if len(text) <= 22 else f"{text[:19]}..."

    if target.ndim == 0:
        return name(int(target))
    shares, indices = target.topk(min(2, len(target)))
    if len(target) == 1 or float(shares[1]) < 0.1:  # what label smoothing gives to every class
        return name(int(indices[0]))
    return " + ".join(f"{100 * s:.0f} % {name(int(i))}" for s, i in zip(shares.tolist(), indices, strict=True))
