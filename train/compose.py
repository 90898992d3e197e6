"""From the command line to a typed configuration, and from Hydra's errors to one line."""

import difflib
import functools
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import timm
from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.base import Container
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    GrammarParseError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from zoo.errors import UserError, first_line
from zoo.names import nearest_names
from zoo.registry import package_models
from zoo.train.config import Schema

__all__ = [
    "PATHS",
    "VettedLoader",
    "compose_config",
    "forbid_targets",
    "from_container",
    "known_keys",
    "normalize",
    "override_value",
    "own_hydra_section",
    "parse_overrides",
    "prepare",
    "typed",
    "updated",
]

Config = TypeVar("Config")
_HYDRA_KEYS = (
    "hydra.searchpath",
    "hydra.sweep.",
    "hydra.sweeper.",
    "hydra/sweeper",
    "hydra/launcher",
    "hydra.launcher.",
)
_SEARCH_PATH = "hydra.searchpath="
# Keys that hold a path (or, of weights, a choice): their values are taken as they are, and `~` is the home folder.
PATHS = (
    "data.root",
    "run_root",
    "run_dir",
    "resume",
    "run",
    "out",
    "report",
    "pretrained",
    "model.pretrained",
    "weights",
)
# Resolvers that a configuration may use: Hydra's own, and these very words of ours. All others could carry what is in
# the environment into a run folder, a logger or an export, or decide by it what is trained.
_HYDRA_RESOLVERS = ("now", "hydra", "python_version")
_OWN_RESOLVERS = (("logger.wandb.mode", "${oc.env:WANDB_MODE,online}"),)
# What Hydra writes into its own section itself; the rest is what this package's files say
_HYDRA_RUNTIME = ("overrides", "runtime", "searchpath", "mode")
_JOB_RUNTIME = ("name", "override_dirname", "id", "num", "config_name")
_NO_PATH = ("", "null", "true", "false")


def known_keys(schema: type[Any], prefix: str = "") -> Iterator[str]:
    """All keys of a configuration, dotted."""
    for item in fields(schema):
        kind = item.default_factory if callable(item.default_factory) else item.type
        yield f"{prefix}{item.name}"
        if isinstance(kind, type) and is_dataclass(kind):
            yield from known_keys(kind, f"{prefix}{item.name}.")


def _quote(text: str) -> str:
    """A text in quotes of Hydra's grammar, where a backslash counts only before a quote."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


def _plain_path(value: str) -> str:
    """A path as it stands in an override, in Hydra's quotes unless the user has quoted it or named no path."""
    if value.lower() in _NO_PATH or re.fullmatch(r"'.*'|\".*\"", value, re.DOTALL):
        return value
    return _quote(os.path.expanduser(value))


def _with_plain_paths(override: str, sweep: bool) -> str:
    """An override whose value is a path, in Hydra's grammar whatever characters the path has.

    In a sweep, commas separate values, and sweep functions (glob, choice) stay what they are.
    """
    key, equals, value = override.partition("=")
    if not equals or key.startswith("~") or key.lstrip("+") not in PATHS:
        return override
    if key.endswith("pretrained") and value.isdecimal():  # no path is meant
        return override
    if not sweep:
        return f"{key}={_plain_path(value)}"
    if re.match(r"\w+\(", value) or re.search("['\"]", value):
        return override
    return f"{key}={','.join(map(_plain_path, value.split(',')))}"


def normalize(schema: Schema[Any], overrides: Sequence[str], sweep: bool = False) -> list[str]:
    """Let free sections take new keys without Hydra's `+`, and paths have any character without quotes."""
    free = tuple(f"{section}{end}" for section in schema.free for end in (".", "="))
    return [f"++{o}" if o.startswith(free) else _with_plain_paths(o, sweep) for o in overrides]


