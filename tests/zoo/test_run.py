"""`zoo run`: programs that know nothing of this package, and commands that answer before anything is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from zoo.cli import main

PROGRAM = """
import sys, timm, beside
print(sys.argv[1:], __name__, timm.is_model("nat_tiny"), beside.VALUE)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "argv", ["zoo"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    for name in ("train.py", "package/__main__.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(PROGRAM)
        path.with_name("beside.py").write_text("VALUE = 7")
    (tmp_path / "script").write_text(f"#!{sys.executable}\n{PROGRAM}")
    (tmp_path / "script").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("program", ["train.py", "package", "script"])
def test_runs_as_python_would(program: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["run", program, "3", "--model", "x"])
    assert left.value.code == 3
    assert capsys.readouterr().out == "['3', '--model', 'x'] __main__ True 7\n"


def test_console_script(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir("/")
    with pytest.raises(SystemExit) as left:
        main(["run", "script", "0"])
    assert (left.value.code, capsys.readouterr().out) == (0, "['0'] __main__ True 7\n")


def test_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["zoo"])
    with pytest.raises(SystemExit):
        main(["run", "-m", "json.tool", "--help"])
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [[], ["-m"], ["nothing.py"], ["-m", "nothing.at.all"], ["--model"], ["empty"], ["ls"]], ids=str
)
def test_one_line(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty").mkdir()
    assert main(["run", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("zoo: ")
    assert err.count("\n") == 1
    assert not argv or argv[-1] in err


ANSWERS = [["--help"], ["--version"], ["list"], ["list", "--tags", "nat*"], ["run", "--help"]]


@pytest.mark.parametrize("argv", ANSWERS, ids=str)
def test_answers_without_pytorch(argv: list[str]) -> None:
    code = f"import sys; sys.argv = ['zoo']; from zoo.cli import main; main({argv}); sys.exit('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout
