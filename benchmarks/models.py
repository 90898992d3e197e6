"""Images per second of the backbones, against timm's own models or the same model with textbook attention.

    python -m benchmarks.models --threads 2 --out benchmarks/results/models_cpu.json
    python -m benchmarks.models --model nat_tiny --batch 4 --rounds 3
    python -m benchmarks.models --device cuda --dtype bfloat16 --channels-last --batch 128 [--compile]
    python -m benchmarks.models --scaling --out benchmarks/results/models_scaling_cpu.json

Peers share the weights and must agree before anything is timed. Their calls are interleaved, round after round, and the
median of each is reported. Peak memory is measured in a process of its own per model: how far the resident set grows
above the built model. `--scaling` gives the time per pixel at 224, 448 and 896 pixels a side.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn

import zoo  # noqa: F401  registers the models
from benchmarks import ROOT, textbook
from benchmarks.environment import command_line, environment, synchronize
from zoo.ops import scriptable

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Entry:
    """A model and its peer: a timm model that takes the same weights, or textbook functions in the place of our ops.

    forward_goal, training_goal: how many times faster than the peer it is meant to be on a CPU.
    """

    name: str
    timm: str | None = None
    textbook: tuple[tuple[str, Callable[..., Any]], ...] = ()
    forward_goal: float | None = None
    training_goal: float | None = None

    @property
    def peer(self) -> str:
        return f"timm {self.timm}" if self.timm else "textbook"


ENTRIES = (
    Entry("zoo_maxvit_tiny_tf_224", timm="maxvit_tiny_tf_224", forward_goal=1.0, training_goal=1.0),
    Entry("zoo_davit_tiny", timm="davit_tiny", forward_goal=1.0, training_goal=1.0),
    Entry("zoo_halonet26t", timm="halonet26t", forward_goal=1.0, training_goal=1.0),
    Entry(
        "nat_tiny",
        textbook=(("neighborhood_attention_qkvpacked", textbook.neighborhood_gather_packed),),
        forward_goal=3.0,
        training_goal=3.0,
    ),
    Entry(
        "biformer_tiny",
        textbook=(("routing_attention", textbook.routing_gather),),
        forward_goal=1.3,
        training_goal=1.3,
    ),
    Entry("van_b0", textbook=(("large_kernel_attention", textbook.large_kernel_direct),)),
    Entry("litv2_s", textbook=(("window_attention_qkvpacked", textbook.window_partitioned_packed),)),
    Entry(
        "stvit_small",
        textbook=(
            ("super_token_sampling", textbook.sampling_unfold),
            ("super_token_mapping", textbook.mapping_unfold),
        ),
    ),
)
GPU_ORDER = (  # the most telling first
    "nat_tiny", "zoo_maxvit_tiny_tf_224", "biformer_tiny", "zoo_davit_tiny", "van_b0", "zoo_halonet26t", "stvit_small",
    "litv2_s",
)  # fmt: skip
SCALING = ("nat_mini", "zoo_maxvit_pico_rw_256", "zoo_davit_tiny", "van_b0")


def input_size(name: str) -> Sequence[int]:
    """Height and width of the images that a model is published for."""
    found = timm.models.get_pretrained_cfg(name)
    assert found is not None
    return found.input_size[-2:]


def build(entry: Entry, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Ours and the peer, with the same weights."""
    torch.manual_seed(0)
    ours = timm.create_model(entry.name).to(device, dtype)
    peer = timm.create_model(entry.timm or entry.name).to(device, dtype)
    peer.load_state_dict(ours.state_dict())
    return ours, peer


@contextlib.contextmanager
def replaced(entry: Entry, peer: bool) -> Iterator[None]:
    """Inside the block the peer's attention is the textbook one.

    Raises:
        LookupError: no model's file imports the op that is to be replaced.
    """
    with contextlib.ExitStack() as stack:
        for name, function in entry.textbook if peer else ():
            op = getattr(scriptable, name, None)  # what models call
            files = [module for key, module in list(sys.modules.items()) if key.startswith("zoo.models.")]
            users = [module for module in files if op is not None and vars(module).get(name) is op]
            if not users:
                raise LookupError(f"no file of zoo.models imports {name}")
            for module in users:
                stack.enter_context(mock.patch.object(module, name, function))
        yield


def forward(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return model(images)


def training(model: nn.Module, images: Tensor) -> Tensor:
    model.train()
    model.zero_grad(set_to_none=True)
    loss = model(images).float().logsumexp(-1).mean()
    loss.backward()
    return loss.detach()


MODES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {"forward": forward, "training": training}


def measure(entry: Entry, options: argparse.Namespace) -> dict[str, Any]:
    """Median images per second of both, and how much memory a step takes."""
    device, dtype = options.device, _DTYPES[options.dtype]
    models: dict[str, Any] = dict(zip((entry.name, entry.peer), build(entry, device, dtype), strict=True))
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    models = {name: model.to(memory_format=layout) for name, model in models.items()}
    size = input_size(entry.name)
    images = torch.randn(options.batch, 3, *size, device=device, dtype=dtype).contiguous(memory_format=layout)
    if options.compile:
        models = {name: torch.compile(model, dynamic=False) for name, model in models.items()}
    outputs = []
    for i, model in enumerate(models.values()):
        with replaced(entry, i == 1):
            outputs.append(forward(model, images[:2]).float())
    difference = float((outputs[0] - outputs[1]).abs().max() / outputs[1].std())
    row: dict[str, Any] = {"model": entry.name, "peer": entry.peer, "size": list(size), "batch": options.batch}
    row["difference"] = difference
    for mode, step in MODES.items():
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for round_number in range(options.rounds + 1):
            for i, (name, model) in enumerate(models.items()):
                with replaced(entry, i == 1):
                    synchronize(device)
                    start = time.perf_counter()
                    step(model, images)
                    synchronize(device)
                    if round_number:  # the first round warms up
                        seconds[name].append(time.perf_counter() - start)
        ours, peer = (statistics.median(times) for times in seconds.values())
        row[mode] = {
            "images_per_second": round(options.batch / ours, 2),
            "peer_images_per_second": round(options.batch / peer, 2),
            "ratio": round(peer / ours, 2),
            "goal": entry.forward_goal if mode == "forward" else entry.training_goal,
        }
        if device.type == "cuda" and not options.no_memory:
            row[mode]["peak_mib"], row[mode]["peer_peak_mib"] = (
                _gpu_memory(entry, i == 1, functools.partial(step, model, images))
                for i, model in enumerate(models.values())
            )
        if device.type == "cpu" and not options.no_memory:
            row[mode]["peak_mib"], row[mode]["peer_peak_mib"] = (
                _memory(entry, mode, peer_too, options) for peer_too in (False, True)
            )
    return row


def _gpu_memory(entry: Entry, peer: bool, step: Callable[[], Any]) -> int:
    """Peak GPU memory of one step above what was allocated before it, in MiB."""
    with replaced(entry, peer):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) >> 20


# ---- on a GPU: each of these runs in a process of its own (benchmarks.gpu)


@dataclass(frozen=True)
class GpuRun:
    """A model and its peer in bfloat16 and channels_last; a dry run takes float32 and two images on the CPU."""

    name: str
    modes: tuple[str, ...] = ("forward", "training")
    compiled: bool = False
    dry_run: bool = False

    @property
    def entry(self) -> Entry:
        return next(e for e in ENTRIES if e.name == self.name)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry_run else "cuda")

    def batch(self, mode: str) -> int:
        return 2 if self.dry_run else {"forward": 128, "training": 64}[mode]

    def models(self) -> tuple[nn.Module, nn.Module]:
        """Ours and the peer, compiled where that is asked for."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        dtype = torch.float32 if self.dry_run else torch.bfloat16
        with self.device:  # a GPU draws the initial weights much faster
            built = build(self.entry, self.device, dtype)
        made: list[Any] = [m.to(memory_format=torch.channels_last) for m in built]
        if self.compiled:
            backend = "eager" if self.dry_run else "inductor"
            made = [torch.compile(m, dynamic=False, backend=backend) for m in made]
        return made[0], made[1]

    def images(self, mode: str, count: int) -> Tensor:
        """The first images of the mode's batch."""
        size = input_size(self.name)
        generator = torch.Generator(self.device).manual_seed(0)
        images = torch.randn(self.batch(mode), 3, *size, device=self.device, generator=generator)[:count]
        images = images.to(torch.float32 if self.dry_run else torch.bfloat16)
        return images.contiguous(memory_format=torch.channels_last)


def compile_threads(count: int) -> None:
    """Let the compiler of this process have so many threads."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = count


def prepare_gpu(report: Callable[[Any], None], run: GpuRun, which: str) -> None:
    """A step of ours or of the peer, so that the compilers' caches hold what it needs when it is timed."""
    model = run.models()[which == "peer"]
    for mode in run.modes:
        with replaced(run.entry, which == "peer"):
            MODES[mode](model, run.images(mode, run.batch(mode)))


