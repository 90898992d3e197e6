"""From the command line to a typed configuration, and from Hydra's errors to one line."""

import difflib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import timm
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from zoo.errors import UserError, first_line
from zoo.registry import nearest_names, package_models
from zoo.train.config import EvalConfig, TrainConfig, validate

__all__ = [
    "SCHEMAS",
    "compose_config",
    "forbid_targets",
    "from_container",
    "known_keys",
    "normalize",
    "prepare",
    "typed",
]

Config = TypeVar("Config", TrainConfig, EvalConfig)
SCHEMAS: dict[str, type[Any]] = {"train": TrainConfig, "eval": EvalConfig}
# Sections whose keys are free: an override sets them without Hydra's `+`.
_FREE = ("model.kwargs", "optim.kwargs")


def known_keys(schema: type[Any], prefix: str = "") -> Iterator[str]:
    """All keys of a configuration, dotted."""
    for item in fields(schema):
        kind = item.default_factory if callable(item.default_factory) else item.type
        yield f"{prefix}{item.name}"
        if isinstance(kind, type) and is_dataclass(kind):
            yield from known_keys(kind, f"{prefix}{item.name}.")


def normalize(overrides: Sequence[str]) -> list[str]:
    """Let free sections take new keys without Hydra's `+`."""
    return [f"++{o}" if o.startswith(tuple(f"{p}{end}" for p in _FREE for end in (".", "="))) else o for o in overrides]


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


def _unknown_key(key: str, schema: type[Any]) -> str:
    near = difflib.get_close_matches(key, list(known_keys(schema)), n=3, cutoff=0.5)
    if not near:
        near = [k for k in known_keys(schema) if k.split(".")[-1] == key.split(".")[-1]][:3]
    hint = f"the nearest keys are {', '.join(near)}" if near else "`--help` lists the keys"
    return f"unknown key {key!r}; {hint}"


def _explain_value(text: str, schema: type[Any]) -> str | None:
    """A message of OmegaConf's as one line, where it is one that users meet."""
    full = re.search(r"full_key: (\S+)", text)
    key = full.group(1) if full else ""
    if re.search(r"Key '[^']+' (is not in struct|not in )", text):
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
    if "Interpolation key" in text:
        return f"{key}: {text.splitlines()[0]}; quote a dollar sign that is meant as one"
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing.group(1)} is not set; give {missing.group(1)}=VALUE"
    return None


def _explain(error: Exception, schema: type[Any]) -> str:
    """One line that names the key or value and the remedy."""
    if isinstance(error, OverrideParseException):
        return f"cannot read the override {error.override!r}; overrides are key=value, lists key=[a,b]"
    texts = [str(error), str(error.__cause__ or "")]
    unknown = re.match(r"Could not override '([^']+)'", texts[0])
    if unknown:
        return _unknown_key(unknown.group(1), schema)
    if "Ambiguous value" in texts[0]:
        return f"{texts[0].splitlines()[0]}; write a list as key=[a,b], or sweep over the values with --multirun"
    for text in reversed(texts):
        found = _explain_value(text, schema)
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
        import zoo  # noqa: F401  registers the models

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


def prepare(search_path: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Register the schemas and check what reaches Hydra itself; returns the overrides in the form that Hydra takes.

    Raises:
        UserError: a `_target_`, a setting of Hydra's that is not open, or a search path that does not exist.
    """
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if re.search(r"(^|[.{,\s'\"])_(target|partial|call)_", override):
            raise UserError(f"{override}: a configuration cannot name code to run; use the keys that `--help` lists")
        open_keys = (
            "hydra.searchpath",
            "hydra.sweep.",
            "hydra.sweeper.",
            "hydra/sweeper",
            "hydra/launcher",
            "hydra.launcher.",
        )
        if key.startswith("hydra") and not key.startswith(open_keys):
            raise UserError(f"{key} is not open to overrides; open are {', '.join(k.rstrip('.') for k in open_keys)}")
    result = normalize(overrides)
    if search_path:
        for folder in search_path:
            if not Path(folder).is_dir():
                raise UserError(
                    f"no configuration folder at {folder}; give the folder that holds model/, data/, experiment/ ..."
                )
        if any(o.lstrip("+").startswith("hydra.searchpath=") for o in overrides):
            raise UserError("both --config-dir and hydra.searchpath are given; keep one")
        paths = ",".join(f"'file://{Path(folder).resolve()}'" for folder in search_path)
        result.append(f"hydra.searchpath=[{paths}]")
    return result


def compose_config(name: str, overrides: Sequence[str], search_path: Sequence[str] = ()) -> DictConfig:
    """Compose configs/NAME.yaml with overrides.

    Raises:
        UserError: a key, a value or a choice is wrong; the message is one line.
    """
    schema = SCHEMAS[name]
    prepared = prepare(search_path, overrides)
    for _ in range(4):  # a model without a file of its own is registered, and the composition tried again
        GlobalHydra.instance().clear()
        try:
            with (
                warnings.catch_warnings(record=True) as caught,
                initialize_config_module("zoo.configs", version_base="1.3"),
            ):
                warnings.simplefilter("always")
                composed = compose(name, overrides=prepared)
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
        return typed(composed, schema)
    raise UserError("the model choices of this configuration do not resolve; give model.name=NAME")


def typed(config: Any, schema: type[Any]) -> DictConfig:
    """A configuration merged onto its schema, resolved and free of code.

    Raises:
        UserError: a key or value does not fit the schema.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
        container = OmegaConf.to_container(merged, resolve=True)
        forbid_targets(container)
        return OmegaConf.merge(OmegaConf.structured(schema), container)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, schema)) from error


def from_container(config: Any, schema: type[Config]) -> Config:
    """The configuration as an instance of its dataclass, validated.

    Raises:
        UserError: a value is missing, of the wrong type, or out of range.
    """
    try:
        instance = OmegaConf.to_object(typed(config, schema))
    except MissingMandatoryValue as error:
        key = re.search(r"full_key: (\S+)", str(error))
        name = key.group(1) if key else first_line(error)
        raise UserError(f"{name} is not set; give {name}=VALUE") from error
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, schema)) from error
    assert isinstance(instance, schema)
    validate(instance)
    return instance
