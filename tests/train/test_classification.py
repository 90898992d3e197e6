"""Training and evaluating: every switch trains, what a run leaves behind, and resuming to the same bits."""

import dataclasses
import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import RANDOM, assert_same_run, checkpoint, metrics, resume, summary, train

import zoo.train.engine as engine
from zoo.errors import UserError
from zoo.train.app import main
from zoo.train.runs import load_run, newest_intact, select_weights
from zoo.train.shell import EXIT_FAILED, EXIT_INTERRUPTED

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with everything random, never interrupted."""
    return train(tmp_path_factory.mktemp("runs") / "whole", "epochs=2", *RANDOM)


def test_run_folder(whole: Path) -> None:
    assert {p.name for p in whole.iterdir()} == {
        ".lock",
        "augmented.png",
        "checkpoints",
        "config.yaml",
        "curves.png",
        "metrics.csv",
        "summary.json",
    }
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {
        f"{name}.{end}" for name in ("last", "previous", "best") for end in ("pt", "manifest.json")
    }
    found = summary(whole)
    for key in (
        "model",
        "parameters",
        "top1",
        "top5",
        "epochs",
        "seconds",
        "images_per_second",
        "git_revision",
        "versions",
    ):
        assert key in found
    model = timm.create_model("nat_mini", depths=[1, 1], num_heads=[1, 2], embed_dim=16, kernel_size=3, num_classes=10)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["epochs"] == 2
    assert found["steps"] == 22
    assert found["weights"] == "ema"
    rows = metrics(whole)
    assert [(r["epoch"], r["step"]) for r in rows] == [("1", "11"), ("2", "22")]
    assert float(rows[1]["ema_top1"]) == found["top1"]
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert load_run(whole).config["model"]["kwargs"] == {
        "depths": [1, 1],
        "num_heads": [1, 2],
        "embed_dim": 16,
        "kernel_size": 3,
    }
    state = checkpoint(whole)
    assert {"optimizer", "scheduler", "scaler", "rng", "state_dict", "state_dict_ema", "epoch", "batch", "step"} <= set(
        state
    )


@pytest.mark.parametrize("step", [11, 17, pytest.param(1, marks=SLOW), pytest.param(10, marks=SLOW)])
def test_resume_is_bitwise(whole: Path, tmp_path: Path, step: int) -> None:
    """Stopped in the middle and at the end of an epoch, with loaders in worker processes after the break."""
    run = train(tmp_path / "run", "epochs=2", f"max_steps={step}", *RANDOM)
    assert checkpoint(run)["step"] == step
    resume(run, "max_steps=null", f"data.num_workers={step % 2}")
    assert_same_run(whole, run, ignore=(".config.data.num_workers", ".config.max_steps"))


def test_a_second_run_is_the_same(whole: Path, tmp_path: Path) -> None:
    assert_same_run(whole, train(tmp_path / "again", "epochs=2", *RANDOM))
    other = train(tmp_path / "other", "epochs=2", "seed=1", *RANDOM)
    assert list(training.differences(checkpoint(whole)["state_dict"], checkpoint(other)["state_dict"]))


@pytest.mark.parametrize(
    "switches",
    [
        ("amp=fp16", "optim.clip_grad=1.0"),
        (
            "model=test_resnet", "channels_last=true", "optim=sgd", "optim.lr=0.01", "ema.enabled=true",
            "optim.clip_grad=0.1", "optim.clip_mode=agc",
        ),
        pytest.param(
            ("amp=bf16", "grad_accum=2", "optim.clip_grad=0.1", "optim.clip_mode=value"), marks=SLOW
        ),
        pytest.param(
            ("augment.repeats=3", "loss.smoothing=0.1", "model.in_chans=1", "optim.layer_decay=0.7"),
            marks=SLOW,
        ),
        pytest.param(
            (
                "loss.name=bce", "augment.mixup=0.5", "augment.mix_mode=elem", "augment.mix_off_epoch=1",
                "model.grad_checkpointing=true",
            ),
            marks=SLOW,
        ),
    ],
    ids=["fp16", "resnet-agc", "bf16-accumulate", "repeats-decay", "bce-checkpointing"],
)  # fmt: skip
def test_switches_train_and_resume(tmp_path: Path, switches: tuple[str, ...]) -> None:
    if "model=test_resnet" in switches:
        base = [f"run_dir={tmp_path / 'a'}", "batch_size=128", "device=cpu", "threads=1"]
    else:
        base = [f"run_dir={tmp_path / 'a'}", *training.TINY]
    argv = [*base, "epochs=2", *switches]
    assert main("train", argv) == 0
    losses = [float(row["train_loss"]) for row in metrics(tmp_path / "a")]
    assert losses[1] < losses[0]
    argv[0] = f"run_dir={tmp_path / 'b'}"
    assert main("train", [*argv, "max_steps=4"]) == 0
    resume(tmp_path / "b", "max_steps=null")
    assert_same_run(tmp_path / "a", tmp_path / "b", ignore=(".config.max_steps",))


def test_scaler_state_is_kept(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "max_steps=3", "amp=fp16")
    assert checkpoint(run)["scaler"]["_growth_tracker"] >= 1


def test_accumulation_matches_a_larger_batch(tmp_path: Path) -> None:
    plain = ("augment=none", "max_steps=3", "optim=sgd", "optim.lr=0.05", "epochs=1")
    one = train(tmp_path / "one", *plain, "batch_size=64")
    two = train(tmp_path / "two", *plain, "batch_size=32", "grad_accum=2")
    a, b = checkpoint(one)["state_dict"], checkpoint(two)["state_dict"]
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


def test_compile_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile wraps the model; the checkpoint's keys are the plain model's."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **k: real(m, backend="aot_eager"))
    run = train(tmp_path / "run", "compile=true", "max_steps=2", "ema.enabled=true")
    state = checkpoint(run)
    assert not any("_orig_mod" in key for key in [*state["state_dict"], *state["state_dict_ema"]])


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run", "dry_run=true", "ema.enabled=true")
    assert checkpoint(run)["step"] == 1
    assert summary(run)["dry_run"] is True
    assert capsys.readouterr().out.splitlines()[-1].startswith("dry run passed")


def test_dry_run_notices_a_checkpoint_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real = engine.load_checkpoint

    def other(path: Path) -> dict[str, Any]:
        state = real(path)
        next(iter(state["state_dict"].values())).add_(1)
        return state

    monkeypatch.setattr(engine, "load_checkpoint", other)
    train(tmp_path / "run", "dry_run=true", expect=EXIT_FAILED)
    assert "came back" in capsys.readouterr().err


def test_loss_that_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "optim=sgd", "optim.lr=1e30", "schedule.warmup_epochs=0", expect=EXIT_FAILED)
    error = capsys.readouterr().err
    assert "lower optim.lr" in error
    assert len(error.splitlines()) == 1


def _strict(path: Path) -> Any:
    """JSON without Python's own NaN and Infinity."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("ends", [("epochs=1",), ("epochs=2", "max_steps=11"), ("epochs=3", "max_steps=15")])
