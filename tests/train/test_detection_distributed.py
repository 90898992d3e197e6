"""Two processes under torchrun, on CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet")

from zoo.train.detection.app import main
from zoo.train.detection.digits_coco import DigitsCoco, build_digits_coco
from zoo.train.runs import load_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_each_image_once(tmp_path: Path) -> None:
    spec = DigitsCoco(canvas=64, train_images=8, val_images=5)
    folder = build_digits_coco(tmp_path / "cache", spec)  # beforehand, so that the processes do not race to compose it
    run = tmp_path / "run"
    arguments = [
        "detector.channels=16",
        "detector.fc_channels=16",
        "detector.proposals=16",
        "detector.roi_samples=16",
        "data.canvas=64",
        "data.scale=[64,64]",
        "data.train_count=8",
        "data.val_count=5",
        f"data.root={tmp_path / 'cache'}",
        "batch_size=2",
        "val_batch_size=2",
        "schedule.epochs=1",
        "schedule.warmup_steps=1",
        "threads=1",
        f"run_dir={run}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launch, "-m", "zoo.train.detection", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["processes"], summary["steps"], summary["images"]) == (2, 2, 5)
    state = load_checkpoint(run / "checkpoints/last.pt")
    assert len(state["rng"]) == 2
    found = json.loads((run / "predictions.bbox.json").read_text())
    images = {i["id"] for i in json.loads((folder / "annotations/val.json").read_text())["images"]}
    assert {p["image_id"] for p in found} <= images
    assert len({json.dumps(p, sort_keys=True) for p in found}) == len(found), "an image was evaluated twice"
    # one process finds the same in the same checkpoint
    assert main(["eval=true", f"run={run}"]) == 0
    alone = json.loads((run / "evaluation-last/summary.json").read_text())
    assert alone["bbox_mAP"] == pytest.approx(summary["bbox_mAP"], abs=1e-9)
    assert alone["segm_mAP"] == pytest.approx(summary["segm_mAP"], abs=1e-9)
    again = json.loads((run / "evaluation-last/predictions.bbox.json").read_text())
    assert len(again) == len(found)
    assert main([f"resume={run}"]) == 2  # made by two processes
