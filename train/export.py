"""`zoo export`: the weights of a run, or of a model, in a form that other programs read."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from timm.models import save_for_hf

from zoo import __version__
from zoo.errors import UserError, first_line
from zoo.names import nearest_names
from zoo.train.build import build_model, load_weights
from zoo.train.compose import from_container
from zoo.train.config import TRAIN, ModelConfig
from zoo.train.data import resolve_transform
from zoo.train.evaluate import check_head, file_labels
from zoo.train.runs import Run, load_run, select_weights

__all__ = ["FORMATS", "ExportConfig", "Exported", "export", "main"]

_EXPORTER = "attention-zoo"
_FILES = ("config.json", "model.safetensors", "README.md")  # of an export, in any format


@dataclass
class ExportConfig:
    """The keys of `zoo export`."""

    run: str | None = None  # the run folder
    model: str | None = None  # or the model's name
    pretrained: str | None = None  # and its weights; the published ones where null
    num_classes: int | None = None  # of the head of that file, where it is not the published size
    out: str | None = None  # the folder to write
    format: str = "timm"
    checkpoint: str = "last"  # last, best or previous
    weights: str = "auto"  # ema, raw; auto is ema where the run kept it
    overwrite: bool = False


_USAGE = """usage: zoo export run=RUN_FOLDER out=DIR [key=value ...]
       zoo export model=NAME [pretrained=FILE] out=DIR [key=value ...]

  run         the run folder that `zoo train` printed
  model       in place of a run: the model's name
  pretrained  its weights, in any dialect that is known of it; without, the published ones
  num_classes how many classes the head in that file has, where it is not the published size
  out         the folder to write; it must not exist, or be empty, unless overwrite=true
  format      timm: model.safetensors, config.json and a model card in timm's hub layout
  checkpoint  last (default), best or previous
  weights     auto (default: the averaged ones where the run kept them), ema or raw
  overwrite   true replaces an earlier export in `out`"""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserError: a mistake that the message names.
    """
    if any(a in ("-h", "--help") for a in argv):
        print(_USAGE)
        return 0
    config = _parse(argv)
    if not config.run and not config.model or not config.out:
        missing = "out=FOLDER" if config.run or config.model else "run=FOLDER or model=NAME"
        raise UserError(f"zoo export needs {missing}; `zoo export --help` says more")
    alone = [key for key in ("model", "pretrained", "num_classes") if getattr(config, key) is not None]
    if config.run and alone:
        raise UserError(f"{alone[0]}= conflicts with run=, which says it; leave one of them out")
    folder = export(Path(config.out), config)
    print(f'exported to {folder}; timm.create_model("local-dir:{folder}", pretrained=True) loads it after `import zoo`')
    return 0


def _parse(argv: Sequence[str]) -> ExportConfig:
    known = [f.name for f in fields(ExportConfig)]
    paths, others = {}, []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"cannot read {argument!r}; arguments are key=value")
        if key not in known:
            near = nearest_names(key, known) or known
            raise UserError(f"unknown key {key!r}; the nearest keys are {', '.join(near)}")
        if key in ("run", "out", "pretrained"):  # taken as they are, whatever characters they have
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            paths[key] = os.path.expanduser(value[1:-1] if quoted else value)
        else:
            others.append(argument)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ExportConfig), OmegaConf.from_dotlist(others))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"zoo export: {first_line(error)}") from error
    assert isinstance(config, ExportConfig)
    for key, value in paths.items():
        setattr(config, key, value)
    if config.format not in FORMATS:
        raise UserError(f"format={config.format!r} is not known; the formats are {', '.join(FORMATS)}")
    return config


@dataclass(frozen=True)
class Exported:
    """What a format writes: a model with weights, and what is known of them."""

    name: str
    model: torch.nn.Module
    data_config: dict[str, Any]  # timm's, of the input
    facts: dict[str, str]  # rows of the card: what it was trained on, which weights, top-1
    labels: list[str] | None = None  # names of the classes
    description: str | None = None  # of weights that are not the published ones
    config: dict[str, Any] | None = None  # of the training


