"""`zoo bench`: its messages, the search for tile configurations, and a dry run of the GPU benchmark."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from zoo import bench, ops
from zoo.cli import main
from zoo.processes import Ending

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
    from zoo.ops import _tuning as tuning
    from zoo.ops.tuning import Config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    slow, fast, wrong, big = Config(8, 64, 4, 1), Config(4, 16, 2, 1), Config(4, 32, 1, 1), Config(16, 16, 1, 1)
    monkeypatch.setattr(bench, "_candidates", lambda kind, direction, heuristic: [slow, wrong, fast, big])

    def running() -> Any:
        return tuning._FORCED.get(("window", "forward"))

    def times(step: Any, *_: Any) -> list[float]:
        return [{slow: 90.0, fast: 50.0, wrong: 1.0}.get(running(), 100.0)]

    monkeypatch.setattr(bench, "step_times", times)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if running() == big:
            raise tuning.OutOfResources(300_000, 100_000, "shared memory")
        out = ops.window_attention(q, k, v, 4, backend="triton")
        return out * 1.5 if running() == wrong else out

    tensors = [torch.randn(1, 4, 8, 1, 8, device=device) for _ in range(3)]
    found = bench.tune_problem(call, tensors, 1)
    (key,) = found
    assert bench.tune_problem(call, tensors, 1, {("window", "forward"): [slow, wrong]})[key] == (slow, 100.0, 90.0)
    assert not bench.tune_problem(call, tensors, 1, end=0.0)
    assert (key.kind, key.direction, key.box, key.size) == ("window", "forward", (4, 4), 5)
    assert found[key] == (fast, 100.0, 50.0)
    path = tmp_path / "table.json"
    tuning.save_table(path, {key: found[key][0]}, bench.environment(torch.device(device)))
    assert tuning.load_table(path) == {key: fast}
    assert json.loads(path.read_text())["environment"]["torch"] == torch.__version__


def test_candidates_begin_with_the_heuristics_neighbours() -> None:
    pytest.importorskip("triton")
    from zoo.ops.tuning import Config

    heuristic = Config(8, 64, 4, 1)
    found = bench._candidates("window", "forward", heuristic)
    assert heuristic not in found
    assert len(found) == len(set(found)) == 3 * 4 * 3 * 3 - 1
    neighbours = {
        Config(4, 64, 4, 1), Config(16, 64, 4, 1), Config(8, 32, 4, 1), Config(8, 128, 4, 1), Config(8, 64, 2, 1),
        Config(8, 64, 8, 1), Config(8, 64, 4, 2),
    }  # fmt: skip
    assert set(found[:7]) == neighbours


def test_a_budget_goes_to_one_problem_of_each_kind_first() -> None:
    searches = [bench.Search(i, "bfloat16", 64) for i in range(len(bench._problems(64)))]
    ordered = bench._headlines_first(searches)
    kinds = [s.problem.name.split()[0] for s in ordered]
    assert sorted(s.number for s in ordered) == [s.number for s in searches]
    count = len(set(kinds))
    assert len(set(kinds[:count])) == count
    assert ordered[0] == searches[0]


def test_candidates_that_cannot_run_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the processes of a budgeted search run, without the processes: passes are found, then their candidates."""
    pytest.importorskip("triton")
    from zoo import processes
    from zoo.ops import _tuning as tuning
    from zoo.ops.tuning import Config

    good, bad = Config(4, 32, 2, 1), Config(16, 128, 8, 3)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if bad in tuning._FORCED.values():
            raise tuning.OutOfResources(300_000, 100_000, "shared memory")
        return ops.window_attention(q, k, v, 4, backend="triton")

    def run(jobs: Any, **limits: Any) -> list[Ending]:
        endings = [Ending(None, begun=True) for _ in jobs]
        for job, ending in zip(jobs, endings, strict=True):
            try:
                job.function(ending.messages.append, *job.arguments)
            except tuning.OutOfResources as error:
                ending.failure = str(error)
        return endings

    device = "cuda" if torch.cuda.is_available() else "cpu"
    maps = [torch.randn(1, 4, 8, 1, 8, device=device) for _ in range(3)]
    monkeypatch.setattr(processes, "run", run)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench, "_candidates", lambda kind, direction, heuristic: [bad, good])
    monkeypatch.setattr(bench, "_problems", lambda batch: [bench.Problem("window", (), call)])
    monkeypatch.setattr(bench.Search, "tensors", lambda self: [x.clone() for x in maps])
    (compiled,) = bench._compile([bench.Search(0, "float32", 1)], 2, 0.0, math.inf)
    assert ("window", "forward") in compiled
    assert len(compiled) >= 2
    assert all(configs == [good] for configs in compiled.values())


