"""The arguments `key=value` of commands that Hydra does not compose, into a dataclass of theirs."""

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.errors import UserError, first_line
from zoo.names import nearest_names

__all__ = ["parse_arguments"]

Config = TypeVar("Config")


def parse_arguments(command: str, schema: type[Config], argv: Sequence[str], paths: Sequence[str]) -> Config:
    """What a command line says of a dataclass of keys.

    Args:
        command: the name before the arguments, for messages: "zoo export".
        schema: a dataclass with defaults.
        argv: the arguments.
        paths: keys whose values are taken as they are, whatever characters they have; `~` is the home folder.

    Raises:
        UserError: no `key=value`, an unknown key, or a value of another type.
    """
    known = [f.name for f in fields(schema)]  # type: ignore[arg-type]
    plain, others = {}, []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"cannot read {argument!r}; arguments are key=value")
        if key not in known:
            near = nearest_names(key, known) or known
            raise UserError(f"unknown key {key!r}; the nearest keys are {', '.join(near)}")
        if key in paths:
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            plain[key] = os.path.expanduser(value[1:-1] if quoted else value)
        else:
            others.append(argument)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(others)))
    except OmegaConfBaseException as error:
        raise UserError(f"{command}: {first_line(error)}") from error
    assert isinstance(config, schema)
    for key, value in plain.items():
        setattr(config, key, value)
    return config
