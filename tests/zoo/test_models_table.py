"""MODELS.md says what the registry says."""

from pathlib import Path

import pytest

from zoo.registry import TABLE_HEADER, models_table, package_models, table_row

TABLE = Path(__file__).parents[2] / "MODELS.md"


def _rows() -> dict[str, str]:
    lines = TABLE.read_text().splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def test_names() -> None:
    assert list(_rows()) == package_models()
    assert all(line in TABLE.read_text() for line in TABLE_HEADER)


@pytest.mark.parametrize(
    "name", ["nat_mini", "dinat_s_tiny", "vitrpb_small", "biformer_tiny", "van_b0", "litv2_s", "stvit_small"]
)
def test_rows(name: str) -> None:
    assert _rows()[name] == table_row(name)


@pytest.mark.slow
def test_whole_table() -> None:
    assert TABLE.read_text() == models_table()
