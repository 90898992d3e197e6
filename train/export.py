"""`zoo export`: the weights of a run, or of a model, in a form that other programs read."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from timm.models._features import FeatureGetterNet

from zoo import __version__
from zoo.errors import UserError, first_line
from zoo.programs import DYNAMIC, PROGRAMS, Form, check_parity, write_program
from zoo.train.arguments import parse_arguments
from zoo.train.build import build_model, load_weights
from zoo.train.compose import from_container
from zoo.train.config import TRAIN, ModelConfig
from zoo.train.data import resolve_transform
from zoo.train.evaluate import check_head, file_labels
from zoo.train.runs import Run, load_run, select_weights

__all__ = ["FORMATS", "ExportConfig", "Exported", "export", "main"]

_EXPORTER = "attention-zoo"
# of an export, in any format
_FILES = ("config.json", "model.safetensors", "model.onnx", "model.onnx.data", "model.pt2", "README.md")
_PREPARED = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # what timm says of images
_LIBRARIES = {"onnx": "onnx", "pt2": "pytorch", "aoti": "pytorch"}  # that load a program, as the hub calls them
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass
class ExportConfig:
    """The keys of `zoo export`."""

    run: str | None = None  # the run folder
    model: str | None = None  # or the model's name
    pretrained: str | None = None  # and its weights; the published ones where null
    num_classes: int | None = None  # of the head of that file, where it is not the published size
    out: str | None = None  # the folder to write
    format: str = "timm"
    features: bool = False  # maps of the backbone in place of logits
    out_indices: list[int] | None = None  # of the maps; all where null
    img_size: str | None = None  # of the images: 224, or 192x256 for height x width; the model's own where null
    dynamic: str = "auto"  # all, batch, none
    dtype: str = "float32"
    opset: int | None = None
    decompose: bool = False
    push: str | None = None
    checkpoint: str = "last"  # last, best or previous
    weights: str = "auto"  # ema, raw; auto is ema where the run kept it
    overwrite: bool = False


# The keys of some formats only.
_ONLY = {
    "push": ("timm",),
    "opset": ("onnx",),
    "decompose": ("pt2", "aoti"),
    **dict.fromkeys(("features", "out_indices", "img_size", "dynamic", "dtype"), tuple(PROGRAMS)),
}

_USAGE = """usage: zoo export run=RUN_FOLDER out=DIR [key=value ...]
       zoo export model=NAME [pretrained=FILE] out=DIR [key=value ...]

  run         the run folder that `zoo train` printed
  model       in place of a run: the model's name
  pretrained  its weights, in any dialect that is known of it; without, the published ones
  num_classes how many classes the head in that file has, where it is not the published size
  out         the folder to write; it must not exist, or be empty, unless overwrite=true
  format      timm: model.safetensors, config.json and a model card in timm's hub layout
              onnx: model.onnx, in ONNX's own operators, for onnxruntime and others
              pt2:  model.pt2 of torch.export, which torch.export.load reads
              aoti: model.pt2, compiled by AOTInductor; needs a C++ compiler
  A program is run in a fresh process on new images and compared with the model before it gets its place.
  Of onnx, pt2 and aoti:
  features    true: the backbone's maps in place of logits; out_indices=[1,2,3] picks some. The run of a detector gives
              its backbone and neck
  img_size    of the images, 224 or 192x256 (height x width); the model's own where it is not given
  dynamic     auto (default: all, or what the model allows), all (batch, height and width), batch, none
  dtype       float32 (default) or float16, of weights, images and outputs
  opset       of ONNX; PyTorch's own where it is not given
  decompose   true: pt2 and aoti in PyTorch's own operators, for machines without zoo; else `import zoo.ops` comes first
  Of timm:
  push        OWNER/NAME of a repository on the Hugging Face hub, to which the folder is uploaded too
  Of all:
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
    if config.format == "timm":
        use = f'timm.create_model("local-dir:{folder}", pretrained=True) loads it after `import zoo`'
    else:
        use = f"{folder / 'README.md'} says how it is run"
    print(f"exported to {folder}; {use}")
    if config.push:
        print(f"uploaded to {_push(folder, config.push)}")
    return 0


