"""`zoo detect` from end to end: training, evaluation, exact resume, signals, and the errors of every bad input."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES

pytest.importorskip("mmdet")

import onnxruntime
import torch
import yaml
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

import zoo.cli
from zoo.train.compose import from_container
from zoo.train.detection import coco_average_precision
from zoo.train.detection.app import main
from zoo.train.detection.config import DETECT
from zoo.train.detection.digits_coco import DigitsCoco, build_digits_coco
from zoo.train.detection.loops import TrainLoop
from zoo.train.detection.mmdet_config import detector_config
from zoo.train.runs import load_checkpoint, load_run, save_checkpoint

SMALL = [
    "detector.channels=16",
    "detector.fc_channels=16",
    "detector.proposals=16",
    "detector.roi_samples=16",
    "data.canvas=64",
    "data.scale=[64,64]",
    "data.train_count=7",
    "data.val_count=3",
    "data.augment=flip",
    "batch_size=2",
    "val_batch_size=2",
    "schedule.epochs=2",
    "schedule.warmup_steps=2",
    "threads=1",
    "log_every=1",
    "model.drop_path_rate=0.2",
    "pictures=2",
]
TIMES = ("images_per_second", "seconds")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits_coco")


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two epochs with four steps each."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*SMALL, f"data.root={cache}", f"run_dir={folder}"]) == 0
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    found = list(csv.DictReader((folder / "metrics.csv").open()))
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


def assert_same(a: Any, b: Any, path: str = "state") -> None:
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in (*TIMES, "cfg"):
                assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}.{i}")
    else:
        assert a == b, path


def assert_same_run(folder: Path, reference: Path) -> None:
    assert rows(folder) == rows(reference)
    states = [load_checkpoint(f / "checkpoints/last.pt") for f in (folder, reference)]
    for state in states:
        assert state["config"].pop("checkpoint")  # how often it was saved
    assert_same(*states)


def test_run_folder(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert {"bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50", "parameters", "versions", "seed"} <= summary.keys()
    assert (summary["epochs"], summary["steps"], summary["images"]) == (2, 8, 3)
    assert [row["epoch"] for row in rows(whole)] == ["1", "2"]
    assert float(rows(whole)[1]["bbox_mAP"]) == summary["bbox_mAP"]
    for name in ("curves.png", "predictions.png"):
        assert (whole / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    config = Config.fromfile(whole / "detector.py")
    assert config.model.backbone.type == "zoo.Backbone"
    assert config.custom_imports.imports == ["zoo.train.mmdet"]
    assert config.model.roi_head.bbox_head.num_classes == 10


def test_saved_predictions_have_the_reported_precision(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    truth = Config.fromfile(whole / "detector.py").val_evaluator.ann_file
    for kind in ("bbox", "segm"):
        found = coco_average_precision(truth, whole / f"predictions.{kind}.json", kind, engine="pycocotools")
        for key in ("mAP", "mAP_50", "mAP_75"):
            assert found[key] == pytest.approx(summary[f"{kind}_{key}"], abs=1e-9)


def test_written_config_serves_mmdets_own_tools(whole: Path, tmp_path: Path) -> None:
    """What tools/test.py does, and what tools/train.py finds in the file."""
    config = Config.fromfile(whole / "detector.py")
    config.load_from, config.work_dir = str(whole / "checkpoints/last.pt"), str(tmp_path)
    assert config.default_hooks.checkpoint.type == "CheckpointHook"
    metrics = Runner.from_cfg(config).test()
    assert metrics["coco/bbox_mAP"] == json.loads((whole / "summary.json").read_text())["bbox_mAP"]


def test_evaluation_repeats_the_run(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert main(["eval=true", f"run={whole}", f"out={tmp_path / 'out.json'}"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert {k: result[k] for k in ("bbox_mAP", "segm_mAP_50")} == {k: summary[k] for k in ("bbox_mAP", "segm_mAP_50")}
    assert f"box AP {summary['bbox_mAP']:.3f}" in capsys.readouterr().out.splitlines()[-1]


def test_evaluation_of_weights_alone(whole: Path, cache: Path, tmp_path: Path) -> None:
    weights = tmp_path / "detector.pth"
    torch.save({"meta": {}, "state_dict": load_checkpoint(whole / "checkpoints/last.pt")["state_dict"]}, weights)
    arguments = [*SMALL, f"data.root={cache}", "eval=true", f"weights={weights}", f"run_dir={tmp_path / 'eval'}"]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "eval/summary.json").read_text())
    assert result["bbox_mAP"] == json.loads((whole / "summary.json").read_text())["bbox_mAP"]


def test_resume_inside_an_epoch_is_exact(whole: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main([*SMALL, f"data.root={cache}", f"run_dir={folder}", "max_steps=6"]) == 0
    assert [row["step"] for row in rows(folder)] == ["4", "6"]
    assert main([f"resume={folder}", "max_steps=null"]) == 0
    assert_same_run(folder, whole)


@pytest.mark.parametrize("moment", ["step", "last step", "evaluation"])
def test_signal_saves_and_resumes_exactly(
    moment: str, whole: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    if moment == "evaluation":
        from mmengine.runner import ValLoop as owner
    else:
        owner = TrainLoop
    count, original = {"step": 2, "last step": 4, "evaluation": 1}[moment], owner.run_iter
    calls = 0

    def interrupted(self: Any, *args: Any) -> None:
        nonlocal calls
        calls += 1
        original(self, *args) if moment != "evaluation" else None
        if calls == count:
            signal.raise_signal(signal.SIGTERM)
        original(self, *args) if moment == "evaluation" else None

    monkeypatch.setattr(owner, "run_iter", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert main([*SMALL, f"data.root={cache}", f"run_dir={folder}"]) == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (folder / "summary.json").exists()
    monkeypatch.setattr(owner, "run_iter", original)
    assert main([f"resume={folder}"]) == 0
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    "moment",
    [
        "last step",
        pytest.param("last step saved", marks=pytest.mark.slow),
        pytest.param("evaluation", marks=pytest.mark.slow),
        "end of evaluation",
    ],
)
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_stopped_at_its_end_is_evaluated(
    moment: str, epochs: int, whole: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are those of the final weights, wherever the run was stopped after its last step."""
    reference, folder = tmp_path / "reference", tmp_path / "run"
    arguments = [*SMALL, f"schedule.epochs={epochs}", f"data.root={cache}"]
    if epochs == 1:
        assert main([*arguments, f"run_dir={reference}"]) == 0
    else:
        reference = whole
    if moment.startswith("last step"):
        owner: Any = TrainLoop
        count = 4 * epochs
    else:
        from mmengine.runner import ValLoop as owner

        count = 2 * epochs - (moment == "evaluation")
    original, calls = owner.run_iter, 0

    class Killed(BaseException):
        pass

    def stopped(self: Any, *args: Any) -> None:
        nonlocal calls
        calls += 1
        original(self, *args)
        if calls == count and moment != "last step saved":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(owner, "run_iter", stopped)
    if moment == "last step saved":  # killed after the step's checkpoint, before the evaluation
        from mmengine.runner import ValLoop

        run, evaluations = ValLoop.run, 0

        def killed(self: Any) -> Any:
            nonlocal evaluations
            evaluations += 1
            if evaluations == epochs:
                raise Killed
            return run(self)

        monkeypatch.setattr(ValLoop, "run", killed)
        with pytest.raises(Killed):
            main([*arguments, f"run_dir={folder}", "checkpoint.every_steps=1"])
        monkeypatch.setattr(ValLoop, "run", run)
    else:
        complete = moment == "end of evaluation"  # nothing was left to be done
        assert main([*arguments, f"run_dir={folder}"]) == (0 if complete else 75)
    monkeypatch.setattr(owner, "run_iter", original)
    assert main([f"resume={folder}"]) == 0
    assert_same_run(folder, reference)
    found, expected = (json.loads((f / "summary.json").read_text()) for f in (folder, reference))
    for key in ("bbox_mAP", "segm_mAP", "bbox_mAP_50", "steps", "epochs", "best", "best_epoch"):
        assert found[key] == expected[key]
    assert float(rows(folder)[-1]["bbox_mAP"]) == found["bbox_mAP"]


