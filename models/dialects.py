"""Dialects: how other programs name the parameters of our models, and which of them a checkpoint speaks.

A family states its dialects as rules from our names to theirs, so what a file must hold is known before it is looked
at: a dialect fits a checkpoint where it accounts for every parameter of the model under one prefix, and for every key
of the checkpoint. Wrappers (`module.`, `model.`, `backbone.`, a detector around its backbone) are such prefixes and are
found, not listed. A mixture of two dialects, or a file of two models, fits none.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ._sources import CheckpointError

__all__ = [
    "OURS",
    "WRAPPERS",
    "Dialect",
    "Match",
    "dialects_of",
    "fit_pointwise",
    "moved_by",
    "nearest",
    "part_of",
    "recognise",
    "rename",
    "unwrapped",
]

StateDict = dict[str, Tensor]
Replacement = str | Callable[[re.Match[str]], str]

# Names of the wrapper around a state_dict, the preferred first. timm's files keep raw and averaged weights side by side
# and mean the averaged ones; the original repositories that store `model_ema` beside `model` (MaxViT, STViT) evaluate
# `model`; mmengine and Lightning put the averaged ones into `state_dict` and the raw ones beside it.
WRAPPERS = (
    "state_dict_ema", "ema", "params_ema", "state_dict", "model", "model_state_dict", "model_ema", "module", "net",
    "weights", "params", "ema_state_dict", "current_model_state",
)  # fmt: skip
# what torch.compile, FSDP and activation checkpointing put into a name
_INSIDE = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
# a prefix of these alone is a wrapper around the whole model; any other one says that the rest is other parts
_WHOLE = re.compile(r"(?:(?:module|model|net|network|\w*ema\w*|\w*averaged\w*|online_model)\.)*")
_AVERAGED = re.compile(r"(?!.*online_model)(?:.*[._])?(?:ema|averaged|swa)(?:[._]|$)")  # matched from the start
# what may lie beside a model inside its wrapper: losses, metrics, the images' statistics, averages and their counters
_BESIDE = re.compile(
    r"(?:(?:module|model|net|network)\.)*"
    r"(?:\w*criterion\w*|\w*loss\w*|\w*metrics?\w*|\w*acc(?:uracy)?|data_preprocessor|normali[sz]e\w*|mean|std"
    r"|\w*ema\w*|\w*averaged\w*|online_model|steps?|initted)(?:\.|$)"
)
_RAW = re.compile(r"(?:model|module|net|network|online_model)\.")  # beside averaged weights
_COUNTERS = re.compile(r"(?:^|\.)(?:total_ops|total_params|n_averaged)$")  # of profilers and of averaging
_UNCOUNTED = ".num_batches_tracked"  # which files older than PyTorch 0.4.1 do not have


@dataclass(frozen=True)
class Dialect:
    """How another program names a family's parameters.

    Attributes:
        name: the program, as messages call it.
        rules: (pattern, replacement) of `re.sub`, applied in that order to our name. In the result `{a,b}` stands for
            several tensors that ours joins along the first dimension, `<a|b>` for the one of them that is there, and
            `[i]` at the end for row i of a tensor.
        ignored: pattern of their keys that hold nothing of the model's, such as index buffers.
        absent: pattern of our names that they do not have and whose initial values stay.
        zero: pattern of our biases that they do not have.
    """

    name: str
    rules: tuple[tuple[str, Replacement], ...] = ()
    ignored: str | None = None
    absent: str | None = None
    zero: str | None = None

    def spell(self, name: str) -> list[list[str]]:
        """Their keys for a parameter of ours: for every tensor that ours joins, the alternatives."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        joined = _expanded([name], "{", ",", "}")
        return [_expanded([part], "<", "|", ">") for part in joined]


def _expanded(names: list[str], opening: str, between: str, closing: str) -> list[str]:
    while opening in names[0]:
        names = [
            f"{name.partition(opening)[0]}{choice}{name.partition(closing)[2]}"
            for name in names
            for choice in name.partition(opening)[2].partition(closing)[0].split(between)
        ]
    return names


OURS = Dialect("ours")


