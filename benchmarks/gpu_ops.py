"""What `benchmarks.gpu` measures of the ops: how a case of zoo.ops.examples and its peers are checked and timed.

Every case is checked first: output and gradients of the first two images against the definition in float32, at most
twice the error of the definition in the same dtype, and the same bits when it runs again. Backward times are of the
backward alone. A GPU's time is taken between events, with its caches flushed, and with the whole call queued before it
starts, so that a slow host does not count; what the host needs to issue a call is given besides.
"""

import contextlib
import functools
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Peer
from benchmarks.models import compile_threads, describe
from benchmarks.ops import differences
from zoo.ops.examples import Example, headlines_first, select
from zoo.timing import host_time, step_times

__all__ = ["Judged", "Settings", "build", "judged", "measure", "passes", "prepare"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_ABSOLUTE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Settings:
    dry_run: bool = False
    dtype_name: str = "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry_run else _DTYPES[self.dtype_name]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry_run else "cuda")

    def compiled(self, function: Callable[..., Tensor]) -> Peer:
        """Compiled for the GPU; a dry run only traces, because compiling takes minutes on a CPU."""
        made = torch.compile(function, dynamic=False, backend="eager" if self.dry_run else "inductor")
        return Peer(made, compiled=True)


def build(s: Settings) -> list[Example]:
    """The cases, one of every kind first: what the time does not suffice for comes last."""
    return select("trial") if s.dry_run else headlines_first(select("gpu"))


def measure(report: Callable[[Any], None], s: Settings, number: int, seconds: float) -> None:
    """Check and time case `number`; what is known so far is reported after every step.

    A report is {"rows": one for the forward and one for the backward, "doing": (whose step, which pass) comes next}.
    No peer is begun when `seconds` are over.
    """
    deadline = time.monotonic() + seconds
    compile_threads(1)  # what compiles is small, or in the compiler's cache
    case = build(s)[number]
    tensors = inputs(case, s)
    ours = Peer(functools.partial(case.bound(tensors), backend="triton"))
    base = {"op": case.folder, "case": case.name, "dtype": str(s.dtype).removeprefix("torch.")}
    rows: dict[str, dict[str, Any]] = {m: base | {"mode": m, "peers": {}, "notes": {}} for m in ("forward", "backward")}

    def say(who: str, mode: str) -> None:
        report({"rows": list(rows.values()), "doing": (who, mode)})

    expected: dict[str, list[Tensor]] = {}
    for mode, row in rows.items():
        say("ours", mode)
        try:
            wrong = check(case, tensors, mode)
            if wrong is not None:
                row["wrong"] = f"WRONG {wrong}"
                continue
            step = dict(passes(ours, tensors, mode))[mode]
            expected[mode] = step()
            row |= timed(step, s)
        except Exception as error:
            row |= {"wrong": f"ERROR {describe(error)}", "traceback": traceback.format_exc()}
            continue
        floor = cases.floors(case)[mode == "backward"]
        if floor is not None and not s.dry_run:
            row |= {"floor_us": floor.microseconds, "of_floor": round(floor.microseconds / row["microseconds"], 3)}
    say("the peers", "")
    for name, peer in (cases.gpu_peers(case, tensors, s.compiled) if expected else {}).items():
        if isinstance(peer, str) or time.monotonic() > deadline:
            for row in rows.values():
                row["notes"][name] = peer if isinstance(peer, str) else "left out, the time was up"
            continue
        with forgiving(rows, name):
            for mode, step in passes(peer, tensors, *expected):
                say(name, mode)
                result = step()
                apart = differences({"ours": expected[mode], name: result})[name] if peer.exact else 0.0
                del result
                if not apart <= _TOLERANCE[s.dtype]:
                    rows[mode]["notes"][name] = f"differs from ours by {apart:.1e}"
                found = timed(step, s)
                found["ratio"] = round(found["microseconds"] / rows[mode]["microseconds"], 2)
                rows[mode]["peers"][name] = found
    say("", "")


def prepare(report: Callable[[Any], None], s: Settings, number: int) -> None:
    """Run what has to be compiled once, so that the compilers' caches hold it when the case is timed."""
    compile_threads(1)
    case = build(s)[number]
    tensors = inputs(case, s)
    ours = Peer(functools.partial(case.bound(tensors), backend="triton"))
    with contextlib.suppress(Exception):
        for _, step in passes(ours, tensors, "forward", "backward"):
            step()
    for peer in cases.gpu_peers(case, tensors, s.compiled).values():
        if isinstance(peer, Peer) and peer.compiled:
            with contextlib.suppress(Exception):
                for _, step in passes(peer, tensors, "forward", "backward"):
                    step()


def inputs(case: Example, s: Settings) -> list[Tensor]:
    """The case's tensors, the same ones every time."""
    torch._functorch.config.donated_buffer = False  # the backward is run again and again on one graph
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is float32 for all
    torch.manual_seed(0)
    return [x.to(s.dtype) for x in case.inputs(device=s.device)]


def weights(out: Tensor, images: int) -> Tensor:
    """A gradient for an output, in its layout; zero but for the first images."""
    weight = torch.zeros_like(out)
    some = weight[:images]
    some.copy_(torch.linspace(-1, 1, some.numel(), device=out.device).view(some.shape))
    return weight


@dataclass(frozen=True)
class Judged:
    """A result of ours: its largest error, what is allowed, the size of its values, and whether its bits came twice."""

    name: str
    error: float
    allowed: float
    size: float
    same: bool


def judged(case: Example, tensors: Sequence[Tensor], mode: str) -> Iterator[Judged]:
    """A pass of ours: it runs the whole batch, and its first two images are judged by the definition.

    At most twice the error of the definition in the same dtype, plus a small term.
    """
    dtype, images = tensors[0].dtype, 2
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    call = case.bound(tensors)

    def run(backend: str, dtype: torch.dtype, tensors: Sequence[Tensor]) -> list[Tensor]:
        leaves = [x.to(dtype).detach().requires_grad_(mode == "backward") for x in tensors]
        out = call(*leaves, backend=backend)
        if mode == "forward":
            return [out[:images].to(wide)]
        # the gradient is zero at the other images, so that those of the parameters are the first two's alone
        grads = torch.autograd.grad(out, leaves, weights(out.detach(), images))
        return [(x[:images] if i < case.batched else x).to(wide) for i, x in enumerate(grads)]

    actual, again = run("triton", dtype, tensors), run("triton", dtype, tensors)
    few = [x[:images] if i < case.batched else x for i, x in enumerate(tensors)]
    exact, plain = run("reference", wide, few), run("reference", dtype, few)
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        name = "the output" if mode == "forward" else f"the gradient of input {i}"
        size = float(e.abs().max().clamp(min=1e-3))
        error, allowed = float((a - e).abs().max()), 2 * float((p - e).abs().max()) + _ABSOLUTE[dtype] * size
        yield Judged(name, error, allowed, size, torch.equal(a, again[i]))


def check(case: Example, tensors: Sequence[Tensor], mode: str) -> str | None:
    """What is wrong with a pass of ours."""
    for what in judged(case, tensors, mode):
        if not what.error <= what.allowed:
            return f"{what.name} is off by {what.error:.2e} of {what.size:.2e}, allowed {what.allowed:.2e}"
        if not what.same:
            return f"{what.name} has not the same bits twice"
    return None


def passes(peer: Peer, tensors: Sequence[Tensor], *wanted: str) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Of the passes that are wanted: the forward and, where there is one, the backward alone."""
    taken = list(tensors[: peer.inputs])

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [peer.function(*taken)]

    if "forward" in wanted:
        yield "forward", forward
    if "backward" in wanted and peer.trains:
        leaves = [x.detach().requires_grad_() for x in taken]
        out = peer.function(*leaves)
        weight = weights(out.detach(), out.shape[0])
        yield "backward", lambda: list(torch.autograd.grad(out, leaves, weight, retain_graph=True))


@contextlib.contextmanager
def forgiving(rows: dict[str, dict[str, Any]], name: str) -> Iterator[None]:
    """A peer that cannot run a case is a finding; the rows without a time of it say why."""
    try:
        yield
    except Exception as error:
        text = describe(error)
        for row in rows.values():
            if name not in row["peers"]:
                row["notes"].setdefault(name, text)
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_initialized():
            with contextlib.suppress(Exception):  # what ruined the context was reported already
                torch.cuda.empty_cache()


def timed(function: Callable[[], Any], s: Settings) -> dict[str, Any]:
    """Median microseconds of a call, those in which the host issues it, and the MiB it holds at most besides."""
    if s.device.type != "cuda":
        start = time.perf_counter()
        function()
        return {"microseconds": round(1e6 * (time.perf_counter() - start), 2)}
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    host = min(host_time(function) for _ in range(5))
    times = step_times(function, s.device, 50, seconds=0.3, least=7)
    return {"microseconds": round(statistics.median(times), 2), "host_us": round(host, 1), "peak_mib": round(memory, 1)}