def _parse(argv: Sequence[str]) -> ExportConfig:
    config = parse_arguments("zoo export", ExportConfig, argv, ("run", "out", "pretrained"))
    for key, value, choices in (
        ("format", config.format, FORMATS), ("dynamic", config.dynamic, DYNAMIC), ("dtype", config.dtype, _DTYPES),
    ):  # fmt: skip
        if value not in choices:
            raise UserError(f"{key}={value!r} is not known; the choices are {', '.join(choices)}")
    if config.img_size:
        _image_size(config.img_size)
    for key, formats in _ONLY.items():
        if getattr(config, key) != getattr(ExportConfig(), key) and config.format not in formats:
            raise UserError(f"{key}= is of format={' or '.join(formats)}, not of format={config.format}; leave it out")
    if config.out_indices is not None and not config.features:
        raise UserError("out_indices= picks maps of the backbone; give features=true with it")
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
    outputs: tuple[str, ...] = ("logits",)  # names of what it gives
    fixed_size: bool = False  # whether it takes one size of images only
    strides: tuple[int, ...] | None = None  # of maps, where it gives these
    program: dict[str, str] = field(default_factory=dict)  # rows of the card: what was found of the program


def export(out: Path, config: ExportConfig) -> Path:
    """Write a run's or a model's weights in a format of FORMATS into a folder, which appears whole or not at all.

    Raises:
        UserError: the run, its checkpoint, the model or its weights are not there, or `out` is taken.
    """
    run = load_run(config.run) if config.run else None
    _check_target(out, run, config.overwrite)
    if run is None:
        exported = _of_model(config)
    elif "detector" in run.config:
        exported = _of_detector(run, config)
    else:
        exported = _of_run(run, config)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}; give another folder") from error
    try:
        FORMATS[config.format](exported, temporary, config)
        for path in (temporary, *temporary.rglob("*")):  # a temporary folder and safetensors shut others out
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
        _exchange(temporary, out)
    except UserError:
        raise
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
    name, options = str(config.model), _feature_options(config)
    classes = None if config.features else config.num_classes
    model: Any = build_model(ModelConfig(name=name, kwargs=options), classes, pretrained=source)
    if not config.features:
        check_head(model, source)
    published = timm.models.get_pretrained_cfg(name)
    labels = file_labels(Path(source)) if isinstance(source, str) else getattr(published, "label_names", None)
    facts = {"trained on": "-", "weights": f"`{Path(source).name}`" if isinstance(source, str) else "published"}
    data_config = timm.data.resolve_data_config(
        pretrained_cfg=published.to_dict() if config.features and published else None,
        model=None if config.features else model,
    )
    return Exported(
        name,
        model.eval(),
        data_config,
        {**facts, "top-1": "not measured"},
        labels,
        f"weights of {Path(source).name}" if isinstance(source, str) else None,
        fixed_size=bool(getattr(published, "fixed_input_size", False)),
        **_maps(model, config),
    )


def _feature_options(config: ExportConfig) -> dict[str, Any]:
    if not config.features:
        return {}
    return {"features_only": True, **({} if config.out_indices is None else {"out_indices": config.out_indices})}


def _maps(model: Any, config: ExportConfig) -> dict[str, Any]:
    """Names and strides of what a backbone gives; nothing for a classifier."""
    if not config.features:
        return {}
    info = model.feature_info
    return {"outputs": tuple(f"map{i}" for i in info.out_indices), "strides": tuple(info.reduction())}


def _of_detector(run: Run, config: ExportConfig) -> Exported:
    if config.format not in PROGRAMS:
        raise UserError(
            f"{run.path} is a run of `zoo detect`, whose checkpoints mmdet's tools take as they are; "
            f"format={' or '.join(PROGRAMS)} writes its backbone and neck"
        )
    if config.features or config.weights == "ema":
        key = "features=" if config.features else "weights=ema"
        raise UserError(f"{key} is of classifiers; the run of a detector gives the maps of its neck; leave it out")
    from zoo.train.detection.export import backbone_and_neck

    found = backbone_and_neck(run, config.checkpoint)
    return Exported(
        found.name,
        found.model.eval(),
        {"input_size": (3, *found.size), "mean": found.mean, "std": found.std},
        found.facts,
        found.classes,
        None,
        run.config,
        outputs=tuple(f"map{i}" for i in range(found.count)),
    )


