"""Folders of images: the folders below a split are its classes, whatever lies below them belongs to them."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from zoo.errors import UserError
from zoo.train.images import readable_suffixes, shown

__all__ = ["FolderReader", "images_below", "is_ignored", "is_image_file"]

# What operating systems, file servers and editors leave in folders; names that begin with a dot are left out as well.
_SYSTEM = frozenset(
    name.casefold()
    for name in (
        "@eaDir", "@tmp", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "$RECYCLE.BIN", "RECYCLER",
        "__MACOSX", "__pycache__", "lost+found", "System Volume Information", "Network Trash Folder",
        "Temporary Items", "Thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "Icon\r", "~snapshot",
    )
)  # fmt: skip


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden, or one that systems leave."""
    return name.startswith(".") or name.casefold() in _SYSTEM


def is_image_file(path: str) -> bool:
    """Whether a file is an image by its name, and none that a system has left."""
    name = os.path.basename(path)
    return not is_ignored(name) and _is_image(name)


def _natural(name: str) -> list[str | int]:
    """timm's natural order: numbers by value."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def _few(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown(n) for n in names[:limit]) + more


@dataclass
class _Found:
    """What a walk leaves out, besides the images that it finds."""

    ignored: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # files by suffix

    def notes(self, folder: Path) -> list[str]:
        lines = []
        if self.ignored:
            names = sorted(set(self.ignored), key=_natural)
            total = len(self.ignored)
            what = "entry" if total == 1 else "entries"
            lines.append(f"{shown(folder)}: ignored {total} hidden or system {what} ({_few(names)})")
        if self.skipped:
            kinds = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in self.skipped.most_common())
            total = sum(self.skipped.values())
            what = "file that is no image" if total == 1 else "files that are no images"
            lines.append(f"{shown(folder)}: skipped {total} {what} Pillow reads ({kinds})")
        return lines


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"cannot list the folder {shown(folder)}: {error.strerror}; mend its permissions") from error


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in readable_suffixes()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _walk(folder: str, found: _Found, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """The images below a folder; links are followed, but not back to a folder that they are in."""
    entries = _entries(folder)
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in entries:
        if is_ignored(entry.name):
            found.ignored.append(entry.name)
        elif _is_folder(entry):
            inside = list(_walk(entry.path, found, (*above, here)))
            if not inside and _is_image(entry.name):
                inside = [entry.path]  # it is called an image, so that it is named where it is read
            yield from inside
        elif _is_image(entry.name):
            yield entry.path
        else:
            found.skipped[os.path.splitext(entry.name)[1].lower()] += 1


def images_below(folder: str | Path) -> tuple[list[str], list[str]]:
    """The images of a folder and of the folders in it, in natural order, and lines that say what was left out.

    Raises:
        UserError: there are none, or the folder cannot be listed.
    """
    found = _Found()
    paths = sorted(_walk(str(folder), found), key=lambda p: (_natural(p), p))
    notes = found.notes(Path(folder))
    if not paths:
        raise UserError(f"no images under {shown(folder)}{f' ({chr(59).join(notes)})' if notes else ''}")
    return paths, notes


class FolderReader:
    """The images of a split with their classes, in timm's order; what timm's dataset calls a reader.

    Args:
        folder: the split's folder, which holds one folder per class.
        base: what the names of images are relative to.
        class_map: class name -> index, where the classes are already numbered.
        complete: every class folder must hold an image.
        known_as: whose classes `class_map` are, for messages.

    Raises:
        UserError: images beside the class folders, no images, empty classes, or classes that `class_map` lacks.
    """

    def __init__(
        self,
        folder: Path,
        base: Path,
        class_map: Mapping[str, int] | None = None,
        complete: bool = True,
        known_as: str = "the training images",
    ) -> None:
        self.folder, self.base = folder, base
        found = _Found()
        by_class = self._scan(found)
        if not any(by_class.values()):
            skipped = f" ({'; '.join(found.notes(folder))})" if found.skipped or found.ignored else ""
            raise UserError(f"no images under {shown(folder)}{skipped}; it must hold one folder of images per class")
        empty = sorted((name for name, paths in by_class.items() if not paths), key=_natural)
        if empty and complete:
            raise UserError(
                f"{shown(folder)} has class folders without images: {_few(empty)}; fill them, or remove them"
            )
        if class_map is None:
            names = sorted(by_class, key=lambda n: (_natural(n), n))
            self.class_to_idx = {name: index for index, name in enumerate(names)}
        else:
            unknown = sorted((n for n in by_class if n not in class_map), key=_natural)
            if unknown:
                missing = sorted((n for n in class_map if n not in by_class), key=_natural)
                hint = f" (which have {_few(missing)})" if missing else ""
                raise UserError(
                    f"{shown(folder)} has classes that {known_as} lack: {_few(unknown)}{hint}; "
                    "rename them as there, or remove them"
                )
            self.class_to_idx = dict(class_map)
        samples = [(path, self.class_to_idx[name]) for name, paths in by_class.items() for path in paths]
        self.samples = sorted(samples, key=lambda s: (_natural(s[0]), s[0]))
        self.notes = found.notes(folder)
        if empty:
            self.notes.append(f"{shown(folder)}: no images in the class folders {_few(empty)}")

    def _scan(self, found: _Found) -> dict[str, list[str]]:
        """The images of every class folder."""
        by_class: dict[str, list[str]] = {}
        stray = []
        for entry in _entries(str(self.folder)):
            if is_ignored(entry.name):
                found.ignored.append(entry.name)
            elif _is_folder(entry):
                by_class[entry.name] = list(_walk(entry.path, found))
            elif _is_image(entry.name):
                stray.append(entry.name)
            else:
                found.skipped[os.path.splitext(entry.name)[1].lower()] += 1
        if stray and not by_class:
            raise UserError(
                f"{shown(self.folder)} holds {len(stray)} images ({_few(stray, 3)}) and no class folders; "
                f"move the images of each class into a folder of its own, {shown(self.folder)}/CLASS/"
            )
        if stray:
            raise UserError(
                f"{len(stray)} images lie beside the class folders of {shown(self.folder)} ({_few(stray, 3)}); "
                "move each into the folder of its class, or away"
            )
        return by_class

    def inner_folders(self) -> list[str]:
        """The folders inside the class folders, which may be what was meant as the classes."""
        return sorted(
            {e.name for name in self.class_to_idx for e in _entries(str(self.folder / name))
             if _is_folder(e) and not is_ignored(e.name)}, key=_natural,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str | IO[bytes], int]:
        return self.samples[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The image's path, relative to the base unless `absolute`."""
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.base)
