"""The Triton kernels on this machine's GPU: correctness, then time, peers, fraction of the floor, peak memory.

    make bench-gpu
    python benchmarks/gpu.py --op neighborhood --dtype float16
    python benchmarks/gpu.py --dry-run          # tiny shapes in Triton's interpreter, no GPU: does the harness work?

Every case is checked first: our output and gradients on two images against the definition in float32 (at most twice
the error of the definition in the same dtype), then each peer against ours. Backward times are of the backward alone.
The table is printed last; JSON is written after every case, so an interruption loses none that is done.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # must be there before triton is imported

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]  # `ops` and `models` are the files beside this one

from cases import channel as channel_cases  # noqa: E402
from cases import neighborhood as neighborhood_cases  # noqa: E402
from cases import window as window_cases  # noqa: E402
from timm.layers.halo_attn import rel_logits_1d  # noqa: E402
from timm.models import maxxvit  # noqa: E402

import models as textbook  # noqa: E402
from ops import differences, environment  # noqa: E402
from zoo import ops as zoo_ops  # noqa: E402

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_ABSOLUTE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Floor:
    """Microseconds that memory traffic, matrix products and exponentials take on one H200; the largest binds.

    Arithmetic for bfloat16 tensors and a float32 log-sum-exp at 4.3 TB/s, 790 TFLOP/s and 3.7e12 exponentials a second.
    """

    memory: float
    products: float = 0.0
    exponentials: float = 0.0

    @property
    def microseconds(self) -> float:
        return max(self.memory, self.products, self.exponentials)


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    exact: whether it computes the same function; where not (NATTEN takes no bias) only its time is of use.
    inputs: how many of the case's tensors it takes.
    trains: whether it has a backward on this device.
    """

    function: Callable[..., Tensor]
    exact: bool = True
    inputs: int | None = None
    trains: bool = True


@dataclass(frozen=True)
class Case:
    """A problem: tensors, how many of them have a batch axis, ours (with `backend`), and its peers."""

    op: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    ours: Callable[..., Tensor]
    peers: Callable[[Sequence[Tensor]], dict[str, Peer]]
    forward: Floor | None = None
    backward: Floor | None = None
    batched: int = 3
    spread: dict[int, float] = field(default_factory=dict)  # input -> factor, where unit normal values are too large


class Settings(argparse.Namespace):
    dry_run: bool
    device: torch.device
    dtype: torch.dtype

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiled for the GPU; a dry run only traces, because compiling takes minutes on a CPU."""
        return torch.compile(function, dynamic=False, backend="eager" if self.dry_run else "inductor")


def neighborhood(
    s: Settings, name: str, batch: int, size: tuple[int, int], heads: int, kernel: int, fwd: Floor, bwd: Floor
) -> Case:
    case = neighborhood_cases.NeighborhoodCase(
        name=name, batch=batch, spatial=size, heads=heads, kernel_size=kernel, dim=8 if s.dry_run else 32
    )

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, backend: str) -> Tensor:
        return zoo_ops.neighborhood_attention(q, k, v, kernel, bias=bias, backend=backend)

    def peers(tensors: Sequence[Tensor]) -> dict[str, Peer]:
        flex = neighborhood_cases._Flex(case, s.device)
        if s.dry_run:
            flex.attend = flex_attention
        found = {"flex compiled": Peer(flex, trains=s.device.type == "cuda")}
        if size[0] * size[1] * batch * heads <= 1 << 20:  # k and v are copied once per key of a window
            gather = neighborhood_cases._gather
            found["gather"] = Peer(functools.partial(gather, windows=neighborhood_cases._windows(case, s.device)))
        try:
            import natten
        except ImportError:
            return found
        found["natten, no bias"] = Peer(lambda q, k, v: natten.na2d(q, k, v, kernel_size=kernel), exact=False, inputs=3)
        return found

    shapes = ((batch, *size, heads, case.dim),) * 3 + ((heads, 2 * kernel - 1, 2 * kernel - 1),)
    return Case("neighborhood", name, shapes, ours, peers, fwd, bwd)


def window(
    s: Settings, name: str, batch: int, side: int, heads: int, w: int, grid: bool, fwd: Floor, bwd: Floor
) -> Case:
    dim = 8 if s.dry_run else 32
    case = window_cases.WindowCase(name=name, batch=batch, side=side, heads=heads, dim=dim, window=w, grid=grid)
    split, join = (
        (maxxvit.grid_partition, maxxvit.grid_reverse) if grid else (maxxvit.window_partition, maxxvit.window_reverse)
    )

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, backend: str) -> Tensor:
        return zoo_ops.window_attention(q, k, v, w, grid=grid, bias=bias, backend=backend)

    def peers(tensors: Sequence[Tensor]) -> dict[str, Peer]:
        index = window_cases._index(w).to(s.device)
        sdpa = functools.partial(window_cases._partitioned, case=case, index=index, fused=True)

        def timm_form(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            """timm's own partition and reversal, around the attention of its MaxViT."""
            q, k, v = (split(x.flatten(3), [w, w]).reshape(-1, w * w, heads, dim).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(1)[:, index][None])
            out = out.transpose(1, 2).reshape(-1, w, w, heads * dim)
            return join(out, [w, w], [side, side]).unflatten(3, (heads, dim))

        return {"sdpa": Peer(sdpa), "sdpa compiled": Peer(s.compiled(sdpa)), "timm": Peer(timm_form)}

    shapes = ((batch, side, side, heads, dim),) * 3 + ((heads, 2 * w - 1, 2 * w - 1),)
    return Case("window", name, shapes, ours, peers, fwd, bwd)


