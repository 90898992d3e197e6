"""The first minute on a GPU: is every kernel right, what does each cost there, and what holds it back?

    make bench-gpu QUICK=1
    python -m benchmarks.gpu_quick --budget 120 --out quick.json
    python -m benchmarks.gpu_quick --dry-run      # tiny shapes in Triton's interpreter, no GPU: does the harness work?

In this order, within `--budget` seconds: the card (clock, copy bandwidth, latency of a launch); every kernel on the odd
shapes of the tests, in three dtypes, against the definition; memcheck, racecheck and initcheck where compute-sanitizer
is installed; then, alone on the machine, the headline calls with the time, registers, spills, shared memory, blocks
per multiprocessor and waves of each of their kernels, and the configurations that ran or were refused; the switches of
the launchers, each against its default; batch 1 and 8 eagerly and as a CUDA graph; 50 runs for their bits beside
another stream; NATTEN's backends by name. A line per finding with its numbers, and JSON after each of them. The exit
status is 1 where something is wrong.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT

_PRELOAD = ["benchmarks.preload"]
_HEADLINES = ("NAT stage 1", "window 7, 56x56", "b8 h3, 32x32 d16")
_CHECKED = 0.5  # of the budget, after which no check is begun
Report = Callable[[dict[str, Any]], None]


# ---- jobs, each in a process of its own; what they import they import there


def card(report: Report, dry_run: bool) -> None:
    """What this GPU does at best, measured now: floors are an H200's and scale with it."""
    import torch

    from benchmarks.environment import environment
    from zoo.timing import step_times

    device = torch.device("cpu" if dry_run else "cuda")
    found = environment(device, torch.get_num_threads(), "")
    source = torch.empty(2**22 if dry_run else 2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = min(step_times(lambda: target.copy_(source), device, 5))
    found["copy_gb_per_second"] = round(2 * source.numel() / took / 1e3, 1)
    small = torch.empty(1, device=device)
    many = step_times(lambda: [small.zero_() for _ in range(100)], device, 5)
    found["launch_us"] = round(min(many) / 100, 2)
    if not dry_run:
        properties = torch.cuda.get_device_properties(0)
        found |= {"multiprocessors": properties.multi_processor_count, "smi": _smi()}
    report(found)


def _smi() -> dict[str, str] | None:
    """Clocks, power and partitioning, right after a copy."""
    names = (
        "clocks.sm",
        "clocks.mem",
        "clocks.max.sm",
        "power.draw",
        "power.limit",
        "temperature.gpu",
        "mig.mode.current",
    )
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(names, (x.strip() for x in done.stdout.splitlines()[0].split(",")), strict=False))


def check(report: Report, dry_run: bool, name: str, dtype_name: str) -> None:
    """Output and gradients of one call against the definition: the largest error as a share of what is allowed."""
    import torch

    from benchmarks.gpu_ops import judged

    case = _example(name)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    dtype = getattr(torch, dtype_name)
    tensors = [x.to(dtype) for x in case.inputs(device="cpu" if dry_run else "cuda")]
    row: dict[str, Any] = {"case": name, "dtype": dtype_name, "error_of_allowed": 0.0}
    for mode in ("forward", "backward"):
        for what in judged(case, tensors, mode):
            share = what.error / what.allowed if what.allowed else 0.0
            row["error_of_allowed"] = max(row["error_of_allowed"], round(share, 3))
            if not share <= 1:
                row["wrong"] = f"{mode}: {what.name} is off by {what.error:.2e}, allowed {what.allowed:.2e}"
            elif not what.same:
                row["wrong"] = f"{mode}: {what.name} has not the same bits twice"
    report(row)


