"""MODELS.md says what the registry says."""

from pathlib import Path

import pytest
from families import FAMILIES
from timm.models import get_arch_pretrained_cfgs

from zoo import names
from zoo.names import NAMES
from zoo.registry import TABLE_HEADER, models_table, names_table, package_models, table_row

TABLE = Path(__file__).parents[2] / "MODELS.md"


def _rows() -> dict[str, str]:
    lines = TABLE.read_text().splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def test_names() -> None:
    assert list(_rows()) == package_models()
    assert all(line in TABLE.read_text() for line in TABLE_HEADER)


@pytest.mark.parametrize("name", ["vitrpb_small", *sorted({row.recorded.name for row in FAMILIES.values()})])
def test_rows(name: str) -> None:
    assert _rows()[name] == table_row(name)


def test_names_without_models() -> None:
    assert {name: tuple(get_arch_pretrained_cfgs(name)) for name in package_models()} == NAMES
    assert Path(names.__file__).with_name("_names.py").read_text() == names_table()


@pytest.mark.slow
def test_whole_table() -> None:
    assert TABLE.read_text() == models_table(package_models())
