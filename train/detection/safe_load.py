"""What mmengine puts into its checkpoints beside tensors, made known to torch's weights-only loader.

mmengine 0.10.7 calls torch.load without `weights_only`, which since torch 2.6 refuses its own HistoryBuffer.
"""

from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

__all__ = ["allow_mmengine_checkpoints"]


def _history_attribute(owner: Any, name: str) -> Any:
    """What pickle's getattr may fetch: a HistoryBuffer's own methods, which its state refers to."""
    if owner is not HistoryBuffer or name.startswith("_"):
        raise ValueError(f"the checkpoint refers to {owner!r}.{name}, which is none of mmengine's statistics")
    return getattr(owner, name)


def allow_mmengine_checkpoints() -> None:
    """Let checkpoints of mmengine's own CheckpointHook be read with weights_only, which stays on."""
    reconstruct: Any = np.empty(0).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32, np.bool_, np.uint32)}
    allowed: list[Any] = [HistoryBuffer, np.ndarray, np.dtype, *dtypes]
    allowed += [(_history_attribute, f"{prefix}getattr") for prefix in ("builtins.", "__builtin__.", "")]
    for core in ("core", "_core"):  # numpy 2 renamed the module
        allowed += [(f, f"numpy.{core}.multiarray.{f.__name__}") for f in (reconstruct, scalar)]
    torch.serialization.add_safe_globals(allowed)
