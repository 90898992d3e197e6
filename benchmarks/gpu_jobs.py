"""What `benchmarks.gpu` runs in processes of its own; importing this file imports nothing else."""

import os
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["import_zoo", "model_case", "op_case", "probe"]


def import_zoo() -> str | None:
    """Import the package; where timm is too old for its models, its ops alone: then the reason."""
    try:
        import zoo.models  # noqa: F401
    except ImportError as error:
        os.environ["ZOO_WITHOUT_MODELS"] = "1"
        return f"{type(error).__name__}: {error}"
    return None


def probe(report: Callable[[Any], None], dry_run: bool, arguments: Sequence[str]) -> None:
    """The machine, and the names of what there is to measure."""
    import torch
    import triton

    from benchmarks import models
    from benchmarks.environment import command_line, environment
    from benchmarks.gpu_ops import Settings, build
    from zoo.ops.tuning import load_table, table_path

    settings = Settings(dry_run=dry_run)
    torch.zeros(1, device=settings.device)
    found = environment(settings.device, torch.get_num_threads(), command_line("gpu", arguments))
    found |= {"torch": torch.__version__, "triton": triton.__version__}
    table = None if dry_run else table_path(torch.cuda.get_device_name())
    found["tuned_configurations"] = len(load_table(table)) if table is not None and table.exists() else 0
    memory = 0 if dry_run else torch.cuda.get_device_properties(0).total_memory >> 30
    cases = [(case.folder, case.name) for case in build(settings)]
    report({"environment": found, "cases": cases, "models": list(models.GPU_ORDER), "memory_gib": memory})


def op_case(report: Callable[[Any], None], settings: dict[str, Any], number: int, seconds: float | None) -> None:
    """Measure a case, or without a number of seconds prepare it."""
    from benchmarks import gpu_ops

    if seconds is None:
        gpu_ops.prepare(report, gpu_ops.Settings(**settings), number)
    else:
        gpu_ops.measure(report, gpu_ops.Settings(**settings), number, seconds)


def model_case(
    report: Callable[[Any], None], run: dict[str, Any], prepared: str | None = None, alone: bool = False
) -> None:
    """Measure a model, or compile what "ours" or its "peer" needs; alone: nothing was compiled before."""
    from benchmarks import models

    if not alone:
        models.compile_threads(1)  # beside others that compile, or from a cache
    if prepared is None:
        models.measure_gpu(report, models.GpuRun(**run))
    else:
        models.prepare_gpu(report, models.GpuRun(**run), prepared)