def export(out: Path, config: ExportConfig) -> Path:
    """Write a run's or a model's weights in a format of FORMATS into a folder, which appears whole or not at all.

    Raises:
        UserError: the run, its checkpoint, the model or its weights are not there, or `out` is taken.
    """
    run = load_run(config.run) if config.run else None
    _check_target(out, run, config.overwrite)
    exported = _of_model(config) if run is None else _of_run(run, config)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}; give another folder") from error
    try:
        FORMATS[config.format](exported, temporary)
        for path in (temporary, *temporary.rglob("*")):  # a temporary folder and safetensors shut others out
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
        _exchange(temporary, out)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"out={out} cannot be written: {first_line(error)}; make room or give another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _exchange(temporary: Path, out: Path) -> None:
    """Give a folder its name; the one that had it goes away once the new one is there."""
    if not out.exists():
        temporary.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        out.rename(old / "old")
        try:
            temporary.rename(out)
        except OSError:
            (old / "old").rename(out)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _check_target(out: Path, run: Run | None, overwrite: bool) -> None:
    """Raise UserError unless `out` is new, an empty folder, or, to be overwritten, an earlier export and no more."""
    if out.is_symlink():
        raise UserError(f"out={out} is a link; give the folder itself")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"out={out} is not a folder; give another one")
    place = out.resolve()
    try:
        found = sorted(path.name for path in out.iterdir())
    except OSError as error:
        raise UserError(f"out={out} cannot be read: {error.strerror}; give another folder") from error
    for name, kept in (
        ("the run", run.path.resolve() if run else None),
        ("the current folder", Path.cwd()),
        ("home", _home()),
    ):
        if kept is not None and kept.is_relative_to(place):
            holds = "is" if kept == place else "holds"
            raise UserError(f"out={out} {holds} {name}, which an export never replaces; give another folder")
    if not found:
        return
    if not overwrite:
        raise UserError(f"out={out} is not an empty folder; give another one, or overwrite=true for an earlier export")
    if not _is_export(out):
        raise UserError(
            f"out={out} is no earlier export, and overwrite=true replaces nothing else; give another folder"
        )
    others = [name for name in found if name not in _FILES or (out / name).is_symlink() or not (out / name).is_file()]
    if others:
        raise UserError(f"out={out} holds more than an export, such as {others[0]}; move it, or give another folder")


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except (RuntimeError, OSError):
        return None


def _is_export(folder: Path) -> bool:
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and str(found.get("exported_by", "")).startswith(_EXPORTER)


def _of_model(config: ExportConfig) -> Exported:
    source = True if config.pretrained in (None, "true") else config.pretrained
    model: Any = build_model(ModelConfig(name=str(config.model)), config.num_classes, pretrained=source)
    check_head(model, source)
    labels = file_labels(Path(source)) if isinstance(source, str) else model.pretrained_cfg.get("label_names")
    facts = {"trained on": "-", "weights": f"`{Path(source).name}`" if isinstance(source, str) else "published"}
    return Exported(
        str(config.model),
        model.eval(),
        timm.data.resolve_data_config(model=model),
        {**facts, "top-1": "not measured"},
        labels,
        f"weights of {Path(source).name}" if isinstance(source, str) else None,
    )


