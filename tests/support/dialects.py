"""Writing a state_dict as another program would: the other direction of zoo.models.dialects."""

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.models.dialects import Dialect

__all__ = ["written"]


def written(state: Mapping[str, Tensor], dialect: Dialect) -> dict[str, Tensor]:
    """A state_dict of ours in a dialect's names, without what the dialect does not have."""
    found: dict[str, Tensor] = {}
    rows: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        spelt = dialect.spell(name)
        for alternatives, part in zip(spelt, value.chunk(len(spelt)) if len(spelt) > 1 else [value], strict=True):
            key, bracket, row = alternatives[0].partition("[")
            if bracket:
                rows.setdefault(key, {})[int(row.rstrip("]"))] = part
            else:
                found[key] = part
    return {**found, **{key: torch.stack([parts[i] for i in sorted(parts)]) for key, parts in rows.items()}}
