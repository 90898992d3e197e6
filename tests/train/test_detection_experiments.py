"""Every published COCO recipe composes, and builds the detector that was published."""

import re
from pathlib import Path

import pytest

pytest.importorskip("mmdet")

from zoo.train.compose import from_container
from zoo.train.detection.app import build_only, detect_config
from zoo.train.detection.coco_data import open_coco
from zoo.train.detection.config import DETECT
from zoo.train.detection.mmdet_config import compose_mmdet

FOLDER = Path(__file__).parents[2] / "configs/experiment"
NAMES = sorted(p.stem for p in FOLDER.glob("coco_*.yaml"))
QUICK = [
    "coco_mask_rcnn_nat_mini_3x",
    "coco_cascade_mask_rcnn_dinat_mini_3x",
    "coco_mask_rcnn_dinat_s_tiny_3x",
    "coco_retinanet_zoo_davit_tiny_1x",
    "coco_mask_rcnn_biformer_small_1x",
    "coco_retinanet_litv2_s_1x_ws4",
]


def build(name: str) -> None:
    cfg = from_container(detect_config([f"experiment={name}", "dry_run=true"]), DETECT)
    config = compose_mmdet(cfg, open_coco(cfg.data, may_lack=True), Path("."))
    built = float(re.search(r": ([\d.]+) M parameters", build_only(cfg, config))[1])  # type: ignore[index]
    published = cfg.notes.get("parameters_m")
    if published is not None:
        assert built == pytest.approx(published, abs=max(1.0, 0.02 * published))


def test_there_is_a_recipe_for_every_published_result() -> None:
    assert len(NAMES) == 49
    assert set(QUICK) <= set(NAMES)


@pytest.mark.parametrize("name", QUICK)
def test_recipe_builds(name: str) -> None:
    build(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in QUICK])
def test_every_recipe_builds(name: str) -> None:
    build(name)


@pytest.mark.parametrize("name", NAMES)
def test_head_of_the_file_says_what_it_is(name: str) -> None:
    head = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = "\n".join(head)
    assert f"zoo detect experiment={name} data.root=" in text
    assert "box AP" in text
    assert "Cost:" in text
    assert "Source:" in text


def test_recipe_is_the_published_one() -> None:
    cfg = from_container(detect_config(["experiment=coco_cascade_mask_rcnn_dinat_small_3x"]), DETECT)
    assert (cfg.schedule.epochs, cfg.schedule.milestones, cfg.schedule.lr, cfg.schedule.weight_decay) == (
        36,
        [27, 33],
        1e-4,
        0.05,
    )
    assert cfg.model.drop_path_rate == 0.5
    assert cfg.model.kwargs["dilations"][0] == [1, 28, 1]
    config = compose_mmdet(cfg, open_coco(cfg.data, may_lack=True), Path("."))
    heads = config.model.roi_head.bbox_head
    assert [h.type for h in heads] == ["ConvFCBBoxHead"] * 3
    assert heads[2].loss_bbox.type == "GIoULoss"
    assert config.optim_wrapper.optimizer.lr == pytest.approx(1e-4 * 2 / 16)  # one process with two images, of sixteen
    assert config.optim_wrapper.type == "AmpOptimWrapper"
