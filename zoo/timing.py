"""The time of a call on a GPU or a CPU."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["host_time", "queue_ahead", "step_times"]


def step_times(
    step: Callable[[], Any], device: torch.device, repeats: int, seconds: float = math.inf, least: int = 1
) -> list[float]:
    """Microseconds of `repeats` calls, fewer but `least` where `seconds` are over.

    A GPU's are taken between events, its caches flushed, and the whole call queued before it begins, so that what the
    host needs to issue it does not count. Elsewhere they are the clock's.
    """
    times: list[float] = []
    start = time.perf_counter()
    if device.type != "cuda":
        while len(times) < repeats and (len(times) < least or time.perf_counter() - start < seconds):
            before = time.perf_counter()
            step()
            times.append(1e6 * (time.perf_counter() - before))
        return times
    cache = torch.empty(256 << 20, dtype=torch.int8, device=device)  # larger than any cache
    step()
    host = min(host_time(step) for _ in range(3))
    flush = min(_flushed(cache, 1, cache.zero_) for _ in range(3))
    count = queue_ahead(host, flush)
    while len(times) < repeats and (len(times) < least or time.perf_counter() - start < seconds):
        times.append(_flushed(cache, count, step))
    return times


def _flushed(cache: Tensor, flushes: int, step: Callable[[], Any]) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(flushes):
        cache.zero_()
    first.record()
    step()
    last.record()
    last.synchronize()
    return 1e3 * float(first.elapsed_time(last))


def queue_ahead(host: float, flush: float, most: int = 64) -> int:
    """How many flushes keep a GPU busy while the host queues a call, given the microseconds of each."""
    return min(most, 2 + int(1.5 * host / max(flush, 1.0)))


def host_time(step: Callable[[], Any]) -> float:
    """Microseconds until a call on an idle GPU returns to the host."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    return 1e6 * (time.perf_counter() - start)
