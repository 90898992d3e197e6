"""`zoo export`: a run's weights in a form that other programs read."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from timm.models import save_for_hf

from zoo._version import __version__
from zoo.errors import UserError, first_line
from zoo.registry import nearest_names, require_model
from zoo.runs import Run, load_run, select_weights

__all__ = ["ExportConfig", "export_run", "main"]

FORMATS = ("timm",)


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
  overwrite   true replaces what is in `out`"""


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
    for argument in argv:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise UserError(f"cannot read {argument!r}; arguments are key=value")
        if key not in known:
            near = nearest_names(key, known) or known
            raise UserError(f"unknown key {key!r}; the nearest keys are {', '.join(near)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ExportConfig), OmegaConf.from_dotlist(list(argv)))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"zoo export: {first_line(error)}") from error
    assert isinstance(config, ExportConfig)
    if config.format not in FORMATS:
        raise UserError(f"format={config.format!r} is not known; the formats are {', '.join(FORMATS)}")
    return config


def export_run(run: Run, out: Path, config: ExportConfig) -> Path:
    """Write a run's weights as a timm model folder: model.safetensors, config.json, README.md.

    The folder appears whole or not at all.

    Raises:
        UserError: the run, its checkpoint or its weights are not there, or `out` is taken.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not config.overwrite:
        raise UserError(f"out={out} is not an empty folder; give another one or overwrite=true")
    path, state = run.checkpoint(config.checkpoint)
    weights, kind = select_weights(state, config.weights)
    model = _rebuild(run, state)
    model.load_state_dict(weights)
    model.eval()

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}; give another folder") from error
    try:
        # these weights are not the published ones, whose tag and figures the configuration still carries
        own = {"pretrained_cfg": {"tag": None, "notes": None, "description": f"trained on {_data_name(run)}"}}
        data_config = _data_config(run, model)
        save_for_hf(model, str(temporary), model_config=own, safe_serialization=True, data_config=data_config)
        (temporary / "README.md").write_text(_card(run, state, model, kind, path.stem))
        temporary.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _rebuild(run: Run, state: dict[str, Any]) -> torch.nn.Module:
    """The run's model with fresh weights, built from plain arguments that config.json can hold."""
    section = run.config["model"]
    name = section["name"]
    require_model(name)
    arguments: dict[str, Any] = {**section.get("kwargs", {}), "in_chans": section.get("in_chans", 3)}
    cfg = timm.models.get_pretrained_cfg(name)
    size = run.config["data"].get("img_size")
    if cfg is not None and cfg.fixed_input_size and size:
        arguments.setdefault("img_size", size)
    return timm.create_model(name, pretrained=False, num_classes=state["num_classes"], **arguments)


def _data_config(run: Run, model: torch.nn.Module) -> dict[str, Any]:
    """The preprocessing that the run evaluated with, in timm's terms."""
    data = run.config["data"]
    asked = {k: data[k] for k in ("mean", "std", "interpolation", "crop_pct", "img_size") if data.get(k) is not None}
    channels = run.config["model"].get("in_chans", 3)
    asked["in_chans"] = channels
    found = timm.data.resolve_data_config(asked, pretrained_cfg=model.pretrained_cfg)
    for key in ("mean", "std"):
        values = list(found[key])
        found[key] = tuple(values if len(values) == channels else [sum(values) / len(values)] * channels)
    return {k: found[k] for k in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}


def _data_name(run: Run) -> str:
    return run.config["data"].get("name") or "an image folder"


def _card(run: Run, state: dict[str, Any], model: torch.nn.Module, kind: str, checkpoint: str) -> str:
    """A model card in the hub's form: what it is, what it was trained on, what it scores, how to load it."""
    name = run.config["model"]["name"]
    summary = run.summary or {}
    cfg = timm.models.get_pretrained_cfg(name)
    parameters = sum(p.numel() for p in model.parameters())
    facts = {
        "model": f"`{name}`, {parameters / 1e6:.2f} M parameters, {state['num_classes']} classes",
        "trained on": f"{_data_name(run)}, {state.get('epoch', 0)} epochs, {state.get('step', 0)} updates",
        "weights": f"{'averaged (EMA)' if kind == 'ema' else 'raw'}, checkpoint `{checkpoint}`",
        "top-1": f"{summary['top1']:.2f} % on the held-out images (end of the run)"
        if "top1" in summary
        else "not measured",
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
    settings = ["## Training configuration", "```json", json.dumps(run.config, indent=1), "```"]
    body = [f"# {name}", "", "| | |", "|---|---|", *rows, "", "## Use", *code, "", *settings]
    return "\n".join([*front, *body, "", f"Written by attention-zoo {__version__}.", ""])
