"""What an evaluation says of every class and image: per_class.csv, confusion.csv, confusion.png, per_image.csv."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from zoo.train.loggers import write_csv
from zoo.train.plot import new_figure, save_figure
from zoo.train.runs import write_atomic
from zoo.train.state import World

__all__ = ["Outcomes"]

_PER_CLASS = ("class", "images", "correct", "accuracy", "precision", "f1", "mistaken_for")
_LARGEST = 2000  # classes of a matrix that is written
_NAMED, _NUMBERED, _WORST = 60, 25, 5  # classes with names and cells with numbers in the picture; classes printed
_DPI = 110


class Outcomes:
    """What was predicted for every readable image: its place in the data set, its class, the best classes."""

    def __init__(self) -> None:
        # place, class, (class index, probability) of the five most probable ones
        self.found: list[tuple[int, int, list[int], list[float]]] = []

    def add(self, output: Tensor, targets: Tensor, places: Sequence[int]) -> None:
        """Take in a batch: logits [B, classes], classes [B], and the places of its images."""
        probabilities = output.detach().float().softmax(dim=-1)
        values, indices = probabilities.topk(min(5, probabilities.shape[-1]), dim=-1)
        self.found += zip(places, targets.tolist(), indices.tolist(), values.tolist(), strict=True)

    def gather(self, world: World) -> None:
        """Bring those of all processes together, in the order of the data set."""
        self.found = sorted(row for rows in world.gather(self.found) for row in rows)

    def rows(self, names: Sequence[str], dataset: Any) -> list[dict[str, Any]]:
        """A row of per_image.csv for every image."""
        name = getattr(dataset, "name", None)
        return [
            {
                "image": name(place) if callable(name) else f"image {place}",
                "class": names[target],
                "predicted": names[indices[0]],
                "correct": int(indices[0] == target),
                **{f"top{i}": names[index] for i, index in enumerate(indices, 1)},
                **{f"probability{i}": f"{value:.6f}" for i, value in enumerate(values, 1)},
            }
            for place, target, indices, values in self.found
        ]

    def write(
        self, folder: Path, names: Sequence[str], per_image: Sequence[Mapping[str, Any]] | None = None
    ) -> list[str]:
        """Write the tables and the picture into a folder, which exists; returns lines on what was found.

        Args:
            folder: where to.
            names: of the classes.
            per_image: rows of per_image.csv, which is not written without them.
        """
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

        truth, predicted = [row[1] for row in self.found], [row[2][0] for row in self.found]
        present = sorted({*truth, *predicted})
        matrix = confusion_matrix(truth, predicted, labels=present)
        precision, recall, f1, images = precision_recall_fscore_support(
            truth, predicted, labels=present, zero_division=0
        )
        place = {index: number for number, index in enumerate(present)}
        rows: list[dict[str, Any]] = []
        for index, name in enumerate(names):
            number = place.get(index)
            if number is None or images[number] == 0:
                rows.append({"class": name, "images": 0, "correct": 0})
                continue
            wrong = np.where(np.arange(len(present)) == number, 0, matrix[number])
            mistaken = names[present[int(wrong.argmax())]] if wrong.any() else None
            rows.append(
                {
                    "class": name,
                    "images": int(images[number]),
                    "correct": int(matrix[number, number]),
                    "accuracy": f"{100 * recall[number]:.2f}",
                    "precision": f"{100 * precision[number]:.2f}",
                    "f1": f"{100 * f1[number]:.2f}",
                    "mistaken_for": mistaken,
                }
            )
        write_csv(folder / "per_class.csv", _PER_CLASS, rows)
        seen = sorted((row for row in rows if row["images"]), key=lambda row: float(row["accuracy"]))
        worst = [f"{row['class']} {row['accuracy']} %" for row in seen[:_WORST]]
        lines = [f"worst classes: {', '.join(worst)}"]
        written = ["per_class.csv"]
        shown = [names[index] for index in present]
        if len(present) <= _LARGEST:
            write_atomic(folder / "confusion.csv", _matrix_text(matrix, shown))
            _draw(folder / "confusion.png", matrix, shown)
            written += ["confusion.csv", "confusion.png"]
        else:
            lines.append(f"no confusion matrix: {len(present)} classes are more than {_LARGEST}")
        if per_image is not None:
            columns = list(dict.fromkeys([*(key for row in per_image for key in row), "error"]))
            write_csv(folder / "per_image.csv", columns, per_image)
            written.append("per_image.csv")
        return [*lines, f"report: {', '.join(written)} in {folder}"]


def _matrix_text(matrix: np.ndarray, names: Sequence[str]) -> str:
    """A row for every class, a column for every class that was predicted, of numbers of images."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["class / predicted", *names])
    writer.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))
    return buffer.getvalue()


def _draw(path: Path, matrix: np.ndarray, names: Sequence[str]) -> None:
    """The matrix with every row divided by its images."""
    count = len(names)
    side = 3.2 + 0.28 * min(count, _NAMED)
    figure = new_figure(figsize=(side + 0.8, side))
    axes = figure.subplots()
    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="% of the class's images", shrink=0.8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("class")
    if count <= _NAMED:
        labels = [name if len(name) <= 20 else f"{name[:17]}..." for name in names]
        axes.set_xticks(range(count), labels, rotation=90 if max(map(len, labels)) > 2 else 0, fontsize=8)
        axes.set_yticks(range(count), labels, fontsize=8)
        for tick in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            tick.set_parse_math(False)
    if count <= _NUMBERED:
        for (row, column), value in np.ndenumerate(matrix):
            if value:
                colour = "white" if shares[row, column] > 60 else "black"
                axes.text(column, row, str(value), ha="center", va="center", fontsize=7, color=colour)
    right = np.trace(matrix)
    axes.set_title(f"{right} of {matrix.sum()} images right; numbers are images", fontsize=9)
    save_figure(path, figure, _DPI)