def parse_overrides(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Key and value of every override.

    Raises:
        UserError: one is no override.
    """
    parser = OverridesParser.create()
    pairs = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
            pairs.append((override.key_or_group, override.value()))
        except (HydraException, ValueError) as error:
            raise UserError(f"cannot read the override {text!r}; overrides are key=value, lists key=[a,b]") from error
    return pairs


def override_value(overrides: Sequence[str], key: str) -> str | None:
    """What the last override of a key says, as text; None where there is none, or where it is empty or null."""
    found = [o.split("=", 1)[1].strip("'\"") for o in overrides if o.lstrip("+").startswith(f"{key}=")]
    if not found or found[-1] in ("", "null"):
        return None
    return os.path.expanduser(found[-1]) if key in PATHS else found[-1]


def forbid_targets(config: Any, path: str = "") -> None:
    """Raise UserError for any `_target_`, with which Hydra would let a configuration run code."""
    if isinstance(config, dict):
        for key, value in config.items():
            if str(key) in ("_target_", "_partial_", "_call_"):
                raise UserError(
                    f"{path}{key}={value!r}: a configuration cannot name code to run; use the keys that `--help` lists"
                )
            forbid_targets(value, f"{path}{key}.")
    elif isinstance(config, list):
        for index, value in enumerate(config):
            forbid_targets(value, f"{path}{index}.")


def _resolvers(text: str) -> list[str]:
    """The resolvers that OmegaConf would call for a value, such as oc.env for ${oc.env:HOME}."""
    if "${" not in text:
        return []
    try:
        waiting: list[Any] = [parse(text)]
    except GrammarParseError:
        return []  # OmegaConf refuses it as well
    found = []
    while waiting:
        node = waiting.pop()
        if isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext):
            found.append(node.resolverName().getText())
        waiting += getattr(node, "children", None) or ()
    return found


def _strings(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The dotted keys and values of all strings in plain containers."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(config, list | tuple):
        for index, value in enumerate(config):
            yield from _strings(value, f"{key}.{index}")
    elif isinstance(config, str):
        yield key, config


def _closed(key: str, text: str) -> UserError:
    return UserError(f"{key}={text}: a configuration cannot call a resolver; write the value itself")


def _forbid_resolvers(config: Any, key: str = "", allowed: Sequence[str] = ()) -> None:
    """Raise UserError where OmegaConf would call a resolver for a value of a configuration."""
    raw = OmegaConf.to_container(config, resolve=False) if isinstance(config, Container) else config
    for name, text in _strings(raw, key):
        if any(resolver not in allowed for resolver in _resolvers(text)) and (name, text) not in _OWN_RESOLVERS:
            raise _closed(name, text)


@contextmanager
def _hydra_resolvers() -> Iterator[None]:
    """Leave OmegaConf no resolvers but Hydra's own: a defaults list is resolved before its values can be looked at."""
    table = BaseContainer._resolvers
    away = {name: table.pop(name) for name in list(table) if name not in _HYDRA_RESOLVERS}
    try:
        yield
    finally:
        table.update(away)


def _hydra_section(config: DictConfig) -> dict[str, Any]:
    """What a composition says to Hydra itself, without what Hydra adds."""
    section: Any = OmegaConf.to_container(config.hydra, resolve=False)
    section["job"] = {k: v for k, v in section["job"].items() if k not in _JOB_RUNTIME}
    return {k: v for k, v in section.items() if k not in _HYDRA_RUNTIME}


def _vet(composed: DictConfig, own: Mapping[str, Any]) -> None:
    """Raise UserError where configuration files say to Hydra what is this package's to say, or call resolvers.

    Args:
        composed: a composition with its section `hydra`.
        own: that section as the package's files and the command line alone make it.
    """
    section = _hydra_section(composed)
    for part in ("sweeper", "launcher"):
        target = str((section[part] or {}).get("_target_"))
        if not target.startswith(("hydra._internal.core_plugins.", "hydra_plugins.")):
            raise UserError(f"hydra.{part}._target_={target}: a configuration cannot name code to run; name a plugin")
        if section[part] != own[part]:
            _forbid_resolvers(section[part], f"hydra.{part}", _HYDRA_RESOLVERS)
    for part in [*own, *(k for k in section if k not in own)]:
        if part not in ("sweeper", "launcher") and section.get(part) != own.get(part):
            said, ours = section.get(part), own.get(part)
            key = f"hydra.{part}"
            if isinstance(said, dict) and isinstance(ours, dict):
                key += f".{next((k for k in said if said[k] != ours.get(k)), '*')}"
            raise UserError(f"{key} is not open to configurations; remove it")
    plain: Any = OmegaConf.to_container(composed, resolve=False)
    _forbid_resolvers({k: v for k, v in plain.items() if k != "hydra"})


class VettedLoader(ConfigLoaderImpl):
    """Hydra's loader, for a sweep: every composition, each job's too, is looked at before Hydra acts on it."""

    def __init__(self, search_path: Any, own: Mapping[str, Any]) -> None:
        super().__init__(search_path)
        self.own = own

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        with _hydra_resolvers():
            composed = super().load_configuration(*args, **kwargs)
        _vet(composed, self.own)
        return composed


def own_hydra_section(schema: Schema[Any], prepared: Sequence[str]) -> dict[str, Any]:
    """Hydra's section as the package's own files and the command line make it.

    Args:
        schema: what is composed.
        prepared: the overrides, as `prepare` returns them.
    """
    own = (o for o in prepared if o.lstrip("+~").startswith("hydra") and not o.startswith(_SEARCH_PATH))
    return _own_hydra_section(schema, tuple(own))


@functools.lru_cache(16)
def _own_hydra_section(schema: Schema[Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    packages = [f"{_SEARCH_PATH}[{','.join(_quote(f'pkg://{p}') for p in schema.packages)}]"] if schema.packages else []
    return _hydra_section(_compose(schema, [*overrides, *packages]))


def _compose(schema: Schema[Any], prepared: Sequence[str]) -> DictConfig:
    """Hydra's composition, with its section `hydra`."""
    GlobalHydra.instance().clear()
    with initialize_config_module("zoo.configs", version_base="1.3"), _hydra_resolvers():
        return compose(schema.name, overrides=list(prepared), return_hydra_config=True)


def _unknown_key(key: str, schema: Schema[Any]) -> str:
    keys = list(known_keys(schema.config))
    last = key.split(".")[-1]
    named = [k for k in keys if k.split(".")[-1] == last]  # as optim.lr is for lr
    near = [*named, *difflib.get_close_matches(key, keys, n=3, cutoff=0.5)]
    if not near:  # or spelt nearly as its last part
        parts = difflib.get_close_matches(last, {k.split(".")[-1] for k in keys}, n=2, cutoff=0.7)
        near = [k for part in parts for k in keys if k.split(".")[-1] == part]
    near = list(dict.fromkeys(near))[:3]
    hint = f"the nearest keys are {', '.join(near)}" if near else "`--help` lists the keys"
    return f"unknown key {key!r}; {hint}"


def _explain_value(error: BaseException | None, schema: Schema[Any]) -> str | None:
    """An error of OmegaConf's as one line, where it is one that users meet."""
    if error is None:
        return None
    text = str(error)
    key = str(getattr(error, "full_key", None) or "")
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and key:
        return _unknown_key(key, schema)
    wrong = re.search(r"Value '(.*)' of type '(\w+)' could not be converted to (\w+)", text)
    if wrong:
        return f"{key}={wrong.group(1)} is not of the right type; give a value of type {wrong.group(3)}"
    wrong = re.search(r"Value '(.*)' is not a valid (\w+)", text)
    if wrong:
        return f"{key}={wrong.group(1)} is not of the right type; give a value of type {wrong.group(2)}"
    if "is not Optional" in text:
        return f"{key}=null is not possible; give a value"
    if "not a supported primitive" in text or "is incompatible with type hint" in text or "Cannot" in text:
        return f"{key}: {text.splitlines()[0]}; `--help` shows the types"
    closed = re.search(r"Unsupported interpolation type (\S+)", text)
    if closed:
        where = f"{key}: " if key else ""
        return f"{where}a configuration cannot call the resolver {closed.group(1)}; write the value itself"
    if isinstance(error, InterpolationKeyError):
        return f"{key}: {text.splitlines()[0]}; quote a dollar sign that is meant as one"
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing.group(1)} is not set; give {missing.group(1)}=VALUE"
    return None


def _explain(error: Exception, schema: Schema[Any]) -> str:
    """One line that names the key or value and the remedy."""
    if isinstance(error, OverrideParseException):
        return f"cannot read the override {error.override!r}; overrides are key=value, lists key=[a,b]"
    texts = [str(error), str(error.__cause__ or "")]
    unknown = re.match(r"Could not override '([^']+)'", texts[0])
    if unknown:
        return _unknown_key(unknown.group(1), schema)
    if "Ambiguous value" in texts[0]:
        return f"{texts[0].splitlines()[0]}; write a list as key=[a,b], or sweep over the values with --multirun"
    for raised in (error.__cause__, error):
        found = _explain_value(raised, schema)
        if found:
            return found
    lines = [line.strip() for line in "\n".join(t for t in texts if t).splitlines()]
    return f"configuration: {' '.join(dict.fromkeys(line for line in lines if line))}; `--help` lists the keys"


def _register_model(name: str) -> None:
    """Make a model that has no file under configs/model/ a choice of its own."""
    ConfigStore.instance().store(group="model", name=name, node={"name": name})


def _missing_choice(error: MissingConfigException, overrides: Sequence[str]) -> str:
    """The line for a group choice that has no file; '' where the choice could be made up and no error remains.

    A model that timm knows becomes a choice; so does the augmentation that goes with a data configuration of the
    user's own, with the defaults of its keys.
    """
    group, _, name = str(error.missing_cfg_file or "").rpartition("/")
    options = sorted(o for o in error.options or [] if not o.startswith("_"))
    if group == "model":
        if timm.is_model(name):
            _register_model(name)
            return ""
        near = nearest_names(name.split(".")[0], {*options, *package_models(), *timm.list_models()})
        return f"unknown model {name!r}; the nearest names are {', '.join(near or options)}; `zoo list` prints all"
    if group == "augment" and f"data={name}" in overrides and not any(o.startswith("augment=") for o in overrides):
        ConfigStore.instance().store(group="augment", name=name, node={})
        return ""
    if not group:
        return f"no configuration {error.missing_cfg_file!r}; {first_line(error)}"
    if group == "experiment" and name.startswith("coco_") and not any(o.startswith("coco_") for o in options):
        return f"unknown choice experiment={name}; coco_ are the recipes of `zoo detect`, here are {', '.join(options)}"
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}? there " if near else "there "
    return f"unknown choice {group}={name}; {hint}are {', '.join(options)}"


def prepare(
    schema: Schema[Any], overrides: Sequence[str], search_path: Sequence[str] = (), sweep: bool = False
) -> list[str]:
    """Register the schema and check what reaches Hydra itself; returns the overrides in the form that Hydra takes.

    Raises:
        UserError: a `_target_`, a setting of Hydra's that is not open, or a search path that does not exist.
    """
    ConfigStore.instance().store(name=f"{schema.name}_schema", node=schema.config)
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if re.search(r"(^|[.{,\s'\"])_(target|partial|call)_", override):
            raise UserError(f"{override}: a configuration cannot name code to run; use the keys that `--help` lists")
        hydra = _HYDRA_RESOLVERS if key.startswith("hydra") else ()
        if any(resolver not in hydra for resolver in _resolvers(override)):
            raise _closed(key, override.partition("=")[2])
        if key.startswith("hydra") and not key.startswith(_HYDRA_KEYS):
            raise UserError(f"{key} is not open to overrides; open are {', '.join(k.rstrip('.') for k in _HYDRA_KEYS)}")
    for folder in search_path:
        if not Path(folder).is_dir():
            raise UserError(
                f"no configuration folder at {folder}; give the folder that holds model/, data/, experiment/ ..."
            )
    given = [o for o in overrides if o.lstrip("+").startswith(_SEARCH_PATH)]
    if search_path and given:
        raise UserError("both --config-dir and hydra.searchpath are given; keep one")
    if not schema.packages and not search_path:
        return normalize(schema, overrides, sweep)
    paths = [f"pkg://{package}" for package in schema.packages]
    paths += [p.strip(" '\"") for o in given for p in o.split("=", 1)[1].strip("[] ").split(",")]
    paths += [f"file://{Path(folder).resolve()}" for folder in search_path]
    quoted = ",".join(map(_quote, paths))
    return [*normalize(schema, [o for o in overrides if o not in given], sweep), f"{_SEARCH_PATH}[{quoted}]"]


def compose_config(schema: Schema[Any], overrides: Sequence[str], search_path: Sequence[str] = ()) -> DictConfig:
    """Compose the configuration of a schema with overrides.

    Raises:
        UserError: a key, a value or a choice is wrong; the message is one line.
    """
    prepared = prepare(schema, overrides, search_path)
    for _ in range(4):  # a model without a file of its own is registered, and the composition tried again
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                composed = _compose(schema, prepared)
        except MissingConfigException as error:
            problem = _missing_choice(error, overrides)
            if problem:
                raise UserError(problem) from error
            continue
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(_explain(error, schema)) from error
        unavailable = [str(w.message) for w in caught if "is not available" in str(w.message)]
        if unavailable:
            raise UserError(
                f"hydra.searchpath: {unavailable[0].splitlines()[0]}; give an existing folder as file:///PATH"
            )
        _vet(composed, own_hydra_section(schema, prepared))
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        return typed(composed, schema)
    raise UserError("the model choices of this configuration do not resolve; give model.name=NAME")


def typed(config: Any, schema: Schema[Any]) -> DictConfig:
    """A configuration merged onto its schema, resolved and free of code.

    Raises:
        UserError: a key or value does not fit the schema.
    """
    _forbid_resolvers(config)  # before merging, which may resolve
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema.config), config)
        container = OmegaConf.to_container(merged, resolve=True)
        forbid_targets(container)
        for key, text in _strings(container):
            if "${" in text:  # that was escaped, and would be resolved the next time
                raise UserError(f"{key}={text}: a value cannot hold a dollar sign with a brace; leave it out")
        return OmegaConf.merge(OmegaConf.structured(schema.config), container)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, schema)) from error


def updated(config: DictConfig, schema: Schema[Any], key: str, value: Any) -> DictConfig:
    """The configuration with another value.

    Raises:
        UserError: key or value does not fit the schema.
    """
    changed = OmegaConf.create(OmegaConf.to_container(config))
    OmegaConf.update(changed, key, value, force_add=True)
    return typed(changed, schema)


def from_container(config: Any, schema: Schema[Config]) -> Config:
    """The configuration as an instance of its dataclass, validated.

    Raises:
        UserError: a value is missing, of the wrong type, or out of range.
    """
    try:
        instance = OmegaConf.to_object(typed(config, schema))
    except MissingMandatoryValue as error:
        name = error.full_key or first_line(error)
        raise UserError(f"{name} is not set; give {name}=VALUE") from error
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, schema)) from error
    assert isinstance(instance, schema.config)
    for path_key in PATHS:
        section, _, name = path_key.rpartition(".")
        owner = getattr(instance, section, None) if section else instance
        value = getattr(owner, name, None)
        if isinstance(value, str) and value.startswith("~"):
            setattr(owner, name, os.path.expanduser(value))
    schema.validate(instance)
    return instance
