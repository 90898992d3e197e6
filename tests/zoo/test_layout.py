"""The house: links, the direction of imports, and what importing the package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKED = ("models", "ops", "train", "configs")

# What each folder may import of this package; the command line sits on top of everything.
ALLOWED = {
    "ops": {"zoo.ops"},
    "models": {"zoo.models", "zoo.ops"},
    "zoo": {"zoo", "zoo.models", "zoo.ops"},
    "train": {"zoo", "zoo.models.checkpoints", "zoo.train", "zoo.configs"},
}
ON_TOP = {ROOT / "zoo" / "cli.py"}
THIRD_PARTY_OPS = {"torch", "triton"}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if node.module == "zoo"}
    return found


def _files(folder: str) -> list[Path]:
    return [
        p for p in (ROOT / folder).rglob("*.py") if not any(part in LINKED for part in p.relative_to(ROOT).parts[1:2])
    ]


@pytest.mark.parametrize("folder", LINKED)
def test_links(folder: str) -> None:
    link = ROOT / "zoo" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder
    assert (ROOT / folder / "__init__.py").is_file()


def _is_upward(module: str, folder: str) -> bool:
    if module.split(".")[0] != "zoo":
        return module.split(".")[0] in LINKED
    if module == "zoo" or folder == "zoo" and module.split(".")[1] not in ("train", "configs"):
        return folder in ("ops", "models")
    return not any(
        module == a or module.startswith(f"{a}.") for a in ALLOWED[folder] if a != "zoo" or folder == "train"
    )


@pytest.mark.parametrize("folder", ["ops", "models", "zoo", "train"])
def test_direction(folder: str) -> None:
    upward = {}
    for path in _files(folder):
        if path in ON_TOP:
            continue
        bad = sorted(m for m in _imports(path) if _is_upward(m, folder))
        if folder == "train":
            bad += sorted(
                m for m in _imports(path) if m.startswith(("zoo.ops", "zoo.models")) and m != "zoo.models.checkpoints"
            )
        if bad:
            upward[str(path.relative_to(ROOT))] = bad
    assert not upward


def test_direction_catches_an_upward_import() -> None:
    assert _is_upward("zoo.models.nat", "ops")
    assert _is_upward("zoo.train.app", "zoo")
    assert _is_upward("zoo", "models")
    assert _is_upward("ops.window", "models")
    assert not _is_upward("zoo.ops.window", "models")
    assert not _is_upward("zoo.registry", "train")


def test_ops_need_only_torch() -> None:
    standard = sys.stdlib_module_names
    foreign = {
        (str(p.relative_to(ROOT)), m)
        for p in _files("ops")
        for m in _imports(p)
        if (top := m.split(".")[0]) not in standard and top not in THIRD_PARTY_OPS | {"zoo"}
    }
    assert not foreign


def test_configs_are_never_imported() -> None:
    for folder in ("ops", "models", "zoo"):
        for path in _files(folder):
            assert not any(m.startswith("zoo.configs") for m in _imports(path)), path


def test_import_without_triton_or_gpu(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import zoo, zoo.ops, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'hydra' not in sys.modules and 'sklearn' not in sys.modules, 'it imports the training stack'\n"
        "import timm; assert timm.is_model('nat_tiny')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr


def _room(parts: tuple[str, ...]) -> str:
    """The folder inside which a private name may be used: a top-level folder, or a wing of train."""
    if parts[:1] == ("zoo",) and parts[1:2] and parts[1] in LINKED:
        parts = parts[1:]
    if parts[:1] == ("train",) and parts[1:2] and (ROOT / "train" / parts[1]).is_dir():
        return "/".join(parts[:2])
    return parts[0] if parts else ""


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _private_owner(dotted: str) -> str | None:
    """The room that owns the first private part of a dotted name of this repository's; None where it has none."""
    parts = tuple(dotted.split("."))
    if parts[0] not in ("zoo", "benchmarks"):
        return None
    return next((_room(parts[:i]) for i, part in enumerate(parts) if _is_private(part)), None)


def _private_uses(source: str, path: str) -> list[tuple[int, str]]:
    """Line and dotted name of every private name of another room's that a file imports, or takes from an import."""
    parts = tuple(Path(path).with_suffix("").parts)
    room = _room(parts[:-1])
    package = (parts if parts[0] in ("zoo", "benchmarks") else ("zoo", *parts))[:-1]
    tree = ast.parse(source)
    bound: dict[str, str] = {}  # what the names that imports bind stand for
    found = []

    def use(line: int, dotted: str) -> None:
        owner = _private_owner(dotted)
        if owner is not None and owner != room:
            found.append((line, dotted))

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                use(node.lineno, alias.name)
                whole = alias.name if alias.asname else alias.name.split(".")[0]
                bound[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                use(node.lineno, f"{module}.{alias.name}")
                bound[alias.asname or alias.name] = f"{module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            names, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                names.insert(0, value.attr)
                value = value.value
            if isinstance(value, ast.Name) and value.id in bound:
                use(node.lineno, ".".join([bound[value.id], *names]))
    return found


def test_private_names_stay_in_their_folder() -> None:
    """Subfolders count as inside, and the tests of a folder may."""
    offenders = []
    for folder in ("zoo", "models", "ops", "train", "benchmarks"):
        for file in sorted(_files(folder)):
            path = file.relative_to(ROOT).as_posix()
            uses = _private_uses(file.read_text(), path)
            offenders += [f"{path}:{line}: {name}" for line, name in uses]
    assert not offenders, "private to another folder; give the name a public one:\n" + "\n".join(offenders)


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("train/build.py", "import torch\nfrom zoo.models._builder import x", [(2, "zoo.models._builder.x")]),
        ("train/build.py", "from zoo.models.nat import _cfg", [(1, "zoo.models.nat._cfg")]),
        ("train/build.py", "def f():\n    import zoo.ops._local as local", [(2, "zoo.ops._local")]),
        ("train/detection/app.py", "from zoo.train import app\napp._parsed(1)", [(2, "zoo.train.app._parsed")]),
        ("train/detection/app.py", "from ..engine import _Signals", [(1, "zoo.train.engine._Signals")]),
        ("train/app.py", "from .detection.app import _help", [(1, "zoo.train.detection.app._help")]),
        ("benchmarks/ops.py", "import zoo.ops.window\nzoo.ops.window._x.y", [(2, "zoo.ops.window._x")]),
        ("benchmarks/models.py", "from zoo.models.nat import NAT\nNAT._init", [(2, "zoo.models.nat.NAT._init")]),
        ("zoo/bench.py", "from benchmarks.ops import _time", [(1, "benchmarks.ops._time")]),
        ("models/nat.py", "from zoo._version import x", [(1, "zoo._version.x")]),
        ("ops/window/op.py", "from zoo.ops._checks import x\nfrom .._register import y\nfrom . import _z", []),
        ("ops/_local/a.py", "from zoo.ops.window.op import _x", []),
        ("train/app.py", "from zoo.train.engine import _x\nfrom torch._dynamo import y\nx = y._z", []),
        ("zoo/cli.py", "from zoo._version import __version__", []),
        ("train/report.py", "from zoo.errors import __all__\nself._x = 1", []),
    ],
)
def test_private_names_are_found(path: str, source: str, found: list[tuple[int, str]]) -> None:
    assert _private_uses(source, path) == found
