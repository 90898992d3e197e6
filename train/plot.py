"""curves.png: loss and accuracy over the epochs of a run."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from zoo.train.runs import write_atomic

__all__ = ["plot_curves"]


def plot_curves(path: str | Path, history: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw the loss and the accuracy of the epochs, as they stand in metrics.csv, and write them as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    panels = (
        (loss, "cross-entropy", (("train_loss", "training"), ("val_loss", "held out"), ("ema_loss", "held out, EMA"))),
        (accuracy, "accuracy (%)", (("top1", "top-1"), ("top5", "top-5"), ("ema_top1", "top-1, EMA"))),
    )
    for axes, label, series in panels:
        for key, name in series:
            points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker="o" if len(points) < 40 else None, markersize=3, label=name
                )
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.suptitle(title, fontsize=10)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(path, buffer.getvalue())
