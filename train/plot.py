"""Pictures of a run: figures without a display, and curves.png, the curves of its epochs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from zoo.train.runs import write_atomic

__all__ = ["Panel", "new_figure", "plot_curves", "save_figure"]


@dataclass(frozen=True)
class Panel:
    """One diagram of curves.png: the name of its axis, (column of metrics.csv, name) of its curves, and its limits."""

    label: str
    series: tuple[tuple[str, str], ...]
    limits: tuple[float, float] | None = None


def new_figure(**kwargs: Any) -> Any:
    """A figure of matplotlib's that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **kwargs)
    FigureCanvasAgg(figure)
    return figure


def save_figure(path: str | Path, figure: Any, dpi: int) -> None:
    """Write a figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_atomic(path, buffer.getvalue())


def plot_curves(
    path: str | Path, history: Sequence[Mapping[str, Any]], title: str, panels: Sequence[Panel], dpi: int = 120
) -> None:
    """Draw figures of the epochs, as they stand in metrics.csv, and write them as PNG."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(figsize=(9, 3.6))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for key, name in panel.series:
            points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
            if points:
                marker = "o" if len(points) < 40 else None
                axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(panel.label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        if panel.limits is not None:
            axes.set_ylim(*panel.limits)
    figure.suptitle(title, fontsize=10)
    save_figure(path, figure, dpi)
