"""The matrix of exports: every family is in it, and the page says what was found."""

import json
from pathlib import Path

import pytest
from families import FAMILIES, file_of

from benchmarks import exports

pytest.importorskip("onnxruntime")


def test_every_family_and_format() -> None:
    """CONTRIBUTING.md, "How to add a family"."""
    from zoo.programs import PROGRAMS

    assert {file_of(m.name) for m in exports.MODELS} == {family.file for family in FAMILIES.values()}
    assert {kind for kind, _options in exports.FORMS.values()} == set(PROGRAMS)


def test_the_page_is_what_the_results_say() -> None:
    """Written by `python -m benchmarks.exports`, and by nobody else."""
    found = json.loads(exports.RESULTS.read_text())
    assert exports.PAGE.read_text() == exports.page(found)
    assert not [row for row in found["results"] if "error" in row]
    assert {(row["model"], row["form"]) for row in found["results"]} == {
        (model.name, form) for model in exports.MODELS for form in exports.FORMS
    }
    assert {row["model"] for row in found["results"] if "speed" in row} == {model.name for model in exports.MODELS}
    # rounding decides the order of some of SG-Former's tokens, in the model as in its program
    least = 1e-4
    assert all(row["program"] <= max(least, 4 * row["own"]) for row in found["results"] if "float16" not in row["form"])


def test_a_row(tmp_path: Path) -> None:
    out = tmp_path / "exports.json"
    arguments = ["--model=nat_isotropic_small", "--form=pt2", "--blocks=1", "--threads=1", f"--out={out}"]
    assert exports.main(arguments) == 0
    (row,) = json.loads(out.read_text())["results"]
    assert row["program"] < 1e-5
    assert len(row["shapes"]) == 3
    text = out.with_suffix(".md").read_text()
    assert "| `nat_isotropic_small` | - | - | batch, H, W: " in text
    assert " * |" in text
    assert "Not measured yet" in text


def test_speed_and_errors_are_shown() -> None:
    row = {"model": "van_b0", "form": "format=onnx", "blocks": None, "dynamic": "all", "program": 1e-6}
    timed = {**row, "speed": {"images": [1, 3, 224, 224], "eager": 30.0, "onnxruntime": 20.0}}
    failed = {**row, "model": "litv2_s", "error": "no such operator"}
    machine = {"threads": 2, "cpu": "a processor"}
    text = exports.page({"results": [timed, failed], "environment": machine, "versions": {"torch": "2"}})
    assert "| `van_b0` | batch, H, W: 1e-06 | - |" in text
    assert "| `van_b0` | 1x3x224x224 | 30.0 | 20.0 | 1.50 |" in text
    assert "| `litv2_s` | fails | - |" in text
    assert "- `litv2_s`, `format=onnx`: no such operator" in text
