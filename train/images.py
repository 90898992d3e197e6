"""Image files to 8-bit images: what Pillow reads, scaled by the range of its mode, or one reason why it cannot be read.

Images of more than 8 bits a pixel keep their most significant bits (`value >> 8` of 16), as Pillow, libpng and libtiff
do with 16-bit colours. 32-bit integers and floating-point numbers have no range of their own: it is that of the data
set (`find_ranges`), never of the single image, or the user's.
"""

import csv
import errno
import io
import os
import stat
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from zoo.train.runs import write_atomic

__all__ = [
    "BadImages",
    "ImageError",
    "PixelRanges",
    "convert_image",
    "find_ranges",
    "is_machine_trouble",
    "read_image",
    "readable_suffixes",
    "shown",
]

# They run another program (Ghostscript), or name the file's type and cannot decode it.
_REFUSED = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
_OTHER_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a fifo"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
# The machine's trouble, not the image's.
_MACHINE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
# Suffixes of files whose pixels have at most 16 bits, so that their range is known.
_KNOWN_RANGE = frozenset(
    (
        ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".avif", ".avifs", ".jp2",
        ".j2k", ".jpx", ".jpc", ".jpf", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".pcx", ".mpo", ".qoi",
    )
)  # fmt: skip
_USUAL = {"I": (255.0, 65535.0, 2.0**31 - 1, 2.0**32 - 1), "F": (1.0, 255.0, 65535.0)}
_SLACK = 1e-3  # of a range: what interpolation adds to floating-point pixels


class ImageError(Exception):
    """An image cannot be read: `reason` says why, `source` names it where it is known."""

    def __init__(self, reason: str, source: str = "") -> None:
        super().__init__(reason, source)  # both, so that it survives the way from a loader's worker
        self.reason, self.source = reason, source

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}" if self.source else self.reason