def _of_run(run: Run, config: ExportConfig) -> Exported:
    cfg = from_container(run.config, TRAIN)
    path, state = run.checkpoint(config.checkpoint)
    classes = state.get("num_classes")
    if state.get("kind") == "detector" or not isinstance(state.get("state_dict"), dict) or not isinstance(classes, int):
        raise UserError(f"checkpoint {path} is not of a run of `zoo train`; give the folder of one")
    weights, kind = select_weights(state, config.weights)
    # what regularizes training is no part of the exported model's arguments
    plain = replace(cfg.model, drop_rate=None, drop_path_rate=None, grad_checkpointing=False)
    model: Any = build_model(plain, classes, cfg.data.img_size, pretrained=False)
    load_weights(model, weights, f"checkpoint {path}")
    transform = resolve_transform(cfg.data, model, cfg.model.in_chans)
    if config.features:
        levels = config.out_indices
        try:
            model = FeatureGetterNet(
                model, out_indices=tuple(range(len(model.feature_info)) if levels is None else levels)
            )
        except (AttributeError, IndexError, AssertionError) as error:
            raise UserError(f"{cfg.model.name} has no maps {config.out_indices or ''}: {first_line(error)}") from error
    published = timm.models.get_pretrained_cfg(cfg.model.name)
    trained_on = cfg.data.name or "an image folder"
    return Exported(
        cfg.model.name,
        model.eval(),
        transform,
        {
            "trained on": f"{trained_on}, {state.get('epoch', 0)} epochs, {state.get('step', 0)} updates",
            "weights": f"{'averaged (EMA)' if kind == 'ema' else 'raw'}, checkpoint `{path.stem}`",
            "top-1": _measured(run, state, kind),
        },
        state.get("label_names"),
        f"trained on {trained_on}",
        run.config,
        fixed_size=bool(getattr(published, "fixed_input_size", False)),
        **_maps(model, config),
    )


def _write_timm(exported: Exported, folder: Path, _config: ExportConfig) -> None:
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


def _write_program(exported: Exported, folder: Path, config: ExportConfig) -> None:
    """model.onnx or model.pt2, which a fresh process has run; config.json and a card."""
    channels, *size = exported.data_config["input_size"]
    dynamic = config.dynamic
    if dynamic == "auto":
        dynamic = "batch" if exported.fixed_size else "all"
    elif dynamic == "all" and exported.fixed_size:
        raise UserError(f"dynamic=all: {exported.name} takes images of one size only; give dynamic=batch")
    form = Form(
        channels=channels,
        size=_image_size(config.img_size) if config.img_size else (size[0], size[1]),
        dynamic=dynamic,
        dtype=_DTYPES[config.dtype],
        opset=config.opset,
        decompose=config.decompose,
        outputs=exported.outputs,
    )
    print(f"writing {exported.name} as {config.format}, {DYNAMIC[dynamic]} dynamic ...", flush=True)
    file, facts = write_program(config.format, exported.model, form, folder)
    print("comparing it with the model, in a fresh process ...", flush=True)
    parity = check_parity(config.format, file, exported.model, form)
    print(f"largest difference: {parity}", flush=True)
    batch = "any batch" if dynamic != "none" else "1"
    spatial = "any height and width" if dynamic == "all" else f"{form.size[0]} x {form.size[1]}"
    exported.program.update(
        {
            "format": config.format,
            "images": f"{batch} x {channels} x {spatial}, {config.dtype}",
            "outputs": ", ".join(exported.outputs),
            **({"strides": ", ".join(map(str, exported.strides))} if exported.strides else {}),
            **facts,
            "largest difference from the model": str(parity),
        }
    )
    described: dict[str, Any] = {
        "architecture": exported.name,
        "format": config.format,
        "dynamic": dynamic,
        "input": {
            **{k: v for k, v in exported.data_config.items() if k in _PREPARED},
            "size": [channels, *form.size],
            "dtype": config.dtype,
        },
        "outputs": list(exported.outputs),
        **({"strides": list(exported.strides)} if exported.strides else {}),
        **({"label_names": [str(name) for name in exported.labels]} if exported.labels else {}),
        "facts": facts,
        "parity": {"program": parity.program, "model": parity.model, "shapes": parity.shapes},
        "exported_by": f"{_EXPORTER} {__version__}",
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2))
    (folder / "README.md").write_text(_card(exported, _usage(config, exported)))


