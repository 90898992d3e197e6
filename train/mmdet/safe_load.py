"""What mmengine puts into its checkpoints beside tensors, made known to torch's weights-only loader.

mmengine 0.10.7 calls torch.load without `weights_only`, which since torch 2.6 refuses its own HistoryBuffer.
"""

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

__all__ = ["allow_mmengine_checkpoints"]


def allow_mmengine_checkpoints() -> None:
    """Let checkpoints of mmengine's own CheckpointHook be read with weights_only, which stays on."""
    reconstruct = np.empty(0).__reduce__()[0]  # its module was renamed in numpy 2
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32, np.bool_, np.uint32)}
    torch.serialization.add_safe_globals([HistoryBuffer, reconstruct, scalar, np.ndarray, np.dtype, *dtypes])