def test_divergence_in_the_last_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float, ends: Any
) -> None:
    """The loss of the last update is a number and the weights after it are none, or lead to none."""
    real = engine.Trainer._backward

    def diverge(self: Any, loss: torch.Tensor, update: bool) -> None:
        real(self, loss, update)
        if self.progress.step == self.total_steps - 1:
            with torch.no_grad():
                for parameter in self.task.parameters():
                    parameter.fill_(value)

    monkeypatch.setattr(engine.Trainer, "_backward", diverge)
    run = train(tmp_path / "run", *ends, "checkpoint.every_steps=5", expect=EXIT_FAILED)
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("zoo train: ")
    assert "lower optim.lr" in error
    state = checkpoint(run)
    assert state["step"] in (10, 11)
    assert all(torch.isfinite(v).all() for v in state["state_dict"].values() if v.is_floating_point())
    assert not (run / "summary.json").exists()
    assert "nan" not in (run / "metrics.csv").read_text()
    monkeypatch.setattr(engine.Trainer, "_backward", real)
    resume(run)
    assert _strict(run / "summary.json")["top1"] > 0
    assert_same_run(train(tmp_path / "never", *ends, "checkpoint.every_steps=5"), run)


@pytest.mark.parametrize("ema", [False, True])
def test_held_out_images_that_give_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ema: bool
) -> None:
    run = train(tmp_path / "run", "epochs=1", "ema.enabled=true")
    before = (run / "summary.json").read_bytes(), (run / "metrics.csv").read_bytes(), checkpoint(run)
    real = engine.Trainer._evaluate

    def evaluate(self: Any, ema: bool) -> Any:
        return dataclasses.replace(real(self, ema), loss=float("nan")) if ema == wanted else real(self, ema)

    wanted = ema
    monkeypatch.setattr(engine.Trainer, "_evaluate", evaluate)
    capsys.readouterr()
    resume(run, "epochs=2", expect=EXIT_FAILED)
    (error,) = capsys.readouterr().err.splitlines()
    assert f"the loss{' of the averaged weights' if ema else ''} on the held-out images is nan after step 22" in error
    assert not list(training.differences(before[2], checkpoint(run)))
    assert ((run / "summary.json").read_bytes(), (run / "metrics.csv").read_bytes()) == before[:2]


