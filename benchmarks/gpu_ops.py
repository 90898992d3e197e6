"""What `gpu.py` measures of the ops: the cases, their peers, and how one is checked and timed.

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
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from cases import channel as channel_cases
from cases import neighborhood as neighborhood_cases
from cases import window as window_cases
from timm.layers.halo_attn import rel_logits_1d
from timm.models import maxxvit
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import models as textbook
from ops import differences
from zoo import ops as zoo_ops
from zoo.bench import host_time, step_times

__all__ = ["Settings", "build", "measure", "prepare"]

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
    compiled: whether torch.compile makes it.
    """

    function: Callable[..., Tensor]
    exact: bool = True
    inputs: int | None = None
    trains: bool = True
    compiled: bool = False


Peers = dict[str, Peer | str]  # text says why one is left out


@dataclass(frozen=True)
class Case:
    """A problem: tensors, how many of them have a batch axis, ours (with `backend`), and its peers, the cheap first."""

    op: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    ours: Callable[..., Tensor]
    peers: Callable[[Sequence[Tensor]], Peers]
    forward: Floor | None = None
    backward: Floor | None = None
    batched: int = 3
    spread: dict[int, float] = field(default_factory=dict)  # input -> factor, where unit normal values are too large
    channels_last: bool = False  # the first input's layout


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

    def compiled(self, function: Callable[..., Any]) -> Peer:
        """Compiled for the GPU; a dry run only traces, because compiling takes minutes on a CPU."""
        made = torch.compile(function, dynamic=False, backend="eager" if self.dry_run else "inductor")
        return Peer(made, compiled=True)