def test_the_gpu_is_kept_busy_while_a_call_is_queued() -> None:
    assert bench.queue_ahead(host=10.0, flush=80.0) == 2
    assert bench.queue_ahead(host=800.0, flush=80.0) * 80.0 > 800.0
    assert bench.queue_ahead(host=1e9, flush=80.0) == 64


@pytest.fixture
def gpu_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("doing", "wrong", "notes"),
    [
        (("ours", "backward"), [None, "ERROR it broke"], [{}, {}]),
        (("flex", "backward"), [None, None], [{}, {"flex": "it broke"}]),
        (("the peers", ""), [None, None], [{"the peers": "it broke"}] * 2),
    ],
    ids=["ours", "a peer", "before the peers"],
)
def test_a_broken_case_keeps_what_was_measured(gpu_script: ModuleType, doing: Any, wrong: Any, notes: Any) -> None:
    """The process of a case died; its rows say in whose step, and the table is still printed."""
    rows: list[dict[str, Any]] = [
        {"op": "window", "case": "tiny", "mode": m, "peers": {}, "notes": {}} for m in ("forward", "backward")
    ]
    rows[0]["microseconds"] = 10.0
    if doing[0] != "ours":
        rows[1]["microseconds"] = 20.0
    if doing[0] == "flex":
        rows[0]["peers"]["flex"] = {"microseconds": 20.0, "ratio": 2.0}
    ending = Ending("it broke", begun=True, messages=[{"rows": rows, "doing": doing}])
    found = gpu_script.finished(ending, {"op": "window", "case": "tiny"})
    assert [row.get("wrong") for row in found] == wrong
    assert [row["notes"] for row in found] == notes
    table = gpu_script.op_table(found)
    assert len(table) == 3
    assert "10.0" in table[1]


@pytest.mark.parametrize("what", [{"op": "window", "case": "tiny"}, {"model": "nat_tiny", "compiled": False}])
def test_a_case_that_never_spoke_is_a_row(gpu_script: ModuleType, what: dict[str, Any]) -> None:
    (row,) = gpu_script.finished(Ending("it broke", begun=True), what)
    assert row["wrong"] == "ERROR it broke"
    table = gpu_script.op_table if "op" in what else gpu_script.model_table
    assert table([row])[1].endswith("ERROR it broke")


def dry_run(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], list[str]]:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert {"torch", "triton", "git_revision", "tuned_configurations"} <= set(report["environment"])
    assert not report["left_out"]
    return report, done.stdout.strip().splitlines()


def test_dry_run_of_the_ops(tmp_path: Path) -> None:
    """Every op and peer at tiny sizes in Triton's interpreter; nothing is wrong and no peer fails."""
    report, lines = dry_run(tmp_path, "--part", "ops")
    rows = report["results"]
    kinds = {"neighborhood", "window", "halo", "routing", "large_kernel", "super_token", "channel"}
    assert {row["op"] for row in rows} == kinds
    for row in rows:
        assert not row["notes"], row
        assert row["microseconds"] > 0
        assert row["peers"]
    assert [line.split()[0] for line in lines[-len(rows) :]] == [row["op"] for row in rows]


@pytest.mark.slow
def test_dry_run_of_a_model(tmp_path: Path) -> None:
    """Ours and timm's, eager and compiled, after both were compiled side by side."""
    report, lines = dry_run(tmp_path, "--part", "models", "--model", "van_b0", "--workers", "2", "--budget", "2000")
    rows = report["models"]
    assert [(row["mode"], row["compiled"]) for row in rows] == [
        ("forward", False), ("training", False), ("forward", True), ("training", True),
    ]  # fmt: skip
    assert report["prepared"]["models"]["finished"] == 4
    for row in rows:
        assert not row["notes"], row
        assert row["images_per_second"] > 0
        assert row["ratio"] > 0
    assert [line.split()[0] for line in lines[-len(rows) :]] == ["van_b0"] * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without a GPU")
def test_no_gpu_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "gpu.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "PyTorch sees no GPU here" in done.stderr
    assert not done.stdout