def moved_by(step: int, template: str) -> Callable[[re.Match[str]], str]:
    """A replacement: the template with the number that the pattern's group found, moved by `step`."""
    return lambda match: template.format(int(match[1]) + step)


def dialects_of(model: nn.Module) -> Sequence[Dialect]:
    """The dialects that a model's family states."""
    found: Sequence[Dialect] = getattr(sys.modules[type(model).__module__], "DIALECTS", (OURS,))
    return found


class _Place(NamedTuple):
    """A state_dict inside a checkpoint: the names of its wrappers, and its tensors."""

    path: tuple[str, ...]
    flat: Mapping[str, Tensor]


class _Spelling(NamedTuple):
    """A dialect's keys: of every parameter, of what other forms of the model have, and all of them."""

    own: Mapping[str, list[list[str]]]
    beside: Mapping[str, str]  # their key -> our name
    meaning: Mapping[str, str]  # their key -> our name, of both kinds


@dataclass(frozen=True)
class Match:
    """How far a dialect accounts for a checkpoint.

    Attributes:
        dialect: the dialect.
        where: wrappers and prefix of the model's keys in the checkpoint, each with its dot.
        sources: of every parameter that is there, its keys.
        missing: parameters that are not there and should be.
        initial: parameters that are not there, whose initial values stay.
        zero: biases that are not there and are zero.
        beside: our names of what other forms of the model have, such as norms of outputs, and their keys.
        dropped: keys that are no part of the model and are known to be none.
        unexpected: keys that are not known.
        wrong_shapes: parameters that are there in another shape.
    """

    dialect: Dialect
    prefix: str
    place: _Place
    sources: Mapping[str, list[str]]
    missing: list[str]
    initial: list[str]
    zero: list[str]
    beside: Mapping[str, str]
    dropped: list[str]
    unexpected: list[str]
    wrong_shapes: list[str]

    @property
    def where(self) -> str:
        return "".join(f"{part}." for part in self.place.path) + self.prefix

    @property
    def rank(self) -> tuple[Any, ...]:
        """Which of several copies is meant: the smallest."""
        return (_rank(self.place.path), not _AVERAGED.match(self.prefix))

    @property
    def used(self) -> set[tuple[tuple[str, ...], str]]:
        return {(self.place.path, key.partition("[")[0]) for keys in self.sources.values() for key in keys}

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape in the file, that of a 1 x 1 convolution's weight as a Linear's."""
        return _core(_shape(self.place.flat, self.sources[name]))

    def state(self) -> StateDict:
        """The parameters in our names."""
        found = {name: _joined(self.place.flat, keys) for name, keys in self.sources.items()}
        for name in self.zero:
            weight = found[f"{name.removesuffix('bias')}weight"]
            found[name] = weight.new_zeros(weight.shape[0])
        return found

    def extra(self) -> StateDict:
        """What other forms of the model have, in our names."""
        return {name: _joined(self.place.flat, [key]) for name, key in self.beside.items()}

    def output_norms(self) -> dict[int, StateDict]:
        """weight and bias of the norm on each output of a detector's backbone, by level."""
        found: dict[int, StateDict] = {}
        for level in range(8):
            spelt = self.prefix + self.dialect.spell(f"stages.{level}.out_norm.weight")[0][0].removesuffix(".weight")
            beside = f"{self.prefix.removesuffix('body.')}norm{level}"  # of `zoo.Backbone`, beside its `body`
            for name in (spelt, beside) if self.prefix.endswith("body.") else (spelt,):
                values = {p: self.place.flat.get(f"{name}.{p}") for p in ("weight", "bias")}
                if all(value is not None for value in values.values()):
                    found[level] = cast(StateDict, values)
        return found


def _joined(flat: Mapping[str, Tensor], keys: list[str]) -> Tensor:
    parts = [_part(flat, key) for key in keys]
    try:
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    except RuntimeError as error:
        shapes = "; ".join(f"{key}: {tuple(part.shape)}" for key, part in zip(keys, parts, strict=True))
        raise CheckpointError(f"the checkpoint holds parts of one tensor in shapes that differ: {shapes}") from error


