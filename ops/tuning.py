"""Tile configurations of the Triton kernels, for tools that measure them: `zoo tune` and the benchmarks.

A table maps problems to configurations; `observed` says what a call launches, `refused` what it could not, and
`forced` lets it launch something else.
"""

from ._tuning import Config, Key, Table, forced, load_table, observed, refused, save_table, table_path

__all__ = [
    "Config",
    "Key",
    "Table",
    "change_launchers",
    "forced",
    "load_table",
    "observed",
    "refused",
    "save_table",
    "table_path",
]


def change_launchers(**constants: int) -> None:
    """Change constants of the local ops' launchers in this process, to measure what they are worth.

    Args:
        constants: names as in `ops/_local/launch.py`, without the underscore in front, in lower case.

    Raises:
        ValueError: there is no such constant.
    """
    from ._local import launch

    for name, value in constants.items():
        if not hasattr(launch, f"_{name.upper()}"):
            raise ValueError(f"change_launchers: no constant {name!r} in ops/_local/launch.py")
        setattr(launch, f"_{name.upper()}", value)
    launch.forget_plans()
