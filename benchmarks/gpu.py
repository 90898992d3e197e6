"""The Triton kernels on this machine's GPU: correctness, then time, peers, fraction of the floor, peak memory.

    make bench-gpu
    python -m benchmarks.gpu --part ops --op neighborhood --dtype float16
    python -m benchmarks.gpu --dry-run          # tiny shapes in Triton's interpreter, no GPU: does the harness work?

First the ops, then whole models in eager mode, then the same compiled, until `--budget` seconds are over; what they did
not suffice for is named. Each case runs in a process of its own: one that crashes, hangs or ruins its GPU context costs
its own row. Before the cases are timed one by one, the compilers' caches are filled on all CPUs at once. The table is
printed last; JSON is written after every case, so an interruption loses none that is done. The exit code is 1 where
one of our results is wrong, or there is none.
"""

import argparse
import contextlib
import getpass
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.gpu_jobs import import_zoo, model_case, op_case, probe

_PRELOAD = ["benchmarks.preload"]
_NO_GPU = "PyTorch sees no GPU here; --dry-run tries the harness without one"
_CASE_LIMIT = 75.0  # seconds after which a case is stopped, and of which peers may begin in the first
_PEERS_UNTIL = 45.0
_PATIENCE = 10  # as often as long in a dry run: the interpreter is slow
# how much of the budget is over when each part ends, at the latest
_SHARES = {"prepared": 0.2, "ops": 0.58, "models": 0.74}