def measure_gpu(report: Callable[[Any], None], run: GpuRun) -> None:
    """Images a second and peak memory of ours and of the peer; what is known so far is reported after every step.

    A report is {"rows": one for each mode, "doing": (whose step, which mode) comes next}. A forward counts only where
    ours is as near to the reference in float32 as the peer is.
    """
    base = {"model": run.name, "peer": run.entry.peer, "compiled": run.compiled}
    rows: dict[str, dict[str, Any]] = {m: base | {"mode": m, "batch": run.batch(m), "notes": {}} for m in run.modes}

    def say(who: str, mode: str) -> None:
        report({"rows": list(rows.values()), "doing": (who, mode)})

    say("ours", run.modes[0])
    models = run.models()
    for mode, row in rows.items():
        say("ours", mode)
        try:
            ours, kept = _ready(run, models[0], mode, False, row["batch"])
        except Exception as error:
            row |= {"wrong": f"ERROR {describe(error)}", "traceback": traceback.format_exc()}
            continue
        try:
            row |= _rated(row["batch"], _rates({"ours": ours}, run.device, rounds=2)["ours"])
        except Exception as error:
            row |= {"wrong": f"ERROR {describe(error)}", "traceback": traceback.format_exc()}
            continue
        say("peer", mode)
        peer = theirs = None
        batch = row["batch"]
        while peer is None:
            try:
                peer, theirs = _ready(run, models[1], mode, True, batch)
            except torch.cuda.OutOfMemoryError:
                row["notes"]["peer"] = f"out of memory at batch {batch}"
                batch //= 4
                if batch == 0:
                    break
            except Exception as error:
                row["notes"]["peer"] = describe(error)
                break
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        say("ours", mode)
        try:
            row |= _compared(run, models[0], mode, kept, theirs)
            found = _rates({"ours": ours, "peer": peer} if peer else {"ours": ours}, run.device)
        except Exception as error:
            row |= {"wrong": f"ERROR {describe(error)}", "traceback": traceback.format_exc()}
            continue
        row |= _rated(row["batch"], found["ours"])
        if peer:
            rate = batch / found["peer"][0]
            row |= {"peer_batch": batch, "peer_images_per_second": round(rate, 1), "peer_peak_mib": found["peer"][1]}
            row["ratio"] = round(row["images_per_second"] / rate, 2)
    say("", "")


def _rated(batch: int, found: tuple[float, int]) -> dict[str, Any]:
    return {"images_per_second": round(batch / found[0], 1), "peak_mib": found[1]}


def _ready(run: GpuRun, model: nn.Module, mode: str, peer: bool, batch: int) -> tuple[Callable[[], Any], Tensor]:
    """A step that ran once, and the logits of two images (of a training step: its loss)."""
    images = run.images(mode, batch)

    def step() -> Tensor:
        with replaced(run.entry, peer):
            return MODES[mode](model, images)

    out = step()
    return step, (out[:2] if mode == "forward" else out).float()


def _compared(run: GpuRun, model: nn.Module, mode: str, ours: Tensor, peer: Tensor | None) -> dict[str, Any]:
    """How far ours and the peer are from the reference in float32; "wrong" where ours is much farther."""
    if not ours.isfinite().all():
        return {"wrong": "WRONG the output is not finite"}
    if mode != "forward":
        return {}
    with run.device:
        exact = timm.create_model(run.name, attn_backend="reference")
    exact.load_state_dict(getattr(model, "_orig_mod", model).state_dict())
    with torch.no_grad():
        expected = exact.eval()(run.images(mode, 2).float())

    def error(x: Tensor) -> float:
        return float((x - expected).square().mean().sqrt() / expected.std())

    found: dict[str, Any] = {"error": error(ours)}
    if peer is not None:
        found["peer_error"] = error(peer)
    if not found["error"] <= 2 * found.get("peer_error", 0.0) + (1e-3 if run.dry_run else 5e-2):
        found["wrong"] = f"WRONG its error is {found['error']:.2e}, the peer's {found.get('peer_error', math.nan):.2e}"
    return found