def sanitize(report: Report, tool: str, number: int) -> None:
    """compute-sanitizer over the tiny call of an op, forward and backward."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    assert program is not None
    code = f"from benchmarks.gpu_quick import tiny; tiny({number})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    row: dict[str, Any] = {"tool": tool, "case": _tiny_names()[number], "exit_code": done.returncode}
    if done.returncode:
        row["wrong"] = f"{tool}: exit code {done.returncode}"
        row["details"] = (done.stdout + done.stderr)[-3000:]
    report(row)


def tiny(number: int) -> None:
    """Forward and backward of a tiny call; imported by what compute-sanitizer runs."""
    import torch

    from zoo.ops.examples import select

    case = select("tiny")[number]
    leaves = [x.requires_grad_() for x in case.inputs(device="cuda")]
    out = case.call(leaves, backend="triton")
    torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
    torch.cuda.synchronize()


def _tiny_names() -> list[str]:
    from zoo.ops.examples import select

    return [f"{e.folder}, {e.name}" for e in select("tiny")]


SWITCHES: dict[str, dict[str, Any]] = {
    "bias gradient by a kernel of its own": {"most_summed": 0},
    "blocks in a loop": {"most_unrolled": 0},
    "no table": {"table_bytes": 0},
    "half the programs": {"programs": 1024},
    "twice the programs": {"programs": 4096},
}
"""Of zoo.ops._local.launch, against its defaults."""


def _example(name: str, batch: int | None = None) -> Any:
    from zoo.ops.examples import select

    (case,) = [e for e in select() if name in (e.name, f"{e.folder}, {e.name}")]
    return case if batch is None else case.with_batch(batch, case.shapes[0][0])


def measure(report: Report, dry_run: bool, name: str, switch: str | None, seconds: float | None) -> None:
    """Times of both passes and, without a switch, of their kernels; without `seconds`, only what has to be compiled."""
    import functools
    import statistics

    import torch

    from benchmarks.cases import Peer, floors
    from benchmarks.gpu_ops import passes
    from zoo.ops.tuning import change_launchers, observed, refused
    from zoo.timing import step_times

    change_launchers(**SWITCHES.get(switch or "", {}))
    case = _example(name)
    device = torch.device("cpu" if dry_run else "cuda")
    torch._functorch.config.donated_buffer = False
    torch.manual_seed(0)
    tensors = [x.to(torch.float32 if dry_run else torch.bfloat16) for x in case.inputs(device=device)]
    row: dict[str, Any] = {"case": name, "switch": switch}
    ours = Peer(functools.partial(case.bound(tensors), backend="triton"))
    with observed() as ran, refused() as too_large:
        steps = dict(passes(ours, tensors, "forward", "backward"))
        for step in steps.values():
            step()
    if seconds is None:
        return
    row["configurations"] = {f"{k.kind} {k.direction}": list(vars(c).values()) for k, c in ran.items()}
    row["refused"] = [f"{k.kind} {k.direction} {c}: {why}" for k, c, why in too_large]
    for mode, step in steps.items():
        times = step_times(step, device, 1 if dry_run else 30, seconds=seconds, least=1 if dry_run else 5)
        row[f"{mode}_us"] = round(statistics.median(times), 1)
        floor = floors(case)[mode == "backward"]
        if floor is not None:
            row[f"{mode}_floor_us"] = floor.microseconds
        report(row | {"more": True})
    if switch is None and not dry_run:
        row["kernels"] = {mode: kernels(step) for mode, step in steps.items()}
    report(row)


def kernels(step: Callable[[], Any], calls: int = 5) -> list[dict[str, Any]]:
    """The kernels of a call: launches, microseconds, and what limits how many blocks a multiprocessor holds."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "kernel"]
    spills = _spills()
    properties = torch.cuda.get_device_properties(0)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for event in events:
        facts = event["args"]
        grid, block = facts["grid"], facts["block"]
        row = found.setdefault((event["name"], *grid), {"name": event["name"][:48], "launches": 0, "us": 0.0})
        row["launches"] += 1
        row["us"] += event["dur"]
        registers, shared = facts["registers per thread"], facts["shared memory"]
        threads = block[0] * block[1] * block[2]
        held = _held(registers, shared, threads, properties)
        blocks = grid[0] * grid[1] * grid[2]
        row |= {
            "blocks": blocks, "threads": threads, "registers": registers, "shared": shared,
            "spills": spills.get(event["name"]), "blocks_per_sm": held,
            "waves": round(blocks / (held * properties.multi_processor_count), 2),
        }  # fmt: skip
    for row in found.values():
        row["us"] = round(row["us"] / calls, 1)
        row["launches"] = round(row["launches"] / calls, 2)
    return sorted(found.values(), key=lambda row: -row["us"])