def halo(
    s: Settings, name: str, batch: int, side: int, heads: int, dim: int, block: int, reach: int, fwd: Floor, bwd: Floor
) -> Case:
    win, blocks = block + 2 * reach, side // block

    def ours(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, backend: str) -> Tensor:
        return zoo_ops.halo_attention(q, k, v, block, reach, rel_height=rows, rel_width=columns, backend=backend)

    def timm_form(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """What timm's HaloAttn does between its projections, with its relative logits."""

        def windows(x: Tensor) -> Tensor:  # (B * nh, blocks, win * win, d)
            x = F.pad(x.permute(0, 3, 4, 1, 2).flatten(0, 1), (reach,) * 4)
            x = x.unfold(2, win, block).unfold(3, win, block).reshape(x.shape[0], dim, blocks**2, -1)
            return x.permute(0, 2, 3, 1)

        query = q.permute(0, 3, 1, 2, 4).reshape(-1, blocks, block, blocks, block, dim).transpose(2, 3)
        query = query.reshape(-1, blocks**2, block**2, dim)
        keys, values = windows(k), windows(v)
        flat = query.reshape(-1, block, block, dim)
        across = rel_logits_1d(flat, columns, (0, 1, 3, 2, 4))
        down = rel_logits_1d(flat.transpose(1, 2), rows, (0, 3, 1, 4, 2))
        relative = (across + down).reshape(-1, blocks**2, block**2, win**2)
        out = ((query @ keys.mT) * dim**-0.5 + relative).softmax(-1) @ values
        out = out.reshape(-1, heads, blocks, blocks, block, block, dim).permute(0, 2, 4, 3, 5, 1, 6)
        return out.reshape(q.shape)

    def peers(tensors: Sequence[Tensor]) -> dict[str, Peer]:
        return {"timm": Peer(timm_form), "timm compiled": Peer(s.compiled(timm_form))}

    shapes = ((batch, side, side, heads, dim),) * 3 + ((2 * win - 1, dim),) * 2
    return Case("halo", name, shapes, ours, peers, fwd, bwd)


def routing(s: Settings, name: str, batch: int, side: int, heads: int, topk: int, fwd: Floor, bwd: Floor) -> Case:
    regions, dim = (2, 8) if s.dry_run else (7, 32)
    lists: dict[tuple[int, ...], Tensor] = {}

    def index(q: Tensor, k: Tensor) -> Tensor:
        """Made once per batch: regions are picked outside the kernel that is timed."""
        if tuple(q.shape) not in lists:
            with torch.no_grad():
                lists[tuple(q.shape)] = zoo_ops.routing_index(q, k, regions, topk)
        return lists[tuple(q.shape)]

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        out = zoo_ops.routing_attention(q, k, v, regions, topk, index=index(q, k), scale=dim**-0.5, backend=backend)
        return out[0] if isinstance(out, tuple) else out

    def gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return textbook.routing_gather(q, k, v, regions, topk, scale=dim**-0.5, index=index(q, k))

    def peers(tensors: Sequence[Tensor]) -> dict[str, Peer]:
        index(tensors[0], tensors[1])
        return {"gather": Peer(gather), "gather compiled": Peer(s.compiled(gather))}

    return Case("routing", name, ((batch, side, side, heads, dim),) * 3, ours, peers, fwd, bwd)


def large_kernel(s: Settings, name: str, batch: int, side: int, channels: int, fwd: Floor) -> Case:
    def ours(*tensors: Any, backend: str) -> Tensor:
        x = tensors[0].contiguous(memory_format=torch.channels_last)
        return zoo_ops.large_kernel_attention(x, *tensors[1:], backend=backend)

    def convolutions(x: Tensor, *weights: Tensor) -> Tensor:
        return textbook.large_kernel_direct(x.contiguous(memory_format=torch.channels_last), *weights)

    def peers(tensors: Sequence[Tensor]) -> dict[str, Peer]:
        return {"convolutions": Peer(convolutions), "convolutions compiled": Peer(s.compiled(convolutions))}

    c = channels
    shapes = ((batch, c, side, side), (c, 1, 5, 5), (c,), (c, 1, 7, 7), (c,), (c, c, 1, 1), (c,))
    return Case(
        "large_kernel", name, shapes, ours, peers, fwd, batched=1, spread={1: 0.2, 3: 0.15, 5: c**-0.5}
    )  # fmt: skip


def super_token(s: Settings, name: str, batch: int, side: int, channels: int, cell: int, fwd: Floor) -> Case:
    def ours(x: Tensor, backend: str) -> Tensor:
        tokens, affinity = zoo_ops.super_token_sampling(x, cell, backend=backend)
        return zoo_ops.super_token_mapping(tokens, affinity, cell, backend=backend)

    def unfold(x: Tensor) -> Tensor:
        return textbook.mapping_unfold(*textbook.sampling_unfold(x, cell), cell)

    def peers(tensors: Sequence[Tensor]) -> dict[str, Peer]:
        return {"unfold/fold": Peer(unfold), "unfold/fold compiled": Peer(s.compiled(unfold))}

    return Case("super_token", name, ((batch, side, side, channels),), ours, peers, fwd, batched=1)


def channel(s: Settings, name: str, batch: int, tokens: int, heads: int) -> Case:
    scale = tokens**-0.5

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return zoo_ops.channel_attention(q, k, v, scale=scale, backend=backend)

    def peers(tensors: Sequence[Tensor]) -> dict[str, Peer]:
        module = functools.partial(channel_cases._module, scale=scale)
        sdpa = functools.partial(channel_cases._sdpa, scale=scale)
        return {"timm": Peer(module), "timm compiled": Peer(s.compiled(module)), "sdpa": Peer(sdpa)}

    return Case("channel", name, ((batch, tokens, heads, 8 if s.dry_run else 32),) * 3, ours, peers)


def build(s: Settings) -> list[Case]:
    """The cases, the most telling first: what the time does not suffice for comes last."""
    if s.dry_run:
        none = Floor(1.0)
        return [
            neighborhood(s, "tiny", 1, (8, 9), 1, 3, none, none),
            window(s, "tiny", 1, 8, 1, 4, False, none, none),
            halo(s, "tiny", 1, 8, 1, 8, 4, 1, none, none),
            routing(s, "tiny", 1, 8, 1, 2, none, none),
            large_kernel(s, "tiny", 1, 5, 16, none),
            super_token(s, "tiny", 1, 8, 16, 4, none),
            channel(s, "tiny", 1, 40, 1),
        ]
    return [
        neighborhood(s, "NAT stage 1", 128, (56, 56), 2, 7, Floor(48.5, 6.4, 10.6), Floor(97, 16, 11)),
        window(s, "window 7, 56x56", 128, 56, 2, 7, False, Floor(48.5, 6.4, 10.6), Floor(97, 16, 11)),
        routing(s, "BiFormer stage 1", 128, 56, 2, 1, Floor(48.5, exponentials=14), Floor(97)),
        halo(s, "b8 h3, 32x32 d16", 128, 32, 8, 16, 8, 3, Floor(32, 17, 55), Floor(64, 42, 55)),
        large_kernel(s, "VAN stage 1, C64", 128, 56, 64, Floor(24, exponentials=57)),
        super_token(s, "SViT stage 1, C64", 128, 56, 64, 8, Floor(57)),
        channel(s, "DaViT stage 1", 128, 3136, 3),
        neighborhood(s, "NAT stage 2", 128, (28, 28), 4, 7, Floor(24, 3.2, 5.3), Floor(48.5, 8, 5)),
        neighborhood(s, "DiNAT-L 96x96 k11", 32, (96, 96), 6, 11, Floor(107, 35, 58), Floor(214, 87, 58)),
        window(s, "grid 7, 56x56", 128, 56, 2, 7, True, Floor(48.5, 6.4, 10.6), Floor(97, 16, 11)),
        halo(s, "b8 h3, 56x56 d32", 128, 56, 4, 32, 8, 3, Floor(97, 51, 85), Floor(194, 128, 85)),
        routing(s, "BiFormer stage 2", 128, 28, 4, 4, Floor(24, exponentials=7), Floor(48.5)),
        routing(s, "BiFormer stage 3", 128, 14, 8, 16, Floor(12, exponentials=14), Floor(24)),
        neighborhood(s, "NAT stage 3", 128, (14, 14), 8, 7, Floor(12, 1.6, 2.7), Floor(24, 4, 3)),
        neighborhood(s, "NAT stage 4", 128, (7, 7), 16, 7, Floor(6, 0.8, 1.3), Floor(12, 2, 1)),
        neighborhood(s, "detection 200x304", 2, (200, 304), 2, 7, Floor(14.7, 1.9, 3.2), Floor(29, 4.8, 3.2)),
    ]


def check(case: Case, tensors: Sequence[Tensor]) -> str | None:
    """What is wrong with ours on the first two images; None where nothing is."""
    dtype = tensors[0].dtype
    few = [x[:2] if i < case.batched else x for i, x in enumerate(tensors)]

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in few]
        out = case.ours(*leaves, backend=backend)
        grad = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
        return [x.detach().float() for x in (out, *torch.autograd.grad(out, leaves, grad))]

    exact, plain = run("reference", torch.float32), run("reference", dtype)
    for i, (a, p, e) in enumerate(zip(run("triton", dtype), plain, exact, strict=True)):
        size = float(e.abs().max().clamp(min=1e-3))
        error, allowed = float((a - e).abs().max()), 2 * float((p - e).abs().max()) + _ABSOLUTE[dtype] * size
        if not error <= allowed:
            return f"tensor {i} (0 is the output): error {error:.2e} of {size:.2e}, allowed {allowed:.2e}"
    return None


