"""The benchmarks: their peers, a row of one, and a dry run of the one for GPUs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cases, gpu, models
from benchmarks.cases import Peer
from benchmarks.ops import differences
from benchmarks.ops import main as ops_main
from zoo.ops.examples import CATALOGUE, Example, select
from zoo.processes import Ending

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("op", sorted({e.folder for e in CATALOGUE}))
def test_every_op_is_measured(op: str) -> None:
    """On a CPU, on a GPU, and in a dry run; CONTRIBUTING.md, "How to add an op"."""
    for tag in ("cpu", "quick", "gpu", "trial", "model"):
        assert select(tag, folder=op), f"ops/examples.py has no example tagged {tag!r} of {op}"


@pytest.mark.parametrize("table", ["GOALS", "FLOORS"])
def test_goals_and_floors_are_of_examples_that_are_measured(table: str) -> None:
    """A goal of a name that was changed would never be looked at."""
    for op in {e.folder for e in CATALOGUE}:
        names = {e.name for e in select("cpu" if table == "GOALS" else "gpu", folder=op)}
        assert set(getattr(cases._module(op), table, {})) <= names


@pytest.mark.parametrize("example", select("trial"), ids=lambda e: e.folder)
def test_peers_compute_the_same(example: Example) -> None:
    """Those of both benchmarks, outputs and gradients, on tiny maps."""
    tensors = example.inputs()

    def training(function: Any) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape))]

    found = cases.peers(example, tensors) | cases.gpu_peers(example, tensors, Peer)
    assert found
    for name, peer in found.items():
        assert isinstance(peer, Peer), peer
        if peer.exact and name != "flex":  # which compiles for minutes, and is here as "flex compiled", uncompiled
            ours = example.bound(tensors)
            both = [x(f) for f in (ours, peer.function) for x in [training if peer.trains else lambda f: [f(*tensors)]]]
            assert differences({"ours": both[0], name: both[1]})[name] < 1e-4, name


@pytest.mark.parametrize("entry", [e for e in models.ENTRIES if e.textbook], ids=lambda e: e.name)
def test_the_peer_of_a_model_runs_the_textbook_forms(entry: models.Entry) -> None:
    """A small image through ours and the peer: other functions, the same logits."""
    ours, peer = models.build(entry, torch.device("cpu"), torch.float32)
    images = torch.randn(1, 3, *([32, 32] if entry.name == "van_b0" else models.input_size(entry.name)))
    called = []

    def noted(name: str, function: Any) -> Any:
        return lambda *args, **options: (called.append(name), function(*args, **options))[1]

    spied = replace(entry, textbook=tuple((name, noted(name, function)) for name, function in entry.textbook))
    with models.replaced(spied, False):
        expected = models.forward(ours, images)
    assert not called
    with models.replaced(spied, True):
        logits = models.forward(peer, images)
    assert set(called) == {name for name, _ in entry.textbook}
    assert float((logits - expected).abs().max() / expected.std()) < 1e-2


def test_a_textbook_form_of_no_op_of_any_model_is_a_mistake() -> None:
    entry = models.Entry("van_b0", textbook=(("super_token_attention", lambda x: x),))
    with (
        pytest.raises(LookupError, match="no file of zoo.models imports super_token_attention"),
        models.replaced(entry, True),
    ):
        pass


def test_an_op_without_peers_is_compared_with_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "_module", lambda folder: None)
    (example,) = (e for e in select("trial") if e.folder == "window")
    tensors = example.inputs()
    (peer,) = cases.peers(example, tensors).values()
    assert isinstance(peer, Peer)
    torch.testing.assert_close(peer.function(*tensors), example.call(tensors))
    assert list(cases.gpu_peers(example, tensors, Peer)) == ["definition", "definition compiled"]


def test_a_case_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ops.json"
    arguments = ["--op", "channel", "--case", "8x49 h24", "--repeats", "1", "--threads", "1", "--out", str(out)]
    assert ops_main(arguments) == 0
    report = json.loads(out.read_text())
    assert [(row["op"], row["case"], row["mode"]) for row in report["results"]] == [
        ("channel", "8x49 h24", "forward"), ("channel", "8x49 h24", "training"),
    ]  # fmt: skip
    assert set(report["results"][0]["ratio"]) == {"module", "sdpa"}
    assert report["environment"]["command"].startswith("python -m benchmarks.ops --op channel")
    assert capsys.readouterr().out.count("\n") == 2


def test_ops_alone_where_timm_is_too_old_for_the_models(tmp_path: Path) -> None:
    """Its ImportError is the reason that is given, and the ops are there all the same."""
    code = (
        "import sys, timm.layers; del timm.layers.calculate_drop_path_rates\n"
        "from benchmarks.gpu_jobs import import_zoo\n"
        "print(import_zoo())\n"
        "import timm, zoo\n"
        "from zoo import processes\n"
        "from zoo.ops import examples\n"
        "(example,) = (e for e in examples.select('tiny') if e.folder == 'window')\n"
        "print(example.call(example.inputs()).shape, timm.is_model('nat_tiny'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    reason, works = done.stdout.splitlines()
    assert reason.startswith("ImportError: cannot import name 'calculate_drop_path_rates' from 'timm.layers'")
    assert works == "torch.Size([1, 11, 9, 2, 16]) False"


@pytest.mark.parametrize(
    ("doing", "wrong", "notes"),
    [
        (("ours", "backward"), [None, "ERROR it broke"], [{}, {}]),
        (("flex", "backward"), [None, None], [{}, {"flex": "it broke"}]),
        (("the peers", ""), [None, None], [{"the peers": "it broke"}] * 2),
    ],
    ids=["ours", "a peer", "before the peers"],
)
def test_a_broken_case_keeps_what_was_measured(doing: Any, wrong: Any, notes: Any) -> None:
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
    found = gpu.finished(ending, {"op": "window", "case": "tiny"})
    assert [row.get("wrong") for row in found] == wrong
    assert [row["notes"] for row in found] == notes
    table = gpu.op_table(found)
    assert len(table) == 3
    assert "10.0" in table[1]


@pytest.mark.parametrize("what", [{"op": "window", "case": "tiny"}, {"model": "nat_tiny", "compiled": False}])
def test_a_case_that_never_spoke_is_a_row(what: dict[str, Any]) -> None:
    (row,) = gpu.finished(Ending("it broke", begun=True), what)
    assert row["wrong"] == "ERROR it broke"
    table = gpu.op_table if "op" in what else gpu.model_table
    assert table([row])[1].endswith("ERROR it broke")


def dry_run(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], list[str]]:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--dry-run", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert {"torch", "triton", "git_revision", "tuned_configurations"} <= set(report["environment"])
    assert not report["left_out"]
    return report, done.stdout.strip().splitlines()


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_dry_run_of_the_ops(tmp_path: Path) -> None:
    """Every op and peer at tiny sizes in Triton's interpreter; nothing is wrong and no peer fails."""
    report, lines = dry_run(tmp_path, "--part", "ops", "--budget", "1900")
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
def test_no_gpu_is_one_line() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "PyTorch sees no GPU here" in done.stderr
    assert not done.stdout


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_the_peak_of_memory_is_the_step_s() -> None:
    """Neither what was there before counts, nor the peak of the process that started this one."""
    earlier = torch.ones(100 << 18)
    del earlier
    models.start_peak()
    before = models.resident("VmRSS")
    step = torch.ones(40 << 18)
    del step
    assert 38 << 10 < models.resident("VmHWM") - before < 60 << 10
