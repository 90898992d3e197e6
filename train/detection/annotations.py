"""COCO's annotations made whole: what is missing is derived, and what cannot be is named by its file and id."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycocotools import mask as rle

from zoo.errors import UserError

__all__ = ["Annotations", "arrange", "categories", "complete", "number_anew"]

_SLACK = 1.0  # pixels that a box may reach out of its image, as COCO's own do, before it is cut


@dataclass
class Annotations:
    """The annotations of a split."""

    file: Path
    content: dict[str, Any]
    changed: bool = False  # the content is no longer that of the file
    notes: list[str] = field(default_factory=list)  # what the user should be told


def _whole(value: Any) -> int | None:
    """An id as a whole number; None where it is none."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _finite(values: Any) -> bool:
    """Whether a list holds finite numbers alone."""
    if not isinstance(values, list | tuple) or any(isinstance(v, bool | str) for v in values[:8]):
        return False
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _size(value: Any) -> int | None:
    """A side of an image in pixels; None where it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if math.isfinite(number) and number >= 1 and not isinstance(value, bool) else None


def _objects(content: Mapping[str, Any], key: str, file: Path) -> list[dict[str, Any]]:
    for position, entry in enumerate(content[key], 1):
        if not isinstance(entry, dict):
            raise UserError(
                f"{file}: entry {position} of {key} is {str(entry)[:40]!r}, no object; correct or remove it"
            )
    return list(content[key])


def categories(content: Mapping[str, Any], file: Path) -> dict[int, str]:
    """Id -> name, sorted by id.

    Raises:
        UserError: a category has no id or no name, two have one id, or two have one name.
    """
    found: dict[int, str] = {}
    for entry in _objects(content, "categories", file):
        number, name = _whole(entry.get("id")), entry.get("name")
        if number is None or not isinstance(name, str) or not name.strip():
            raise UserError(
                f"{file}: the category with id {entry.get('id')!r} and name {name!r} needs a whole number and a name"
            )
        if found.get(number, name) != name:
            raise UserError(f"{file}: the category id {number} is both {found[number]!r} and {name!r}; keep one")
        others = [i for i, n in found.items() if n == name and i != number]
        if others:
            raise UserError(
                f"{file}: the category {name!r} has the ids {others[0]} and {number}; which one is meant is not clear"
            )
        found[number] = name
    return dict(sorted(found.items()))


def arrange(found: Annotations, classes: Sequence[str]) -> None:
    """List the categories in the order of `classes`, which hold all their names; one without objects is added.

    mmdet numbers classes by their order in the file, and both splits must agree in it.
    """
    by_name = {entry["name"]: {**entry, "id": _whole(entry["id"])} for entry in found.content["categories"]}
    free = max(entry["id"] for entry in by_name.values()) + 1
    listed = []
    for name in classes:
        if name not in by_name:
            by_name[name], free = {"id": free, "name": name}, free + 1
        listed.append(by_name[name])
    if found.content["categories"] != listed:
        found.content = {**found.content, "categories": listed}
        found.changed = True


def complete(found: Annotations, measure: Callable[[str], tuple[int, int] | None], masks: bool, exact: bool) -> None:
    """Derive what is missing: sizes, boxes, areas, crowd flags, ids.

    Args:
        found: the annotations, which are changed.
        measure: height and width of an image by its file_name; None where it cannot be read.
        masks: the detector predicts masks, so that every object needs one.
        exact: boxes count as they stand, as in an evaluation, where mmdet does not cut or skip them by itself.

    Raises:
        UserError: something is missing, no number, or contradictory, and follows from nothing else.
    """
    file = found.file
    known = categories(found.content, file)
    images = _images(found)
    entries = _objects(found.content, "annotations", file)
    _sizes(found, images, entries, measure)
    kept: list[dict[str, Any]] = []
    strange: set[Any] = set()
    orphans: list[str] = []
    empty: list[str] = []
    cut: list[str] = []
    for position, entry in enumerate(entries, 1):
        name = str(entry["id"]) if entry.get("id") is not None else f"number {position}"
        mended = _Entry(file, name, dict(entry))
        image = images.get(mended.whole("image_id"))
        if image is None:
            orphans.append(name)
            continue
        if mended.whole("category_id") not in known:
            strange.add(mended.entry["category_id"])
            continue
        mended.crowd()
        mended.segmentation(image)
        if not mended.box(image, cut):
            empty.append(name)
            continue
        mended.area(image)
        if masks:
            mended.mask()
        found.changed |= mended.changed
        kept.append(mended.entry)
    if strange:
        raise UserError(
            f"{file} has annotations of categories {sorted(strange)[:5]}, which its categories do not list; "
            "add the categories, or remove the annotations"
        )
    if not any(not entry["iscrowd"] for entry in kept):
        raise UserError(
            f"{file} is empty: {len(images)} images, {len(entries)} annotations, of which {len(kept)} can be used"
        )
    found.changed |= bool(cut or empty) and exact
    for what, names in (
        ("belong to no image of the file and are left out", orphans),
        ("have a box of no area inside their image and are left out", empty),
        ("have a box that reaches out of its image and is cut", cut),
    ):
        if names:
            found.notes.append(f"{file}: {len(names)} annotations {what}, the first is annotation {names[0]}")
    found.changed |= number_anew(kept)
    found.content = {**found.content, "images": list(images.values()), "annotations": kept}


def number_anew(entries: Sequence[dict[str, Any]]) -> bool:
    """Number annotations from 1 where an id is missing, below 1 (evaluation takes 0 for none) or there twice."""
    numbers = [entry.get("id") for entry in entries]
    if all(type(n) is int and n > 0 for n in numbers) and len(set(numbers)) == len(numbers):
        return False
    for number, entry in enumerate(entries, 1):
        entry["id"] = number
    return True


def _images(found: Annotations) -> dict[Any, dict[str, Any]]:
    """The images by id."""
    images: dict[Any, dict[str, Any]] = {}
    for entry in _objects(found.content, "images", found.file):
        number, name = _whole(entry.get("id")), entry.get("file_name")
        if not isinstance(name, str) or not name:
            raise UserError(f"{found.file}: image {entry.get('id')!r} has the file_name {name!r}; name its file")
        if number is None:
            raise UserError(
                f"{found.file}: image {name!r} has the id {entry.get('id')!r}; give it a whole number, which its "
                "annotations have as image_id"
            )
        if number in images:
            if images[number]["file_name"] != name:
                raise UserError(
                    f"{found.file}: the image id {number} is both {images[number]['file_name']!r} and {name!r}; "
                    "number the images anew"
                )
            found.changed = True
            continue
        found.changed |= type(entry["id"]) is not int
        images[number] = {**entry, "id": number}
    return images


def _sizes(
    found: Annotations,
    images: Mapping[Any, dict[str, Any]],
    entries: Sequence[Mapping[str, Any]],
    measure: Callable[[str], tuple[int, int] | None],
) -> None:
    """Heights and widths, measured where they are missing; those of an unreadable image hold its boxes."""
    for number, image in images.items():
        size = _size(image.get("height")), _size(image.get("width"))
        if None in size:
            measured = measure(image["file_name"])
            if measured is None:
                boxes = [e["bbox"] for e in entries if _whole(e.get("image_id")) == number and _is_box(e.get("bbox"))]
                measured = (
                    math.ceil(max([1, *(b[1] + b[3] for b in boxes)])),
                    math.ceil(max([1, *(b[0] + b[2] for b in boxes)])),
                )
            size = measured
        if (image.get("height"), image.get("width")) != size or isinstance(image["height"], float):
            found.changed = True
            image["height"], image["width"] = size


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and _finite(box) and min(box[2:]) >= 0


class _Entry:
    """One annotation on its way to being whole."""

    def __init__(self, file: Path, name: str, entry: dict[str, Any]) -> None:
        self.file, self.name, self.entry = file, name, entry
        self.changed = False

    def _fault(self, text: str) -> UserError:
        return UserError(f"{self.file}: annotation {self.name} {text}")

    def _set(self, key: str, value: Any) -> None:
        self.entry[key] = value
        self.changed = True

    def whole(self, key: str) -> int:
        value = self.entry.get(key)
        number = _whole(value)
        if number is None:
            raise self._fault(f"has the {key} {value!r}; give it a whole number, or remove the annotation")
        if type(value) is not int:
            self._set(key, number)
        return number

    def crowd(self) -> None:
        value = self.entry.get("iscrowd")
        if type(value) is int and value in (0, 1):
            return
        known: dict[Any, int] = {None: 0, False: 0, True: 1, "0": 0, "1": 1, "": 0}
        if isinstance(value, list | dict) or value not in known:
            raise self._fault(f"has iscrowd {value!r}; give 0 or 1")
        self._set("iscrowd", known[value])

    def segmentation(self, image: Mapping[str, Any]) -> None:
        """Check the mask, and drop an empty one."""
        found = self.entry.get("segmentation")
        if isinstance(found, list) and found and all(isinstance(part, list) for part in found):
            for part in found:
                if not _finite(part):
                    raise self._fault("has a polygon with values that are no finite numbers; correct or remove it")
            if any(found):
                return
        elif isinstance(found, dict):
            size, counts = found.get("size"), found.get("counts")
            if isinstance(counts, str) and counts or isinstance(counts, list) and counts and _finite(counts):
                if size == [image["height"], image["width"]]:
                    return
                raise self._fault(
                    f"has a mask of size {size} in an image of {[image['height'], image['width']]}; correct one"
                )
            raise self._fault("has a mask without counts; correct or remove it")
        elif found:
            raise self._fault(f"has the segmentation {str(found)[:40]!r}; give polygons or a run-length code, or none")
        if "segmentation" in self.entry:
            del self.entry["segmentation"]
            self.changed = True

    def _code(self, image: Mapping[str, Any]) -> Any:
        """The mask as a run-length code; None where there is none."""
        found, size = self.entry.get("segmentation"), (image["height"], image["width"])
        if found is None:
            return None
        if isinstance(found, list):
            parts = [part for part in found if len(part) >= 6 and len(part) % 2 == 0]
            return rle.merge(rle.frPyObjects(parts, *size)) if parts else None
        return rle.frPyObjects(found, *size) if isinstance(found["counts"], list) else found

    def box(self, image: Mapping[str, Any], cut: list[str]) -> bool:
        """Derive or cut the box; whether something of it is in the image."""
        given: Any = self.entry.get("bbox")
        width, height = image["width"], image["height"]
        if not _is_box(given):
            code = self._code(image)
            if code is None:
                raise self._fault(
                    f"has the bbox {given!r}; a box is [x, y, width, height] of finite numbers, none of its sides "
                    "negative; correct or remove the annotation"
                )
            self._set("bbox", [float(v) for v in rle.toBbox(code)])
        elif not _overlap(given, width, height):
            code = self._code(image)
            if code is None or not rle.area(code):
                return False
            self._set("bbox", [float(v) for v in rle.toBbox(code)])
        x, y, w, h = self.entry["bbox"]
        if not _overlap((x, y, w, h), width, height):
            return False
        if min(x, y) < -_SLACK or x + w > width + _SLACK or y + h > height + _SLACK:
            left, top = max(x, 0), max(y, 0)
            self.entry["bbox"] = [left, top, min(x + w, width) - left, min(y + h, height) - top]
            if self.entry.get("area") == w * h:
                self.entry["area"] = self.entry["bbox"][2] * self.entry["bbox"][3]
            cut.append(self.name)
        return True

    def area(self, image: Mapping[str, Any]) -> None:
        value = self.entry.get("area")
        if isinstance(value, int | float) and not isinstance(value, bool) and _finite([value]) and value > 0:
            return
        code = self._code(image)
        found = float(rle.area(code)) if code is not None else 0.0
        self._set("area", found or float(self.entry["bbox"][2] * self.entry["bbox"][3]))

    def mask(self) -> None:
        """Require a mask; of a crowd, which is only ignored, the box will do."""
        if self.entry.get("segmentation"):
            return
        if not self.entry["iscrowd"]:
            raise self._fault(
                "has no segmentation, from which this detector learns masks; give one, or choose a detector of boxes "
                "such as detector=faster_rcnn"
            )
        x, y, w, h = self.entry["bbox"]
        self._set("segmentation", [[x, y, x + w, y, x + w, y + h, x, y + h]])


def _overlap(box: Sequence[float], width: int, height: int) -> bool:
    x, y, w, h = box
    return min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
