"""What `benchmarks/ops.py` measures: one module per op, named after its folder in ops/.

A module holds
- `CASES`: a sequence of Case subclasses' instances;
- `inputs(case)`: the tensors that every implementation takes, float32 on the CPU, drawn from the global generator;
- `implementations(case, device, dtype)`: name -> Implementation; the first is ours, the rest are its peers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Case", "Implementation"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A problem size.

    Attributes:
        name: shown in the table, unique in its module.
        quick: whether `--quick` includes it.
        forward_goals, training_goals: peer -> how many times faster than it ours is meant to be on a CPU.
    """

    name: str
    quick: bool = False
    forward_goals: Mapping[str, float] = field(default_factory=dict)
    training_goals: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Implementation:
    """A function of the case's inputs; whatever depends on sizes alone was prepared when it was made.

    Attributes:
        function: the inputs -> one output tensor.
        trains: whether it has a backward on this device.
    """

    function: Callable[..., Tensor]
    trains: bool = True
