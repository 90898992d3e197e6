"""`zoo predict`: the classes of images that nobody has labelled, as a table, as CSV and as a picture."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import ImageOps

from zoo.errors import UserError
from zoo.train.arguments import parse_arguments
from zoo.train.compose import from_container
from zoo.train.config import EVAL, EvalConfig
from zoo.train.data import EvalLoader, ReaderImages, resolve_transform
from zoo.train.evaluate import Source, open_source
from zoo.train.folders import images_below
from zoo.train.images import ImageError, PixelRanges, find_ranges, read_image, shown
from zoo.train.loggers import write_csv
from zoo.train.plot import new_figure, save_figure
from zoo.train.runs import check_writable, is_run, load_run
from zoo.train.shell import Command, run_command
from zoo.train.state import join_world

__all__ = ["COLUMNS", "PredictConfig", "Prediction", "class_titles", "main", "predict"]

COLUMNS = ("image", "rank", "index", "class", "description", "probability", "error")
_DRAWN, _PER_ROW, _SIDE, _DPI = 24, 4, 384, 110  # images in the picture, in a row of it, their pixels; its resolution
_PRINTED = 20  # images that are printed; the table holds all


@dataclass
class PredictConfig:
    """The keys of `zoo predict`."""

    model: str | None = None  # a name, or a run folder
    image: str | None = None  # a file, or a folder
    pretrained: str | None = None  # of a name: a checkpoint file; the published weights where null
    out: str = "predictions"  # the folder for predictions.csv and predictions.png
    top: int = 5
    checkpoint: str = "last"  # of a run: last, best or previous
    weights: str = "auto"  # of a run: ema, raw; auto is ema where the run kept it
    num_classes: int | None = None  # of the head in `pretrained`, where it is not the published size
    img_size: int | None = None  # the run's or the model's own where null
    value_range: list[float] | None = None  # [black, white] of images with more than 8 bits a pixel
    batch_size: int = 16
    device: str = "auto"
    debug: bool = False


USAGE = """usage: zoo predict model=NAME|RUN_FOLDER image=FILE|FOLDER [key=value ...]

  model       the folder of a run of `zoo train`, or a model's name
  image       an image, or a folder of them; folders in it are looked through as well
  pretrained  of a model's name: a checkpoint in any dialect that is known of it; without, the published weights
  num_classes how many classes the head in that file has, where it is not the published size
  out         the folder for predictions.csv and predictions.png (default: predictions)
  top         how many classes are named for each image (default: 5, or all where there are fewer)
  img_size    size of the images in pixels; without, as the run was trained or the model's weights were published
  value_range [black,white] of images with more than 8 bits a pixel
  checkpoint  of a run: last (default), best or previous
  weights     of a run: auto (default: the averaged ones where the run kept them), ema or raw
  batch_size  default: 16
  device      auto (default), cpu, cuda, cuda:N or mps

  Images are prepared as the run prepared its held-out ones, or as timm says of the model."""


@dataclass(frozen=True)
class Prediction:
    """What is said of an image: (class index, probability), most probable first; or why it cannot be read."""

    path: str
    classes: tuple[tuple[int, float], ...] = ()
    error: str | None = None


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code; errors become one line on stderr.

    Args:
        argv: `key=value`; USAGE lists the keys.
    """
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    command = Command("predict", EVAL, lambda arguments: _predict(arguments.overrides), dict)
    return run_command(command, argv)


