"""Which path runs an op: the reference, the CPU path or the Triton kernels; and what autocast makes of its tensors."""

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "autocast_dtype", "cast", "cast_dtype", "no_autocast", "resolve_backend", "run_reference", "runs_triton",
    "without_triton",
]  # fmt: skip

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # read when triton is imported, so once here too
_OLDEST = (8, 0)  # below, Triton has no products of bfloat16, and makes those of other dtypes without tensor cores
_Result = TypeVar("_Result")


def autocast_dtype(device: str) -> torch.dtype | None:
    """What an active autocast region makes of floating tensors on a kind of device; None outside of one."""
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def cast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that an op sees of x: that of an active autocast region, which leaves float64 and integers alone."""
    dtype = autocast_dtype(x.device.type)
    return x.dtype if dtype is None or x.dtype == torch.float64 or not x.is_floating_point() else dtype


def cast(x: Any) -> Any:
    """A tensor in the dtype that an op sees of it; anything else as it is."""
    return x.to(cast_dtype(x)) if isinstance(x, Tensor) else x


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Switch autocast off on x's device."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


def _has_autocast(device: str) -> bool:
    return device != "meta"  # torch.amp.is_autocast_available says it too, but breaks graphs in torch 2.11


def run_reference(reference: Callable[..., _Result], x: Tensor, *args: Any) -> _Result:
    """The definition as the registered ops run: on tensors that autocast has cast, its products in their dtypes."""
    if autocast_dtype(x.device.type) is None:
        return reference(x, *args)
    args = tuple(cast(a) for a in (x, *args))
    with no_autocast(x):
        return reference(*args)


def resolve_backend(op: str, backend: str | None, x: Tensor, unavailable: dict[str, str]) -> str:
    """Name the path that runs `op` on a tensor like x: "reference", "cpu" or "triton".

    Args:
        op: public name of the op, for messages.
        backend: the caller's choice; None takes Triton on a GPU, the CPU path on a CPU, the reference otherwise.
        x: a tensor on the device of the call.
        unavailable: backend -> the reason it cannot run this call; backends that are absent from it can run.

    Raises:
        ValueError: the name is no backend.
        RuntimeError: a named backend cannot run this call; the message gives the reason.
    """
    if backend not in ("reference", "cpu", "triton", None):
        raise ValueError(f"{op}: unknown backend {backend!r}; choose 'reference', 'cpu', 'triton' or None")
    reasons = dict(unavailable)
    transform = _differentiating_transform()
    if transform is not None:
        for name in ("cpu", "triton"):
            reasons.setdefault(name, f"{transform} works through the reference alone")
    if backend is None:
        preferred = {"cpu": "cpu", "meta": "cpu", "cuda": "triton"}.get(x.device.type, "reference")
        return preferred if preferred not in reasons else "reference"
    if backend == "cpu" and x.device.type not in ("cpu", "meta"):
        reasons.setdefault("cpu", f"the tensors are on {x.device}")
    if backend in reasons:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run this call: {reasons[backend]}")
    return backend


def _differentiating_transform() -> str | None:
    """The transform around this call that registered ops do not support: they have a plain backward alone."""
    if torch.compiler.is_compiling():
        return None
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation (jvp)"  # the op would drop the tangent without a word
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return "torch.func.grad" if any("Grad" in str(level.key()) for level in levels) else None


def without_triton(x: Tensor) -> dict[str, str]:
    """Why the Triton kernels cannot run on a tensor like x, as `resolve_backend` takes it; empty where they can."""
    if not _HAS_TRITON:
        return {"triton": "the package triton is not installed"}
    if x.dtype == torch.float64:
        return {"triton": "the kernels compute in float32; float64 runs on the other backends"}
    if x.device.type == "cpu" and not _INTERPRET:
        return {"triton": "the tensors are on the CPU, where it runs only in its interpreter (TRITON_INTERPRET=1)"}
    if x.device.type == "cuda" and (reason := _too_old(x.device)) is not None:
        return {"triton": reason}
    if x.device.type not in ("cpu", "cuda", "meta"):
        return {"triton": f"the tensors are on {x.device}"}
    return {}


@torch.compiler.assume_constant_result
def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip or (major, minor) >= _OLDEST:
        return None
    return f"this GPU has compute capability {major}.{minor}, and the kernels need {_OLDEST[0]}.{_OLDEST[1]}"


def runs_triton(op: str, backend: str, x: Tensor) -> bool:
    """Whether a registered op that is called with this backend string runs its Triton kernels.

    The public functions pass the path that they chose; scripted models call the registered op and may leave the
    choice to it with "".

    Raises:
        ValueError, RuntimeError: as `resolve_backend`, and for "reference", which is no registered op.
    """
    if backend == "cpu":
        return False
    if backend == "reference":
        raise ValueError(f"{op}: the registered op runs backend '', 'cpu' or 'triton', got {backend!r}")
    return resolve_backend(op, backend or None, x, without_triton(x)) == "triton"
