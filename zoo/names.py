"""The names of this package's models, for commands that answer before PyTorch is imported."""

import difflib
from collections.abc import Iterable

from ._names import NAMES

__all__ = ["NAMES", "nearest_names"]


def nearest_names(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates that are spelt most like a name."""
    return difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.4)
