"""What data say of themselves: class names, sizes, which images; compared by name, never by position alone."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from zoo.errors import UserError
from zoo.train.config import DataConfig
from zoo.train.folders import FolderReader
from zoo.train.images import PixelRanges, shown
from zoo.train.views import View

__all__ = ["check_same_data", "class_count", "data_notes", "describe_data", "label_names", "match_labels"]


def data_notes(dataset: Any) -> list[str]:
    """What the user should be told once about a data set: what was left out, and how pixels are read."""
    return list(getattr(dataset, "notes", ()))


def _classes(dataset: Any) -> Any:
    """A list of names, a mapping from names to indices, or None."""
    return getattr(dataset, "classes", None) or getattr(getattr(dataset, "reader", None), "class_to_idx", None)


def label_names(dataset: Any) -> list[str] | None:
    """The names of a data set's classes, in the order of their indices; None where it does not say them."""
    found = _classes(dataset)
    if not found:
        return None
    if not isinstance(found, Mapping):
        return [str(name) for name in found]
    if sorted(found.values()) != list(range(len(found))):
        return None
    return [str(name) for name in sorted(found, key=lambda n: found[n])]


class _Relabelled(View, Dataset[tuple[Any, int]]):
    """A data set whose classes carry the indices of another one."""

    def __init__(self, dataset: Any, index: Sequence[int], names: Sequence[str]) -> None:
        super().__init__(dataset)
        self.index, self.classes = list(index), list(names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.dataset[index]
        return image, self.index[int(target)]


class _RelabelledStream(View, IterableDataset[Any]):
    def __init__(self, dataset: Any, index: Sequence[int], names: Sequence[str]) -> None:
        super().__init__(dataset)
        self.index, self.classes = list(index), list(names)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for image, target in self.dataset:
            yield image, self.index[int(target)]


def match_labels(dataset: Any, names: Sequence[str], known_as: str) -> Any:
    """The data set with its classes numbered as in `names`, matched by name; as it is where it says no names.

    Raises:
        UserError: it has a class that `names` lack.
    """
    own = label_names(dataset)
    if own is None or own == list(names):
        return dataset
    unknown = [name for name in own if name not in names]
    if unknown:
        missing = [name for name in names if name not in own]
        hint = f" (which have {', '.join(map(shown, missing[:5]))})" if missing else ""
        raise UserError(
            f"the data have classes that {known_as} lack: {', '.join(map(shown, unknown[:5]))}{hint}; "
            "rename them as there, or remove them"
        )
    number = {name: index for index, name in enumerate(names)}
    kind = _RelabelledStream if isinstance(dataset, IterableDataset) else _Relabelled
    return kind(dataset, [number[name] for name in own], names)


def class_count(cfg: DataConfig, dataset: Any) -> int | None:
    """How many classes the data have: what they say themselves, checked against data.num_classes; None if neither says.

    Raises:
        UserError: data.num_classes is smaller than what the data say.
    """
    found = _classes(dataset)
    count = len(found) if found else None
    if cfg.num_classes is None:
        return count
    if count is not None and count > cfg.num_classes:
        raise UserError(
            f"data.num_classes={cfg.num_classes}, but {cfg.name} has {count} classes; set it to {count} or more"
        )
    return cfg.num_classes


def _size(dataset: Any) -> int | None:
    """The number of images; a stream's own length is rounded to the number of workers."""
    if isinstance(dataset, IterableDataset):
        found = getattr(getattr(dataset, "reader", None), "num_samples", None)
        return None if found is None else int(found)
    return len(dataset)


def _fingerprint(dataset: Any) -> str | None:
    """A hash of the names and classes of a folder's images, in their order."""
    reader = getattr(dataset, "reader", None)
    if not isinstance(reader, FolderReader):
        return None
    digest = hashlib.sha256()
    start = len(str(reader.folder)) + 1
    for path, target in reader.samples:
        digest.update(f"{path[start:]}\0{target}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def describe_data(training: Any, held_out: Any) -> dict[str, Any]:
    """What a checkpoint says of its data: class names, sizes, which images, the ranges of their pixels."""
    ranges = getattr(training, "ranges", None)
    return {
        "label_names": label_names(training),
        "data_set": {
            "training": {"images": _size(training), "fingerprint": _fingerprint(training)},
            "held-out": {"images": _size(held_out), "fingerprint": _fingerprint(held_out)},
            "ranges": ranges.state() if isinstance(ranges, PixelRanges) else None,
        },
    }


def check_same_data(state: Mapping[str, Any], now: Mapping[str, Any], source: str | Path) -> None:
    """Compare the data that a checkpoint was made with and those at hand.

    Raises:
        UserError: a class has another name or number, or there are other images.
    """
    names, own = state.get("label_names"), now["label_names"]
    if names is not None and own is not None and list(names) != list(own):
        gone, new = [n for n in names if n not in own], [n for n in own if n not in names]
        parts = [f"{what} {', '.join(map(shown, found[:5]))}"
                 for what, found in (("without", gone), ("with the new", new)) if found]  # fmt: skip
        detail = " and ".join(parts) or "in another order"
        raise UserError(
            f"{source} was trained on other classes: the data are now {detail}; restore the class folders, or start "
            "a new run"
        )
    before = state.get("data_set")
    if before is None:  # written before checkpoints named their data
        return
    for split in ("training", "held-out"):
        a, b = before[split], now["data_set"][split]
        if a["images"] is not None and b["images"] is not None and a["images"] != b["images"]:
            raise UserError(
                f"{source} was made with {a['images']} {split} images and there are {b['images']} now; restore them, "
                "or start a new run"
            )
        if a["fingerprint"] and b["fingerprint"] and a["fingerprint"] != b["fingerprint"]:
            raise UserError(
                f"{source} was made with other {split} images: as many, but under other names or in other classes; "
                "restore them, or start a new run"
            )
