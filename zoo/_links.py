"""What a checkout without links says. zoo/{models,ops,train,configs} are links to the folders beside zoo/; git writes
them as text files where core.symlinks is false, and then nothing of the package can be imported. Importing this checks.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _broken() -> list[str]:
    """The links that are text files, or lead nowhere."""
    paths = {name: os.path.join(_HERE, name) for name in ("models", "ops", "train", "configs")}
    return [n for n, path in paths.items() if os.path.isfile(path) or os.path.islink(path) and not os.path.isdir(path)]


def is_command() -> bool:
    """Whether the package is imported as a command: for `python -m zoo`, or by the console script."""
    return bool(sys.argv) and (sys.argv[0] == "-m" or os.path.basename(sys.argv[0]) in ("zoo", "zoo.exe"))


def _check() -> None:
    broken = _broken()
    if not broken:
        return
    message = (
        f"{', '.join(f'zoo/{name}' for name in broken)} in {os.path.dirname(_HERE)} should be links to folders and are "
        "not; `git config core.symlinks true && git checkout -- zoo` there makes them links; where the file system "
        "has none, install a wheel of the package and import it from another folder"
    )
    if is_command():
        print(f"zoo: {message}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(message, name="zoo")


_check()
