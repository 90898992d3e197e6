"""The house: links, the direction of imports, and what importing the package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKED = ("models", "ops", "train", "configs")

# What each folder may import of this package; the command line and the exporter sit on top of everything.
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
    assert not _is_upward("zoo.runs", "train")


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