def _of_run(run: Run, config: ExportConfig) -> Exported:
    if "detector" in run.config:
        raise UserError(f"{run.path} is a run of `zoo detect`; mmdet's tools take its checkpoints as they are")
    cfg = from_container(run.config, TRAIN)
    path, state = run.checkpoint(config.checkpoint)
    classes = state.get("num_classes")
    if state.get("kind") == "detector" or not isinstance(state.get("state_dict"), dict) or not isinstance(classes, int):
        raise UserError(f"checkpoint {path} is not of a run of `zoo train`; give the folder of one")
    weights, kind = select_weights(state, config.weights)
    # what regularizes training is no part of the exported model's arguments
    plain = replace(cfg.model, drop_rate=None, drop_path_rate=None, grad_checkpointing=False)
    model = build_model(plain, classes, cfg.data.img_size, pretrained=False)
    load_weights(model, weights, f"checkpoint {path}")
    trained_on = cfg.data.name or "an image folder"
    return Exported(
        cfg.model.name,
        model.eval(),
        resolve_transform(cfg.data, model, cfg.model.in_chans),
        {
            "trained on": f"{trained_on}, {state.get('epoch', 0)} epochs, {state.get('step', 0)} updates",
            "weights": f"{'averaged (EMA)' if kind == 'ema' else 'raw'}, checkpoint `{path.stem}`",
            "top-1": _measured(run, state, kind),
        },
        state.get("label_names"),
        f"trained on {trained_on}",
        run.config,
    )


def _write_timm(exported: Exported, folder: Path) -> None:
    """model.safetensors, config.json and a model card, in timm's hub layout."""
    own: dict[str, Any] = {"exported_by": f"{_EXPORTER} {__version__}"}
    if exported.description:  # not the published weights, whose tag and figures the configuration still carries
        own["pretrained_cfg"] = {"tag": None, "notes": None, "description": exported.description}
    if isinstance(exported.labels, list) and len(exported.labels) == getattr(exported.model, "num_classes", None):
        own["label_names"] = [str(name) for name in exported.labels]
    shape = exported.data_config
    data_config = {k: shape[k] for k in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    save_for_hf(exported.model, str(folder), model_config=own, safe_serialization=True, data_config=data_config)
    config = json.loads((folder / "config.json").read_text())
    config.get("model_args", {}).pop("num_classes", None)  # stated above; transformers gives it a second time
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "README.md").write_text(_card(exported))


def _measured(run: Run, state: dict[str, Any], weights: str) -> str:
    """The accuracy of these very weights, from the history in a verified checkpoint; summary.json is not asked."""
    key = "ema_top1" if weights == "ema" else "top1"
    for rows in (state.get("history"), _later_rows(run)):
        for row in reversed(rows if isinstance(rows, list) else []):
            value = row.get(key) if isinstance(row, dict) and row.get("step") == state.get("step") else None
            if isinstance(value, float | int) and math.isfinite(value):
                return f"{value:.2f} % on {row.get('held_out', 'the')} held-out images"
    return "not measured"


def _later_rows(run: Run) -> Any:
    """What was measured after a checkpoint inside an epoch was written, which the best one of the run may know."""
    with suppress(UserError):
        return run.checkpoint("best")[1].get("history")
    return None


def _card(exported: Exported) -> str:
    """A model card in the hub's form: what it is, what it was trained on, what it scores, how to load it."""
    cfg = timm.models.get_pretrained_cfg(exported.name)
    parameters = sum(p.numel() for p in exported.model.parameters())
    classes = getattr(exported.model, "num_classes", 0)
    facts = {
        "model": f"`{exported.name}`, {parameters / 1e6:.2f} M parameters, {classes} classes",
        **exported.facts,
        "paper": (cfg.paper_name if cfg else None) or "-",
        "original code": (cfg.origin_url if cfg else None) or "-",
    }
    front = ["---", "library_name: timm", "tags:", "- image-classification", "- timm", "- attention-zoo", "---"]
    rows = [f"| {key} | {value} |" for key, value in facts.items()]
    code = [
        "```python",
        "import timm, zoo",
        'model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))",
        "```",
    ]
    settings = ["## Training configuration", "```json", json.dumps(exported.config, indent=1), "```", ""]
    body = [f"# {exported.name}", "", "| | |", "|---|---|", *rows, "", "## Use", *code, ""]
    return "\n".join(
        [*front, *body, *(settings if exported.config else []), f"Written by attention-zoo {__version__}.", ""]
    )


# format=NAME -> what writes it into an empty folder
FORMATS: dict[str, Callable[[Exported, Path], None]] = {"timm": _write_timm}
