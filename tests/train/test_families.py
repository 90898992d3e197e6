"""Every family learns the digits by its one configuration; every published ImageNet recipe composes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, file_of
from torch.utils._python_dispatch import TorchDispatchMode
from training import summary

from zoo.registry import model_info, package_models
from zoo.train.app import main
from zoo.train.build import build_model
from zoo.train.compose import compose_config, from_container
from zoo.train.config import TRAIN, ModelConfig, TrainConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(p.stem for p in (ROOT / "configs/model").glob("*_digits.yaml"))
RECIPES = sorted(p.stem for p in (ROOT / "configs/experiment").glob("*_imagenet.yaml"))
GOAL = 95.0


class _Calls(TorchDispatchMode):
    """Collects the names of this package's ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "zoo":
            self.names.add(func.name().removeprefix("zoo::"))
        return func(*args, **(kwargs or {}))


def composed(config: str) -> TrainConfig:
    return from_container(compose_config(TRAIN, [f"model={config}"]), TRAIN)


def test_every_family_has_one_configuration() -> None:
    # the isotropic models are NAT and DiNAT without stages
    files = {file_of(name) for name in package_models()} - {"nat_isotropic"}
    models = {config: composed(config).model.name for config in CONFIGS}
    assert {file_of(name) for name in models.values()} == files
    # NAT and DiNAT are one file, dilation is what tells them apart
    assert len(CONFIGS) == len(files) + 1
    assert models["dinat_digits"].startswith("dinat_")


@pytest.mark.parametrize("config", CONFIGS)
def test_dry_run(config: str, tmp_path: Path) -> None:
    """It builds, takes a step, is saved, loaded and evaluated."""
    run = tmp_path / "run"
    assert main("train", [f"model={config}", "dry_run=true", "device=cpu", "batch_size=8", f"run_dir={run}"]) == 0
    found = summary(run)
    assert found["dry_run"]
    assert found["threads"] == 1
    assert 0.1e6 < found["parameters"] < 1e6


@pytest.mark.parametrize("config", CONFIGS)
def test_the_family_s_attention_is_still_there(config: str) -> None:
    model = build_model(composed(config).model, num_classes=10, img_size=32).eval()
    with _Calls() as calls, torch.no_grad():
        assert model(torch.randn(3, 3, 32, 32)).shape == (3, 10)
    used = {name.removesuffix("_qkvpacked") for name in calls.names}
    name = composed(config).model.name
    published = set(model_info(name).ops)
    assert bool(published) == any(row.kernels for row in FAMILIES.values() if row.file == file_of(name))
    assert published <= used, "the shrunken model has lost attention of the published one"


def test_training_names_no_family() -> None:
    """The engine builds models by name alone, in every folder; rows of published recipes say which models are theirs.

    What reads a checkpoint file is no family's.
    """
    names = "|".join(sorted({file_of(name) for name in package_models()} | {"dinat"}))
    names = names.replace("|soft|", "|soft_(?!targets|nms)|")  # words of other things
    paths = set((ROOT / "train").rglob("*.py")) - {ROOT / "train/detection/recipes.py"}
    assert len(paths) > 30
    for path in paths:
        code = re.sub(r"#.*|\b(?:from|import) zoo\.models\.checkpoints\b", "", path.read_text())
        assert not re.search(rf"['\"](zoo_)?({names})|zoo\.models", code), path


def test_committed_table_covers_every_configuration() -> None:
    rows = json.loads((ROOT / "benchmarks/results/digits.json").read_text())["results"]
    assert [row["config"] for row in rows] == CONFIGS
    table = (ROOT / "benchmarks/results/digits.md").read_text()
    for row in rows:
        assert row["top1"] >= GOAL, row["config"]
        assert row["model"] == composed(row["config"]).model.name
        assert f"| {row['config']} | {row['model']} |" in table
        assert row["command"] == f"zoo train model={row['config']}"
        model = build_model(composed(row["config"]).model, num_classes=10, img_size=32)
        assert sum(p.numel() for p in model.parameters()) == row["parameters"], row["config"]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_learns_the_digits(config: str, tmp_path: Path) -> None:
    assert main("train", [f"model={config}", "device=cpu", f"run_dir={tmp_path / 'run'}"]) == 0
    found = summary(tmp_path / "run")
    assert found["held_out"] == 359
    assert found["top1"] >= GOAL


@pytest.mark.parametrize("recipe", RECIPES)
def test_imagenet_recipe(recipe: str) -> None:
    path = ROOT / f"configs/experiment/{recipe}.yaml"
    head = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "arXiv:" in head
    assert "torchrun --nproc-per-node=8 -m zoo.train experiment=" in head
    config = from_container(compose_config(TRAIN, [f"experiment={recipe}", "data.root=x"]), TRAIN)
    assert config.epochs == 300
    assert 8 * config.batch_size * config.grad_accum in (1024, 4096)
    assert build_model(ModelConfig(config.model.name, kwargs={"device": "meta"}), num_classes=1000) is not None


@pytest.mark.parametrize("recipe", RECIPES)
def test_imagenet_commands_compose(recipe: str) -> None:
    """The commands at the head of the file are ones that run, and their model is of the recipe's family."""
    text = (ROOT / f"configs/experiment/{recipe}.yaml").read_text().replace("\\\n#", "")
    assert "Expected top-1" in text
    assert "Cost:" in text
    assert "Source:" in text
    commands = re.findall(r"-m zoo\.train (.*)", text)
    assert commands
    for command in commands:
        overrides = command.replace("IMAGENET", "x").split()
        assert overrides[0] == f"experiment={recipe}"
        config = from_container(compose_config(TRAIN, overrides), TRAIN)
        name = recipe.removesuffix("_imagenet")
        assert file_of(config.model.name) == {"dinat": "nat"}.get(name, name)
