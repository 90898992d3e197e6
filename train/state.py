"""Where randomness comes from and what a checkpoint of it holds, and the processes of a run.

Images, their order and their mixing are a pure function of (seed, epoch, position), so a resumed run needs no history
to draw them again. What the model itself draws (drop path, dropout) comes from the global generators, whose states are
saved.
"""

import hashlib
import os
import random
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so

from zoo.errors import UserError

__all__ = ["World", "derive_seed", "determinism", "isolated_rng", "join_world", "restore_rng", "rng_state"]


def derive_seed(*key: int) -> int:
    """A 63-bit seed that depends on every number of the key."""
    packed = struct.pack(f"<{len(key)}q", *key)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


@contextmanager
def isolated_rng(*key: int) -> Iterator[None]:
    """Seed the CPU generators from a key inside the block; outside nothing has changed.

    torch.manual_seed would also reseed every GPU, so torch's CPU generator is seeded by itself.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def rng_state() -> dict[str, Any]:
    """The states of the global generators, as plain containers and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set the global generators to what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if state.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def determinism(enabled: bool) -> Iterator[None]:
    """Deterministic algorithms inside the block where PyTorch has them."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(enabled, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not enabled
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = before[3]


@dataclass(frozen=True)
class World:
    """The processes of a run, one under plain python, several under torchrun."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_primary(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.size > 1

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if not self.distributed:
            return flag
        votes = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the processes."""
        if self.distributed:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def totals(self, *values: float) -> list[float]:
        """The sums of numbers over the processes, in double precision, which not every device has."""
        device = self.device if self.distributed else "cpu"
        return self.sum(torch.tensor(values, dtype=torch.float64, device=device)).tolist()

    def gather(self, value: Any) -> list[Any]:
        """One object of each process, in every process."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_primary(self, value: Any) -> Any:
        """The first process's object, in every process."""
        if not self.distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def leave(self) -> None:
        """Take leave of the other processes."""
        if self.distributed and dist.is_initialized():
            dist.destroy_process_group()


def join_world(device: str) -> World:
    """Choose the device and, under torchrun, join the other processes.

    Raises:
        UserError: the device is unknown or not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={device!r} is not known; choose auto, cpu, cuda, cuda:N or mps")
    try:
        torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device!r} is not known; choose auto, cpu, cuda, cuda:N or mps") from None
    if kind == "mps" and not torch.backends.mps.is_available():
        why = "this Mac's system is too old for it" if torch.backends.mps.is_built() else "it was built without Metal"
        raise UserError(f"device={device} was asked for and this PyTorch has no MPS: {why}; use device=cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={device} was asked for and PyTorch sees no GPU here; use device=cpu")
    index = torch.device(device).index
    if index is not None and kind == "cuda" and index >= torch.cuda.device_count():
        raise UserError(
            f"device={device} does not exist; this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        if kind == "cuda":
            torch.cuda.set_device(index or 0)
        return World(torch.device(device))
    found = init_distributed_device_so(device)
    return World(torch.device(found["device"]), found["global_rank"], found["world_size"], found["local_rank"])
