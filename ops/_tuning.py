"""Tile configurations: what a table of this GPU says, exactly or for the nearest problem, and a heuristic else.

Tables are files `ops/tables/<name of the GPU>.json`, written by `zoo tune` and by nothing else; a GPU without one
runs the heuristic. A table is a suggestion: where it asks for more shared memory than there is, the heuristic's own
configurations follow, each of which needs less than the one before it.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from ._triton import Like

__all__ = [
    "Config",
    "Key",
    "Table",
    "forced",
    "key",
    "launch",
    "load_table",
    "observed",
    "refused",
    "save_table",
    "table_path",
]

FOLDER = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Config:
    """How a kernel is cut up; every number is a power of two.

    tile: positions of a tile, per axis in the local ops, in all elsewhere.
    columns: most keys (or channels, where a tile walks channels) in one block.
    """

    tile: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Key:
    """A problem, as tables name it. It leaves the batch out, so that an image's bits do not depend on the others.

    box: sides of what a query sees, or of whatever else decides the work per position.
    size: log2 of the map's positions, rounded up.
    """

    kind: str
    direction: str
    dtype: str
    dim: int
    box: tuple[int, int]
    size: int


Table = dict[Key, Config]
Refusal = tuple[Key, Config, str]
_FORCED: dict[tuple[str, str], Config] = {}
_OBSERVERS: list[Table] = []
_REFUSALS: list[list[Refusal]] = []
_FITTED: dict[tuple[Any, ...], int] = {}


def key(kind: str, direction: str, x: torch.Tensor | Like, dim: int, box: tuple[int, int], positions: int) -> Key:
    """The key of a call on tensors like x."""
    size = math.ceil(math.log2(max(1, positions)))
    return Key(kind, direction, str(x.dtype).removeprefix("torch."), dim, box, size)


def launch(
    problem: Key, heuristic: Sequence[Config], device: torch.device, run: Callable[[Config], None], *shape: Any
) -> None:
    """Run the first configuration that the device has the resources for, and remember it for calls of this shape.

    Raises:
        ValueError: the table of this GPU is malformed.
        OutOfResources: not even the last configuration fits.
    """
    configs = _configs(problem, tuple(heuristic), gpu_name(device))
    memory = (problem, shape, device, configs)
    for i in range(_FITTED.get(memory, 0), len(configs)):
        try:
            run(configs[i])
        except OutOfResources as error:
            for seen in _REFUSALS:
                seen.append((problem, configs[i], str(error)))
            if i + 1 == len(configs):
                raise
            continue
        _FITTED[memory] = i
        for table in _OBSERVERS:
            table.setdefault(problem, configs[i])
        return


def _configs(problem: Key, heuristic: tuple[Config, ...], name: str | None) -> tuple[Config, ...]:
    forced = _FORCED.get((problem.kind, problem.direction))
    if forced is not None:
        return (forced,)
    found = None if name is None else _lookup(problem, name, FOLDER)
    return heuristic if found is None else (found, *(c for c in heuristic if c != found))


@functools.lru_cache(maxsize=4096)
def _lookup(problem: Key, name: str, folder: Path) -> Config | None:
    """The table's word on a problem: its own entry, or the nearest of the same kind, direction and dtype."""
    path = table_path(name, folder)
    if not path.exists():
        return None
    table = load_table(path)
    if problem in table:
        return table[problem]
    alike = [k for k in table if (k.kind, k.direction, k.dtype) == (problem.kind, problem.direction, problem.dtype)]
    return table[min(alike, key=lambda k: _distance(k, problem))] if alike else None


def _distance(a: Key, b: Key) -> tuple[float, float, int]:
    """The head dim decides most of the shared memory, then the box; the size of the map matters least."""
    dim = abs(math.log2(max(16, a.dim)) - math.log2(max(16, b.dim)))
    box = abs(math.log2(a.box[0] * a.box[1]) - math.log2(b.box[0] * b.box[1]))
    return dim, box, abs(a.size - b.size)


@functools.lru_cache(maxsize=16)
def gpu_name(device: torch.device) -> str | None:
    """The name of a GPU; None where the kernels run in Triton's interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def table_path(name: str, folder: Path | None = None) -> Path:
    """Where the table of a GPU of this name is."""
    return (folder or FOLDER) / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def load_table(path: Path) -> Table:
    """Read a table.

    Raises:
        ValueError: it is malformed; the message names the file and the entry.
    """
    try:
        entries = json.loads(path.read_text())["entries"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"the table of tile configurations {path} cannot be read: {error!r}") from error
    table: Table = {}
    for number, entry in enumerate(entries):
        try:
            problem, config = _entry(entry)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the table of tile configurations {path}, entry {number}: {error}") from error
        table[problem] = config
    return table


def _entry(entry: dict[str, Any]) -> tuple[Key, Config]:
    names = {f.name for f in fields(Key)} | {f.name for f in fields(Config)}
    if set(entry) != names:
        raise ValueError(f"its fields are {sorted(entry)}, not {sorted(names)}")
    numbers = [*entry["box"], *(entry[name] for name in ("dim", "size", "tile", "columns", "warps", "stages"))]
    if len(entry["box"]) != 2 or any(type(n) is not int or n < 0 for n in numbers) or min(*entry["box"]) < 1:
        raise ValueError(f"box must hold two positive integers, and numbers must be integers: {entry}")
    config = Config(*(entry[f.name] for f in fields(Config)))
    odd = [n for n in (config.tile, config.columns, config.warps) if n < 1 or n & (n - 1)]
    if odd or config.stages < 1 or config.tile < 4 or config.columns < 16:
        raise ValueError(f"tile (4 or more), columns (16 or more) and warps must be powers of two: {config}")
    return Key(**{f.name: entry[f.name] for f in fields(Key)} | {"box": tuple(entry["box"])}), config


def save_table(path: Path, table: Table, environment: dict[str, Any]) -> None:
    """Write a table beside what it was measured with; entries that the file already has for other problems are kept."""
    kept = load_table(path) if path.exists() else {}
    order = sorted((kept | table).items(), key=lambda item: str(item[0]))
    entries = [asdict(k) | asdict(c) for k, c in order]
    path.write_text(json.dumps({"environment": environment, "entries": entries}, indent=1) + "\n")
    _lookup.cache_clear()


@contextlib.contextmanager
def forced(kind: str, direction: str, config: Config) -> Iterator[None]:
    """Inside the block, one pass of one kind of op runs this configuration and no other."""
    before = _FORCED.get((kind, direction))
    _FORCED[kind, direction] = config
    try:
        yield
    finally:
        del _FORCED[kind, direction]
        if before is not None:
            _FORCED[kind, direction] = before


@contextlib.contextmanager
def observed() -> Iterator[Table]:
    """Collect the keys of the launches inside the block, in order, and the configuration that each ran first."""
    seen: Table = {}
    _OBSERVERS.append(seen)
    try:
        yield seen
    finally:
        _OBSERVERS.remove(seen)


@contextlib.contextmanager
def refused() -> Iterator[list[Refusal]]:
    """Collect what the device had not the resources for inside the block: problem, configuration, and its reason."""
    seen: list[Refusal] = []
    _REFUSALS.append(seen)
    try:
        yield seen
    finally:
        _REFUSALS.remove(seen)
