"""`zoo train profile=true`: where the time of an update goes, as a trace, a table and one line."""

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

__all__ = ["UpdateProfiler", "part"]

_SKIPPED, _WARMUP, _UPDATES = 1, 1, 5  # the first update builds caches
_ROWS = 60
_PREFIX = "zoo: "


def part(name: str) -> record_function:
    """A context that gives a part of an update its name in profiles; of next to no cost without one."""
    return record_function(_PREFIX + name)


class UpdateProfiler:
    """Watches five updates of a run, the third to the seventh from its start or resume.

    Args:
        folder: for `trace.json`, which Perfetto and chrome://tracing open, and `table.txt`.
        device: of the training.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.line: str | None = None
        self._ended = -_SKIPPED - _WARMUP  # updates, of those that are watched
        self._sort = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or its library writes of its own state
        plan = schedule(wait=_SKIPPED, warmup=_WARMUP, active=_UPDATES, repeat=1)
        self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._profile.start()

    def step(self) -> str | None:
        """An update has ended; returns the line on all of them once the last one has."""
        self._ended += 1
        self._profile.step()
        return None if self.line is None else self.close()

    def close(self) -> str | None:
        """Stop watching; returns the line on the updates that were seen, if there were any."""
        self._profile.stop()
        return self.line

    def _write(self, found: profile) -> None:
        if self._ended <= 0:
            return
        averages = found.key_averages()
        self.folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self.folder / "trace.json"))
        (self.folder / "table.txt").write_text(averages.table(sort_by=self._sort, row_limit=_ROWS) + "\n")
        taken = {
            event.key.removeprefix(_PREFIX): event.cpu_time_total
            for event in averages
            if event.key.startswith(_PREFIX) and str(event.device_type).endswith("CPU")
        }
        total = sum(event.cpu_time_total for event in averages if event.key.startswith("ProfilerStep"))
        shares = [f"{name} {100 * time / total:.1f} %" for name, time in sorted(taken.items(), key=lambda x: -x[1])]
        shares.append(f"the rest {100 * (1 - sum(taken.values()) / total):.1f} %")
        self.line = (
            f"profile: {self._ended} updates of {total / self._ended / 1e3:.1f} ms: {', '.join(shares)}; "
            f"{self.folder / 'table.txt'}, trace.json"
        )
