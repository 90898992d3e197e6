"""A checkout whose links are text files says so, and its folders cannot be imported by their bare names."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zoo.configs
import zoo.models
import zoo.ops
import zoo.train

ROOT = Path(__file__).parents[2]
FOLDERS = ("models", "ops", "train", "configs")
REMEDY = "git config core.symlinks true && git checkout -- zoo"


def run(cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(cwd), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True)


def python(cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return run(cwd, sys.executable, *argv)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with its links, committed."""
    root = tmp_path_factory.mktemp("origin") / "checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("zoo", *FOLDERS):
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=ignore)
    git = ("git", "-c", "user.name=zoo", "-c", "user.email=zoo@example.org")
    for command in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "all")):
        result = run(root, *git, *command)
        assert result.returncode == 0, result.stderr
    return root


@pytest.fixture
def linkless(checkout: Path, tmp_path: Path) -> Path:
    """A clone on which git writes links as text files."""
    clone = tmp_path / "clone"
    result = run(tmp_path, "git", "clone", "-q", "-c", "core.symlinks=false", str(checkout), str(clone))
    assert result.returncode == 0, result.stderr
    assert all((clone / "zoo" / name).is_file() for name in FOLDERS)
    return clone


def test_checkout_without_links_says_so_and_how_to_mend_it(linkless: Path) -> None:
    result = python(linkless, "-c", "import zoo")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: zoo/models, zoo/ops, zoo/train, zoo/configs in ")
    assert REMEDY in last
    code = "try:\n    import zoo.train.app\nexcept ImportError as error:\n    print(error)"
    assert python(linkless, "-c", code).stdout.splitlines() == [last.removeprefix("ImportError: ")]
    mended = subprocess.run(REMEDY, shell=True, cwd=linkless, capture_output=True, text=True)
    assert mended.returncode == 0, mended.stderr
    assert all((linkless / "zoo" / name).is_symlink() for name in FOLDERS)
    result = python(linkless, "-c", "import zoo; print(zoo.__file__)")
    assert result.stdout.strip() == str(linkless / "zoo/__init__.py"), result.stderr


@pytest.mark.parametrize("module", ["zoo", "zoo.train", "zoo.cli"])
def test_command_without_links_is_one_line(linkless: Path, module: str) -> None:
    result = python(linkless, "-m", module, "list")
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("zoo: zoo/models, ")
    assert REMEDY in result.stderr


def test_console_script_without_links_is_one_line(linkless: Path) -> None:
    script = linkless / "bin/zoo"
    script.parent.mkdir()
    script.write_text("import sys\nfrom zoo.cli import main\nsys.exit(main())\n")
    result = python(linkless, str(script), "list")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert REMEDY in result.stderr


@pytest.mark.parametrize("name", FOLDERS)
def test_one_link_that_leads_nowhere(checkout: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(checkout / "zoo", tmp_path / "zoo", symlinks=True)
    for folder in FOLDERS:
        if folder != name:
            (tmp_path / folder).symlink_to(ROOT / folder)
    last = python(tmp_path, "-c", "import zoo").stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: zoo/{name} in ")


BARE = """
import importlib, sys
for name in ("models", "ops", "train", "configs"):
    for module in (name, f"{name}.nothing"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(error)
    assert name not in sys.modules
"""


@pytest.mark.parametrize("before", ["", "import zoo.ops, zoo.train, zoo.configs"])
def test_bare_folder_refuses(checkout: Path, before: str) -> None:
    result = python(checkout, "-c", before + BARE)
    lines = [f"`{name}` is a folder of the package zoo; import zoo.{name}" for name in FOLDERS for _ in range(2)]
    assert result.stdout.splitlines() == lines, result.stderr


def test_bare_folder_as_a_command_is_one_line(checkout: Path) -> None:
    result = python(checkout, "-m", "train", "epochs=1")
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "import zoo.train" in result.stderr


def test_folders_have_their_names_through_the_links() -> None:
    for module in (zoo.models, zoo.ops, zoo.train, zoo.configs):
        assert module.__name__.startswith("zoo.")
    assert pickle.loads(pickle.dumps(zoo.models.nat.NAT)) is zoo.models.nat.NAT
    assert zoo.models.nat.NAT.__module__ == "zoo.models.nat"