def _predict(argv: Sequence[str]) -> None:
    config = parse_arguments("zoo predict", PredictConfig, argv, ("model", "image", "pretrained", "out"))
    if not config.model or not config.image:
        missing = "image=FILE|FOLDER" if config.model else "model=NAME|RUN_FOLDER"
        raise UserError(f"zoo predict needs {missing}; `zoo predict --help` says more")
    if config.top < 1:
        raise UserError(f"top={config.top} is out of range; give at least 1")
    out = Path(config.out)
    for name in ("predictions.csv", "predictions.png"):
        check_writable(out / name)
    paths, base, notes = _images(config.image)
    source, cfg = _source(config)
    if config.value_range is not None or source.ranges is None:
        given = cfg.data.value_range
        ranges, lines = (PixelRanges.given(given[0], given[1]), []) if given else _ranges(paths)
        source, notes = replace(source, ranges=ranges), [*notes, *lines]
    for line in notes:
        print(line, flush=True)
    names, titles, note = class_titles(source)
    if note:
        print(note, flush=True)
    found = predict(source, cfg, paths, config.top)
    readable = [p for p in found if p.error is None]
    for prediction in found:
        if prediction.error is not None and len(found) > 1:
            print(f"unreadable: {_name(prediction.path, base)}: {prediction.error}", flush=True)
    if not readable:
        raise UserError(
            f"none of the {len(found)} images under {shown(config.image)} can be read"
            if len(found) > 1
            else f"{shown(config.image)} cannot be read: {found[0].error}"
        )
    rows = [row for prediction in found for row in _rows(prediction, base, names, titles)]
    write_csv(out / "predictions.csv", COLUMNS, rows)
    drawn = readable[:_DRAWN]
    _draw(out / "predictions.png", drawn, base, titles, cfg, source.ranges or PixelRanges())
    for prediction in readable[:_PRINTED]:
        words = "  ".join(f"{titles[index]} {100 * p:.1f} %" for index, p in prediction.classes)
        print(f"{_name(prediction.path, base)}: {words}")
    if len(readable) > _PRINTED:
        print(f"... and {len(readable) - _PRINTED} more images")
    several = f" (the first {len(drawn)} images)" if len(drawn) < len(readable) else ""
    print(f"{len(readable)} images: {out / 'predictions.csv'}, {out / 'predictions.png'}{several}")


def _name(path: str, base: str) -> str:
    return shown(os.path.relpath(path, base))


def _images(image: str) -> tuple[list[str], str, list[str]]:
    """The images, what their names are relative to, and lines on what was left out."""
    if os.path.isdir(image):
        paths, notes = images_below(image)
        return paths, image, notes
    if not os.path.lexists(image):
        raise UserError(f"no image at {shown(image)}; give image=FILE or image=FOLDER")
    return [image], os.path.dirname(image) or ".", []


def _ranges(paths: Sequence[str]) -> tuple[PixelRanges, list[str]]:
    try:
        return find_ranges(paths)
    except ImageError as error:
        raise UserError(str(error).replace("data.value_range", "value_range")) from error


def _source(config: PredictConfig) -> tuple[Source, EvalConfig]:
    """The model with its weights, and the configuration by which images are prepared."""
    model = str(config.model)
    if is_run(model):
        alone = [key for key in ("pretrained", "num_classes") if getattr(config, key) is not None]
        if alone:
            raise UserError(f"{alone[0]}= conflicts with a run, which says it; leave it out")
        run = load_run(model)
        if "detector" in run.config:
            raise UserError(f"{run.path} is the run of a detector; `zoo detect eval=true run={run.path}` draws boxes")
        own: dict[str, Any] = {"model": run.config["model"], "data": dict(run.config["data"])}
    else:
        if config.checkpoint != "last" or config.weights != "auto":
            raise UserError("checkpoint= and weights= choose among those of a run; give model=RUN_FOLDER, or leave out")
        own = {"model": {"name": model, "num_classes": config.num_classes}, "data": {"name": "imagefolder"}}
    for key in ("img_size", "value_range"):
        if getattr(config, key) is not None:
            own["data"][key] = getattr(config, key)
    own["data"]["num_workers"] = 0
    own |= {"run": model if is_run(model) else None, "pretrained": config.pretrained or not is_run(model) or None}
    own |= {key: getattr(config, key) for key in ("checkpoint", "weights", "batch_size", "device")}
    cfg = from_container(own, EVAL)
    return open_source(cfg), cfg


