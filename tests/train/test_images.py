"""The decoder: every mode of Pillow's gives the numbers of its 8-bit twin, and what cannot be read says why."""

import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.train.images import (
    BadImages,
    ImageError,
    PixelRanges,
    convert_image,
    find_ranges,
    read_image,
    readable_suffixes,
    shown,
)

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.stack([GREY, GREY[::-1], GREY.T], axis=-1)
WIDE = GREY.astype(np.uint16) * 257


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def twin(array: np.ndarray, mode: str) -> np.ndarray:
    return pixels(Image.fromarray(array).convert(mode))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(array: np.ndarray, colour_type: int, *extra: bytes) -> bytes:
    """A PNG file of 16-bit samples."""
    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(data: bytes, bits: int, *, photometric: int = 1, samples: int = 1, sample_format: int = 1) -> bytes:
    """An uncompressed little-endian TIFF file of 16 x 16 pixels."""
    tags = {256: 16, 257: 16, 259: 1, 262: photometric, 277: samples, 278: 16, 279: len(data), 339: sample_format}
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    several = struct.pack(f"<{samples}H", *[bits] * samples) if samples > 2 else b""
    tags |= {258: start if several else bits, 273: start + len(several)}
    entries = b"".join(
        struct.pack("<HHII", tag, 3 if tag not in (273, 279) else 4, samples if tag == 258 else 1, value)
        for tag, value in sorted(tags.items())
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + several + data


def pack_12_bits(values: np.ndarray) -> bytes:
    pairs = values.reshape(-1, 2).astype(int)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)


FILES: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "grey16.png": (lambda: png(WIDE, 0), GREY),
    "grey16-alpha.png": (lambda: png(np.stack([WIDE, np.full_like(WIDE, 9)], -1), 4), GREY),
    "colour16.png": (lambda: png(COLOUR.astype(np.uint16) * 257, 2), COLOUR),
    "colour16-low-bits.png": (lambda: png(COLOUR.astype(np.uint16) * 256 + 17, 2), COLOUR),
    "grey16-low-bits.png": (lambda: png(GREY.astype(np.uint16) * 256 + 200, 0), GREY),
    "grey16.tif": (lambda: tiff(WIDE.astype("<u2").tobytes(), 16), GREY),
    "colour16.tif": (lambda: tiff((COLOUR.astype("<u2") * 257).tobytes(), 16, photometric=2, samples=3), COLOUR),
    "white-is-zero.tif": (lambda: tiff((65535 - WIDE).astype("<u2").tobytes(), 16, photometric=0), GREY),
    "grey12.tif": (lambda: tiff(pack_12_bits(GREY.astype(int) << 4 | GREY >> 4), 12), GREY),
    "grey10.pgm": (lambda: b"P5 16 16 1023\n" + np.rint(GREY / 255 * 1023).astype(">u2").tobytes(), GREY),
    "grey16.pgm": (lambda: b"P5 16 16 65535\n" + WIDE.astype(">u2").tobytes(), GREY),
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", FILES)
def test_more_than_8_bits(tmp_path: Path, name: str, mode: str) -> None:
    content, expected = FILES[name]
    (tmp_path / name).write_bytes(content())
    assert find_ranges([str(tmp_path / name)]) == (PixelRanges(), [])
    found = read_image(tmp_path / name, mode)
    assert found.mode == mode
    assert (pixels(found) == twin(expected, mode)).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("suffix", ["png", "tif", "jp2"])
def test_16_bits_as_pillow_writes_them(tmp_path: Path, suffix: str, mode: str) -> None:
    for name, image in (
        ("little", Image.fromarray(WIDE)),
        ("big", Image.frombytes("I;16B", (16, 16), WIDE.astype(">u2").tobytes())),
    ):
        assert (pixels(convert_image(image, mode)) == twin(GREY, mode)).all()
        path = tmp_path / f"{name}.{suffix}"
        image.save(path)
        assert (pixels(read_image(path, mode)) == twin(GREY, mode)).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", ["LA", "La", "RGBA", "RGBa", "RGBX", "CMYK", "1"])