def _held(registers: int, shared: int, threads: int, properties: Any) -> int:
    """Blocks that a multiprocessor holds at once: a warp gets registers in steps of 256, a block 1 KiB of its own."""
    by_registers = 65536 // max(1, -(-registers * 32 // 256) * 256 * (threads // 32))
    by_shared = int(getattr(properties, "shared_memory_per_multiprocessor", 233472)) // (shared + 1024)
    return max(1, min(by_registers, by_shared, 2048 // threads, 32))


def _spills() -> dict[str, int]:
    """Bytes that a thread spills, by the name of the kernel, of what this process compiled or loaded."""
    import gc

    from triton.compiler import CompiledKernel

    return {x.name: x.n_spills for x in gc.get_objects() if isinstance(x, CompiledKernel) and hasattr(x, "n_spills")}


def graphs(report: Report, dry_run: bool, name: str, batch: int) -> None:
    """Microseconds of forward and backward at a small batch by the clock, eagerly and as a CUDA graph."""
    import torch

    step = _training(_example(name, batch), dry_run)
    row: dict[str, Any] = {"case": name, "batch": batch, "eager_us": _clock(step, 1 if dry_run else 50)}
    report(row | {"more": not dry_run})
    if dry_run:
        return
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    expected = [x.clone() for x in step()]
    others(300)
    graph.replay()
    torch.cuda.synchronize()
    if not all(torch.equal(a, e) for a, e in zip(captured, expected, strict=True)):
        row["wrong"] = "a replay after 300 other shapes differs"
    row["graph_us"] = _clock(graph.replay, 50)
    report(row)


def others(count: int) -> None:
    """Calls on other map sizes, so that whatever was kept for the first one would have to go."""
    import torch

    from zoo import ops

    for i in range(count):
        x = torch.randn(1, 6 + i % 20, 6 + i // 20, 1, 16, device="cuda")
        ops.neighborhood_attention(x, x, x, 3, backend="triton")


def _training(case: Any, dry_run: bool) -> Callable[[], list[Any]]:
    """The output of a call and its gradients, as a function; the same inputs every time."""
    import torch

    dtype, device = (torch.float32, "cpu") if dry_run else (torch.bfloat16, "cuda")
    leaves = [x.to(dtype).requires_grad_() for x in case.inputs(device=device)]
    call = case.bound(leaves)
    weight = torch.ones_like(call(*leaves, backend="triton"))

    def step() -> list[Any]:
        out = call(*leaves, backend="triton")
        return [out, *torch.autograd.grad(out, leaves, weight)]

    return step


def _clock(step: Callable[[], Any], repeats: int) -> float:
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    step()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    return round(1e6 * (time.perf_counter() - start) / repeats, 1)


def repeats(report: Report, dry_run: bool, name: str, count: int) -> None:
    """The bits of `count` runs while another stream multiplies matrices."""
    import torch

    step = _training(_example(name, 2 if dry_run else 16), dry_run)
    first: list[Any] | None = None
    different = 0
    load = None if dry_run else torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    stream = None if dry_run else torch.cuda.Stream()
    for _ in range(count):
        if load is not None:
            with torch.cuda.stream(stream):
                for _ in range(4):
                    load @ load
        found = step()
        first = first or found
        different += not all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
    row: dict[str, Any] = {"case": name, "runs": count, "different": different}
    if different:
        row["wrong"] = f"{different} of {count} runs differ from the first"
    report(row)


def natten(report: Report) -> None:
    """NATTEN's own kernels on NAT's first stage without bias, each backend by its name."""
    import functools
    import statistics

    import torch

    try:
        import natten as theirs
    except ImportError as error:
        report({"natten": str(error)})
        return
    from zoo.timing import step_times

    q, k, v = (torch.randn(128, 56, 56, 2, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    row: dict[str, Any] = {"natten": theirs.__version__}
    for backend in ("hopper-fna", "blackwell-fna", "cutlass-fna", "flex-fna"):
        try:
            call = functools.partial(theirs.na2d, q, k, v, kernel_size=7, backend=backend)
            row[backend] = round(statistics.median(step_times(call, q.device, 20)), 1)
        except Exception as error:
            row[backend] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    report(row)


# ---- the run


class Quick:
    """Runs the jobs within the time, prints a line per finding and keeps them in the JSON."""

    def __init__(self, options: argparse.Namespace) -> None:
        from zoo import processes

        self.processes, self.options = processes, options
        self.start = time.monotonic()
        self.report: dict[str, Any] = {"card": {}, "left_out": []}
        self.wrong = 0
        self.workers = 1 if options.dry_run else max(1, min(14, (os.cpu_count() or 1) - 2))

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    def left(self, share: float = 1.0) -> float:
        return max(0.0, share * self.options.budget - self.spent)

    def save(self) -> None:
        if self.options.out is not None:
            self.report["seconds"] = round(self.spent, 1)
            self.options.out.write_text(json.dumps(self.report, indent=1) + "\n")

    def run(
        self, part: str, jobs: Sequence[tuple[str, Any]], workers: int = 1, share: float = 1.0, quiet: bool = False
    ) -> None:
        """Jobs by name; none is begun when this share of the budget is over."""
        limit = max(5.0, self.left()) if not self.options.dry_run else 600.0
        jobs = [(name, self.processes.Job(job.function, job.arguments, limit)) for name, job in jobs]
        deadline = self.start + share * self.options.budget
        rows: dict[int, dict[str, Any]] = {}

        def received(number: int, row: dict[str, Any]) -> None:
            more = row.pop("more", False)
            rows[number] = row
            self.report.setdefault(part, {})[jobs[number][0]] = row
            self.save()
            if not more:
                self.say(part, jobs[number][0], row)

        endings = self.processes.run(
            [job for _, job in jobs],
            workers=workers,
            method="forkserver",
            deadline=deadline,
            preload=_PRELOAD,
            received=received,
        )
        for number, (ending, (name, _)) in enumerate(zip(endings, jobs, strict=True)):
            if not ending.begun:
                self.report["left_out"].append(f"{part}: {name}")
            elif ending.failure is not None:
                row = self.report.setdefault(part, {}).setdefault(name, rows.get(number, {}))
                row |= {"wrong": ending.failure, "traceback": ending.details}
                self.say(part, name, row)
        self.save()

    def say(self, part: str, name: str, row: dict[str, Any]) -> None:
        self.wrong += "wrong" in row
        print(f"{self.spent:6.1f} s  {part}: {name}: {line(row)}", flush=True)

    def everything(self) -> int:
        from zoo.ops.examples import select

        dry, job = self.options.dry_run, self.processes.Job
        self.run("card", [("card", job(card, (dry,)))])
        cases = [f"{e.folder}, {e.name}" for e in select("trial" if dry else "test")]
        headlines = [cases[0]] if dry else list(_HEADLINES)
        switches = [next(iter(SWITCHES))] if dry else list(SWITCHES)
        compared = [(name, s) for s in switches for name in headlines[:2]]
        if not dry:  # the compilers' caches are filled side by side
            prepared = [
                (f"{n}, {s}", job(measure, (dry, n, s, None))) for n, s in [(n, None) for n in headlines] + compared
            ]
            checks = [(f"{n}, {d}", job(check, (dry, n, d))) for n in cases for d in ("bfloat16", "float32", "float16")]
            self.run("prepared", prepared, self.workers, _CHECKED)
        else:
            checks = [(f"{n}, float32", job(check, (dry, n, "float32"))) for n in cases]
        self.run("checks", checks, self.workers, _CHECKED if not dry else 1.0)
        self.run("times", [(n, job(measure, (dry, n, None, 0.3))) for n in headlines])
        self.run("switches", [(f"{n}, {s}", job(measure, (dry, n, s, 0.3))) for n, s in compared])
        self.run(
            "graphs",
            [(f"{n}, batch {b}", job(graphs, (dry, n, b))) for n in headlines[:2] for b in (1, 8)][: 1 if dry else 4],
        )
        self.run("repeats", [(n, job(repeats, (dry, n, 2 if dry else 50))) for n in headlines])
        if dry:
            return self.ended()
        self.run("natten", [("natten", job(natten))])
        if shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer"):
            tools = ("memcheck", "racecheck", "initcheck")
            calls = [(f"{t}, {n}", job(sanitize, (t, i))) for t in tools for i, n in enumerate(_tiny_names())]
            self.run("sanitizer", calls, self.workers)
        else:
            self.report["left_out"].append("compute-sanitizer is not installed")
        return self.ended()

    def ended(self) -> int:
        for what in self.report["left_out"]:
            print(f"left out: {what}")
        checked = self.report.get("checks", {})
        good = sum("wrong" not in row for row in checked.values())
        print(f"{good} of {len(checked)} checks passed, {self.wrong} findings are wrong, {self.spent:.0f} s")
        self.save()
        return int(self.wrong > 0 or not checked)


def line(row: dict[str, Any]) -> str:
    """A finding in one line, its numbers first."""
    if "wrong" in row:
        return f"WRONG {row['wrong']}"
    parts = []
    for key, value in row.items():
        if key == "kernels":
            for mode, found in value.items():
                for k in found[:5]:
                    parts.append(
                        f"\n            {mode} {k['name']}: {k['us']} us, {k['registers']} registers, "
                        f"{k['spills']} spilled, {k['shared']} B shared, "
                        f"{k['blocks_per_sm']} per SM, {k['waves']} waves"
                    )
        elif key not in ("case", "switch", "dtype") and value not in (None, [], {}):
            parts.append(f"{key} {value}")
    return ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all is right; 1: something is wrong; 2: nothing can be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_quick", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for everything")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in the interpreter, on the CPU")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_quick_<name of the GPU>.json")
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # must be there before triton is imported
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that asks CUDA itself cannot be forked
    from benchmarks.gpu import usable_caches
    from benchmarks.gpu_jobs import import_zoo

    usable_caches()
    import_zoo()
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print(
            "benchmarks.gpu_quick: PyTorch sees no GPU here; --dry-run tries the harness without one", file=sys.stderr
        )
        return 2
    if options.out is None and not options.dry_run:
        name = torch.cuda.get_device_name().lower().replace(" ", "_")
        options.out = ROOT / "benchmarks" / "results" / f"gpu_quick_{name}.json"
    return Quick(options).everything()


if __name__ == "__main__":
    sys.exit(main())
