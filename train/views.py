"""What stands over a data set and changes its samples."""

from typing import Any

__all__ = ["View"]


class View:
    """The first base of a data set that is made from another one: of the same length, with its other attributes."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)
