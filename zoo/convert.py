"""`zoo convert`: a checkpoint of any dialect, written once in our format."""

import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo.models  # noqa: F401  registers the models
from zoo import __version__
from zoo.errors import UserError, first_line
from zoo.models.checkpoints import CheckpointError, check_state_dict, read_source
from zoo.models.dialects import Match, dialects_of, nearest, part_of, recognise
from zoo.registry import package_models, require_model

__all__ = ["Converted", "convert", "main"]

_USAGE = """usage: zoo convert FILE out=X.safetensors [key=value ...]

  FILE        a checkpoint file, an index of shards (.index.json), or a folder: of a run, an export, torch's distributed
              checkpoints, or weights in the layout of the hub
  out         the file to write
  model       the model's name; found by keys and shapes where one model alone fits
  part        the part of the checkpoint that is meant, where it holds several models: part=teacher
  overwrite   true replaces the file `out`"""

_KEYS = ("out", "model", "part", "overwrite")


@dataclass(frozen=True)
class Converted:
    """What was written: the model, the dialect, where in the checkpoint it lay, and the keys that were left out."""

    model: str
    match: Match
    tensors: int


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserError: a mistake that the message names.
    """
    if any(a in ("-h", "--help") for a in argv):
        print(_USAGE)
        return 0
    files, options = [], {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if equals and key in _KEYS:
            options[key] = value
        elif equals and key.isidentifier() and not Path(argument).exists():
            raise UserError(f"unknown key {key!r}; the keys are {', '.join(_KEYS)}")
        else:
            files.append(argument)
    if len(files) != 1 or not options.get("out"):
        raise UserError("zoo convert takes one FILE and out=X.safetensors; `zoo convert --help` says more")
    overwrite = options.get("overwrite", "false").lower()
    if overwrite not in ("true", "false"):
        raise UserError(f"overwrite={options['overwrite']} is no choice; give true or false")
    source, out = (Path(value).expanduser() for value in (files[0], options["out"]))
    done = convert(source, out, options.get("model"), options.get("part"), overwrite == "true")
    where = f", under {done.match.where.rstrip('.')}" if done.match.where else ""
    print(f"{source}: {done.model}; dialect: {done.match.dialect.name}{where}")
    for title, names in (
        ("left out", done.match.dropped),
        ("not there", done.match.missing),
        ("not there, kept at their initial values", done.match.initial),
        ("not there, zero", done.match.zero),
    ):
        if names:
            print(f"{title}: {_listed(names)}")
    print(f"{out}: {done.tensors} tensors")
    return 0


def _listed(names: Sequence[str]) -> str:
    """Every name, those that differ in their numbers alone together."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def convert(
    source: Path, out: Path, model: str | None = None, part: str | None = None, overwrite: bool = False
) -> Converted:
    """Write a checkpoint's weights of one model, in our names, as a safetensors file that appears whole or not at all.

    A backbone alone lacks its final norm and classifier in the file too; norms that it has on its outputs are kept.

    Raises:
        UserError: the checkpoint cannot be read, is of no model or of several, or `out` cannot be written.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"out={out} must end in .safetensors")
    if out.is_dir() or (out.exists() or out.is_symlink()) and not overwrite:
        raise UserError(f"out={out} is there already; give another file, or overwrite=true")
    try:
        checkpoint = read_source(source)
    except (OSError, CheckpointError) as error:
        raise UserError(str(error)) from error
    stated, arguments = _stated(checkpoint)
    if part is not None:
        checkpoint = part_of(checkpoint, part)
        if not checkpoint:
            raise UserError(f"{source} has nothing under part={part}")
    if model is not None:
        require_model(model)
    name = model or stated
    if name is not None and name.split(".")[0] not in package_models():
        raise UserError(f"model={name} is none of this package's; `zoo list` prints them")
    try:
        if name is None:
            name, match = _only_fit(source, checkpoint)
            built = _on_meta(name, {})
        else:
            built = _on_meta(name, arguments if name == stated else {})
            match = _recognise(name, built, checkpoint)
        state = _state(name, built, match)
    except (CheckpointError, TypeError) as error:
        raise UserError(f"{source}: {first_line(error)}") from error
    classes = [v.shape[0] for k, v in state.items() if k in _classifier(built)]
    facts = {"model": name, "dialect": match.dialect.name, "written_by": f"attention-zoo {__version__}"}
    _write(out, state, {"format": "pt", **facts, **({"num_classes": str(classes[0])} if classes else {})})
    return Converted(name, match, len(state))


def _stated(checkpoint: Any) -> tuple[str | None, dict[str, Any]]:
    """The model and its arguments that the configuration in a run's checkpoint names."""
    found = checkpoint.get("config") if isinstance(checkpoint, Mapping) else None
    model = found.get("model") if isinstance(found, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(model.get("name"), str):
        return None, {}
    kwargs = model.get("kwargs")
    return model["name"], dict(kwargs) if isinstance(kwargs, Mapping) else {}


def _on_meta(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A model without values; one that has no classifier by default gets one, which a file may have."""
    cfg = timm.get_pretrained_cfg(name)
    classes = cfg.num_classes if cfg is not None and cfg.num_classes else 1000
    model: nn.Module = timm.create_model(name, **{**arguments, "num_classes": classes, "device": "meta"})
    return model


def _classifier(model: nn.Module) -> tuple[str, ...]:
    cfg: Any = model.pretrained_cfg
    names = cfg.get("classifier") or ()
    return tuple(f"{n}.{p}" for n in ((names,) if isinstance(names, str) else names) for p in ("weight", "bias"))


def _recognise(name: str, model: nn.Module, checkpoint: Any) -> Match:
    match = recognise(
        checkpoint,
        model.state_dict(),
        dialects_of(model),
        f"the checkpoint does not fit {name};",
        optional=lambda key: key.startswith(("norm.", "head.")),
        droppable=lambda key: True,
    )
    return match


def _only_fit(source: Path, checkpoint: Any) -> tuple[str, Match]:
    """The one model of this package's that a checkpoint has the keys and shapes of.

    Raises:
        UserError: there is none, or there are several, which the message names.
    """
    fits: dict[str, Match] = {}
    refused: list[tuple[int, str]] = []  # the better, the larger the number
    for name, model in _candidates(checkpoint):
        try:
            match = _recognise(name, model, checkpoint)
        except CheckpointError as error:
            best = nearest(checkpoint, model)
            score = len(best.sources) - len(best.unexpected) - len(best.missing) if best else 0
            refused.append((score, str(error)))
            continue
        wrong = [key for key in match.wrong_shapes if key not in _classifier(model)]
        if not wrong:
            fits[name] = match
            continue
        own = tuple(model.state_dict()[wrong[0]].shape)
        first = f"{wrong[0]}: {match.shape(wrong[0])} in the file, {own} in the model"
        refused.append(
            (len(match.sources) - len(wrong), f"{len(wrong)} tensors have another shape in {name}, the first: {first}")
        )
    most = max((len(match.sources) for match in fits.values()), default=0)
    fits = {name: match for name, match in fits.items() if len(match.sources) == most}
    if not fits:
        raise UserError(f"{source} is of no model that is known: {max(refused)[1]}")
    if len(fits) > 1:
        raise UserError(f"{source} fits {', '.join(fits)}; say which with model=NAME")
    return next(iter(fits.items()))


def _candidates(checkpoint: Any) -> Iterator[tuple[str, nn.Module]]:
    """The models of the families whose first one has about the keys of a checkpoint, whatever their depths.

    Where there is no such family, the first model of that which comes nearest, to say what differs.
    """
    families: dict[str, list[str]] = {}
    for name in package_models():
        families.setdefault(timm.model_entrypoint(name).__module__, []).append(name)
    shares = []
    for names in families.values():
        first = _on_meta(names[0], {})
        best = nearest(checkpoint, first)
        size = min(len(first.state_dict()), len(best.place.flat)) if best else 1
        shares.append((len(best.sources) / size if best else 0.0, names))
    if max(shares)[0] < 0.5:
        shares = [(0.5, max(shares)[1][:1])]
    for share, names in shares:
        if share >= 0.5:
            yield from ((name, _on_meta(name, {})) for name in names)


def _state(name: str, model: nn.Module, match: Match) -> dict[str, Tensor]:
    """The weights in our names and the model's shapes, the classifier in its own."""
    adapt = sys.modules[type(model).__module__].checkpoint_filter_fn
    own = model.state_dict()
    state = {key: value for key, value in adapt({**match.state()}, model).items() if not value.is_meta}
    if any(key in own and key not in state for key in match.initial):
        fresh = timm.create_model(name).state_dict()
        state = {**{key: fresh[key] for key in match.initial if key in fresh}, **state}
    there = {key: own[key] for key in own if key in state}
    check_state_dict(f"the checkpoint does not fit {name};", state, there, free=_classifier(model))
    return {**state, **match.extra()}


def _write(out: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    whole = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{out.name}-", dir=out.parent)
        os.close(descriptor)
        save_file(whole, temporary, metadata)
        mask = os.umask(0o077)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"out={out} cannot be written: {first_line(error)}; make room or give another file") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
