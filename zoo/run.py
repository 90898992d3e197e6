"""`zoo run`: any Python program, unchanged, that finds this package's models in timm's registry."""

import os
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from zoo.errors import UserError

__all__ = ["USAGE", "program"]

USAGE = """usage: zoo run PROGRAM [ARGUMENT ...]
       zoo run -m MODULE [ARGUMENT ...]

Run a Python program with zoo's models registered with timm, as `python PROGRAM` would: a script, a folder or archive
with a __main__.py, a console script of the environment, or a module. With several processes:
torchrun --nproc-per-node 8 -m zoo run train.py --model nat_tiny ..."""


def program(argv: Sequence[str]) -> Callable[[], object]:
    """What runs the program that the arguments name; it leaves with the program's own exit code.

    Raises:
        UserError: no program is named, there is none of that name, or it is not Python's.
    """
    if not argv:
        raise UserError("zoo run needs a program; `zoo run --help` says more")
    if argv[0] == "-m":
        if len(argv) == 1:
            raise UserError("zoo run -m needs a module; `zoo run --help` says more")
        return _module(argv[1], argv[1:])
    if argv[0].startswith("-"):
        raise UserError(f"zoo run takes no option {argv[0]}; options of the program follow its name")
    path = argv[0] if os.path.exists(argv[0]) else _console_script(argv[0])
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "__main__.py")):
        raise UserError(f"{path}: the folder has no __main__.py to run")
    place = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))

    def run() -> None:
        import zoo.models  # noqa: F401

        sys.argv = [path, *argv[1:]]
        sys.path[0:1] = [place]
        runpy.run_path(path, run_name="__main__")

    return run


def _module(name: str, argv: Sequence[str]) -> Callable[[], object]:
    try:
        found = find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UserError(f"no module {name!r} in this environment or in {os.getcwd()}")

    def run() -> None:
        import zoo.models  # noqa: F401

        sys.argv = list(argv)
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return run


def _console_script(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))
    if found is None:
        raise UserError(f"no file, folder or command {name!r}; for a module say `zoo run -m {name}`")
    with open(found, "rb") as file:
        first = file.readline(200)
    if not first.startswith(b"#!") or b"python" not in first:
        raise UserError(f"{found} is not a program of Python's, so it cannot be run with zoo's models registered")
    return found
