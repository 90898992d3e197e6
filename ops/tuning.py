"""Tile configurations of the Triton kernels, for tools that measure them: `zoo tune` and the benchmarks.

A table maps problems to configurations; `observed` says what a call launches, `refused` what it could not, and
`forced` lets it launch something else.
"""

from ._tuning import Config, Key, Table, forced, load_table, observed, refused, save_table, table_path

__all__ = ["Config", "Key", "Table", "forced", "load_table", "observed", "refused", "save_table", "table_path"]
