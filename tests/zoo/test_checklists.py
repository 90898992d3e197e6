"""What CONTRIBUTING.md asks of a family, an op, a recipe, a data set or a format is there; if not, it is printed."""

import json
import re
from pathlib import Path

import pytest
import yaml
from families import FAMILIES, RECORDINGS, file_of

import zoo.ops
from zoo.ops.examples import CATALOGUE
from zoo.registry import package_models

ROOT = Path(__file__).parents[2]
OPS = sorted(p.parent.name for p in (ROOT / "ops").glob("*/op.py"))
# the isotropic models are NAT and DiNAT without stages
ISOTROPIC = {"nat_isotropic"}


def checklist(what: str) -> str:
    """The section `How to add WHAT` of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(rf"^## How to add {what}$.*?(?=^## )", text, re.MULTILINE | re.DOTALL)
    assert found, f"CONTRIBUTING.md has no checklist for {what}"
    return found.group()


def complete(what: str, missing: dict[str, set[str]]) -> None:
    """Fail with the checklist unless nothing is missing; `missing` is by place."""
    gaps = [f"{place}: {', '.join(sorted(names))}" for place, names in missing.items() if names]
    if gaps:
        pytest.fail("\n".join(["missing in", *gaps, "", checklist(what)]), pytrace=False)


def test_families() -> None:
    files = {file_of(name) for name in package_models()}
    rows = {row.file for row in FAMILIES.values() if row.smallest is not None}
    configs = {}
    for path in (ROOT / "configs/model").glob("*_digits.yaml"):
        configs[path.stem] = file_of(yaml.safe_load(path.read_text())["model"]["name"])
    learned = {row["config"] for row in json.loads((ROOT / "benchmarks/results/digits.json").read_text())["results"]}
    table = set(re.findall(r"^\| `(\w+)` ", (ROOT / "MODELS.md").read_text(), re.MULTILINE))
    recorded = {row.recorded.file.split("/")[0] for row in FAMILIES.values()}
    complete(
        "a family",
        {
            "tests/support/families.py, FAMILIES": files - rows,
            "tests/support/families.py, RECORDINGS": recorded - {r.pattern.split("/")[0] for r in RECORDINGS},
            "configs/model/<family>_digits.yaml": files - ISOTROPIC - set(configs.values()),
            "tests/goldens/": {
                row.recorded.file
                for row in FAMILIES.values()
                if not (ROOT / f"tests/goldens/{row.recorded.file}.npz").is_file()
            },
            "MODELS.md (make models-table)": set(package_models()) - table,
            "benchmarks/results/digits.json (python -m benchmarks.digits)": set(configs) - learned,
        },
    )


def test_ops() -> None:
    tagged = {tag: {example.folder for example in CATALOGUE if tag in example.tags} for tag in ("tiny", "test", "gpu")}
    public = {name for name in OPS if any(hasattr(zoo.ops, e.op) for e in CATALOGUE if e.folder == name)}
    files = ("__init__.py", "reference.py", "cpu.py", "README.md")
    complete(
        "an op",
        {
            "ops/<name>/": {f"{op}/{file}" for op in OPS for file in files if not (ROOT / "ops" / op / file).is_file()},
            "ops/__init__.py": set(OPS) - public,
            **{f"ops/examples.py, tag {tag}": set(OPS) - found for tag, found in tagged.items()},
            "tests/ops/test_<name>.py": {op for op in OPS if not (ROOT / f"tests/ops/test_{op}.py").is_file()},
        },
    )


def test_detector_recipes() -> None:
    pytest.importorskip("mmdet")
    from zoo.train.detection.recipes import RECIPES

    recorded = json.loads((ROOT / "tests/goldens/coco_experiments.json").read_text())["recipes"]
    complete("a detector recipe", {"tests/goldens/coco_experiments.json": set(RECIPES) - set(recorded)})


def test_data_sets() -> None:
    data, augment = ({p.stem for p in (ROOT / "configs" / group).glob("*.yaml")} for group in ("data", "augment"))
    complete("a data set", {"configs/augment/": data - augment})


def test_export_formats(capsys: pytest.CaptureFixture[str]) -> None:
    from zoo.train.export import FORMATS, main

    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    tests = (ROOT / "tests/train/test_export.py").read_text()
    complete(
        "an export format",
        {
            "the help of train/export.py": {name for name in FORMATS if f"{name}: " not in usage},
            "tests/train/test_export.py": {name for name in FORMATS if name not in tests},
        },
    )


def test_a_gap_prints_the_checklist() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"configs/model/: rocket[\s\S]*## How to add a family"):
        complete("a family", {"configs/model/": {"rocket"}, "MODELS.md": set()})