@dataclass(frozen=True)
class PixelRanges:
    """From which values to which the pixels go, by mode: "I;16" (all 16-bit images), "I" (32-bit), "F".

    With `clip` values outside are cut off; without it an image that has them is refused.
    """

    by_mode: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    clip: bool = False

    @classmethod
    def given(cls, low: float, high: float) -> "PixelRanges":
        """The user's range, for every image of more than 8 bits a pixel."""
        return cls({mode: (low, high) for mode in ("I;16", "I", "F")}, clip=True)

    def state(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        return {"by_mode": {k: list(v) for k, v in self.by_mode.items()}, "clip": self.clip}

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> "PixelRanges":
        if not state:
            return cls()
        return cls({k: (float(v[0]), float(v[1])) for k, v in state["by_mode"].items()}, bool(state["clip"]))


_DEFAULT = PixelRanges()


def shown(text: str | os.PathLike[str]) -> str:
    """A file's name as one line that every terminal and file takes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in os.fspath(text)
    )


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name in Image.OPEN and name not in _REFUSED)


@cache
def readable_suffixes() -> frozenset[str]:
    """The suffixes of the files that this Pillow decodes, lower case, with their dots."""
    known = set(_formats())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def _open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file that is one; a fifo or a device is not even opened, since that could wait for ever."""
    mode = os.stat(path).st_mode
    for test, name in _OTHER_KINDS:
        if test(mode):
            raise ImageError(f"{name}, not a file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageError("not a file")
    return open(descriptor, "rb")


def is_machine_trouble(error: BaseException) -> bool:
    """Whether an error tells of the machine (memory, open files) and not of the image."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _MACHINE)


def _why(error: Exception, head: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        if not head:
            return "an empty file"
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
            return "HTML or XML, not an image"
        if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
            return "a TIFF file whose bands or bits Pillow does not read; convert it to grey or colour images"
        return "no image format that Pillow reads"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels (a decompression bomb)"
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_image(
    source: str | os.PathLike[str] | IO[bytes], mode: str = "RGB", ranges: PixelRanges = _DEFAULT
) -> Image.Image:
    """Decode a file's first picture to 8 bits a channel.

    Args:
        source: a path, or an open binary file, which is closed.
        mode: "RGB" or "L" (grey).
        ranges: of pixels with more than 8 bits.

    Raises:
        ImageError: it cannot be read; MemoryError and an exhausted table of open files are raised as they are.
    """
    name = "" if hasattr(source, "read") else shown(os.fspath(source))
    head = b""
    try:
        with _open_regular(source) if name else source as file:  # type: ignore[arg-type, union-attr]
            head = file.read(64)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = Image.open(file, formats=_formats())
                image.load()
                return convert_image(image, mode, ranges)
    except ImageError as error:
        raise ImageError(error.reason, name) from None
    except Exception as error:  # decoders meet damaged bytes with exceptions of every kind
        if is_machine_trouble(error):
            raise
        raise ImageError(_why(error, head), name) from error


def convert_image(image: Image.Image, mode: str, ranges: PixelRanges = _DEFAULT) -> Image.Image:
    """An image of any mode of Pillow's as "RGB" or "L", 8 bits a channel; transparency is dropped.

    Raises:
        ImageError: its pixels are no numbers, or outside the range.
    """
    if mode not in ("RGB", "L"):
        raise ValueError(f"mode {mode!r} is neither RGB nor L")
    if min(image.size) < 1:
        raise ImageError("an image without pixels")
    if image.mode == mode:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = Image.fromarray(_to_8_bits(image, ranges))
        return grey if mode == "L" else grey.convert(mode)
    if image.mode in ("La", "RGBa"):  # colours multiplied by their opacity
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode == "LAB":
        image = image.convert("RGB")
    return image.convert(mode)


def _tag(image: Image.Image, number: int, default: int) -> int:
    """A TIFF tag's first value."""
    value = getattr(image, "tag_v2", {}).get(number, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _pixels(image: Image.Image) -> tuple[np.ndarray, str, int]:
    """The values of a 16-bit, 32-bit or floating-point image, the kind of their range, and their bits."""
    values = np.asarray(image)
    tiff = image.format == "TIFF"
    bits = _tag(image, 258, 16) if tiff else 16
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # PPM scales to 16 bits
        values = values.astype(np.int64)
        if tiff and _tag(image, 262, 1) == 0:  # white is zero, which Pillow inverts for 8 bits only
            values = (1 << bits) - 1 - values
        return values, "I;16", bits
    if image.mode == "I":
        if tiff and bits == 32 and _tag(image, 339, 1) == 1:  # unsigned numbers in Pillow's signed mode
            values = np.ascontiguousarray(values).view(np.uint32)
        return values.astype(np.int64), "I", 32
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError("pixels that are no numbers (NaN or infinite)")
    return values, "F", 32


def _to_8_bits(image: Image.Image, ranges: PixelRanges) -> np.ndarray:
    values, kind, bits = _pixels(image)
    standard = {"I;16": (0.0, float((1 << bits) - 1)), "I": (0.0, 65535.0), "F": (0.0, 1.0)}
    low, high = ranges.by_mode.get(kind, standard[kind])
    smallest, largest = float(values.min()), float(values.max())
    slack = _SLACK * (high - low) if kind == "F" else 0.0
    if not ranges.clip and (smallest < low - slack or largest > high + slack):
        raise ImageError(
            f"pixels from {smallest:g} to {largest:g}, outside the range {low:g} to {high:g}; "
            "set data.value_range=[low,high]"
        )
    values = values.clip(low, high)
    steps = int(high) + 1
    if kind != "F" and low == 0 and high == int(high) and steps >= 256 and steps & (steps - 1) == 0:
        return (values.astype(np.int64) >> (steps.bit_length() - 9)).astype(np.uint8)
    return np.rint((values - low) * (255.0 / (high - low))).astype(np.uint8)


def find_ranges(paths: Iterable[str]) -> tuple[PixelRanges, list[str]]:
    """The ranges of a data set's 32-bit and floating-point images: the smallest usual one that holds all their values.

    Reads those images once. Returns the ranges and lines that say what was found; both are empty where there are none.

    Raises:
        ImageError: values below 0 or above every usual range, which only the user can interpret.
    """
    found: dict[str, tuple[float, float]] = {}
    for path in paths:
        if os.path.splitext(path)[1].lower() in _KNOWN_RANGE:
            continue
        try:
            with _open_regular(path) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = Image.open(file, formats=_formats())
                if image.mode not in ("I", "F"):
                    continue
                image.load()
                values, kind, _ = _pixels(image)
        except Exception as error:  # it is named when it is read
            if is_machine_trouble(error):
                raise
            continue
        low, high = found.get(kind, (0.0, 0.0))
        found[kind] = min(low, float(values.min())), max(high, float(values.max()))
        if found[kind][0] < 0 or (kind != "I;16" and found[kind][1] > _USUAL[kind][-1]):
            raise ImageError(
                f"pixels from {found[kind][0]:g} to {found[kind][1]:g}, whose range nothing says; "
                "set data.value_range=[low,high]",
                shown(path),
            )
    chosen, notes = {}, []
    for kind in ("I", "F"):
        if kind in found:
            largest = found[kind][1]
            high = next(h for h in _USUAL[kind] if largest <= h * (1 + (_SLACK if kind == "F" else 0)))
            chosen[kind] = (0.0, high)
            name = "32-bit integer" if kind == "I" else "floating-point"
            notes.append(
                f"{name} images are read as 0 (black) to {high:.10g} (white), their largest pixel being "
                f"{largest:.10g}; data.value_range=[low,high] sets another range"
            )
    return PixelRanges(chosen), notes


class BadImages:
    """The unreadable images of a run, each once: split and name, and the reason."""

    FIELDS = ("split", "image", "reason")

    def __init__(self, rows: Iterable[tuple[str, str, str]] = ()) -> None:
        self.rows: dict[tuple[str, str], str] = {}
        self.merge(rows)

    def merge(self, rows: Iterable[tuple[str, str, str]]) -> None:
        for split, name, reason in rows:
            self.rows.setdefault((split, name), reason)

    def count(self, split: str) -> int:
        return sum(1 for key in self.rows if key[0] == split)

    def listed(self) -> list[tuple[str, str, str]]:
        """Sorted, so that the file does not depend on who found which image first."""
        return sorted((split, name, reason) for (split, name), reason in self.rows.items())

    def first(self, split: str) -> str:
        """The first one, as `name: reason`."""
        return next((f"{name}: {reason}" for part, name, reason in self.listed() if part == split), "none")

    @classmethod
    def read(cls, path: Path) -> "BadImages":
        """What an earlier start of the run has found; nothing where the file is missing or is another one."""
        try:
            with open(path, newline="", encoding="utf-8") as file:
                return cls((r["split"], r["image"], r["reason"]) for r in csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError):
            return cls()

    def forget_mended(self, base: Path) -> None:
        """Drop the images below `base` that can be read by now."""
        for split, name in list(self.rows):
            try:
                read_image(base / name)
            except ImageError as error:
                if "data.value_range" not in error.reason:
                    continue
            del self.rows[split, name]

    def write(self, path: Path) -> None:
        """Write the list; no file where it is empty."""
        if not self.rows:
            return
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.FIELDS)
        writer.writerows(self.listed())
        write_atomic(path, buffer.getvalue())
