"""Runs in processes of their own: killed at any moment, told to stop, and several processes at once."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from training import RANDOM, assert_same_run, checkpoint, metrics, summary, train

import zoo.train.engine as engine
import zoo.train.runs as runs
from zoo.train.app import main
from zoo.train.shell import EXIT_INTERRUPTED

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
OFTEN = ("checkpoint.every_steps=1", "log_every=1")


def start(*overrides: str) -> "subprocess.Popen[str]":
    argv = [sys.executable, "-m", "zoo.train", *overrides]
    return subprocess.Popen(
        argv, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def step_of(run: Path) -> int:
    try:
        return json.loads((run / "checkpoints" / "last.manifest.json").read_text())["step"]
    except (OSError, ValueError):
        return -1


def wait_until(process: "subprocess.Popen[str]", reached: Callable[[], bool]) -> None:
    while not reached() and process.poll() is None:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "whole", "epochs=2", *OFTEN, *RANDOM)


def _finish(run: Path) -> str:
    process = start(f"resume={run}")
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    return out


def test_kill_in_the_middle_of_an_epoch(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(f"run_dir={run}", *training.TINY, "epochs=2", "data.num_workers=1", *OFTEN, *RANDOM)
    wait_until(process, lambda: step_of(run) >= 15)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert "resuming from" in _finish(run)
    assert_same_run(whole, run, ignore=(".config.data.num_workers",))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_kill_at_random_moments(whole: Path, tmp_path: Path, seed: int) -> None:
    """Killed again and again, each time after a few more updates and some milliseconds, until it is through."""
    chance = random.Random(seed)
    run = tmp_path / "run"
    process = start(f"run_dir={run}", *training.TINY, "epochs=2", f"data.num_workers={seed % 2}", *OFTEN, *RANDOM)
    kills = 0
    while True:
        target = step_of(run) + chance.randint(1, 4)
        wait_until(process, lambda target=target: step_of(run) >= target)  # type: ignore[misc]
        time.sleep(chance.random() * 0.03)  # a few updates at most, or a fast machine is through before two kills
        process.kill()
        out, _ = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, out
        kills += 1
        process = start(f"resume={run}")
    assert kills >= 2, out
    assert_same_run(whole, run, ignore=(".config.data.num_workers",))


def _killed_at(moment: int, run: Callable[[], int]) -> int:
    """Run in a forked child that kills itself at its n-th file operation or micro-batch; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = moment

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    code = 1
    try:
        for name in ("replace", "fsync", "link"):
            setattr(runs.os, name, dying(getattr(os, name)))
        engine.Trainer._backward = dying(engine.Trainer._backward)  # type: ignore[method-assign]
        code = run()
    finally:
        os._exit(code)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_between_file_operations(tmp_path: Path, workers: int) -> None:
    """Before the rename, the flush or the link of a checkpoint, and inside an update, many times in one run."""
    argv = [*training.TINY, "epochs=2", "batch_size=256", "amp=bf16", "grad_accum=2", *OFTEN, *RANDOM]
    assert main("train", [f"run_dir={tmp_path / 'whole'}", *argv]) == 0
    run, chance = tmp_path / "run", random.Random(workers)
    first = [f"run_dir={run}", *argv, f"data.num_workers={workers}"]
    assert _killed_at(chance.randint(8, 30), lambda: main("train", first)) == -signal.SIGKILL
    kills = 1
    while (code := _killed_at(chance.randint(8, 30), lambda: main("train", [f"resume={run}"]))) != 0:
        assert code == -signal.SIGKILL
        kills += 1
        assert kills < 60
    assert kills >= 3
    assert_same_run(tmp_path / "whole", run, ignore=(".config.data.num_workers",))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_saves_and_says_so(whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    """To the whole process group, as a terminal or a scheduler sends it: the loader's workers must not mind."""
    run = tmp_path / "run"
    argv = [sys.executable, "-m", "zoo.train", f"run_dir={run}", *training.TINY, "epochs=2", "data.num_workers=1"]
    options = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    process = subprocess.Popen([*argv, *OFTEN, *RANDOM], cwd=ROOT, env=ENVIRONMENT, **options)  # type: ignore[call-overload]
    wait_until(process, lambda: step_of(run) >= 5)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_INTERRUPTED, out
    assert f"resume={run}" in out.splitlines()[-1]
    assert "Traceback" not in out
    _finish(run)
    assert_same_run(whole, run, ignore=(".config.data.num_workers",))


def together(*overrides: str, processes: int = 2) -> str:
    """Train under torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    result = subprocess.run(
        [*argv, "-m", "zoo.train", *overrides], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_two_processes_make_the_run_of_one(tmp_path: Path) -> None:
    plain = (*training.TINY, "epochs=1", "max_steps=4", "grad_accum=2", "optim=sgd", "optim.lr=0.05")
    out = together(f"run_dir={tmp_path / 'two'}", *plain, "batch_size=64", "ema.enabled=true", "ema.decay=0.5")
    one = train(tmp_path / "one", *plain, "batch_size=128", "ema.enabled=true", "ema.decay=0.5")
    a, b = checkpoint(one), checkpoint(tmp_path / "two")
    for key in ("state_dict", "state_dict_ema"):
        assert list(a[key]) == list(b[key])
        for name in a[key]:
            torch.testing.assert_close(a[key][name], b[key][name], rtol=1e-4, atol=1e-5)
    assert b["world_size"] == 2
    assert len(b["rng"]) == 2
    assert summary(tmp_path / "two")["held_out"] == 359
    assert summary(tmp_path / "two")["top1"] == pytest.approx(summary(one)["top1"], abs=0.6)
    assert float(metrics(one)[-1]["train_loss"]) == pytest.approx(
        float(metrics(tmp_path / "two")[-1]["train_loss"]), rel=1e-4
    )
    assert len(out.splitlines()) == 3, "the model's, the epoch's and the last line come from one process"


@pytest.mark.slow
def test_two_processes_resume_bitwise(tmp_path: Path) -> None:
    argv = (*training.TINY, "epochs=2", "batch_size=64", *RANDOM)
    together(f"run_dir={tmp_path / 'a'}", *argv)
    together(f"run_dir={tmp_path / 'b'}", *argv, "max_steps=15")
    together(f"resume={tmp_path / 'b'}", "max_steps=null")
    assert_same_run(tmp_path / "a", tmp_path / "b", ignore=(".config.max_steps",))
    process = start(f"resume={tmp_path / 'b'}")
    out, _ = process.communicate()
    assert process.returncode == 2
    assert "torchrun --nproc-per-node=2" in out
