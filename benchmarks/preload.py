"""Imports what the processes of `benchmarks.gpu` need, once for all that are forked from the importing one."""

import os

from benchmarks.gpu_jobs import import_zoo


def _import() -> None:
    import_zoo()
    import torch

    from benchmarks import gpu_ops  # noqa: F401

    # the compiler asks for a GPU when it is imported, and a process that asked cannot be forked any more
    asked, torch.cuda.is_available = torch.cuda.is_available, lambda: "TRITON_INTERPRET" not in os.environ
    import torch._inductor.compile_fx

    torch.cuda.is_available = asked


_import()
