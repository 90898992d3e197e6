"""What the benchmarks know of an op beyond its calls in zoo.ops.examples: goals, floors and peers.

An op may have a module here, named after its folder in ops/, with any of
- `GOALS`: name of an example -> Goals, the ratios that were aimed at on a CPU;
- `FLOORS`: name of an example -> (Floor of the forward, of the backward or None), what an H200 can do at best;
- `peers(example, tensors)`: Peers that `python -m benchmarks.ops` compares with;
- `gpu_peers(example, tensors, compiled)`: those of `python -m benchmarks.gpu`, the cheap first; by default the same,
  and then each compiled.
Without a module the op is compared with its own definition.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

from torch import Tensor

from zoo.ops.examples import Example

__all__ = ["Floor", "Goals", "Peer", "Peers", "floors", "goals", "gpu_peers", "peers"]


@dataclass(frozen=True)
class Peer:
    """Another implementation; whatever depends on sizes alone was prepared when it was made.

    function: the example's tensors -> one output tensor.
    exact: whether it computes the same function; where not (NATTEN takes no bias) only its time is of use.
    inputs: how many of the example's tensors it takes.
    trains: whether it has a backward on this device.
    compiled: whether torch.compile makes it.
    """

    function: Callable[..., Tensor]
    exact: bool = True
    inputs: int | None = None
    trains: bool = True
    compiled: bool = False


Peers = dict[str, Peer | str]  # text says why one is left out
Compiler = Callable[[Callable[..., Tensor]], Peer]


@dataclass(frozen=True)
class Goals:
    """Peer -> how many times faster than it ours is meant to be on a CPU."""

    forward: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Floor:
    """Microseconds that memory traffic, matrix products and exponentials take on one H200; the largest binds.

    Arithmetic for bfloat16 tensors and a float32 log-sum-exp at 4.3 TB/s, 790 TFLOP/s and 3.7e12 exponentials a second.
    """

    memory: float
    products: float = 0.0
    exponentials: float = 0.0

    @property
    def microseconds(self) -> float:
        return max(self.memory, self.products, self.exponentials)


def goals(example: Example) -> Goals:
    return _known(example, "GOALS").get(example.name, Goals())


def floors(example: Example) -> tuple[Floor | None, Floor | None]:
    """Of the forward and of the backward; None where nobody has worked it out."""
    return _known(example, "FLOORS").get(example.name, (None, None))


def peers(example: Example, tensors: Sequence[Tensor]) -> Peers:
    """What the example is compared with on the tensors' device, in their dtype."""
    make = getattr(_module(example.folder), "peers", None)
    if make is None:
        return {"definition": Peer(functools.partial(example.bound(tensors), backend="reference"))}
    return make(example, tensors)


def gpu_peers(example: Example, tensors: Sequence[Tensor], compiled: Compiler) -> Peers:
    """The same for the benchmark of the Triton kernels; `compiled` makes a peer of a function by compiling it."""
    make = getattr(_module(example.folder), "gpu_peers", None)
    if make is not None:
        return make(example, tensors, compiled)
    found = peers(example, tensors)
    return found | {f"{n} compiled": compiled(p.function) for n, p in found.items() if isinstance(p, Peer)}


@functools.cache
def _module(folder: str) -> ModuleType | None:
    if folder not in {module.name for module in pkgutil.iter_modules(__path__)}:
        return None
    return importlib.import_module(f"{__name__}.{folder}")


def _known(example: Example, table: str) -> Mapping:
    return getattr(_module(example.folder), table, {})