def test_a_run_ended_inside_an_epoch_keeps_its_figures(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main([*SMALL, f"data.root={cache}", f"run_dir={folder}", "max_steps=3"]) == 0
    before, table = json.loads((folder / "summary.json").read_text()), rows(folder)
    assert main([f"resume={folder}"]) == 0
    after = json.loads((folder / "summary.json").read_text())
    assert {k: v for k, v in after.items() if k not in TIMES} == {k: v for k, v in before.items() if k not in TIMES}
    assert rows(folder) == table
    assert main([f"resume={folder}", "max_steps=2"]) == 0  # nothing to do, and nothing lost
    assert rows(folder) == table


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_in_the_last_update_fails(
    value: float,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = TrainLoop.run_iter

    def diverged(self: Any, *args: Any) -> None:
        original(self, *args)
        if self._iter == 4:
            next(self.runner.model.parameters()).data.flatten()[0] = value

    monkeypatch.setattr(TrainLoop, "run_iter", diverged)
    folder = tmp_path / "run"
    assert main([*SMALL, f"data.root={cache}", f"run_dir={folder}", "schedule.epochs=1"]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "the weights hold values that are no numbers (in backbone." in error[0]
    assert not (folder / "summary.json").exists()
    assert not (folder / "checkpoints/last.pt").exists()


@pytest.mark.parametrize("part", ["backbone.body.stages.1.", "roi_head.bbox_head.fc_cls.weight"])
@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_an_evaluation_without_numbers_fails(
    part: str, value: float, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that are no numbers, or from which none follow, would look like images without objects."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    (folder / "evaluation-last").mkdir(exist_ok=True)
    state = load_checkpoint(folder / "checkpoints/last.pt")
    key = next(k for k in state["state_dict"] if k.startswith(part) and k.endswith("weight"))
    state["state_dict"][key] = torch.full_like(state["state_dict"][key], value)
    if value == value:
        state["state_dict"][key].flatten()[::2] *= -1
    save_checkpoint(folder / "checkpoints/last.pt", state)
    assert main(["eval=true", f"run={folder}"]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "are no numbers" in error[0]


def test_summaries_are_strict_json(whole: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads((whole / "summary.json").read_text(), parse_constant=refuse)


HOSTILE = [
    "detector.overrides.roi_head.bbox_head.type=os.system",
    "detector.overrides.type=os.system",
    "detector.overrides.backbone.type=os.system",
    "detector.overrides.neck={type: os.system, command: ls}",
    "detector.overrides.neck.type=mmengine.registry.Registry",
    "detector.overrides.neck.type=[os.system]",
    "detector.overrides.neck.type=zoo.Backbone",
    "detector.overrides.rpn_head.loss_cls.type=subprocess.run",
    "detector.overrides.train_cfg.rcnn.assigner.iou_calculator.type=builtins.exec",
    "detector.overrides.data_preprocessor.batch_augments=[{type: os.system, command: ls}]",
    "detector.overrides.data_preprocessor.batch_augments=[[{inner: {type: os.system}}]]",
    "detector.overrides.hooks=[{type: os.system}]",
    "detector.overrides.env_cfg.mp_cfg.type=os.system",
    "detector.overrides.test_cfg.rcnn.nms.type=\"__import__('os').getpid()\"",
    "detector.overrides.roi_head.bbox_roi_extractor.roi_layer.type=os.system",
    "detector.overrides.init_cfg={type: Pretrained, checkpoint: weights.pth}",
    "detector.overrides.init_cfg={type: Normal, layer: 'http://x.y'}",
    "detector.overrides.type=KnowledgeDistillationSingleStageDetector",
    "detector.overrides.teacher_config=teacher.py",
    "detector.overrides.type=LAD",
    "detector.overrides.language_model={type: BertModel, name: x}",
    "detector.overrides.backend_args.backend=petrel",
    "detector.overrides.neck.file_client_args={backend: disk}",
    "detector.overrides._base_=x.py",
    "detector.overrides.neck._delete_=true",
    "detector.overrides.neck._scope_=os",
    "detector.overrides.custom_imports.imports=[os]",
    "detector.overrides.neck.text={{$HOME}}",
    "model.kwargs.type=os.system",
    "model.kwargs._scope_=os",
    "model.kwargs.pretrained_cfg_overlay={file: x.pth}",
    "model.kwargs.checkpoint_path=x.pth",
]


@pytest.mark.parametrize("override", HOSTILE)
def test_a_configuration_names_no_code(
    override: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "system", lambda *args: pytest.fail("code was run"))
    folder = tmp_path / "run"
    assert main([*SMALL, f"data.root={cache}", f"run_dir={folder}", override]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert override.split(".")[0] + "." + override.split(".")[1].split("=")[0] in error[0]
    assert not folder.exists()


@pytest.mark.parametrize("command", ["resume={}", "eval=true run={}"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"roi_head": {"bbox_head": {"type": "os.system"}}},
        {"test_cfg": {"rcnn": {"nms": {"type": "exec('1')"}}}},
        {"data_preprocessor": {"batch_augments": [{"type": "os.system", "command": "ls"}]}},
        {"neck": {"_scope_": "os"}},
    ],
)
def test_a_run_folder_from_elsewhere_names_no_code(
    command: str, overrides: dict[str, Any], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["detector"]["overrides"] = overrides
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(command.format(folder).split()) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "detector.overrides." in error[0]


def test_another_part_of_mmdet_s_is_welcome(cache: Path, tmp_path: Path) -> None:
    overrides = [
        "detector=retinanet",
        "detector.overrides.neck.type=PAFPN",
        "detector.overrides.bbox_head.loss_bbox={type: mmdet.SmoothL1Loss, beta: 0.11, loss_weight: 1.0}",
        "detector.overrides.bbox_head.init_cfg={type: Normal, layer: Conv2d, std: 0.02}",
        "detector.overrides.data_preprocessor.batch_augments=[{type: BatchFixedSizePad, size: [64, 64]}]",
        "schedule.optimizer=SGD",
        "max_steps=1",
    ]
    folder = tmp_path / "run"
    assert main([*SMALL, f"data.root={cache}", f"run_dir={folder}", *overrides]) == 0
    config = Config.fromfile(folder / "detector.py")
    assert config.model.neck.type == "PAFPN"
    assert config.model.bbox_head.loss_bbox.beta == 0.11


def test_damaged_checkpoint_falls_back(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "checkpoints/last.pt").write_bytes(b"not a checkpoint")
    assert main([f"resume={folder}"]) == 0
    assert "is damaged" in capsys.readouterr().out
    assert_same_run(folder, whole)


def test_dry_run_without_data_builds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data=coco", "model=nat_mini", "dry_run=true"]) == 0
    assert "mask_rcnn with nat_mini: 3" in capsys.readouterr().out  # 39.6 M parameters


def test_dry_run(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, f"data.root={cache}", f"run_dir={tmp_path / 'run'}", "dry_run=true", "detector=retinanet"]
    assert main(arguments) == 0
    assert "dry run passed" in capsys.readouterr().out.splitlines()[-1]


def coco_folder(root: Path) -> Path:
    """A copy of a small digits_coco laid out as COCO is."""
    source = build_digits_coco(root / "cache", DigitsCoco(canvas=64, train_images=4, val_images=3, size=(24, 40)))
    data = root / "data"
    (data / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(source / split, data / f"{split}2017")
        shutil.copy(source / f"annotations/{split}.json", data / f"annotations/instances_{split}2017.json")
    return data


COCO = [
    *[a for a in SMALL if not a.startswith(("data.canvas", "data.train_count", "data.val_count"))],
    "data=coco",
    "model=nat_digits",
    "schedule=digits",
    "schedule.epochs=1",
    "schedule.warmup_steps=1",
    "batch_size=2",
    "data.num_workers=0",
    "detector.anchor_scale=4",
]


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    for key, change in changes.items():
        content[key] = change(content[key])
    file.write_text(json.dumps(content))


def test_unreadable_images_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = coco_folder(tmp_path)
    (data / "train2017/000002.png").write_bytes(b"")
    (data / "val2017/000003.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    assert main([*COCO, f"data.root={data}", f"run_dir={tmp_path / 'run'}", "logger=tensorboard"]) == 0
    assert list((tmp_path / "run/tensorboard").glob("events.*"))
    bad = json.loads((tmp_path / "run/summary.json").read_text())["unreadable_images"]
    assert bad == [str(data / "train2017/000002.png"), str(data / "val2017/000003.png")]
    assert "2 images could not be read" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("data=coco model=nat_mini", ("data.root is not set",)),
        ("data=coco model=nat_mini data.root=/no/such", ("/no/such", "data.root=FOLDER")),
        (
            "data=coco model=nat_mini data.root={data} data.train_annotations=x.json",
            ("x.json", "data.train_annotations"),
        ),
        ("data=coco model=nat_mini data.root={data} data.val_images=val", ("no image folder", "data.val_images")),
        ("detector=mask_rnn", ("mask_rnn", "mask_rcnn")),
        ("model=nat_minni", ("nat_minni", "nat_mini")),
        ("schedule=2x", ("schedule=2x", "1x")),
        ("schedule.lr=-1", ("schedule.lr=-1", "positive")),
        ("schedule.lrr=1", ("schedule.lrr", "schedule.lr")),
        ("model.frozen_stages=9", ("frozen_stages is 9", "3 stages")),
        ("model.out_indices=[0,7]", ("model.out_indices=[0, 7]", "strides [4, 8, 16]")),
        ("model.pretrained=/no/such.pth", ("/no/such.pth", "run folder")),
        ("model.kwargs.foo=1", ("nat_mini", "foo")),
        ("weights=/no/such.pth", ("/no/such.pth", "weights=FILE")),
        ("eval=true", ("run=RUN_FOLDER", "weights=FILE")),
        ("eval=true run=/no/such", ("/no/such",)),
        ("resume=/no/such", ("/no/such",)),
        ("data.canvas=20", ("canvas 20", "data.canvas")),
        ("detector.overrides.rpn_head.typo=1", ("detector.overrides", "typo")),
        ("model._target_=os.system", ("_target_", "cannot name code")),
        ("seed=1,2", ("seed",)),
    ],
)
def test_mistakes_are_one_line(
    arguments: str, words: tuple[str, ...], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coco_folder(tmp_path) if "{data}" in arguments else None
    argv = arguments.format(data=data).split()
    small = [] if "data=coco" in arguments else [*SMALL, f"data.root={cache}"]
    alone = any(a.startswith(("resume", "run=")) for a in argv)
    assert main([*([] if alone else [*small, f"run_dir={tmp_path / 'run'}"]), *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert all(word in error[0] for word in words), error[0]
    assert not (tmp_path / "run").exists(), "a start that failed left a run folder"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"categories": lambda c: [*c[:-1], {"id": 10, "name": "ten"}]}, ("different categories", "'nine'", "'ten'")),
        ({"annotations": lambda a: []}, ("is empty", "0 annotations")),
        ({"images": lambda i: []}, ("is empty", "0 images")),
        ({"images": lambda i: [{**i[0], "file_name": "other.png"}]}, ("other.png", "data.val_images")),
        ({"annotations": lambda a: [{**a[0], "category_id": 77}]}, ("77", "categories do not list")),
    ],
)
def test_bad_annotations_are_named(
    change: dict[str, Any], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coco_folder(tmp_path)
    edit(data / "annotations/instances_val2017.json", **change)
    assert main([*COCO, f"data.root={data}", f"run_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_conflicting_resume_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"resume={whole}", "schedule.lr=5"]) == 2
    assert "schedule.lr=5 conflicts with the run's schedule.lr=0.001" in capsys.readouterr().err


FAMILY_ARGUMENTS = [row.detection for row in FAMILIES.values() if row.detection is not None]


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILY_ARGUMENTS, ids=lambda m: m.split()[0])
def test_every_family_trains_two_steps(model: str, cache: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, f"data.root={cache}", f"run_dir={tmp_path / 'run'}", "max_steps=2", *f"model={model}".split()]
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 2
    assert 0 <= summary["bbox_mAP"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "detector", ["retinanet", "faster_rcnn", "cascade_mask_rcnn", "cascade_mask_rcnn_4conv", "atss", "dino"]
)
def test_every_detector_trains_two_steps(detector: str, cache: Path, tmp_path: Path) -> None:
    small = [*SMALL, "detector.channels=64"]  # ATSS normalizes 32 groups, on maps down to one cell
    arguments = [*small, f"data.root={cache}", f"run_dir={tmp_path / 'run'}", "max_steps=2", f"detector={detector}"]
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert ("segm_mAP" in summary and summary["segm_mAP"] is not None) == ("mask" in detector)


@pytest.mark.slow
def test_killed_run_resumes_exactly(whole: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "zoo.train.detection", *SMALL, f"data.root={cache}", f"run_dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([*command, "checkpoint.every_steps=1"], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        manifest = folder / "checkpoints/last.manifest.json"
        while process.poll() is None and time.monotonic() < deadline:
            if manifest.is_file() and json.loads(manifest.read_text())["step"] >= 3:
                break
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert main([f"resume={folder}"]) == 0
    assert_same_run(folder, whole)


def test_help_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("zoo detect", "cascade_mask_rcnn", "digits_coco", "3x", "coco_mask_rcnn_nat_mini_3x", "anchor_scale"):
        assert word in text
    assert main(["--cfg", "job", "seed=7"]) == 0
    assert "seed: 7" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_export_of_backbone_and_neck(whole: Path, tmp_path: Path, kind: str) -> None:
    """A program of the run's weights gives the maps that the detector's heads would get, at any size."""
    out = tmp_path / "out"
    assert zoo.cli.main(["export", f"run={whole}", f"out={out}", f"format={kind}", "img_size=128x160"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["parity"]["program"] < 1e-4
    assert len(config["label_names"]) == 10
    # not by the code that exported it: the detector of mmdet's own configuration, its weights, its feature extraction
    run = load_run(whole)
    cfg = from_container(run.config, DETECT)
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector = MODELS.build(ConfigDict(detector_config(cfg, 10))).eval()
    detector.load_state_dict(run.checkpoint("last")[1]["state_dict"])
    images = torch.randn(2, 3, 100, 203)
    with torch.no_grad():
        expected = detector.extract_feat(images)
    if kind == "onnx":
        session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
        maps = [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]
    else:
        maps = torch.export.load(out / "model.pt2").module()(images)
    assert config["outputs"] == [f"map{i}" for i in range(len(expected))]
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_an_export_of_a_detector_does_not_take(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, said in (
        (["format=timm"], "format=onnx or pt2 or aoti writes its backbone and neck"),
        (["format=pt2", "features=true"], "features= is of classifiers"),
        (["format=pt2", "weights=ema"], "weights=ema is of classifiers"),
    ):
        assert zoo.cli.main(["export", f"run={whole}", f"out={tmp_path / 'out'}", *more]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