def timed(function: Callable[[], Any], s: Settings) -> tuple[float, float | None]:
    """Median microseconds of a call, and the MiB that it holds at most above what was there."""
    if s.device.type != "cuda":
        start = time.perf_counter()
        function()
        return 1e6 * (time.perf_counter() - start), None
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    cache = torch.empty(256 << 20, dtype=torch.int8, device=s.device)  # larger than any cache
    pairs = []
    start = time.perf_counter()
    while len(pairs) < 7 or (len(pairs) < 50 and time.perf_counter() - start < 0.3):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        first.record()
        function()
        last.record()
        last.synchronize()
        pairs.append(1e3 * first.elapsed_time(last))
    return statistics.median(pairs), memory


def measure(case: Case, s: Settings, deadline: float) -> list[dict[str, Any]]:
    """A row for the forward and one for the backward; one row that says why where ours is wrong."""
    torch.manual_seed(0)
    tensors = [
        (torch.randn(shape, device=s.device) * case.spread.get(i, 1.0)).to(s.dtype)
        for i, shape in enumerate(case.shapes)
    ]
    base: dict[str, Any] = {"op": case.op, "case": case.name, "dtype": str(s.dtype).removeprefix("torch.")}
    wrong = check(case, tensors)
    if wrong is not None:
        return [base | {"mode": "forward", "wrong": wrong}]
    ours = functools.partial(case.ours, backend="triton")
    rows = [base | {"mode": mode, "peers": {}, "notes": {}} for mode in ("forward", "backward")]
    expected: list[list[Tensor]] = []
    for name, peer in {"ours": Peer(ours), **case.peers(tensors)}.items():
        if name != "ours" and time.perf_counter() > deadline:
            for row in rows:
                row["notes"][name] = "left out: the time was up"
            continue
        try:
            _measure_one(name, peer, case, tensors, rows, expected, s)
        except Exception as error:  # a peer that cannot run this case is a finding, ours would be a failure
            if name == "ours":
                raise
            for row in rows:
                row["notes"].setdefault(name, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
    return rows


def _measure_one(
    name: str, peer: Peer, case: Case, tensors: Sequence[Tensor], rows: list[dict[str, Any]],
    expected: list[list[Tensor]], s: Settings,
) -> None:  # fmt: skip
    taken = list(tensors[: peer.inputs])

    def forward() -> Tensor:
        with torch.no_grad():
            return peer.function(*taken)

    steps: list[Callable[[], Any]] = [forward]
    results = [[forward()]]
    if peer.trains:
        leaves = [x.detach().requires_grad_() for x in taken]
        out = peer.function(*leaves)
        grad = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)

        def backward() -> Sequence[Tensor]:
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

        steps.append(backward)
        results.append(list(backward()))
    if name == "ours":
        expected.extend(results)
    for row, step, result, wanted, floor in zip(
        rows, steps, results, expected, (case.forward, case.backward), strict=False
    ):
        if name != "ours" and peer.exact:
            error = differences({"ours": wanted, name: result})[name]
            if not error <= _TOLERANCE[s.dtype]:
                row["notes"][name] = f"differs from ours by {error:.1e}"
                row["disagrees"] = True
                continue
        microseconds, memory = timed(step, s)
        found: dict[str, Any] = {"microseconds": round(microseconds, 2)}
        if memory is not None:
            found["peak_mib"] = round(memory, 1)
        if name == "ours":
            row |= found
            if floor is not None and not s.dry_run:
                row |= {"floor_us": floor.microseconds, "of_floor": round(floor.microseconds / microseconds, 3)}
        else:
            row["peers"][name] = found | {"ratio": round(microseconds / row["microseconds"], 2)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What is printed last."""
    lines = [f"{'op':<13} {'case':<18} {'pass':<8} {'us':>9} {'floor':>7} {'of it':>6} {'MiB':>7}  peers, x our time"]
    for row in rows:
        head = f"{row['op']:<13} {row['case']:<18} {row['mode']:<8} "
        if "wrong" in row:
            lines.append(f"{head}WRONG: {row['wrong']}")
            continue
        floor = f"{row['floor_us']:7.1f} {row['of_floor']:6.2f}" if "floor_us" in row else f"{'-':>7} {'-':>6}"
        memory = f"{row['peak_mib']:7.1f}" if "peak_mib" in row else f"{'-':>7}"
        peers = [f"{name} {found['ratio']:.2f}" for name, found in row["peers"].items()]
        peers += [f"[{name}: {note}]" for name, note in row["notes"].items()]
        lines.append(f"{head}{row['microseconds']:9.1f} {floor} {memory}  {'  '.join(peers)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the JSON, print the table; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="default: all")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no case or peer is begun")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in the interpreter, on the CPU")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_<name of the GPU>.json")
    s = parser.parse_args(arguments, namespace=Settings())
    if not s.dry_run and not torch.cuda.is_available():
        print("benchmarks/gpu.py: PyTorch sees no GPU here; --dry-run tries the harness without one", file=sys.stderr)
        return 2
    s.device = torch.device("cpu" if s.dry_run else "cuda")
    s.dtype = torch.float32 if s.dry_run else _DTYPES[s.dtype]
    torch._functorch.config.donated_buffer = False  # the backward is timed again and again on one graph
    name = "dry_run" if s.dry_run else torch.cuda.get_device_name().lower().replace(" ", "_")
    out = s.out or (None if s.dry_run else ROOT / "benchmarks" / "results" / f"gpu_{name}.json")
    found = environment(s.device, torch.get_num_threads(), arguments)
    found["command"] = found["command"].replace("benchmarks/ops.py", "benchmarks/gpu.py")
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for case in build(s):
        if s.op and case.op not in s.op:
            continue
        if time.perf_counter() - start > s.budget:
            skipped.append(f"{case.op}, {case.name}")
            continue
        rows += measure(case, s, start + s.budget)
        torch._dynamo.reset()
        print(f"{time.perf_counter() - start:6.1f} s  {case.op}, {case.name}", file=sys.stderr, flush=True)
        if out is not None:
            report = {"environment": found, "results": rows, "skipped": skipped}
            out.write_text(json.dumps(report, indent=2) + "\n")
    for line in skipped:
        print(f"left out, the time was up: {line}")
    versions = ", ".join(f"{k} {found[k]}" for k in ("gpu", "driver", "torch", "triton") if found.get(k))
    print(f"{versions}, {s.dtype}\n{table(rows)}")
    return int(any("wrong" in row or row.get("disagrees") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