class Bench:
    """The state of a run: its clock, its processes, and what was found."""

    def __init__(self, options: argparse.Namespace, start: float) -> None:
        self.no_models = import_zoo()
        from zoo import processes

        self.options, self.start, self.processes = options, start, processes
        self.begin, self.end = start, start + options.budget
        self.report: dict[str, Any] = {"environment": {}, "results": [], "models": [], "left_out": []}
        self.out: Path | None = options.out
        self.workers = 0
        self.method = "forkserver"

    def run(self, jobs: Sequence[Any], **limits: Any) -> list[Any]:
        endings: list[Any] = self.processes.run(jobs, method=self.method, preload=_PRELOAD, **limits)
        return endings

    def until(self, part: str) -> float:
        return self.begin + (self.end - self.begin) * _SHARES[part]

    def left_out(self, text: str) -> None:
        self.report["left_out"].append(text)

    def progress(self, text: str) -> None:
        print(f"{time.monotonic() - self.start:6.1f} s  {text}", file=sys.stderr, flush=True)

    def save(self) -> None:
        if self.out is not None:
            self.report["seconds"] = round(time.monotonic() - self.start, 1)
            try:
                self.out.write_text(json.dumps(self.report, indent=2) + "\n")
            except OSError as error:
                elsewhere = Path(tempfile.gettempdir()) / self.out.name
                self.progress(f"{error}: the JSON goes to {elsewhere}")
                self.out = elsewhere
                self.out.write_text(json.dumps(self.report, indent=2) + "\n")

    def probe(self, arguments: Sequence[str]) -> str | None:
        """Ask a process what there is; the reason why nothing can be measured."""
        job = self.processes.Job(probe, (self.options.dry_run, list(arguments)), 120)
        for self.method in ("forkserver", "spawn"):  # the second imports everything for every case, but always works
            with contextlib.suppress(OSError, EOFError):
                (ending,) = self.run([job])
                if "forked" not in (ending.failure or ""):
                    break
        if ending.failure is not None:
            return f"{ending.failure} (with {sys.executable})"
        (self.found,) = ending.messages
        self.report["environment"] = self.found["environment"] | {"budget": self.options.budget}
        if self.out is None and not self.options.dry_run:
            name = self.found["environment"]["gpu"].lower().replace(" ", "_")
            self.out = ROOT / "benchmarks" / "results" / f"gpu_{name}.json"
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # a process may need some GiB of the GPU; on few CPUs they would only wait for each other
        workers = 0 if self.options.dry_run or cpus < 4 else min(cpus - 2, self.found["memory_gib"] // 8)
        self.workers = workers if self.options.workers is None else self.options.workers
        return None

    def prepare(self, jobs: Sequence[Any], end: float, what: str) -> list[Any]:
        """Run jobs side by side until `end`; only the compilers' caches remember them."""
        start = time.monotonic()
        endings = self.run(jobs, workers=self.workers, deadline=end, end=end)
        done = sum(e.failure is None for e in endings)
        seconds = round(time.monotonic() - start, 1)
        self.report.setdefault("prepared", {})[what] = {"jobs": len(jobs), "finished": done, "seconds": seconds}
        self.progress(f"compiled {what}: {done} of {len(jobs)}")
        return endings

    def measure(self, key: str, what: dict[str, Any], function: Callable[..., None], *arguments: Any) -> None:
        """Run one case alone on the machine; its rows join the report, whatever becomes of it."""
        most = _PATIENCE * _CASE_LIMIT if self.options.dry_run else _CASE_LIMIT
        limit = max(5.0, min(most, self.end - time.monotonic()))
        (ending,) = self.run([self.processes.Job(function, arguments, limit)])
        title = ", ".join(str(x) for x in what.values())
        if what.get("compiled") and ending.failure is not None and ending.failure.startswith("stopped"):
            self.left_out(f"{title} ({ending.failure})")  # compiling takes long, and is nobody's mistake
        else:
            self.report[key] += finished(ending, what)
        self.save()
        self.progress(title)

    def ops(self) -> None:
        options = self.options
        settings = {"dry_run": options.dry_run, "dtype_name": options.dtype}
        chosen = [i for i, (op, _) in enumerate(self.found["cases"]) if not options.op or op in options.op]
        if self.workers:
            jobs = [self.processes.Job(op_case, (settings, i, None)) for i in chosen]
            jobs += [
                self.processes.Job(model_case, ({"name": name, "dry_run": options.dry_run}, "ours"))
                for name in self.models()
            ]
            self.prepare(jobs, self.until("prepared"), "ops")
        end = self.until("ops") if self.models() else self.end
        for i in chosen:
            op, name = self.found["cases"][i]
            seconds = end - time.monotonic()
            if seconds <= 0:
                self.left_out(f"{op}, {name} (the time was up)")
                continue
            until = _PATIENCE * _PEERS_UNTIL if options.dry_run else _PEERS_UNTIL
            self.measure("results", {"op": op, "case": name}, op_case, settings, i, min(until, seconds))

    def models(self) -> list[str]:
        if self.options.part == "ops" or self.no_models is not None:
            return []
        return [n for n in self.found["models"] if not self.options.model or n in self.options.model]

    def eager_models(self) -> None:
        end = self.until("models") if self.options.part == "both" else self.end
        for name in self.models():
            if time.monotonic() > end:
                self.left_out(f"{name}, eager (the time was up)")
                continue
            run = {"name": name, "dry_run": self.options.dry_run}
            self.measure("models", {"model": name, "compiled": ""}, model_case, run)

    def compiled_models(self) -> None:
        """Forwards, then training; where both sides were compiled before in time."""
        runs = [
            {"name": name, "modes": (mode,), "compiled": True, "dry_run": self.options.dry_run}
            for mode in ("forward", "training")
            for name in self.models()
        ]
        ready = [True] * len(runs)
        if self.workers and runs:
            jobs = [self.processes.Job(model_case, (run, which)) for run in runs for which in ("ours", "peer")]
            now = time.monotonic()
            endings = self.prepare(jobs, now + 0.6 * max(0.0, self.end - now), "models")
            # one that failed fails again, and says so; one that was stopped is too slow for the rest of the time
            in_time = [e.begun and not (e.failure or "").startswith("stopped") for e in endings]
            ready = [all(in_time[2 * i : 2 * i + 2]) for i in range(len(runs))]
        for run, prepared in zip(runs, ready, strict=True):
            what = {"model": run["name"], "mode": run["modes"][0], "compiled": "compiled"}
            if not prepared or time.monotonic() > self.end - 5:
                self.left_out(f"{', '.join(what.values())} (the time was up)")
            else:
                self.measure("models", what, model_case, run, None, not self.workers)


def finished(ending: Any, what: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a case; where its process did not come to its end, they say why."""
    if not ending.messages:
        wrong = {"wrong": f"ERROR {ending.failure}", "traceback": ending.details}
        return [{"mode": "forward"} | what | wrong]
    rows: list[dict[str, Any]] = ending.messages[-1]["rows"]
    if ending.failure is None:
        return rows
    who, _ = ending.messages[-1]["doing"]
    for row in rows:
        if "wrong" in row:
            continue
        if "microseconds" not in row and "images_per_second" not in row and who == "ours":
            row |= {"wrong": f"ERROR {ending.failure}", "traceback": ending.details}
        elif who != "ours" and who not in row.get("peers", {}):
            row["notes"].setdefault(who or "the end", ending.failure)
    return rows


def op_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """us: the GPU's time. host: what the host needs to issue the call. Peers by how many times our time they take."""
    lines = [
        f"{'op':<13} {'case':<18} {'pass':<8} {'us':>9} {'floor':>7} {'of it':>6} {'host':>7} {'MiB':>7}"
        "  peers, x our time"
    ]
    for row in rows:
        head = f"{row['op']:<13} {row['case']:<18} {row['mode']:<8} "
        if "wrong" in row:
            lines.append(head + row["wrong"][:160])
            continue
        floor = f"{row['floor_us']:7.1f} {row['of_floor']:6.2f}" if "floor_us" in row else f"{'-':>7} {'-':>6}"
        rest = " ".join(f"{row[k]:7.0f}" if k in row else f"{'-':>7}" for k in ("host_us", "peak_mib"))
        peers = [f"{name} {found['ratio']:.2f}" for name, found in row["peers"].items()]
        peers += [f"[{name}: {note[:60]}]" for name, note in row["notes"].items()]
        lines.append(f"{head}{row.get('microseconds', float('nan')):9.1f} {floor} {rest}  {'  '.join(peers)}")
    return lines


def model_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Images a second of ours and of the peer, and the MiB that a step takes."""
    columns = f"{'images/s':>9} {'MiB':>7}"
    lines = [f"{'model':<23} {'pass':<8} {'mode':<8} {columns}  {'peer':<23} {columns} {'x':>6}"]
    for row in rows:
        head = f"{row['model']:<23} {row['mode']:<8} {'compiled' if row['compiled'] else 'eager':<8} "
        if "wrong" in row:
            lines.append(head + row["wrong"][:160])
            continue
        ours = f"{row.get('images_per_second', float('nan')):9.1f} {row.get('peak_mib', 0):7d}"
        peer = f"{'-':>9} {'-':>7} {'-':>6}"
        if "ratio" in row:
            peer = f"{row['peer_images_per_second']:9.1f} {row['peer_peak_mib']:7d} {row['ratio']:6.2f}"
        notes = "".join(f"  [{name}: {note[:60]}]" for name, note in row["notes"].items())
        lines.append(f"{head}{ours}  {row['peer'][:23]:<23} {peer}{notes}")
    return lines


def text(report: dict[str, Any]) -> str:
    """What is printed last."""
    found = report["environment"]
    lines = [f"left out: {what}" for what in report["left_out"]]
    versions = ", ".join(f"{k} {found[k]}" for k in ("gpu", "driver", "torch", "triton") if found.get(k))
    tuned = found["tuned_configurations"]
    lines.append(f"{versions}, {f'{tuned} tuned tile configurations' if tuned else 'tile configurations: heuristic'}")
    if report["models"]:
        lines += ["", *model_table(report["models"])]
    if report["results"]:
        lines += ["", *op_table(report["results"])]
    return "\n".join(lines)


def usable_caches() -> None:
    """Compilers need a folder to write to; a home that is read-only, or a user without a name, has none."""
    try:
        home = Path(os.environ.get("TRITON_HOME") or Path.home())
        writable = os.access(home / ".triton" if (home / ".triton").exists() else home, os.W_OK)
        getpass.getuser()
    except (OSError, KeyError, RuntimeError):
        writable = False
    if not writable:
        folder = tempfile.mkdtemp(prefix="zoo-bench-")
        os.environ.setdefault("TRITON_CACHE_DIR", f"{folder}/triton")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/inductor")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the JSON, print the table; 1 where something of ours is wrong, 2 where nothing can be measured."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=("ops", "models", "both"), default="both")
    parser.add_argument("--op", action="append", help="of the ops only these")
    parser.add_argument("--model", action="append", help="of the models only these")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the ops")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds for everything")
    parser.add_argument("--tune", type=float, metavar="SECONDS", help="first let `zoo tune` search that long")
    parser.add_argument("--workers", type=int, help="processes that compile side by side; default: by CPUs and memory")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in the interpreter, on the CPU")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_<name of the GPU>.json")
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # must be there before triton is imported
    usable_caches()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that asks CUDA itself cannot be forked
    forkserver.set_forkserver_preload([*_PRELOAD, "zoo.processes"])
    forkserver.ensure_running()  # it imports beside this process
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        import torch

        problem = None if options.dry_run or torch.cuda.is_available() else _NO_GPU
        if problem is None:
            bench = Bench(options, start)
            problem = bench.probe(given)
    except ImportError as error:
        problem = f"{error} (with {sys.executable})"
    if problem is not None:
        print(f"benchmarks.gpu: {problem}", file=sys.stderr)
        return 2
    if options.tune:
        command = [sys.executable, "-m", "zoo", "tune", "--budget", str(options.tune)]
        command += ["--batch", "128", "--dtype", options.dtype]
        try:
            code: int | None = subprocess.run(command, cwd=ROOT, check=False, timeout=options.tune + 45).returncode
        except subprocess.TimeoutExpired:
            code = None
        bench.report["tuning"] = {"budget": options.tune, "exit_code": code}
        bench.begin = time.monotonic()
        bench.probe(given)  # it counts the table's entries
        bench.progress("tuned")
    if options.part != "models":
        bench.ops()
    if options.part != "ops":
        if bench.no_models is not None:
            bench.left_out(f"the models: {bench.no_models}")
        bench.eager_models()
        bench.compiled_models()
    bench.save()
    print(text(bench.report))
    rows = bench.report["results"] + bench.report["models"]
    return int(any("wrong" in row for row in rows) or not rows)


if __name__ == "__main__":
    sys.exit(main())