def test_weights_that_are_no_numbers_are_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    torch.nn.init.constant_(model.fc.weight, float("nan"))
    file, out = tmp_path / "nan.pth", tmp_path / "out.json"
    torch.save(model.state_dict(), file)
    argv = ["model=test_resnet", "model.num_classes=10", "data=digits", f"pretrained={file}", f"out={out}"]
    assert main("eval", argv) == EXIT_FAILED
    assert "the accuracies say nothing" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("model", ["test_resnet", "nat_mini"])
def test_a_fresh_head_is_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    """A file's head is taken where it fits; weights without one of the size asked for have nothing to evaluate."""
    kwargs = {} if model == "test_resnet" else {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16}
    more = [f"model.kwargs={{{','.join(f'{k}:{v}' for k, v in kwargs.items())}}}"] if kwargs else []
    source = timm.create_model(model, num_classes=10, **kwargs)
    file, out = tmp_path / "ten.pth", tmp_path / "out.json"
    torch.save(source.state_dict(), file)
    argv = [f"model={model}", *more, "data=digits", f"out={out}", f"pretrained={file}"]
    assert main("eval", [*argv, "model.num_classes=10"]) == 0
    first = _strict(out)
    if model == "test_resnet":
        assert main("eval", argv) == 0
        assert _strict(out)["loss"] == first["loss"]
    else:
        assert main("eval", argv) == 2
        assert "num_classes=10" in capsys.readouterr().err
    capsys.readouterr()
    assert main("eval", [*argv, "model.num_classes=11"]) == 2
    assert "11 classes" in capsys.readouterr().err
    torch.save({k: v for k, v in source.state_dict().items() if "fc" not in k}, file)
    assert main("eval", [*argv, "model.num_classes=10"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_short_runs_average_what_they_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the default decay of 0.9999 the averaged weights of 44 updates are near the last ones, not the first."""
    run = train(tmp_path / "run", "epochs=4", "ema.enabled=true", "optim.lr=0.005")
    first = train(tmp_path / "first", "epochs=4", "max_steps=1", "optim.lr=0.005")
    lines = capsys.readouterr().out.splitlines()
    note = "note: ema.decay=0.9999 is not reached in 44 updates; its warm-up ends at "
    assert [line for line in lines if line.startswith(note)] == [f"{note}{1 - 44 ** (-2 / 3):.4g}"]
    state, begin = checkpoint(run), checkpoint(first)["state_dict"]
    assert (state["config"]["ema"]["decay"], state["config"]["ema"]["warmup"]) == (0.9999, True)
    name = "head.fc.weight"
    to_last = (state["state_dict_ema"][name] - state["state_dict"][name]).norm()
    to_first = (state["state_dict_ema"][name] - begin[name]).norm()
    assert to_last < 0.5 * to_first
    assert summary(run)["top1"] > 25


def test_an_average_without_warm_up_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "epochs=1", "ema.enabled=true", "ema.warmup=false")
    assert "11 updates are few for ema.decay=0.9999" in capsys.readouterr().out
    train(tmp_path / "low", "epochs=1", "ema.enabled=true", "ema.warmup=false", "ema.decay=0.5")
    train(tmp_path / "none", "epochs=1")
    assert "ema.decay" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["folder", "file/out.json", "pipe", "/proc/nowhere/out.json"])
def test_a_result_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """It is found before the evaluation, not after."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("zoo.train.evaluate.build_model", pytest.fail)
    out = tmp_path / name
    assert main("eval", ["model=nat_tiny", "pretrained=true", "data=digits", f"out={out}"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"out={out} cannot be written" in error


def test_damaged_checkpoint_falls_back_and_says_so(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path / "run", "epochs=2", "checkpoint.every_steps=5", "max_steps=17", *RANDOM)
    last = run / "checkpoints" / "last.pt"
    data = bytearray(last.read_bytes())
    data[len(data) // 3] ^= 4
    last.write_bytes(data)
    found = newest_intact(run)
    assert found is not None
    assert found[1]["step"] == 15
    capsys.readouterr()
    resume(run, "max_steps=null", "checkpoint.every_steps=null")
    out = capsys.readouterr().out
    assert "last.pt is damaged" in out
    assert "newest intact checkpoint" in out
    assert_same_run(whole, run, ignore=(".config.max_steps",))


def test_resume_before_the_first_checkpoint(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    text = (whole / "config.yaml").read_text()
    (run / "config.yaml").write_text(text)
    resume(run)
    assert_same_run(whole, run)


def test_resume_of_a_finished_run_changes_nothing(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = checkpoint(whole), metrics(whole), summary(whole)
    resume(whole)
    assert not list(training.differences(before[0], checkpoint(whole)))
    assert (before[1], before[2]["top1"]) == (metrics(whole), summary(whole)["top1"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("top-1 ")


@pytest.mark.parametrize(
    "override", ["optim.lr=1", "model=nat_tiny", "seed=4", "data=imagenet", "batch_size=2", "ema.enabled=false"]
)
def test_conflicting_override(whole: Path, capsys: pytest.CaptureFixture[str], override: str) -> None:
    resume(whole, override, expect=2)
    error = capsys.readouterr().err
    assert override in error
    assert "conflicts" in error


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "overrides",
    [
        ("epochs=1",),
        ("max_steps=3",),
        ("epochs=0",),
        ("epochs=5", "optim.lr=1"),
        ("epochs=5", "device=cuda:99"),
        ("epochs=5", "device=tpu"),
        ("epochs=5", "data.num_workers=-1"),
        ("epochs=5", "checkpoint.every_steps=0"),
        ("epochs=5", "logger.tensorboard=perhaps"),
        ("epochs=5", "logger.wandb.mode=perhaps"),
        ("epochs=5", "made.up=1"),
    ],
)
def test_a_failed_resume_changes_no_byte(whole: Path, capsys: pytest.CaptureFixture[str], overrides: Any) -> None:
    before = _bytes(whole)
    capsys.readouterr()
    resume(whole, *overrides, expect=2)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert _bytes(whole) == before


def test_a_resume_that_fails_late_changes_no_byte(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data, the checkpoint and the loggers may still refuse."""
    import zoo.train.recorder as recorder

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UserError("refused; mend it")

    before = _bytes(whole)
    for owner, name in ((engine, "check_same_data"), (engine, "open_dataset"), (recorder, "Loggers")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            resume(whole, "epochs=5", "log_every=3", expect=2)
        assert capsys.readouterr().err == "zoo train: refused; mend it\n"
        assert _bytes(whole) == before


def test_agreeing_override_and_more_epochs(whole: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", "epochs=1")
    resume(run, "epochs=2", "seed=0", "model=nat_mini", "data=digits", "logger=tensorboard")
    assert [row["epoch"] for row in metrics(run)] == ["1", "2"]
    assert (run / "tensorboard").is_dir()


def test_folder_in_use(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = f"import sys; from zoo.train.runs import lock_run; keep = lock_run({str(whole)!r}); "
    code += "print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdin is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        resume(whole, expect=2)
        assert "another process" in capsys.readouterr().err
    finally:
        holder.stdin.close()
        holder.wait()


def test_stop_request_saves(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A signal in the middle of an update: the update is finished, saved, and the exit code says so."""
    real = engine.Trainer._micro_step
    import signal

    def step(self: Any, images: torch.Tensor, targets: torch.Tensor, batch: int) -> Any:
        if self.progress.step == 6:
            signal.raise_signal(signal.SIGTERM)
        return real(self, images, targets, batch)

    monkeypatch.setattr(engine.Trainer, "_micro_step", step)
    run = train(tmp_path / "run", "epochs=2", *RANDOM, expect=EXIT_INTERRUPTED)
    assert checkpoint(run)["step"] == 7
    assert f"resume={run}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.setattr(engine.Trainer, "_micro_step", real)
    resume(run)
    assert_same_run(whole, run)


def test_stop_request_during_evaluation(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    real = engine.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(engine, "evaluate", evaluate)
    run = train(tmp_path / "run", "epochs=2", *RANDOM, expect=EXIT_INTERRUPTED)
    assert checkpoint(run)["step"] == 11
    assert metrics(run) == []
    monkeypatch.setattr(engine, "evaluate", real)
    resume(run)
    assert_same_run(whole, run)


def test_eval_of_a_run(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "result.json"
    assert main("eval", [f"run={whole}", f"out={out}", "threads=1"]) == 0
    result = json.loads(out.read_text())
    assert result["top1"] == summary(whole)["top1"]
    assert result["weights"] == "ema"
    assert result["images"] == 359
    assert {"top5", "loss", "images_per_second"} <= set(result)
    assert main("eval", [f"run={whole}", "weights=raw", f"out={out}", "batch_size=17"]) == 0
    raw = json.loads(out.read_text())
    assert raw["top1"] == float(metrics(whole)[-1]["top1"])
    assert raw["loss"] == pytest.approx(float(metrics(whole)[-1]["val_loss"]), rel=1e-4)
    assert main("eval", [f"run={whole}", "checkpoint=best", f"out={out}"]) == 0
    assert json.loads(out.read_text())["top1"] == summary(whole)["best_top1"]
    capsys.readouterr()
    assert main("eval", [f"run={whole}", "model=nat_tiny"]) == 2
    assert "conflicts with run=" in capsys.readouterr().err


def test_eval_of_a_checkpoint_file(whole: Path, tmp_path: Path) -> None:
    weights, _ = select_weights(checkpoint(whole), "ema")
    file, out = tmp_path / "weights.pth", tmp_path / "out.json"
    torch.save({"state_dict": weights}, file)
    argv = ["model=nat_digits", *training.TINY[:3], "model.num_classes=10", "data=digits", f"out={out}"]
    assert main("eval", [*argv, f"pretrained={file}"]) == 0
    assert json.loads(out.read_text())["top1"] == summary(whole)["top1"]


def test_fine_tuning_takes_a_fresh_head(tmp_path: Path) -> None:
    """A file with another number of classes gives its backbone."""
    model = timm.create_model("nat_mini", depths=[1, 1], num_heads=[1, 2], embed_dim=16, kernel_size=3, num_classes=7)
    file = tmp_path / "seven.pth"
    torch.save(model.state_dict(), file)
    run = train(
        tmp_path / "run",
        f"model.pretrained={file}",
        "max_steps=1",
        "schedule.warmup_epochs=1",
        "schedule.warmup_lr=1e-30",
    )
    state = checkpoint(run)["state_dict"]
    own = model.state_dict()
    torch.testing.assert_close(
        {k: v for k, v in state.items() if "head" not in k}, {k: v for k, v in own.items() if "head" not in k}
    )
    assert {v.shape[0] for k, v in state.items() if "head" in k} == {10}


def test_wrong_class_in_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("zoo.train.data.Digits.__getitem__", lambda self, index: (self.images[index], 12))
    train(tmp_path / "run", expect=2)
    error = capsys.readouterr().err
    assert "class 12" in error
    assert "data.num_classes" in error


def test_tensorboard_events(tmp_path: Path) -> None:
    run = train(
        tmp_path / "run", "epochs=2", "logger=tensorboard", "log_every=5", "max_steps=13", "checkpoint.every_steps=12"
    )
    resume(run, "max_steps=null")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/lr", "epoch/top1", "epoch/val_loss", "epoch/train_loss"} <= set(
        events.Tags()["scalars"]
    )
    assert [e.step for e in events.Scalars("train/loss")] == [5, 10, 15, 20]
    top1 = {e.step: e.value for e in events.Scalars("epoch/top1")}
    assert top1[22] == pytest.approx(float(metrics(run)[-1]["top1"]))


def test_wandb_offline_and_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = train(tmp_path / "off", "logger=wandb", "logger.wandb.mode=offline", "max_steps=2", "epochs=1")
    files = list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1
    assert b"train_loss" in files[0].read_bytes()
    identity = (run / "wandb_id").read_text()
    assert identity in files[0].name
    disabled = train(tmp_path / "dis", "logger=wandb", "logger.wandb.mode=disabled", "max_steps=1")
    assert not (disabled / "wandb").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"off", "dis"}


def test_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run", "epochs=1", "log_every=5")
    lines = capsys.readouterr().out.splitlines()
    assert any("step 5/11" in line and "loss" in line and "images/s" in line and "ETA" in line for line in lines)
    assert lines[-1] == f"top-1 {summary(run)['top1']:.2f} % on 359 held-out images; run folder: {run}"


def test_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    main_end, child_end = pty.openpty()
    argv = [sys.executable, "-m", "zoo.train", f"run_dir={tmp_path / 'run'}", *training.TINY, "epochs=1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TERM": "xterm"}
    process = subprocess.Popen(argv, cwd=ROOT, stdout=child_end, stderr=child_end, env=env)
    os.close(child_end)
    text = b""
    while True:
        ready, _, _ = select.select([main_end], [], [], 300)
        try:
            chunk = os.read(main_end, 65536) if ready else b""
        except OSError:
            chunk = b""
        if not chunk:
            break
        text += chunk
    os.close(main_end)
    assert process.wait() == 0, text.decode()
    shown = text.decode()
    assert "11/11" in shown or "/11 [" in shown
    assert "loss" in shown
    assert "images/s" in shown
    assert shown.strip().splitlines()[-1].strip().endswith(f"run folder: {tmp_path / 'run'}")
