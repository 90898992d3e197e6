"""What a run's own configuration becomes when the run is taken up again with overrides."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.errors import UserError
from zoo.train.compose import compose_config, forbid_targets, normalize, parse_overrides, prepare, typed, updated
from zoo.train.config import Schema
from zoo.train.runs import Run, newest_intact

__all__ = ["Changes", "resumed_config"]


@dataclass(frozen=True)
class Changes:
    """What may change: nothing that what was already computed depends on."""

    who: str  # as in "a resumed run keeps it"
    keys: tuple[str, ...]
    sections: tuple[str, ...]  # with their dot
    remedy: str

    def allow(self, key: str) -> bool:
        """Whether a key may change."""
        return key in self.keys or key.startswith(self.sections)

    def __str__(self) -> str:
        return ", ".join([*self.keys, *(f"{section}*" for section in self.sections)])


def resumed_config(
    run: Run, schema: Schema[Any], changes: Changes, overrides: Sequence[str], search_path: Sequence[str] = ()
) -> DictConfig:
    """The run's own configuration with the overrides that may change.

    Raises:
        UserError: an override conflicts with what the run was started with.
    """
    forbid_targets(run.config)
    if not run.sealed and newest_intact(run.path) is None:
        raise UserError(
            f"{run.path}/config.yaml was changed since it was written, and there is no checkpoint to compare it with; "
            "start a new run"
        )
    prepare(schema, overrides, search_path)
    config = typed(run.config, schema)
    parsed = [
        (key.replace("/", "."), value, text)
        for text, (key, value) in zip(overrides, parse_overrides(normalize(schema, overrides)), strict=True)
    ]
    for key, value, text in sorted(parsed, key=lambda found: "." in found[0]):  # choices before keys inside them
        if key == "resume":
            continue
        if changes.allow(key):
            config = updated(config, schema, key, value)
        elif changes.allow(f"{key}.") and isinstance(value, str) and "name" not in config[key]:  # as in logger=wandb
            chosen = compose_config(schema, [f"{key}={value}"], search_path)
            config = updated(config, schema, key, OmegaConf.select(chosen, key))
        elif (current := _current(config, key, value)) != value:
            raise UserError(
                f"{text} conflicts with the run's {key}={current}; {changes.who} keeps it "
                f"(what may change: {changes}); {changes.remedy}"
            )
    config.resume = None
    return config


def _current(config: DictConfig, key: str, value: Any) -> Any:
    """The run's value for a key, in the form that an override of it has."""
    current = None
    with suppress(OmegaConfBaseException):
        current = OmegaConf.select(config, key)
    if isinstance(current, DictConfig) and isinstance(value, str):
        current = current.get("name")  # a group's choice, such as model=nat_mini
    return OmegaConf.to_container(current) if OmegaConf.is_config(current) else current