def neighborhood(
    s: Settings, name: str, batch: int, size: tuple[int, int], heads: int, kernel: int, fwd: Floor, bwd: Floor
) -> Case:
    case = neighborhood_cases.NeighborhoodCase(
        name=name, batch=batch, spatial=size, heads=heads, kernel_size=kernel, dim=8 if s.dry_run else 32
    )

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, backend: str) -> Tensor:
        return zoo_ops.neighborhood_attention(q, k, v, kernel, bias=bias, backend=backend)

    def peers(tensors: Sequence[Tensor]) -> Peers:
        found: Peers = {}
        pairs, queries = (size[0] * size[1]) ** 2, size[0] * size[1] * batch * heads
        if queries <= 1 << 20:
            gather = neighborhood_cases._gather
            found["gather"] = Peer(functools.partial(gather, windows=neighborhood_cases._windows(case, s.device)))
        else:
            found["gather"] = "too large: k and v are copied once per key of a window"
        with contextlib.suppress(ImportError):
            import natten

            found["natten, no bias"] = Peer(
                lambda q, k, v: natten.na2d(q, k, v, kernel_size=kernel), exact=False, inputs=3
            )

        @functools.cache
        def flex() -> Any:
            made = neighborhood_cases._Flex(case, s.device)
            if s.dry_run:
                made.attend = flex_attention
            return made

        name = "flex compiled"
        found[name] = Peer(lambda *x: flex()(*x), trains=not s.dry_run, compiled=True)
        if pairs > 1 << 28:
            found[name] = "too large: its block mask is made from one flag per pair of tokens"
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

    def peers(tensors: Sequence[Tensor]) -> Peers:
        index = window_cases._index(w).to(s.device)
        sdpa = functools.partial(window_cases._partitioned, case=case, index=index, fused=True)

        def timm_form(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            """timm's own partition and reversal, around the attention of its MaxViT."""
            q, k, v = (split(x.flatten(3), [w, w]).reshape(-1, w * w, heads, dim).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(1)[:, index][None])
            out = out.transpose(1, 2).reshape(-1, w, w, heads * dim)
            return join(out, [w, w], [side, side]).unflatten(3, (heads, dim))

        return {"sdpa": Peer(sdpa), "timm": Peer(timm_form), "sdpa compiled": s.compiled(sdpa)}

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

    def peers(tensors: Sequence[Tensor]) -> Peers:
        return {"timm": Peer(timm_form), "timm compiled": s.compiled(timm_form)}

    shapes = ((batch, side, side, heads, dim),) * 3 + ((2 * win - 1, dim),) * 2
    return Case("halo", name, shapes, ours, peers, fwd, bwd)


def routing(s: Settings, name: str, batch: int, side: int, heads: int, topk: int, fwd: Floor, bwd: Floor) -> Case:
    regions, dim = (2, 8) if s.dry_run else (7, 32)
    picked: list[Tensor] = []

    def index(q: Tensor, k: Tensor) -> Tensor:
        """Picked once, for the whole batch that comes first: routing is no part of what is timed."""
        if not picked:
            with torch.no_grad():
                picked.append(zoo_ops.routing_index(q, k, regions, topk))
        return picked[0][: q.shape[0]]

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        out = zoo_ops.routing_attention(q, k, v, regions, topk, index=index(q, k), scale=dim**-0.5, backend=backend)
        return out[0] if isinstance(out, tuple) else out

    def peers(tensors: Sequence[Tensor]) -> Peers:
        chosen = index(tensors[0], tensors[1])

        def gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return textbook.routing_gather(q, k, v, regions, topk, scale=dim**-0.5, index=chosen)

        return {"gather": Peer(gather), "gather compiled": s.compiled(gather)}

    return Case("routing", name, ((batch, side, side, heads, dim),) * 3, ours, peers, fwd, bwd)


def large_kernel(s: Settings, name: str, batch: int, side: int, channels: int, fwd: Floor) -> Case:
    def ours(*tensors: Any, backend: str) -> Tensor:
        return zoo_ops.large_kernel_attention(*tensors, backend=backend)

    def peers(tensors: Sequence[Tensor]) -> Peers:
        convolutions = textbook.large_kernel_direct
        return {"convolutions": Peer(convolutions), "convolutions compiled": s.compiled(convolutions)}

    c = channels
    shapes = ((batch, c, side, side), (c, 1, 5, 5), (c,), (c, 1, 7, 7), (c,), (c, c, 1, 1), (c,))
    spread = {1: 0.2, 3: 0.15, 5: c**-0.5}
    return Case("large_kernel", name, shapes, ours, peers, fwd, batched=1, spread=spread, channels_last=True)


def super_token(s: Settings, name: str, batch: int, side: int, channels: int, cell: int, fwd: Floor) -> Case:
    def ours(x: Tensor, backend: str) -> Tensor:
        tokens, affinity = zoo_ops.super_token_sampling(x, cell, backend=backend)
        return zoo_ops.super_token_mapping(tokens, affinity, cell, backend=backend)

    def unfold(x: Tensor) -> Tensor:
        return textbook.mapping_unfold(*textbook.sampling_unfold(x, cell), cell)

    def peers(tensors: Sequence[Tensor]) -> Peers:
        return {"unfold/fold": Peer(unfold), "unfold/fold compiled": s.compiled(unfold)}

    return Case("super_token", name, ((batch, side, side, channels),), ours, peers, fwd, batched=1)


def channel(s: Settings, name: str, batch: int, tokens: int, heads: int, fwd: Floor, bwd: Floor) -> Case:
    scale = tokens**-0.5

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return zoo_ops.channel_attention(q, k, v, scale=scale, backend=backend)

    def peers(tensors: Sequence[Tensor]) -> Peers:
        module = functools.partial(channel_cases._module, scale=scale)
        sdpa = functools.partial(channel_cases._sdpa, scale=scale)
        return {"timm": Peer(module), "sdpa": Peer(sdpa), "timm compiled": s.compiled(module)}

    return Case("channel", name, ((batch, tokens, heads, 8 if s.dry_run else 32),) * 3, ours, peers, fwd, bwd)


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
            channel(s, "tiny", 1, 40, 1, none, none),
        ]
    return [
        neighborhood(s, "NAT stage 1", 128, (56, 56), 2, 7, Floor(48.5, 6.4, 10.6), Floor(97, 16, 11)),
        window(s, "window 7, 56x56", 128, 56, 2, 7, False, Floor(48.5, 6.4, 10.6), Floor(97, 16, 11)),
        routing(s, "BiFormer stage 1", 128, 56, 2, 1, Floor(48.5, exponentials=14), Floor(97)),
        halo(s, "b8 h3, 32x32 d16", 128, 32, 8, 16, 8, 3, Floor(32, 17, 55), Floor(64, 42, 55)),
        large_kernel(s, "VAN stage 1, C64", 128, 56, 64, Floor(24, exponentials=57)),
        super_token(s, "STViT stage 1, C64", 128, 56, 64, 8, Floor(57)),
        channel(s, "DaViT stage 1", 128, 3136, 3, Floor(72), Floor(125)),
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


# ---- one case


def measure(report: Callable[[Any], None], s: Settings, number: int, seconds: float) -> None:
    """Check and time case `number`; what is known so far is reported after every step.

    A report is {"rows": one for the forward and one for the backward, "doing": (whose step, which pass) comes next}.
    No peer is begun when `seconds` are over.
    """
    deadline = time.monotonic() + seconds
    textbook.compile_threads(1)  # what compiles is small, or in the compiler's cache
    case = build(s)[number]
    tensors = inputs(case, s)
    base = {"op": case.op, "case": case.name, "dtype": str(s.dtype).removeprefix("torch.")}
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
            step = dict(passes(Peer(functools.partial(case.ours, backend="triton")), tensors, mode))[mode]
            expected[mode] = step()
            row |= timed(step, s)
        except Exception as error:
            row |= {"wrong": f"ERROR {textbook.describe(error)}", "traceback": traceback.format_exc()}
            continue
        floor = case.forward if mode == "forward" else case.backward
        if floor is not None and not s.dry_run:
            row |= {"floor_us": floor.microseconds, "of_floor": round(floor.microseconds / row["microseconds"], 3)}
    say("the peers", "")
    for name, peer in (case.peers(tensors) if expected else {}).items():
        if isinstance(peer, str) or time.monotonic() > deadline:
            for row in rows.values():
                row["notes"][name] = peer if isinstance(peer, str) else "left out, the time was up"
            continue
        with forgiving(rows, name):
            for mode, step in passes(peer, tensors, *expected):
                say(name, mode)
                result = step()
                error = differences({"ours": expected[mode], name: result})[name] if peer.exact else 0.0
                del result
                if not error <= _TOLERANCE[s.dtype]:
                    rows[mode]["notes"][name] = f"differs from ours by {error:.1e}"
                found = timed(step, s)
                found["ratio"] = round(found["microseconds"] / rows[mode]["microseconds"], 2)
                rows[mode]["peers"][name] = found
    say("", "")


def prepare(report: Callable[[Any], None], s: Settings, number: int) -> None:
    """Run what has to be compiled once, so that the compilers' caches hold it when the case is timed."""
    textbook.compile_threads(1)
    case = build(s)[number]
    tensors = inputs(case, s)
    ours = Peer(functools.partial(case.ours, backend="triton"))
    with contextlib.suppress(Exception):
        for _, step in passes(ours, tensors, "forward", "backward"):
            step()
    for peer in case.peers(tensors).values():
        if isinstance(peer, Peer) and peer.compiled:
            with contextlib.suppress(Exception):
                for _, step in passes(peer, tensors, "forward", "backward"):
                    step()


def inputs(case: Case, s: Settings) -> list[Tensor]:
    """The case's tensors, the same ones every time."""
    torch._functorch.config.donated_buffer = False  # the backward is run again and again on one graph
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is float32 for all
    torch.manual_seed(0)
    tensors = [
        (torch.randn(shape, device=s.device) * case.spread.get(i, 1.0)).to(s.dtype)
        for i, shape in enumerate(case.shapes)
    ]
    if case.channels_last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    return tensors


def weights(out: Tensor, images: int) -> Tensor:
    """A gradient for an output, in its layout; zero but for the first images."""
    weight = torch.zeros_like(out)
    some = weight[:images]
    some.copy_(torch.linspace(-1, 1, some.numel(), device=out.device).view(some.shape))
    return weight


def check(case: Case, tensors: Sequence[Tensor], mode: str) -> str | None:
    """What is wrong with a pass of ours: it runs the whole batch, and its first two images are judged."""
    dtype, images = tensors[0].dtype, 2

    def run(backend: str, dtype: torch.dtype, tensors: Sequence[Tensor]) -> list[Tensor]:
        leaves = [x.to(dtype).detach().requires_grad_(mode == "backward") for x in tensors]
        out = case.ours(*leaves, backend=backend)
        if mode == "forward":
            return [out[:images].float()]
        # the gradient is zero at the other images, so that those of the parameters are the first two's alone
        grads = torch.autograd.grad(out, leaves, weights(out.detach(), images))
        return [(x[:images] if i < case.batched else x).float() for i, x in enumerate(grads)]

    actual, again = run("triton", dtype, tensors), run("triton", dtype, tensors)
    few = [x[:images] if i < case.batched else x for i, x in enumerate(tensors)]
    exact, plain = run("reference", torch.float32, few), run("reference", dtype, few)
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        name = "the output" if mode == "forward" else f"the gradient of input {i}"
        size = float(e.abs().max().clamp(min=1e-3))
        error, allowed = float((a - e).abs().max()), 2 * float((p - e).abs().max()) + _ABSOLUTE[dtype] * size
        if not error <= allowed:
            return f"{name} is off by {error:.2e} of {size:.2e}, allowed {allowed:.2e}"
        if not torch.equal(a, again[i]):
            return f"{name} has not the same bits twice"
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
        text = textbook.describe(error)
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
