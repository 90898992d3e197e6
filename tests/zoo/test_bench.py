"""`zoo bench`: its messages, the search for tile configurations, and a dry run of the GPU benchmark."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo import bench, ops
from zoo.cli import main

ROOT = Path(__file__).parents[2]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert "ops, models, gpu, tune" in capsys.readouterr().out
    assert main(["bench"]) == 2


def test_unknown_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tuen"]) == 2
    assert capsys.readouterr().err == "zoo: no benchmark 'tuen'; there are ops, models, gpu, tune\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without a GPU")
def test_tuning_without_a_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tune"]) == 2
    err = capsys.readouterr().err
    assert err == "zoo: `zoo bench tune` measures a GPU, and PyTorch sees none on this machine\n"


def test_without_a_checkout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "zoo" / "bench.py"))
    assert main(["bench", "ops"]) == 2
    assert "needs a checkout of the repository" in capsys.readouterr().err


def test_arguments_and_exit_code_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "benchmarks" / "ops.py"
    script.parent.mkdir()
    script.write_text("import sys; sys.exit(3 if sys.argv[1:] == ['--quick'] else 4)\n")
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "zoo" / "bench.py"))
    assert main(["bench", "ops", "--quick"]) == 3


def test_every_problem_of_the_tuner_is_a_valid_call() -> None:
    """The shapes are checked on meta tensors, with the batch that tuning starts from."""
    for problem in bench._problems(64):
        out = problem.call(*(torch.empty(shape, device="meta") for shape in problem.shapes))
        assert out.numel(), problem.name


def test_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fastest candidate wins, one that disagrees never does, and a table made of them is read back."""
    pytest.importorskip("triton")
    from zoo.ops._local import tuning
    from zoo.ops._local.tuning import Config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    slow, fast, wrong, big = Config(8, 64, 4, 1), Config(4, 16, 2, 1), Config(4, 32, 1, 1), Config(16, 16, 1, 1)
    monkeypatch.setattr(bench, "_candidates", lambda kind, direction: [slow, wrong, fast, big])

    def running() -> Any:
        return tuning._FORCED.get(("window", "forward"))

    def microseconds(step: Any, *_: Any) -> float:
        return {slow: 90.0, fast: 50.0, wrong: 1.0}.get(running(), 100.0)

    monkeypatch.setattr(bench, "_microseconds", microseconds)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if running() == big:
            raise tuning.OutOfResources(300_000, 100_000, "shared memory")
        out = ops.window_attention(q, k, v, 4, backend="triton")
        return out * 1.5 if running() == wrong else out

    tensors = [torch.randn(1, 4, 8, 1, 8, device=device) for _ in range(3)]
    found = bench.tune_problem(call, tensors, 1)
    (key,) = found
    assert (key.kind, key.direction, key.box, key.size) == ("window", "forward", (4, 4), 5)
    assert found[key] == (fast, 100.0, 50.0)
    path = tmp_path / "table.json"
    tuning.save_table(path, {key: found[key][0]}, bench.environment(torch.device(device)))
    assert tuning.load_table(path) == {key: fast}
    assert json.loads(path.read_text())["environment"]["torch"] == torch.__version__


def test_dry_run_of_the_gpu_benchmark(tmp_path: Path) -> None:
    """Every op and peer at tiny sizes in Triton's interpreter; nothing is wrong and no peer fails."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert {"torch", "triton", "git_revision"} <= set(report["environment"])
    rows = report["results"]
    kinds = {"neighborhood", "window", "halo", "routing", "large_kernel", "super_token", "channel"}
    assert {row["op"] for row in rows} == kinds
    for row in rows:
        assert not row["notes"], row
        assert row["microseconds"] > 0
        assert row["peers"] or row["op"] == "neighborhood"
    last = done.stdout.strip().splitlines()[-len(rows) :]
    assert [line.split()[0] for line in last] == [row["op"] for row in rows]
