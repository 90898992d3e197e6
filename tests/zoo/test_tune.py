"""`zoo tune`: its messages, and the search for tile configurations."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zoo import ops, timing, tune
from zoo.cli import main
from zoo.ops.examples import select
from zoo.processes import Ending


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without a GPU")
def test_without_a_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    err = capsys.readouterr().err
    assert err == "zoo: `zoo tune` measures a GPU, and PyTorch sees none on this machine\n"


def test_an_unknown_kind_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Fake GPU 9000")
    out = str(tmp_path / "table.json")
    assert main(["tune", "--kind", "gird", "--out", out]) == 2
    err = capsys.readouterr().err
    assert err.startswith("zoo: no problem is of the kind gird; there are neighborhood, window, grid, halo, ")
    assert err.count("\n") == 1
    assert main(["tune", "--out", str(tmp_path / "missing" / "table.json")]) == 2
    assert "cannot be written; name another file with --out" in capsys.readouterr().err


def test_every_stage_of_a_model_is_tuned_at_the_batch_that_was_asked_for() -> None:
    found = tune.problems()
    assert {example.kind for example in found} >= {example.kind for example in select("gpu")}
    for number, example in enumerate(found):
        batch = tune.Search(number, "bfloat16", 64).example.shapes[0][0]
        assert batch == example.shapes[0][0] // 2


def test_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fastest candidate wins, one that disagrees never does, and a table made of them is read back."""
    pytest.importorskip("triton")
    from zoo.ops import _tuning as tuning
    from zoo.ops.tuning import Config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    slow, fast, wrong, big = Config(8, 64, 4, 1), Config(4, 16, 2, 1), Config(4, 32, 1, 1), Config(16, 16, 1, 1)
    monkeypatch.setattr(tune, "_candidates", lambda kind, direction, heuristic: [slow, wrong, fast, big])

    def running() -> Any:
        return tuning._FORCED.get(("window", "forward"))

    def times(step: Any, *_: Any) -> list[float]:
        return [{slow: 90.0, fast: 50.0, wrong: 1.0}.get(running(), 100.0)]

    monkeypatch.setattr(tune, "step_times", times)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if running() == big:
            raise tuning.OutOfResources(300_000, 100_000, "shared memory")
        out = ops.window_attention(q, k, v, 4, backend="triton")
        return out * 1.5 if running() == wrong else out

    tensors = [torch.randn(1, 4, 8, 1, 8, device=device) for _ in range(3)]
    found = tune.tune(call, tensors, 1)
    (key,) = found
    assert tune.tune(call, tensors, 1, {("window", "forward"): [slow, wrong]})[key] == (slow, 100.0, 90.0)
    assert not tune.tune(call, tensors, 1, end=0.0)
    assert (key.kind, key.direction, key.box, key.size) == ("window", "forward", (4, 4), 5)
    assert found[key] == (fast, 100.0, 50.0)
    path = tmp_path / "table.json"
    tuning.save_table(path, {key: found[key][0]}, tune.environment(torch.device(device)))
    assert tuning.load_table(path) == {key: fast}
    assert json.loads(path.read_text())["environment"]["torch"] == torch.__version__


def test_candidates_begin_with_the_heuristics_neighbours() -> None:
    pytest.importorskip("triton")
    from zoo.ops.tuning import Config

    heuristic = Config(8, 64, 4, 1)
    found = tune._candidates("window", "forward", heuristic)
    assert heuristic not in found
    assert len(found) == len(set(found)) == 3 * 4 * 3 * 3 - 1
    neighbours = {
        Config(4, 64, 4, 1), Config(16, 64, 4, 1), Config(8, 32, 4, 1), Config(8, 128, 4, 1), Config(8, 64, 2, 1),
        Config(8, 64, 8, 1), Config(8, 64, 4, 2),
    }  # fmt: skip
    assert set(found[:7]) == neighbours


def test_a_budget_goes_to_one_problem_of_each_kind_first() -> None:
    kinds = [example.kind for example in tune.problems()]
    count = len(set(kinds))
    assert len(set(kinds[:count])) == count
    assert len(kinds) == len(select("model"))


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
    monkeypatch.setattr(tune, "_candidates", lambda kind, direction, heuristic: [bad, good])
    search = SimpleNamespace(call=call, tensors=lambda: [x.clone() for x in maps])
    (compiled,) = tune._compile([search], 2, 0.0, math.inf)
    assert ("window", "forward") in compiled
    assert len(compiled) >= 2
    assert all(configs == [good] for configs in compiled.values())


def test_the_gpu_is_kept_busy_while_a_call_is_queued() -> None:
    assert timing.queue_ahead(host=10.0, flush=80.0) == 2
    assert timing.queue_ahead(host=800.0, flush=80.0) * 80.0 > 800.0
    assert timing.queue_ahead(host=1e9, flush=80.0) == 64