def _rates(steps: dict[str, Callable[[], Any]], device: torch.device, rounds: int = 5) -> dict[str, tuple[float, int]]:
    """Median seconds of a step and the MiB it takes at most; the calls take turns."""
    if device.type != "cuda":
        return {name: (_clocked(step), 0) for name, step in steps.items()}
    memory: dict[str, int] = {}
    counts: dict[str, int] = {}
    for name, step in steps.items():
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once = _elapsed(step, 1)
        memory[name] = (torch.cuda.max_memory_allocated() - before) >> 20
        counts[name] = max(1, min(50, int(0.2 / once)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_elapsed(step, counts[name]))
    return {name: (statistics.median(times[name]), memory[name]) for name in steps}


def _elapsed(step: Callable[[], Any], count: int) -> float:
    """Seconds a step, by the GPU's clock, one after the other as in use."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(count):
        step()
    last.record()
    last.synchronize()
    return 1e-3 * first.elapsed_time(last) / count


def _clocked(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def describe(error: BaseException) -> str:
    """An exception in a line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


# ---- on a CPU


def _memory(entry: Entry, mode: str, peer: bool, options: argparse.Namespace) -> int:
    """Peak resident memory of one step above the built model, in MiB, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.models", "--memory", entry.name, mode, "peer" if peer else "ours"]
    command += ["--batch", str(options.batch), "--dtype", options.dtype, "--threads", str(options.threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def memory_child(options: argparse.Namespace) -> None:
    name, mode, which = options.memory
    entry = next(e for e in ENTRIES if e.name == name)
    ours, peer = build(entry, torch.device("cpu"), _DTYPES[options.dtype])
    model = peer if which == "peer" else ours
    del ours, peer
    size = input_size(entry.name)
    images = torch.randn(options.batch, 3, *size, dtype=_DTYPES[options.dtype])
    with replaced(entry, which == "peer"):
        MODES[mode](model, images[:1])
        start_peak()
        before = resident("VmRSS")
        MODES[mode](model, images)
    print((resident("VmHWM") - before) >> 10)


def start_peak() -> None:
    """Give back what building left behind, and let the peak of the resident set begin here.

    `ru_maxrss` begins at the peak of the process that started this one, and so says nothing.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(key: str) -> int:
    """KiB from /proc: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def scaling(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Nanoseconds a pixel of a forward at 224, 448 and 896, the same number of pixels in every batch."""
    model = timm.create_model(name).to(options.device)
    times: dict[int, float] = {}
    for size, batch in ((224, 16), (448, 4), (896, 1)):
        images = torch.randn(batch, 3, size, size, device=options.device)
        forward(model, images)
        rounds = []
        for _ in range(options.rounds):
            start = time.perf_counter()
            forward(model, images)
            synchronize(options.device)
            rounds.append(time.perf_counter() - start)
        times[size] = 1e9 * statistics.median(rounds) / (batch * size * size)
    spread = max(times.values()) / min(times.values()) - 1
    return {"model": name, "ns_per_pixel": {k: round(v, 1) for k, v in times.items()}, "spread": round(spread, 3)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a line per model, write the JSON; 1 where a model disagrees with its peer."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", action="append", choices=[e.name for e in ENTRIES], help="default: all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile both models (fixed shapes)")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--scaling", action="store_true", help="time per pixel at three sizes instead")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.memory:
        memory_child(options)
        return 0

    rows: list[dict[str, Any]] = []

    def write() -> None:
        """What is known so far."""
        if options.out:
            command = command_line("models", sys.argv[1:] if arguments is None else arguments)
            found = environment(options.device, options.threads, command)
            options.out.write_text(json.dumps({"environment": found, "results": rows}, indent=2) + "\n")

    if options.scaling:
        for name in SCALING:
            rows.append(scaling(name, options))
            write()
            print(
                f"{name:<24} {rows[-1]['ns_per_pixel']} ns a pixel, spread {100 * rows[-1]['spread']:.0f} %", flush=True
            )
    else:
        for entry in ENTRIES:
            if not options.model or entry.name in options.model:
                rows.append(measure(entry, options))
                write()
                print(_line(rows[-1]), flush=True)
    allowed = 1e-2 if options.dtype == "float32" else 1e-1  # of the logits' standard deviation
    return int(any(row.get("difference", 0) > allowed for row in rows))


def _line(row: dict[str, Any]) -> str:
    parts = []
    for mode in MODES:
        found = row[mode]
        goal = (
            ""
            if found["goal"] is None
            else f" (goal {found['goal']:g}{', MISSED' if found['ratio'] < found['goal'] else ''})"
        )
        memory = f", {found['peak_mib']} against {found['peer_peak_mib']} MiB" if "peak_mib" in found else ""
        parts.append(f"{mode} {found['images_per_second']:.1f} images/s, {found['ratio']:.2f}x{goal}{memory}")
    return f"{row['model']:<24} against {row['peer']:<24} {'; '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
