"""Every published COCO recipe composes what it always did, and builds the detector that was published."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

pytest.importorskip("mmdet")

from zoo.train.compose import from_container
from zoo.train.detection.app import build_only, detect_config, main
from zoo.train.detection.coco_data import open_coco
from zoo.train.detection.config import DETECT, DetectConfig
from zoo.train.detection.mmdet_config import compose_mmdet
from zoo.train.detection.recipes import RECIPES

RECORDED = json.loads((Path(__file__).parents[1] / "goldens/coco_experiments.json").read_text())
NAMES = list(RECORDED["recipes"])
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


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def composed(*overrides: str) -> dict[str, Any]:
    return dict(leaves(OmegaConf.to_container(detect_config(overrides))))


def recorded(name: str) -> dict[str, Any]:
    chosen = {key: RECORDED["distinct"][key][index] for key, index in RECORDED["recipes"][name].items()}
    return RECORDED["common"] | chosen


def test_there_is_a_recipe_for_every_published_result() -> None:
    assert len(NAMES) == 49
    assert list(RECIPES) == sorted(NAMES)
    assert set(QUICK) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_composes_what_its_file_did(name: str) -> None:
    """A key that the configuration has had only since then has its default."""
    defaults = dict(leaves(OmegaConf.to_container(OmegaConf.structured(DetectConfig))))
    found, expected = composed(f"experiment={name}"), recorded(name)
    assert {k: v for k, v in found.items() if k in expected or v != defaults.get(k)} == expected
    assert json.dumps([found[k] for k in expected]) == json.dumps(list(expected.values()))  # 1 is not 1.0


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["schedule.lr=3e-4", "batch_size=4"], {"schedule.lr": 3e-4, "batch_size": 4}),
        (["model.kwargs.n_win=8"], {"model.kwargs.n_win": 8}),
        (["notes.mine=3"], {"notes.mine": 3}),
        (["detector=faster_rcnn"], {"detector.name": "faster_rcnn"}),
        (["model.name=van_b0"], {"model.name": "van_b0"}),
        (["schedule=3x"], {"schedule.epochs": 36, "schedule.milestones": [27, 33]}),
        (["data.root=/data"], {"data.root": "/data"}),
    ],
)
def test_overrides_win_over_the_recipe(overrides: list[str], changes: dict[str, Any]) -> None:
    name = "coco_mask_rcnn_biformer_small_1x"
    assert composed(f"experiment={name}", *overrides) == recorded(name) | changes
    assert composed(*overrides, f"experiment={name}") == recorded(name) | changes


def test_configuration_of_the_users_own_builds_on_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - coco_retinanet_litv2_s_1x\n  - _self_\nschedule:\n  lr: 0.5\n"
    (tmp_path / "experiment/mine.yaml").write_text(text)
    mine = dict(leaves(OmegaConf.to_container(detect_config(["experiment=mine"], [str(tmp_path)]))))
    assert mine == recorded("coco_retinanet_litv2_s_1x") | {"schedule.lr": 0.5}


def test_recipes_are_listed_and_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  experiment "))
    assert line.split(maxsplit=1)[1].split(", ") == NAMES
    assert main(["experiment=coco_mask_rcnn_nat_tinny_3x"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert f"did you mean {', '.join(difflib.get_close_matches('coco_mask_rcnn_nat_tinny_3x', NAMES))}?" in error
    assert all(name in error for name in NAMES)


@pytest.mark.parametrize("name", QUICK)
def test_recipe_builds(name: str) -> None:
    build(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in QUICK])
def test_every_recipe_builds(name: str) -> None:
    build(name)


@pytest.mark.parametrize("name", NAMES)
def test_head_says_what_the_recipe_is(name: str) -> None:
    head = RECIPES[name].head
    assert hashlib.sha256(head.encode()).hexdigest()[:16] == RECORDED["heads"][name]
    assert all(line.startswith("# ") for line in head.splitlines())
    assert f"zoo detect experiment={name} data.root=" in head
    assert "box AP" in head
    assert "Cost:" in head
    assert "Source:" in head


def test_cfg_job_prints_head_and_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    name = "coco_retinanet_zoo_davit_base_3x"
    assert main(["--cfg", "job", f"experiment={name}", "data.root=/data"]) == 0
    text = capsys.readouterr().out
    head = RECIPES[name].head
    assert text == f"{head}\n{OmegaConf.to_yaml(detect_config([f'experiment={name}', 'data.root=/data']))}"
    assert main(["--cfg", "job", f"experiment={name}", "schedule.lr=0.5", "model.kwargs.x=[1,2]"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{head}\n# Otherwise here: model.kwargs.x=[1, 2], schedule.lr=0.5\n")
    assert main(["--cfg", "job"]) == 0
    assert not capsys.readouterr().out.startswith("#")


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
