"""What every op shares: the choice of a backend, and registration with torch.library."""

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "LIBRARY", "autocast_dtype", "no_autocast", "register_op", "require", "resolve_backend", "resolve_scale",
    "runs_triton", "without_triton",
]  # fmt: skip

LIBRARY = torch.library.Library("zoo", "DEF")

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # read when triton is imported, so once here too
_AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
_AUTOCAST_SET = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What an active autocast region makes of floating tensors on x's device; None outside of one."""
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Switch autocast off on x's device."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


def _has_autocast(device: str) -> bool:
    return device != "meta"  # torch.amp.is_autocast_available says it too, but breaks graphs in torch 2.11


def resolve_scale(scale: float | None, dim: int) -> float:
    """The softmax scale: dim ** -0.5 unless one is given."""
    return 1.0 / math.sqrt(dim) if scale is None else float(scale)


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
    transform = _differentiating_transform()
    if transform is not None:
        unavailable = {
            **dict.fromkeys(("cpu", "triton"), f"{transform} works through the reference alone"),
            **unavailable,
        }
    if backend is None:
        preferred = {"cpu": "cpu", "meta": "cpu", "cuda": "triton"}.get(x.device.type, "reference")
        return preferred if preferred not in unavailable else "reference"
    require(
        backend in ("reference", "cpu", "triton"),
        f"{op}: unknown backend {backend!r}; choose 'reference', 'cpu', 'triton' or None",
    )
    reasons = dict(unavailable)
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
    if x.device.type not in ("cpu", "cuda", "meta"):
        return {"triton": f"the tensors are on {x.device}"}
    return {}


def runs_triton(op: str, backend: str, x: Tensor) -> bool:
    """Whether a registered op that is called with this backend string runs its Triton kernels.

    The public functions pass the path that they chose; scripted models call the registered op by name and leave the
    choice to it with "" or "auto".

    Raises:
        ValueError, RuntimeError: as `resolve_backend`.
    """
    if backend == "cpu":
        return False
    chosen = None if backend in ("", "auto") else backend
    return resolve_backend(op, chosen, x, without_triton(x)) == "triton"


def register_op(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: bool = True,
    tags: Sequence[torch.Tag] = (),
) -> Any:
    """Define `zoo::<schema>` and return its default overload.

    Args:
        schema: e.g. "neighborhood_attention(Tensor q, ..., str backend) -> (Tensor, Tensor)".
        impl: the kernel for every device; it receives real tensors with no autograd history.
        fake: returns empty tensors of the right shape, stride and dtype for FakeTensor and meta.
        setup_context, backward: as for torch.library.register_autograd; leave both out for an op with no gradient.
        autocast: cast all floating tensor arguments to the autocast dtype inside an autocast region.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=tuple(tags))
    LIBRARY.impl(name, _without_autocast(impl), "CompositeExplicitAutograd")
    torch.library.register_fake(f"zoo::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.zoo, name).default
    if backward is not None:
        torch.library.register_autograd(f"zoo::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    if autocast:
        for device, key in _AUTOCAST_KEYS.items():
            LIBRARY.impl(name, _autocast_rule(op, device, key), key.name, with_keyset=False)
    return op


def _without_autocast(impl: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel whose own products keep their dtypes: a backward may run inside the loss's autocast region."""

    @functools.wraps(impl)
    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_SET):
            return impl(*args)

    return kernel


def _autocast_rule(op: Any, device: str, key: torch._C.DispatchKey) -> Callable[..., Any]:
    def rule(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*(_cast(a, dtype, device) for a in args))

    return rule


def _cast(x: Any, dtype: torch.dtype, device: str) -> Any:
    eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 and x.device.type == device
    return x.to(dtype) if eligible else x
