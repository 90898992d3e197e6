"""`zoo export`: a run's weights in a form that other programs read."""

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
from zoo.registry import nearest_names
from zoo.train.build import build_model, load_weights
from zoo.train.compose import from_container
from zoo.train.config import TRAIN, TrainConfig
from zoo.train.data import resolve_transform
from zoo.train.runs import Run, load_run, select_weights

__all__ = ["FORMATS", "ExportConfig", "Exported", "export_run", "main"]

_EXPORTER = "attention-zoo"
_FILES = ("config.json", "model.safetensors", "README.md")  # of an export, in any format


@dataclass
class ExportConfig:
    """The keys of `zoo export`."""

    run: str | None = None  # the run folder
    out: str | None = None  # the folder to write
    format: str = "timm"
    checkpoint: str = "last"  # last, best or previous
    weights: str = "auto"  # ema, raw; auto is ema where the run kept it
    overwrite: bool = False


_USAGE = """usage: zoo export run=RUN_FOLDER out=DIR [key=value ...]

  run         the run folder that `zoo train` printed
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
    if not config.run or not config.out:
        missing = "run" if not config.run else "out"
        raise UserError(f"zoo export needs {missing}=FOLDER; `zoo export --help` says more")
    folder = export_run(load_run(config.run), Path(config.out), config)
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
        if key in ("run", "out"):  # taken as they are, whatever characters they have
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
    """What a format writes: a model with a run's weights, and where they come from."""

    run: Run
    cfg: TrainConfig
    model: torch.nn.Module
    state: dict[str, Any]  # the checkpoint
    checkpoint: str  # its name
    weights: str  # ema or raw

    @property
    def data_name(self) -> str:
        """What the run was trained on."""
        return self.cfg.data.name or "an image folder"


def export_run(run: Run, out: Path, config: ExportConfig) -> Path:
    """Write a run's weights in a format of FORMATS into a folder, which appears whole or not at all.

    Raises:
        UserError: the run, its checkpoint or its weights are not there, or `out` is taken.
    """
    _check_target(out, run, config.overwrite)
    exported = _open(run, config)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}; give another folder") from error
    try:
        FORMATS[config.format](exported, temporary)
        temporary.chmod(0o777 & ~_umask())
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


def _check_target(out: Path, run: Run, overwrite: bool) -> None:
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
    for name, kept in (("the run", run.path.resolve()), ("the current folder", Path.cwd()), ("home", _home())):
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


def _open(run: Run, config: ExportConfig) -> Exported:
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
    model = build_model(plain, state["num_classes"], cfg.data.img_size, pretrained=False)
    load_weights(model, weights, f"checkpoint {path}")
    return Exported(run, cfg, model.eval(), state, path.stem, kind)


def _write_timm(exported: Exported, folder: Path) -> None:
    """model.safetensors, config.json and a model card, in timm's hub layout."""
    # these weights are not the published ones, whose tag and figures the configuration still carries
    description = f"trained on {exported.data_name}"
    own: dict[str, Any] = {"pretrained_cfg": {"tag": None, "notes": None, "description": description}}
    names = exported.state.get("label_names")
    if isinstance(names, list) and len(names) == exported.state["num_classes"]:
        own["label_names"] = [str(name) for name in names]
    shape = resolve_transform(exported.cfg.data, exported.model, exported.cfg.model.in_chans)
    data_config = {k: shape[k] for k in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    own["exported_by"] = f"{_EXPORTER} {__version__}"
    save_for_hf(exported.model, str(folder), model_config=own, safe_serialization=True, data_config=data_config)
    (folder / "README.md").write_text(_card(exported))


def _measured(exported: Exported) -> str:
    """The accuracy of these very weights, from the history in a verified checkpoint; summary.json is not asked."""
    key = "ema_top1" if exported.weights == "ema" else "top1"
    for rows in (exported.state.get("history"), _later_rows(exported)):
        for row in reversed(rows if isinstance(rows, list) else []):
            value = row.get(key) if isinstance(row, dict) and row.get("step") == exported.state.get("step") else None
            if isinstance(value, float | int) and math.isfinite(value):
                return f"{value:.2f} % on {row.get('held_out', 'the')} held-out images"
    return "not measured"


def _later_rows(exported: Exported) -> Any:
    """What was measured after a checkpoint inside an epoch was written, which the best one of the run may know."""
    with suppress(UserError):
        return exported.run.checkpoint("best")[1].get("history")
    return None


def _card(exported: Exported) -> str:
    """A model card in the hub's form: what it is, what it was trained on, what it scores, how to load it."""
    name, state, model = exported.cfg.model.name, exported.state, exported.model
    cfg = timm.models.get_pretrained_cfg(name)
    parameters = sum(p.numel() for p in model.parameters())
    facts = {
        "model": f"`{name}`, {parameters / 1e6:.2f} M parameters, {state['num_classes']} classes",
        "trained on": f"{exported.data_name}, {state.get('epoch', 0)} epochs, {state.get('step', 0)} updates",
        "weights": f"{'averaged (EMA)' if exported.weights == 'ema' else 'raw'}, checkpoint `{exported.checkpoint}`",
        "top-1": _measured(exported),
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
    settings = ["## Training configuration", "```json", json.dumps(exported.run.config, indent=1), "```"]
    body = [f"# {name}", "", "| | |", "|---|---|", *rows, "", "## Use", *code, "", *settings]
    return "\n".join([*front, *body, "", f"Written by attention-zoo {__version__}.", ""])


# format=NAME -> what writes it into an empty folder
FORMATS: dict[str, Callable[[Exported, Path], None]] = {"timm": _write_timm}
