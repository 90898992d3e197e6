"""docs/clients.md from what `pytest tests/clients --junitxml=FILE` found: python tests/clients/matrix.py FILE."""

import importlib.metadata
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from families import FAMILIES

OUT = Path(__file__).parents[2] / "docs" / "clients.md"
PACKAGES = {
    "test_transformers": "transformers",
    "test_transformers_backbone": "transformers",
    "test_smp": "segmentation-models-pytorch",
    "test_fastai": "fastai",
    "test_lightning": "lightning",
    "test_torchvision_detection": "torchvision",
    "test_grad_cam": "grad-cam",
    "test_captum": "captum",
    "test_fvcore": "fvcore",
    "test_peft": "peft",
    "test_accelerate": "accelerate",
    "test_torchao": "torchao",
    "test_open_clip": "open_clip_torch",
    "test_effdet": "effdet",
    "test_mmseg": "mmsegmentation",
    "test_fsdp2": "torch",
}
INTRODUCTION = """# Programs that take these models

Written by `make test-clients`: one small model of every family in each of these programs, beside timm's own DaViT. What
is done with each, and which numbers must come out, is in `tests/clients/test_clients.py`. A dash: a model of one
resolution has no levels. mmsegmentation runs on `mmcv-lite` with the operators of `zoo.train.detection`.
"""


def results(path: Path) -> dict[tuple[str, str], str]:
    """(client's test, family) -> how it ended, the worst of several."""
    found: dict[tuple[str, str], str] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        test, _, parameters = case.get("name", "").partition("[")
        family = re.sub(r"^(?:cpu|disk)-|-(?:cpu|disk)$", "", parameters.rstrip("]"))
        kinds = {child.tag for child in case}
        ended = "fails" if kinds & {"failure", "error"} else "-" if "skipped" in kinds else "yes"
        known = found.get((test, family))
        found[test, family] = "fails" if "fails" in (known, ended) else ended
    return found


def table(found: dict[tuple[str, str], str]) -> str:
    known = [*FAMILIES]  # the tests ran in any order; the control, which is none of them, comes first
    tested = dict.fromkeys(family for _, family in found)
    families = sorted(tested, key=lambda family: known.index(family) if family in known else -1)
    lines = [f"| program | version | {' | '.join(families)} |", "|---|---|" + ":-:|" * len(families)]
    for test, package in PACKAGES.items():
        program = test.removeprefix("test_").replace("_", " ")
        cells = [found.get((test, family), "not run") for family in families]
        lines.append(f"| {program} | {package} {importlib.metadata.version(package)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tested = results(Path(sys.argv[1]))
    lacking = {test for test, _ in tested} - set(PACKAGES)
    if lacking:
        sys.exit(f"no package is named for {', '.join(sorted(lacking))}")
    versions = f"timm {importlib.metadata.version('timm')}, torch {importlib.metadata.version('torch')}"
    OUT.write_text(f"{INTRODUCTION}\nWith {versions}:\n\n{table(tested)}\n")
    sys.exit(any(ended == "fails" for ended in tested.values()))