def _part(flat: Mapping[str, Tensor], key: str) -> Tensor:
    """The tensor of a key, or the row of it that the key names; the whole where it has no such row."""
    name, bracket, row = key.partition("[")
    value, index = flat[name], int(row.rstrip("]") or 0)
    return value[index] if bracket and value.ndim and index < len(value) else value


def _plain_keys(tensors: Mapping[str, Tensor]) -> StateDict:
    """A state_dict without what torch.compile, FSDP and activation checkpointing put into its keys."""
    plain: StateDict = {}
    for key, value in tensors.items():
        name = _INSIDE.sub("", key)
        if name in plain:
            raise CheckpointError(f"the checkpoint holds {name} twice, with and without a wrapper's name inside")
        plain[name] = value
    return plain


def _places(value: Any, path: tuple[str, ...] = ()) -> Iterator[_Place]:
    """The state_dicts inside a checkpoint."""
    tensors = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield _Place(path, _plain_keys(tensors))
    for key, inner in value.items():
        if isinstance(key, str) and isinstance(inner, Mapping) and len(path) < 4:
            yield from _places(inner, (*path, key))


def _rank(path: tuple[str, ...]) -> tuple[int, ...]:
    """Which of several copies their wrappers' names say is meant: the smallest."""
    return (*(WRAPPERS.index(part) if part in WRAPPERS else len(WRAPPERS) for part in path), -1)


def unwrapped(checkpoint: Any) -> StateDict | None:
    """The state_dict of a checkpoint whose model is not known, of several the one that their wrappers prefer."""
    places = list(_places(checkpoint)) if isinstance(checkpoint, Mapping) else []
    places = [p for p in places if any("." in key for key in p.flat)] or places
    best = min(places, key=lambda p: (_rank(p.path), -len(p.flat)), default=None)
    return None if best is None else dict(best.flat)


def _other_forms(own: Mapping[str, Tensor]) -> list[str]:
    """Names that a model has in other forms: norms of its outputs, a final norm and a classifier."""
    stages = {name.split(".")[1] for name in own if name.startswith("stages.")}
    modules = [*(f"stages.{i}.out_norm" for i in sorted(stages)), "norm", "head.norm", "head.fc"]
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [f"{module}.{part}" for module in modules for part in parts if f"{module}.{part}" not in own]


def _spelling(dialect: Dialect, own: Mapping[str, Tensor], others: Sequence[str]) -> _Spelling:
    spelt = {name: dialect.spell(name) for name in own}
    meaning = {key.partition("[")[0]: name for name, parts in spelt.items() for part in parts for key in part}
    beside = {key: name for name in others for key in dialect.spell(name)[0] if key not in meaning}
    return _Spelling(spelt, beside, {**beside, **meaning})


def _prefixes(flat: Mapping[str, Tensor], keys: Mapping[str, str]) -> list[str]:
    """The prefixes under which a dialect's keys are found, those of at least half as many as under the best."""
    counts: Counter[str] = Counter()
    for key in flat:
        start = 0
        while start >= 0:
            if key[start:] in keys:
                counts[key[:start]] += 1
            dot = key.find(".", start)
            start = dot + 1 if dot >= 0 else -1
    most = max(counts.values(), default=0)
    return [prefix for prefix, count in counts.items() if 2 * count >= most]