def _image_size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) in (1, 2) and all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        height, width = int(parts[0]), int(parts[-1])
        return height, width
    raise UserError(f"img_size={text} is no size; give 224, or 192x256 for height x width")


def _usage(config: ExportConfig, exported: Exported) -> list[str]:
    """Python that runs the program."""
    count = len(exported.outputs)
    names = ", ".join(exported.outputs) + ("," if count == 1 and config.format == "onnx" else "")
    if config.format == "onnx":
        return [
            "import onnxruntime",
            'session = onnxruntime.InferenceSession("model.onnx")',
            f'{names} = session.run(None, {{"images": images}})  # a NumPy array',
        ]
    load = "torch._inductor.aoti_load_package" if config.format == "aoti" else "torch.export.load"
    before = ["import torch", *([] if config.decompose else ["import zoo.ops  # operators"])]
    more = "" if config.format == "aoti" else ".module()"
    return [*before, f'program = {load}("model.pt2"){more}', f"{names} = program(images)"]


def _push(folder: Path, repository: str) -> str:
    """Upload an exported folder as it is; timm's own upload would write a configuration that transformers refuses."""
    from huggingface_hub import create_repo, upload_folder
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        create_repo(repository, exist_ok=True)
        return str(upload_folder(repo_id=repository, folder_path=folder, commit_message="Add the model"))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise UserError(
            f"push={repository}: {first_line(error)}; the folder {folder} is whole, `hf auth login` and "
            f"`hf upload {repository} {folder}` send it later"
        ) from error


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


def _card(exported: Exported, usage: list[str] | None = None) -> str:
    """A model card in the hub's form: what it is, what it was trained on, what it scores, how to load it."""
    cfg = timm.models.get_pretrained_cfg(exported.name)
    parameters = sum(p.numel() for p in exported.model.parameters())
    gives = "maps" if "logits" not in exported.outputs else f"{getattr(exported.model, 'num_classes', 0)} classes"
    facts = {
        "model": f"`{exported.name}`, {parameters / 1e6:.2f} M parameters, {gives}",
        **exported.facts,
        **exported.program,
        "paper": (cfg.paper_name if cfg else None) or "-",
        "original code": (cfg.origin_url if cfg else None) or "-",
    }
    library = _LIBRARIES.get(exported.program.get("format", ""), "timm")
    task = "image-classification" if "logits" in exported.outputs else "image-feature-extraction"
    front = ["---", f"library_name: {library}", "tags:", *(f"- {x}" for x in (task, library, _EXPORTER)), "---"]
    rows = [f"| {key} | {value} |" for key, value in facts.items()]
    timm_usage = [
        "import timm, zoo",
        'model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))",
    ]
    mean, std = (", ".join(f"{x:g}" for x in exported.data_config[key]) for key in ("mean", "std"))
    scaled = "" if max(exported.data_config["std"]) <= 1 else " of 0 to 255"
    given = f"# images: [B, C, H, W], RGB{scaled}, minus the mean ({mean}), divided by ({std})"
    code = ["```python", *([given, *usage] if usage else timm_usage), "```"]
    settings = ["## Training configuration", "```json", json.dumps(exported.config, indent=1), "```", ""]
    body = [f"# {exported.name}", "", "| | |", "|---|---|", *rows, "", "## Use", *code, ""]
    return "\n".join(
        [*front, *body, *(settings if exported.config else []), f"Written by attention-zoo {__version__}.", ""]
    )


# format=NAME -> what writes it into an empty folder
FORMATS: dict[str, Callable[[Exported, Path, ExportConfig], None]] = {
    "timm": _write_timm,
    **dict.fromkeys(PROGRAMS, _write_program),
}
