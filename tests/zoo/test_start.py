"""How commands begin and end as processes: an early Ctrl-C, a reader that goes away, a full disk."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = [
    "model.kwargs.depths=[1,1]", "model.kwargs.num_heads=[1,2]", "model.kwargs.embed_dim=16", "device=cpu",
    "batch_size=128", "epochs=1",
]  # fmt: skip
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _start(*argv: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "zoo", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
    )


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])
def test_ctrl_c_while_it_starts(tmp_path: Path, seconds: float) -> None:
    process = _start("train", f"run_dir={tmp_path / 'run'}", *TINY)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    if process.returncode == -signal.SIGINT:
        pytest.skip("Python itself had not started")
    if process.returncode == 75:
        assert "resume=" in out
        return
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert "interrupted" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "argv", [["list"], ["list", "--markdown", "nat_mini"], ["--help"], ["train", "--help"], ["train", "--cfg", "job"]]
)
def test_nobody_reads(argv: list[str]) -> None:
    process = _start(*argv)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_a_training_goes_on_when_nobody_reads(tmp_path: Path) -> None:
    process = _start("train", f"run_dir={tmp_path / 'run'}", "log_every=1", *TINY)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("model: nat_digits")
    assert process.stdout.readline().startswith("epoch 1/1  step 1/11")
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert (tmp_path / "run" / "summary.json").exists()


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from zoo.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("size", [1000, 100_000])
def test_a_full_disk(tmp_path: Path, size: int) -> None:
    run = tmp_path / "run"
    argv = [sys.executable, "-c", LIMITED, str(size), "train", f"run_dir={run}", *TINY]
    result = subprocess.run(argv, capture_output=True, text=True, env=ENV)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "make room and resume" in line
    assert not list(run.rglob("*.tmp"))
    assert not list(run.rglob("*.pt"))