def _match(place: _Place, dialect: Dialect, spelling: _Spelling, own: Mapping[str, Tensor], prefix: str) -> Match:
    flat = place.flat
    sources: dict[str, list[str]] = {}
    missing, initial, zero = [], [], []
    for name, parts in spelling.own.items():
        found = [next((prefix + k for k in part if (prefix + k).partition("[")[0] in flat), None) for part in parts]
        if None not in found:
            sources[name] = [key for key in found if key is not None]
        elif dialect.zero is not None and re.search(dialect.zero, name):
            zero.append(name)
        elif dialect.absent is not None and re.search(dialect.absent, name) or name.endswith(_UNCOUNTED):
            initial.append(name)
        else:
            missing.append(name)
    zero = [name for name in zero if f"{name.removesuffix('bias')}weight" in sources]
    if not any(".out_norm." in name for name in sources):  # a dense form that starts from a classifier's weights
        initial += [name for name in missing if ".out_norm." in name]
        missing = [name for name in missing if ".out_norm." not in name]
    used = {key.partition("[")[0] for keys in sources.values() for key in keys}
    averages = {f"ema_{key.replace('.', '_')}" for key in flat}  # as mmcv 1 keeps them
    beside, dropped, unexpected = {}, [], []
    whole = _WHOLE.fullmatch(prefix) is not None
    averaged = _AVERAGED.match(prefix) is not None
    for key in flat:
        if key in used:
            continue
        local = key.removeprefix(prefix) if key.startswith(prefix) else None
        if local is not None and local in spelling.beside:
            beside[spelling.beside[local]] = key
        elif (
            (dialect.ignored is not None and local is not None and re.search(dialect.ignored, local))
            or _COUNTERS.search(key)
            or key in averages
            or (local is None and (not whole or _BESIDE.match(key) or averaged and _RAW.match(key)))
        ):
            dropped.append(key)
        else:
            unexpected.append(key)
    wrong = [name for name, keys in sources.items() if _core(_shape(flat, keys)) != _core(own[name].shape)]
    return Match(dialect, prefix, place, sources, missing, initial, zero, beside, dropped, unexpected, wrong)


def _shape(flat: Mapping[str, Tensor], keys: list[str]) -> tuple[int, ...]:
    shapes = [tuple(_part(flat, key).shape) for key in keys]
    return shapes[0] if len(shapes) == 1 else (sum(sum(s[:1]) for s in shapes), *shapes[0][1:])