def class_titles(source: Source) -> tuple[list[str], list[str], str | None]:
    """The names of a model's classes, what they are called for readers, and a line where they were not said.

    Names of ImageNet's classes are WordNet ids, whose words timm has.
    """
    count = source.model.num_classes
    names, note = source.names, None
    subset = timm.data.infer_imagenet_subset(source.model)
    known = timm.data.ImageNetInfo(subset) if subset else None
    if names is None and known is not None and known.num_classes() == count:
        names = list(known.label_names())
        if source.facts["weights"] != "published":
            note = f"note: the weights do not name their {count} classes, which are taken to be those of {subset}"
    if names is None:
        note = f"note: the weights do not name their {count} classes, which are numbered from 0"
        names = [str(i) for i in range(count)]
    names = [*names, *(str(i) for i in range(len(names), count))]
    words: Any = known.label_descriptions(as_dict=True) if known is not None else {}
    return names, [words[name].split(",")[0] if name in words else name for name in names], note


class _Listed:
    """A reader of timm's kind over files, whose classes are their places in the list."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.paths[index], index

    def filename(self, index: int) -> str:
        return str(index)


@torch.inference_mode()
def predict(source: Source, cfg: EvalConfig, paths: Sequence[str], top: int = 5) -> list[Prediction]:
    """The most probable classes of images, in the order of `paths`; of unreadable ones the reason.

    Args:
        source: a model with weights.
        cfg: says how images are prepared: its data and model sections, batch_size, device.
        paths: files.
        top: how many classes, of those that there are.
    """
    world = join_world(cfg.device)
    shape = resolve_transform(cfg.data, source.model, cfg.model.in_chans)
    model = source.model.to(world.device).eval()
    mode = "L" if cfg.model.in_chans == 1 else "RGB"
    dataset = ReaderImages(_Listed(paths), mode, source.ranges)
    loader = EvalLoader(dataset, cfg.data, shape, cfg.batch_size, world)
    found: dict[int, Prediction] = {}
    try:
        for images, places in loader:
            probabilities = model(images.to(world.device)).float().softmax(dim=-1).cpu()
            best, indices = probabilities.topk(min(top, probabilities.shape[-1]), dim=-1)
            for place, values, classes in zip(places.tolist(), best.tolist(), indices.tolist(), strict=True):
                found[place] = Prediction(paths[place], tuple(zip(classes, values, strict=True)))
        for name, reason in loader.unreadable:
            found[int(name)] = Prediction(paths[int(name)], error=reason)
    finally:
        loader.close()
    return [found[number] for number in range(len(paths))]


def _rows(prediction: Prediction, base: str, names: Sequence[str], titles: Sequence[str]) -> list[dict[str, Any]]:
    image = _name(prediction.path, base)
    if prediction.error is not None:
        return [{"image": image, "error": prediction.error}]
    return [
        {
            "image": image,
            "rank": rank,
            "index": index,
            "class": names[index],
            "description": titles[index] if titles[index] != names[index] else None,
            "probability": f"{probability:.6f}",
        }
        for rank, (index, probability) in enumerate(prediction.classes, 1)
    ]


def _draw(
    path: Path, drawn: Sequence[Prediction], base: str, titles: Sequence[str], cfg: EvalConfig, ranges: PixelRanges
) -> None:
    """Every image over the bars of its classes."""
    columns = min(_PER_ROW, len(drawn))
    rows = -(-len(drawn) // columns)
    bars = max(len(p.classes) for p in drawn)
    height = 0.17 * bars + 0.1
    figure = new_figure(figsize=(3.0 * columns, (2.6 + height) * rows))
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2.4, height] * rows)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, prediction in enumerate(drawn):
        above, below = grid[2 * (number // columns) : 2 * (number // columns) + 2, number % columns]
        image = read_image(prediction.path, "L" if cfg.model.in_chans == 1 else "RGB", ranges)
        above.imshow(ImageOps.contain(image, (_SIDE, _SIDE)) if max(image.size) > _SIDE else image, cmap="gray")
        above.set_title(_cut(_name(prediction.path, base), 40), fontsize=8, parse_math=False)
        values = [p for _, p in prediction.classes]
        below.barh(range(len(values)), values, color="tab:blue", alpha=0.35, height=0.9)
        below.set_xlim(0, 1)
        below.set_ylim(bars - 0.5, -0.5)
        for place, (index, probability) in enumerate(prediction.classes):
            label = f"{_cut(titles[index])}  {100 * probability:.1f} %"
            below.text(0.01, place, label, fontsize=7, va="center", parse_math=False)
    save_figure(path, figure, _DPI)


def _cut(text: str, width: int = 34) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
