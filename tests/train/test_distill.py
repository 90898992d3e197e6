"""Distillation: what is learned from a teacher, and teachers that do not fit."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training import TINY, assert_same_run, checkpoint, summary, train

import zoo.train.engine as engine
from zoo.train.app import main

STUDENT = (*TINY, "epochs=1", "max_steps=4", "batch_size=32", "optim=sgd", "optim.lr=0.05", "model.drop_path_rate=0")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        tmp_path_factory.mktemp("teacher") / "run", *STUDENT, "data.mean=[0.2,0.2,0.2]", "data.std=[0.7,0.7,0.7]"
    )


def test_the_loss_is_that_of_both(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor each, the teacher's images normalized as it was trained, and no gradient or update of its weights."""
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    forward = engine.DistilledTask.forward

    def noted(self: engine.DistilledTask, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        given: list[Tensor] = []
        hook = self.teacher.model.register_forward_hook(lambda module, args, out: given.extend((args[0], out)))
        found = forward(self, input, target)
        hook.remove()
        assert not self.teacher.training
        assert not self.teacher.model.training
        logits, (pixels, answers) = found["output"].detach(), given
        torch.testing.assert_close(pixels * 0.7 + 0.2, input * self.student_std + self.student_mean)
        soft = F.softmax(answers / 3, 1)
        divergence = (soft * (soft.log() - F.log_softmax(logits / 3, 1))).sum(1).mean() * 9
        seen.append((found["loss"].detach(), F.cross_entropy(logits, target), divergence, target))
        return found

    monkeypatch.setattr(engine.DistilledTask, "forward", noted)
    options = (f"distill.teacher={teacher}", "distill.weight=0.25", "distill.task_weight=0.5", "distill.temperature=3")
    run = train(tmp_path / "run", *STUDENT, *options)
    assert len(seen) == 4
    for loss, task, divergence, _ in seen:
        torch.testing.assert_close(loss, 0.5 * task + 0.25 * divergence, rtol=1e-4, atol=1e-5)
    state = checkpoint(run)
    assert not [key for key in state["state_dict"] if "teacher" in key]
    assert summary(run)["parameters"] == sum(v.numel() for k, v in state["state_dict"].items() if "running" not in k
                                             and "num_batches" not in k)  # fmt: skip


def test_labels_alone_and_teacher_alone_differ(teacher: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", *STUDENT)
    taught = train(tmp_path / "taught", *STUDENT, f"distill.teacher={teacher}", "distill.task_weight=0")
    a, b = checkpoint(plain)["state_dict"], checkpoint(taught)["state_dict"]
    assert any(not torch.equal(a[key], b[key]) for key in a)


def test_resumed_exactly(teacher: Path, tmp_path: Path) -> None:
    options = (*TINY, "epochs=1", "batch_size=128", f"distill.teacher={teacher}", "ema.enabled=true")
    whole = train(tmp_path / "whole", *options)
    part = train(tmp_path / "part", *options, "max_steps=5")
    assert main("train", [f"resume={part}", "max_steps=null"]) == 0
    assert_same_run(part, whole)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["distill.weight=2"], "distill.weight has no effect without a teacher"),
        (["distill.teacher=resnet18", "distill.pretrained=false"], "knows nothing"),
        (["distill.teacher=resnet18", "distill.pretrained=3"], "no choice"),
        (["distill.teacher={run}", "distill.pretrained=x.pt"], "conflicts with a run"),
        (["distill.teacher={run}", "distill.temperature=0"], "distill.temperature=0.0 is out of range"),
        (["distill.teacher={run}", "distill.weight=-1"], "distill.weight=-1.0 is out of range"),
        (["distill.teacher={run}/nothing"], "no run folder at"),
        (["distill.teacher=resnett18"], "nearest names are resnet18"),
        (["distill.teacher={run}", "model.num_classes=12"], "has 10 classes and the student 12"),
    ],
)
def test_one_line(
    teacher: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [option.format(run=teacher) for option in options]
    assert main("train", [f"run_dir={tmp_path / 'run'}", *STUDENT, *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(re.escape(said), line)


def test_classes_are_compared_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for root, names in (("a", ("cat", "dog")), ("b", ("cat", "eel"))):
        for split in ("train", "val"):
            for shade, name in enumerate(names):
                folder = tmp_path / root / split / name
                folder.mkdir(parents=True)
                for i in range(4):
                    Image.new("RGB", (32, 32), (60 * shade, 20 * i, 0)).save(folder / f"{i}.png")
    options = [*TINY, "data=imagefolder", "augment=none", "data.img_size=32", "batch_size=4", "epochs=1"]
    first = train(tmp_path / "first", *options, f"data.root={tmp_path / 'a'}")
    second = [f"data.root={tmp_path / 'b'}", f"run_dir={tmp_path / 'second'}", f"distill.teacher={first}"]
    assert main("train", [*options, *second]) == 2
    assert "class 1 is 'dog' for distill.teacher=" in capsys.readouterr().err
    train(tmp_path / "third", *options, f"data.root={tmp_path / 'a'}", f"distill.teacher={first}")