def test_modes_of_8_bits(kind: str, mode: str) -> None:
    source = GREY if kind in ("LA", "La", "1") else COLOUR
    image = Image.fromarray(source)
    image = image.convert("LA" if kind == "La" else "RGBA" if kind == "RGBa" else kind)
    if kind in ("La", "RGBa"):
        image = image.convert(kind)
    expected = np.asarray(Image.fromarray(GREY).convert("1")).astype(np.uint8) * 255 if kind == "1" else source
    assert (pixels(convert_image(image, mode)) == twin(expected, mode)).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("kind", "error"), [("YCbCr", 3), ("HSV", 5), ("LAB", 40)])
def test_other_colour_spaces(kind: str, error: int, mode: str) -> None:
    """Within what the colour space itself can hold."""
    assert abs(pixels(convert_image(Image.fromarray(COLOUR).convert(kind), mode)) - twin(COLOUR, mode)).max() <= error


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("transparency", [None, 3, bytes(range(16))], ids=["opaque", "index", "bytes"])
def test_palettes(tmp_path: Path, transparency: int | bytes | None, mode: str) -> None:
    image = Image.fromarray(COLOUR).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    image.save(tmp_path / "x.png", **({} if transparency is None else {"transparency": transparency}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (pixels(read_image(tmp_path / "x.png", mode)) == twin(expected, mode)).all()
        assert (pixels(convert_image(image.convert("PA"), mode)) == twin(expected, mode)).all()


@pytest.mark.parametrize(
    ("array", "high"),
    [
        (GREY.astype(np.float32) / 255, 1),
        (GREY.astype(np.float32), 255),
        (WIDE.astype(np.float32), 65535),
        (GREY.astype(np.int32), 255),
        (WIDE.astype(np.int32), 65535),
        ((GREY.astype(np.int64) << 23 | 1).astype(np.int32), 2**31 - 1),
    ],
    ids=["F-1", "F-255", "F-65535", "I-255", "I-65535", "I-31bit"],
)
def test_ranges_are_those_of_the_data_set(tmp_path: Path, array: np.ndarray, high: int) -> None:
    """A dark image is read in the range of its brighter neighbours."""
    dark = (array // 8).astype(array.dtype) if array.dtype != np.float32 else (array / 8).astype(np.float32)
    paths = [str(tmp_path / "bright.tif"), str(tmp_path / "dark.tif")]
    for path, values in zip(paths, (array, dark), strict=True):
        Image.fromarray(values).save(path)
    ranges, notes = find_ranges(paths)
    assert f"0 (black) to {high} (white)" in notes[0]
    assert (pixels(read_image(paths[0], "L", ranges)) == GREY).all()
    assert abs(pixels(read_image(paths[1], "RGB", ranges))[..., 0] - GREY / 8).max() <= 1
    assert PixelRanges.from_state(ranges.state()) == ranges


def test_unsigned_32_bits(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    path.write_bytes(tiff((GREY.astype("<u4") * 16843009).tobytes(), 32))
    ranges, _ = find_ranges([str(path)])
    assert (pixels(read_image(path, "L", ranges)) == GREY).all()


def test_a_range_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    values = GREY.astype(np.float32) * 4 - 100  # such as a CT's Hounsfield units
    Image.fromarray(values).save(path)
    with pytest.raises(ImageError, match=r"-100 to 920.*data\.value_range"):
        find_ranges([str(path)])
    with pytest.raises(ImageError, match=r"outside the range 0 to 1.*data\.value_range"):
        read_image(path)
    assert (pixels(read_image(path, "L", PixelRanges.given(-100, 920))) == GREY).all()
    clipped = pixels(read_image(path, "L", PixelRanges.given(0, 100)))
    assert clipped.min() == 0
    assert clipped.max() == 255
    Image.fromarray(GREY.astype(np.uint16) * 16).save(tmp_path / "x.png")  # 12 bits in a 16-bit file
    assert (pixels(read_image(tmp_path / "x.png", "L", PixelRanges.given(0, 4095))) == GREY).all()


def test_pixels_that_are_no_numbers(tmp_path: Path) -> None:
    for value in (np.nan, np.inf):
        Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "x.tif")
        with pytest.raises(ImageError, match="no numbers"):
            read_image(tmp_path / "x.tif")


def _damaged(folder: Path) -> dict[str, str]:
    """Files that are no readable images, and a word of the reason."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("jpg", "png", "webp", "gif", "bmp", "tif"):
        Image.fromarray(noise).save(folder / f"whole.{suffix}")
        data = (folder / f"whole.{suffix}").read_bytes()
        (folder / f"truncated.{suffix}").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("\n<!DOCTYPE html><html>404</html>")
    (folder / "words.png").write_text("not found")
    (folder / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 80_000_000))
    (folder / "text.png").write_bytes(png(WIDE, 0, text))
    bomb = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    os.mkfifo(folder / "fifo.png")
    (folder / "folder.png").mkdir()
    (folder / "nowhere.png").symlink_to("missing")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "device.png").symlink_to("/dev/zero")
    reasons = {
        "empty.png": "empty", "page.jpg": "HTML", "words.png": "no image format", "program.png": "no image format",
        "text.png": "MAX_TEXT_CHUNK", "bomb.png": "bomb", "fifo.png": "a fifo", "folder.png": "a folder",
        "nowhere.png": "No such file", "loop.png": "symbolic links", "device.png": "a device",
    }  # fmt: skip
    return reasons | {f"truncated.{s}": "" for s in ("jpg", "png", "webp", "gif", "bmp", "tif")}


def test_bands_that_pillow_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(tiff(bytes(16 * 16 * 5), 8, samples=5))
    with pytest.raises(ImageError, match="bands or bits"):
        read_image(tmp_path / "x.tif")


def test_the_first_picture_of_several(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), (value, 0, 0)) for value in (40, 200)]
    for name in ("x.gif", "x.png", "x.webp", "x.tif", "x.mpo", "x.avif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert abs(read_image(tmp_path / name).getpixel((8, 8))[0] - 40) < 4, name


def test_unreadable_files_say_why(tmp_path: Path) -> None:
    for name, word in _damaged(tmp_path).items():
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name)
        assert word in caught.value.reason, name
        assert caught.value.source == str(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    with pytest.raises(ImageError, match="Permission denied"):
        read_image(tmp_path / "x.png")


def test_trouble_of_the_machine_is_not_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(GREY).save(tmp_path / "x.png")
    for error in (MemoryError(), OSError(24, "Too many open files")):

        def fail(*args: object, error: Exception = error, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(Image, "open", fail)
        with pytest.raises(type(error)):
            read_image(tmp_path / "x.png")


def test_suffixes() -> None:
    wanted = ".png .jpg .jpeg .bmp .webp .tif .tiff .gif .jfif .ppm .jp2"
    assert set(wanted.split()) <= readable_suffixes()
    assert not {".eps", ".ps", ".pdf", ".txt", ".mpg", ".h5", ""} & readable_suffixes()


def test_list_of_bad_images(tmp_path: Path) -> None:
    file = tmp_path / "bad_images.csv"
    BadImages().write(file)
    assert not file.exists()
    rows = [("train", 'b,"x\n.png', "empty"), ("train", "a.png", "HTML"), ("held-out", "a.png", "a fifo, not a file")]
    found = BadImages(rows)
    found.merge([("train", "a.png", "another reason")])
    assert (found.count("train"), found.count("held-out")) == (2, 1)
    found.write(file)
    again = BadImages.read(file)
    assert again.listed() == found.listed() == sorted(rows)
    assert BadImages.read(tmp_path / "none.csv").rows == {}
    Image.fromarray(GREY).save(tmp_path / "a.png")
    again.forget_mended(tmp_path)
    assert list(again.rows) == [("train", 'b,"x\n.png')]


def test_names_are_one_line() -> None:
    assert shown("a\nb\udc80ü日") == "a\\nb\\udc80ü日"
