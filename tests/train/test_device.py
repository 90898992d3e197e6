"""device=: what is refused says what to do; sums need no double precision on the device."""

import pytest
import torch

from zoo.errors import UserError
from zoo.train.state import World, join_world


def test_mps_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=mps was asked for .* use device=cpu"):
        join_world("mps")


def test_mps_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert join_world("mps").device == torch.device("mps")


def test_unknown_devices_are_told_of_mps() -> None:
    with pytest.raises(UserError, match="choose auto, cpu, cuda, cuda:N or mps"):
        join_world("tpu")


def test_totals_stay_off_a_device_without_double_precision() -> None:
    assert World(torch.device("meta")).totals(0.1, 3) == [0.1, 3.0]