def _core(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape in which a 1 x 1 convolution's weight is that of a Linear."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def _matches(checkpoint: Any, own: Mapping[str, Tensor], dialects: Sequence[Dialect]) -> list[Match]:
    others = _other_forms(own)
    places = list(_places(checkpoint)) if isinstance(checkpoint, Mapping) else []
    found = []
    for dialect in dialects:
        spelling = _spelling(dialect, own, others)
        for place in places:
            for prefix in _prefixes(place.flat, spelling.meaning):
                found.append(_match(place, dialect, spelling, own, prefix))
    return found


def nearest(checkpoint: Any, model: nn.Module) -> Match | None:
    """The reading of a checkpoint as a model that accounts for most of both; None where no key is known."""
    return _nearest(_matches(checkpoint, model.state_dict(), dialects_of(model)))


def _nearest(matches: Sequence[Match]) -> Match | None:
    known = [m for m in matches if m.sources]
    return max(known, key=lambda m: (len(m.sources), -len(m.unexpected) - len(m.missing)), default=None)


def recognise(
    checkpoint: Any,
    own: Mapping[str, Tensor],
    dialects: Sequence[Dialect],
    headline: str,
    *,
    optional: Callable[[str], bool] = lambda name: False,
    droppable: Callable[[str], bool] = lambda name: False,
) -> Match:
    """The one reading of a checkpoint that accounts for all of a model and for all of the checkpoint.

    Args:
        checkpoint: nested containers of tensors.
        own: the model's state_dict, which may be on the meta device.
        dialects: those of its family.
        headline: what the message begins with.
        optional: whether a parameter may be missing.
        droppable: whether a tensor of another form of the model, by our name, may be left out.

    Raises:
        CheckpointError: there is none, or there are several; one line with the first keys of both sides.
    """
    matches = _matches(checkpoint, own, dialects)
    fits = [
        m
        for m in matches
        if m.sources and not m.unexpected and all(map(optional, m.missing)) and all(map(droppable, m.beside))
    ]
    if not fits:
        raise CheckpointError(f"{headline} {_misfit(checkpoint, own, dialects, matches, optional, droppable)}")
    wrong = [sum(not optional(name) for name in m.wrong_shapes) for m in fits]
    fits = [m for m, count in zip(fits, wrong, strict=True) if count == min(wrong)]
    best = min(fits, key=lambda m: (m.rank, -len(m.sources)))
    for other in fits:
        if other.rank == best.rank and not other.used <= best.used:
            raise CheckpointError(
                f"{headline} it holds two models, under {best.where!r} and {other.where!r}; save one of them alone, or "
                f"write it out with `zoo convert FILE part={best.where.rstrip('.')} out=FILE.safetensors`"
            )
    return best


def _misfit(
    checkpoint: Any,
    own: Mapping[str, Tensor],
    dialects: Sequence[Dialect],
    matches: Sequence[Match],
    optional: Callable[[str], bool],
    droppable: Callable[[str], bool],
) -> str:
    best = _nearest(matches)
    if best is None:
        keys = [k for place in _places(checkpoint) for k in place.flat] if isinstance(checkpoint, Mapping) else []
        return (
            f"its keys are of no dialect that is known of this model ({', '.join(d.name for d in dialects)}): "
            f"the file's first keys are {'; '.join(keys[:4]) or 'none'}, the model's {'; '.join(list(own)[:4])}"
        )
    missing = [name for name in best.missing if not optional(name)]
    unexpected = [*best.unexpected, *(name for name in best.beside if not droppable(name))]
    place = f", under {best.where!r}" if best.where else ""
    problems = [_mixture(best, own, dialects)]
    for count, what, first in (
        (len(missing), "keys of the model are not in the file", missing),
        (len(unexpected), "keys of the file are not in the model", unexpected),
    ):
        if count:
            problems.append(f"{count} {what}, the first: {'; '.join(first[:4])}")
    if all(name.startswith(("norm.", "head.")) for name in missing) and not best.unexpected:
        problems.append("it is a backbone alone, which features_only=True and zoo.Backbone take")
    return f"the nearest dialect is {best.dialect.name}{place}; {'; '.join(p for p in problems if p)}"


def _mixture(best: Match, own: Mapping[str, Tensor], dialects: Sequence[Dialect]) -> str:
    """Which other dialect the keys that one does not know are of."""
    others = _other_forms(own)
    for dialect in dialects:
        meaning = _spelling(dialect, own, others).meaning if dialect is not best.dialect else {}
        keys = [k for k in best.unexpected if k.removeprefix(best.prefix) in meaning]
        both = {*best.sources, *(meaning[k.removeprefix(best.prefix)] for k in keys)}
        if not keys or 2 * len(both) < len(own):  # names that they have in common with another model
            continue
        name = meaning[keys[0].removeprefix(best.prefix)]
        if name in best.sources:
            first = best.sources[name][0].partition("[")[0]
            return f"it is of two dialects: {first} and {keys[0]} both mean {name}"
        first = next(iter(best.sources.values()))[0].partition("[")[0]
        return f"it is of two dialects: {first} is a name of {best.dialect.name}, {keys[0]} of {dialect.name}"
    return ""


def part_of(checkpoint: Any, part: str) -> StateDict:
    """The tensors below a dotted path of a checkpoint, whose wrappers and prefixes it may go through."""
    places = list(_places(checkpoint)) if isinstance(checkpoint, Mapping) else []
    full = {".".join([*place.path, key]): value for place in places for key, value in place.flat.items()}
    return {key.removeprefix(f"{part}."): value for key, value in full.items() if key.startswith(f"{part}.")}


def rename(state_dict: Mapping[str, Tensor], model: nn.Module) -> StateDict:
    """A state_dict in our names, as far as the nearest dialect of the model's family goes; the rest as it was.

    A state_dict in our own names comes back as it is. Nothing is checked: `recognise` does.
    """
    own, best = model.state_dict(), nearest(state_dict, model)
    if best is None:
        return dict(state_dict)
    kept = {name: own[name] for name in best.initial if best.dialect.absent and re.search(best.dialect.absent, name)}
    rest = {key.removeprefix(best.prefix): best.place.flat[key] for key in best.unexpected}
    return fit_pointwise({**best.state(), **kept, **best.extra(), **rest}, own)


def fit_pointwise(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> StateDict:
    """A state_dict whose weights of 1x1 convolutions and Linear layers have the shape that the model has for them."""
    fitted: StateDict = {}
    for key, value in state_dict.items():
        shape = own[key].shape if key in own else value.shape
        pointwise = {len(shape), value.ndim} == {2, 4} and _core(shape) == _core(value.shape)
        fitted[key] = value.reshape(shape) if pointwise else value
    return fitted
