"""The catalogue of op calls: what `zoo doctor`, `zoo tune`, the tests and the benchmarks run.

A new op adds a function that describes a call of it, and rows to CATALOGUE: one "tiny" (the doctor checks it) and one
"test" (every path against the definition) at the least.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import zoo.ops as ops

__all__ = [
    "CATALOGUE", "TAGS", "Example", "channel", "halo", "headlines_first", "large_kernel", "mapping", "neighborhood",
    "routing", "sampling", "select", "super_token", "window",
]  # fmt: skip

TAGS = {
    "tiny": "one call per op: `zoo doctor`, CUDA graphs",
    "test": "the Triton kernels against the definition, in the interpreter and on GPUs; names are unique over all ops",
    "compile": "what is compiled for GPUs that are not there",
    "model": "a stage of a published model: `zoo tune`",
    "cpu": "python -m benchmarks.ops",
    "quick": "... --quick",
    "gpu": "python -m benchmarks.gpu",
    "trial": "... --dry-run",
    "packed": "q, k and v in one tensor",
    "causal": "",
    "dilated": "",
    "strided": "",
    "shifted": "",
    "grid": "",
    "padded": "the map is no multiple of its windows, blocks, regions or cells",
    "1d": "",
}
"""Who runs an example, and what is special about it (this the functions below add by themselves)."""

_HALF = (torch.float32, torch.float16, torch.bfloat16)
Pair = int | tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """A call of an op: the shapes of its tensors, and what it is called with besides.

    Attributes:
        name: unique among the examples of a folder.
        folder: of the op, in ops/.
        op: the function in zoo.ops.
        shapes: of the tensors, which are the first arguments; those of the first `batched` begin with the batch.
        named: keywords of the last tensors, which are no positional arguments.
        arguments: after the tensors.
        options: further keywords.
        dtypes: what the interpreter, which is slow, runs it in.
        spread: tensor -> factor, where unit normal values are too large.
        probabilities: tensors that sum to one over their last axis.
        channels_last: the memory format of the first tensor.
        pick: tensors -> keywords [B, ...] that depend on values, for callers that keep them: see `bound`.
    """

    name: str
    folder: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    batched: int
    named: tuple[str, ...] = ()
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    spread: Mapping[int, float] = field(default_factory=dict)
    probabilities: tuple[int, ...] = ()
    channels_last: bool = False
    pick: Callable[[Sequence[Tensor]], dict[str, Tensor]] | None = None

    @property
    def kind(self) -> str:
        """What tables of tile configurations call it: grids are kept apart from windows."""
        return "grid" if "grid" in self.tags else self.folder

    def inputs(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """The tensors, drawn in this dtype; from the device's own generator unless one is given."""
        tensors = []
        for i, shape in enumerate(self.shapes):
            x = torch.randn(shape, dtype=dtype, device=device, generator=generator)
            if i in self.spread:
                x *= self.spread[i]
            tensors.append(x.softmax(-1) if i in self.probabilities else x)
        if self.channels_last:
            tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        return tensors

    def call(self, tensors: Sequence[Tensor], **extra: Any) -> Tensor:
        """The first output of the op, called on these tensors; `backend` is among the extra keywords."""
        count = len(self.shapes) - len(self.named)
        keywords = dict(zip(self.named, tensors[count:], strict=True)) | dict(self.options) | extra
        out = getattr(ops, self.op)(*tensors[:count], *self.arguments, **keywords)
        return out[0] if isinstance(out, tuple) else out

    def bound(self, tensors: Sequence[Tensor]) -> Callable[..., Tensor]:
        """`call` as a function of tensors and `backend`; choices by value (routed regions) are made now and kept.

        It takes the tensors it was made from, casts of them, and their first images.
        """
        picked = {} if self.pick is None else self.pick(tensors)

        def call(*tensors: Tensor, backend: str | None = None) -> Tensor:
            first = tensors[0]
            return self.call(
                tensors, backend=backend, **{n: x[: first.shape[0]].to(first.device) for n, x in picked.items()}
            )

        return call

    def with_batch(self, count: int, of: int) -> "Example":
        """The batch times count / of, and at least one image."""
        batch = max(1, self.shapes[0][0] * count // of)
        shapes = tuple((batch, *s[1:]) if i < self.batched else s for i, s in enumerate(self.shapes))
        return replace(self, shapes=shapes)


def select(*tags: str, folder: str | None = None) -> list[Example]:
    """The examples that carry all these tags.

    Raises:
        ValueError: there is no such tag.
    """
    unknown = set(tags) - set(TAGS)
    if unknown:
        raise ValueError(f"no tag {', '.join(sorted(unknown))}; there are {', '.join(TAGS)}")
    return [e for e in CATALOGUE if e.tags.issuperset(tags) and folder in (None, e.folder)]


def headlines_first(examples: Iterable[Example]) -> list[Example]:
    """The first example of each kind, then the second of each, and so on: the order in which time may run out."""
    seen: dict[str, int] = {}
    ranks: dict[Example, int] = {}
    for example in examples:
        ranks[example] = seen[example.kind] = seen.get(example.kind, -1) + 1
    return sorted(ranks, key=lambda e: ranks[e])


# ---- how each op is called


def _made(tags: str, **facts: Any) -> Example:
    special = (name for name, holds in facts.pop("special", {}).items() if holds)
    return Example(tags=frozenset([*tags.split(), *special]), **facts)


def _maps(leading: tuple[int, ...], heads: int, dim: int, packed: bool) -> tuple[tuple[int, ...], ...]:
    return ((*leading, 3, heads, dim),) if packed else ((*leading, heads, dim),) * 3


def _pair(x: Pair) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else x


def _divides(size: Sequence[int], side: Pair) -> bool:
    return all(n % s == 0 for n, s in zip(size, _pair(side), strict=True))


def neighborhood(
    name: str, size: tuple[int, ...], kernel: Any, *, heads: int = 1, dim: int = 8, dim_v: int | None = None,
    batch: int = 1, bias: bool = True, dilation: Any = 1, stride: Any = 1, is_causal: Any = False, packed: bool = False,
    tags: str = "", **facts: Any,
) -> Example:  # fmt: skip
    """`neighborhood_attention` on a line or a map of this size."""
    sides = kernel if isinstance(kernel, tuple) else (kernel,) * len(size)
    shapes = _maps((batch, *size), heads, dim, packed)
    if dim_v is not None:
        shapes = (*shapes[:2], (*shapes[2][:-1], dim_v))
    one = (1, (1,) * len(size))
    return _made(
        tags,
        name=name,
        folder="neighborhood",
        op="neighborhood_attention" + "_qkvpacked" * packed,
        shapes=shapes + ((heads, *(2 * k - 1 for k in sides)),) * bias,
        batched=len(shapes),
        named=("bias",) * bias,
        arguments=(kernel,),
        options={"dilation": dilation, "stride": stride, "is_causal": is_causal},
        special={
            "packed": packed, "1d": len(size) == 1, "dilated": dilation not in one, "strided": stride not in one,
            "causal": any(is_causal) if isinstance(is_causal, tuple) else is_causal,
        },
        **facts,
    )  # fmt: skip


def window(
    name: str, size: tuple[int, int], side: Pair, *, heads: int = 1, dim: int = 8, batch: int = 1, bias: bool = True,
    shift: Any = 0, grid: bool = False, packed: bool = False, tags: str = "", **facts: Any,
) -> Example:  # fmt: skip
    """`window_attention` on windows or a grid of this side."""
    height, width = _pair(side)
    shapes = _maps((batch, *size), heads, dim, packed)
    return _made(
        tags,
        name=name,
        folder="window",
        op="window_attention" + "_qkvpacked" * packed,
        shapes=shapes + ((heads, 2 * height - 1, 2 * width - 1),) * bias,
        batched=len(shapes),
        named=("bias",) * bias,
        arguments=(side,),
        options={"shift": shift, "grid": grid},
        special={
            "packed": packed, "grid": grid, "shifted": shift not in (0, (0, 0)), "padded": not _divides(size, side)
        },
        **facts,
    )  # fmt: skip


def halo(
    name: str, size: tuple[int, int], block: int, reach: int, *, heads: int = 1, dim: int = 8, dim_v: int | None = None,
    batch: int = 1, stride: int = 1, relative: str = "hw", border: str = "zero", tags: str = "", **facts: Any,
) -> Example:  # fmt: skip
    """`halo_attention` with queries at every `stride` of the map, and embeddings of relative rows (h), columns (w)."""
    query = tuple(-(-s // stride) for s in size)
    q, k, v = ((batch, *s, heads, d) for s, d in ((query, dim), (size, dim), (size, dim_v or dim)))
    return _made(
        tags,
        name=name,
        folder="halo",
        op="halo_attention",
        shapes=(q, k, v, *((2 * (block + 2 * reach) - 1, dim) for _ in relative)),
        batched=3,
        named=tuple({"h": "rel_height", "w": "rel_width"}[axis] for axis in relative),
        arguments=(block, reach),
        options={"border": border},
        spread={3 + i: dim**-0.5 for i in range(len(relative))},  # as timm initializes them
        special={"strided": stride != 1, "padded": not _divides(size, block)},
        **facts,
    )


def routing(
    name: str, size: tuple[int, int], regions: Pair, topk: int, *, heads: int = 1, dim: int = 8,
    dim_v: int | None = None, batch: int = 1, padding: str = "none", scale: float | None = None, tags: str = "",
    **facts: Any,
) -> Example:  # fmt: skip
    """`routing_attention` in a partition into regions, `topk` of which every region attends to."""

    def pick(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"index": ops.routing_index(tensors[0], tensors[1], regions, topk, padding=padding)}

    leading = (batch, *size, heads)
    return _made(
        tags,
        name=name,
        folder="routing",
        op="routing_attention",
        shapes=((*leading, dim), (*leading, dim), (*leading, dim_v or dim)),
        batched=3,
        arguments=(regions, topk),
        options={"padding": padding, "scale": scale},
        pick=pick,
        special={"padded": not _divides(size, regions)},
        **facts,
    )


def channel(
    name: str, tokens: int, *, heads: int = 1, dim: int = 8, batch: int = 1, scale: float | None = None,
    packed: bool = False, tags: str = "", **facts: Any,
) -> Example:  # fmt: skip
    """`channel_attention` on so many tokens."""
    shapes = _maps((batch, tokens), heads, dim, packed)
    return _made(
        tags,
        name=name,
        folder="channel",
        op="channel_attention" + "_qkvpacked" * packed,
        shapes=shapes,
        batched=len(shapes),
        options={"scale": scale},
        special={"packed": packed},
        **facts,
    )


def sampling(
    name: str, size: tuple[int, int], cell: Pair, *, channels: int = 16, batch: int = 1, n_iter: int = 1,
    tags: str = "", **facts: Any,
) -> Example:  # fmt: skip
    """`super_token_sampling`: the super tokens of cells of pixels."""
    return _made(
        tags,
        name=name,
        folder="super_token",
        op="super_token_sampling",
        shapes=((batch, *size, channels),),
        batched=1,
        arguments=(cell,),
        options={"n_iter": n_iter},
        special={"padded": not _divides(size, cell)},
        **facts,
    )


def mapping(
    name: str, size: tuple[int, int], cell: int, *, channels: int = 16, batch: int = 1, tags: str = "", **facts: Any
) -> Example:
    """`super_token_mapping`: super tokens spread over the pixels."""
    cells = tuple(-(-s // cell) for s in size)
    return _made(
        tags,
        name=name,
        folder="super_token",
        op="super_token_mapping",
        shapes=((batch, *cells, channels), (batch, *size, 9)),
        batched=2,
        arguments=(cell,),
        probabilities=(1,),
        special={"padded": not _divides(size, cell)},
        **facts,
    )


def super_token(
    name: str, size: tuple[int, int], cell: int, *, channels: int = 16, batch: int = 1, tags: str = "", **facts: Any
) -> Example:
    """`super_token_attention` of no weights: sampling, then mapping."""
    return _made(
        tags,
        name=name,
        folder="super_token",
        op="super_token_attention",
        shapes=((batch, *size, channels),),
        batched=1,
        arguments=(None, None, None, None, 1, cell),
        special={"padded": not _divides(size, cell)},
        **facts,
    )


def large_kernel(
    name: str, size: tuple[int, int], channels: int, *, batch: int = 1, kernels: tuple[int, int] = (5, 7),
    dilation: int = 3, tags: str = "", **facts: Any,
) -> Example:  # fmt: skip
    """`large_kernel_attention` of two depthwise convolutions and a pointwise one."""
    weights = ((channels, 1, kernels[0], kernels[0]), (channels, 1, kernels[1], kernels[1]), (channels, channels, 1, 1))
    return _made(
        tags,
        name=name,
        folder="large_kernel",
        op="large_kernel_attention",
        shapes=((batch, channels, *size), *(shape for weight in weights for shape in (weight, (channels,)))),
        batched=1,
        options={"dilation": dilation},
        spread={1: 1 / kernels[0], 3: 1 / kernels[1]},
        **facts,
    )


# ---- the calls; of each op those for a quick check, for the tests, for the compiler, and what models run


CATALOGUE: tuple[Example, ...] = (
    neighborhood("11x9 k3 d2", (11, 9), 3, heads=2, dim=16, dilation=2, tags="tiny"),
    neighborhood("tiny", (8, 9), 3, tags="trial"),
    neighborhood("na-3-odd-map", (9, 11), 3, heads=2, batch=2, tags="test", dtypes=_HALF),
    neighborhood("na-7-window-equals-map", (7, 7), 7, dim=16, tags="test", dtypes=_HALF),
    neighborhood("na-even-kernel", (9, 10), (4, 6), tags="test"),
    neighborhood("na-no-bias-dim24-dimv40", (8, 9), 5, dim=24, dim_v=40, bias=False, tags="test"),
    neighborhood("na-dilated-uneven-phases", (13, 11), (3, 5), dilation=(3, 2), tags="test"),
    neighborhood("na-stride", (10, 9), 5, stride=(2, 5), tags="test"),
    neighborhood("na-causal", (9, 8), 3, is_causal=(True, False), stride=(2, 1), tags="test"),
    neighborhood("na-1d", (37,), 5, dilation=2, heads=2, tags="test"),
    neighborhood("na-1d-causal", (29,), 7, is_causal=True, tags="test", dtypes=_HALF),
    neighborhood("na-packed", (9, 8), 3, heads=2, batch=2, packed=True, tags="test"),
    neighborhood("28x28 k7", (28, 28), 7, heads=2, dim=32, batch=2, tags="compile"),
    neighborhood("24x24 k11", (24, 24), 11, heads=2, dim=32, batch=2, tags="compile"),
    neighborhood("28x28 k13 dim64", (28, 28), 13, heads=2, dim=64, batch=2, tags="compile"),
    neighborhood("2x56x56 h2 k7", (56, 56), 7, batch=2, heads=2, dim=32, tags="cpu quick"),
    neighborhood("4x28x28 h4 k7", (28, 28), 7, batch=4, heads=4, dim=32, tags="cpu quick"),
    neighborhood("8x14x14 h8 k7", (14, 14), 7, batch=8, heads=8, dim=32, tags="cpu quick"),
    neighborhood("16x7x7 h16 k7", (7, 7), 7, batch=16, heads=16, dim=32, tags="cpu"),
    neighborhood("2x56x56 h2 k7 d8", (56, 56), 7, batch=2, heads=2, dim=32, dilation=8, tags="cpu"),
    neighborhood("2x57x61 h2 k7 d3", (57, 61), 7, batch=2, heads=2, dim=32, dilation=3, tags="cpu"),
    neighborhood("2x56x56 h2 k11", (56, 56), 11, batch=2, heads=2, dim=32, tags="cpu"),
    neighborhood("2x56x56 h2 k13", (56, 56), 13, batch=2, heads=2, dim=32, tags="cpu"),
    neighborhood("1x112x112 h4 k7", (112, 112), 7, heads=4, dim=32, tags="cpu"),
    neighborhood("NAT stage 1", (56, 56), 7, batch=128, heads=2, dim=32, tags="model gpu"),
    neighborhood("NAT stage 2", (28, 28), 7, batch=128, heads=4, dim=32, tags="model gpu"),
    neighborhood("DiNAT-L 96x96 k11", (96, 96), 11, batch=32, heads=6, dim=32, tags="model gpu"),
    neighborhood("NAT stage 3", (14, 14), 7, batch=128, heads=8, dim=32, tags="model gpu"),
    neighborhood("NAT stage 4", (7, 7), 7, batch=128, heads=16, dim=32, tags="model gpu"),
    neighborhood("detection 200x304", (200, 304), 7, batch=2, heads=2, dim=32, tags="gpu"),
    window("11x9 w4 shift 2", (11, 9), 4, heads=2, dim=16, shift=2, tags="tiny"),
    window("tiny", (8, 8), 4, tags="trial"),
    window("window", (14, 14), 7, heads=2, dim=16, tags="test", dtypes=_HALF),
    window("window-odd-shifted", (11, 13), (4, 5), shift=(2, 3), tags="test", dtypes=_HALF),
    window("window-larger-than-a-tile", (12, 12), 12, bias=False, tags="test"),
    window("window-grid", (14, 7), 7, grid=True, tags="test", dtypes=_HALF),
    window("window-grid-padded", (10, 9), 4, grid=True, tags="test", dtypes=_HALF),
    window("window-packed", (10, 9), 4, heads=2, shift=1, packed=True, tags="test", dtypes=_HALF),
    window("28x28 w7 shift 3, no bias", (28, 28), 7, heads=2, dim=32, batch=2, shift=3, bias=False, tags="compile"),
    window("28x28 w7 shift 3", (28, 28), 7, heads=2, dim=32, batch=2, shift=3, tags="compile"),
    window("2x56x56 h2 w7", (56, 56), 7, batch=2, heads=2, dim=32, tags="cpu quick"),
    window("2x56x56 h2 g7", (56, 56), 7, batch=2, heads=2, dim=32, grid=True, tags="cpu"),
    window("8x14x14 h8 w7", (14, 14), 7, batch=8, heads=8, dim=32, tags="cpu quick"),
    window("4x28x28 h4 w7", (28, 28), 7, batch=4, heads=4, dim=32, tags="cpu"),
    window("16x7x7 h16 w7", (7, 7), 7, batch=16, heads=16, dim=32, tags="cpu"),
    window("2x96x96 h2 w12", (96, 96), 12, batch=2, heads=2, dim=32, tags="cpu"),
    window("window 7, 56x56", (56, 56), 7, batch=128, heads=2, dim=32, tags="model gpu"),
    window("window 7, 28x28", (28, 28), 7, batch=128, heads=4, dim=32, tags="model"),
    window("window 7, 14x14", (14, 14), 7, batch=128, heads=8, dim=32, tags="model"),
    window("grid 7, 56x56", (56, 56), 7, batch=128, heads=2, dim=32, grid=True, tags="model gpu"),
    window("grid 7, 28x28", (28, 28), 7, batch=128, heads=4, dim=32, grid=True, tags="model"),
    window("grid 7, 14x14", (14, 14), 7, batch=128, heads=8, dim=32, grid=True, tags="model"),
    halo("11x9 b4 h2", (11, 9), 4, 2, heads=2, dim=16, tags="tiny"),
    halo("tiny", (8, 8), 4, 1, tags="trial"),
    halo("halo-zero", (16, 16), 8, 3, dim=16, tags="test", dtypes=_HALF),
    halo("halo-mask-overhang", (9, 14), 4, 1, border="mask", heads=2, tags="test"),
    halo("halo-strided", (16, 8), 8, 2, stride=2, dim_v=16, tags="test"),
    halo("halo-block7-rows-only", (14, 7), 7, 2, relative="h", tags="test"),
    halo("halo-plain", (8, 9), 4, 2, relative="", batch=2, tags="test"),
    halo("32x32 b8 h3 dim16", (32, 32), 8, 3, heads=2, dim=16, batch=2, tags="compile"),
    halo("4x32x32 h8 b8", (32, 32), 8, 3, batch=4, heads=8, dim=16, tags="cpu quick"),
    halo("b8 h3, 32x32 d16", (32, 32), 8, 3, batch=128, heads=8, dim=16, tags="model gpu"),
    halo("b8 h3, 56x56 d32", (56, 56), 8, 3, batch=128, heads=4, dim=32, tags="model gpu"),
    routing("12x8 r4 t2", (12, 8), 4, 2, heads=2, dim=16, tags="tiny"),
    routing("tiny", (8, 8), 2, 2, scale=8**-0.5, tags="trial"),
    routing("routing", (14, 14), 7, 4, heads=2, tags="test", dtypes=_HALF),
    routing("routing-zero-padding", (13, 17), 4, 3, padding="zero", dim_v=16, tags="test"),
    routing("routing-large-region", (18, 18), 2, 2, batch=2, tags="test"),
    routing("28x28 r7 t4", (28, 28), 7, 4, heads=2, dim=32, batch=2, tags="compile"),
    routing("28x28 r14 t16", (28, 28), 14, 16, heads=2, dim=32, batch=2, tags="compile"),
    routing("14x14 r7 t16", (14, 14), 7, 16, heads=2, dim=32, batch=2, tags="compile"),
    routing("4x28x28 h4 r7 t4", (28, 28), 7, 4, batch=4, heads=4, dim=32, tags="cpu quick"),
    routing("BiFormer stage 1", (56, 56), 7, 1, batch=128, heads=2, dim=32, scale=32**-0.5, tags="model gpu"),
    routing("BiFormer stage 2", (28, 28), 7, 4, batch=128, heads=4, dim=32, scale=32**-0.5, tags="model gpu"),
    routing("BiFormer stage 3", (14, 14), 7, 16, batch=128, heads=8, dim=32, scale=32**-0.5, tags="model gpu"),
    channel("33 tokens", 33, heads=2, dim=16, tags="tiny"),
    channel("tiny", 40, scale=40**-0.5, tags="trial"),
    channel("channel", 77, heads=3, batch=2, tags="test", dtypes=_HALF),
    channel("channel-dim24", 130, dim=24, tags="test"),
    channel("channel-packed", 70, heads=2, packed=True, tags="test"),
    channel("784 tokens", 784, heads=3, dim=32, batch=2, tags="compile"),
    channel("4x3136 h3", 3136, batch=4, heads=3, dim=32, scale=3136**-0.5, tags="cpu quick"),
    channel("8x784 h6", 784, batch=8, heads=6, dim=32, scale=784**-0.5, tags="cpu"),
    channel("8x196 h12", 196, batch=8, heads=12, dim=32, scale=196**-0.5, tags="cpu quick"),
    channel("8x49 h24", 49, batch=8, heads=24, dim=32, scale=49**-0.5, tags="cpu"),
    channel("DaViT stage 1", 3136, batch=128, heads=3, dim=32, scale=3136**-0.5, tags="model gpu"),
    channel("DaViT stage 2", 784, batch=128, heads=6, dim=32, scale=784**-0.5, tags="model"),
    channel("DaViT stage 3", 196, batch=128, heads=12, dim=32, scale=196**-0.5, tags="model"),
    sampling("11x9 cell 4", (11, 9), 4, tags="tiny"),
    super_token("tiny", (8, 8), 4, tags="trial"),
    sampling("sampling", (16, 16), 4, batch=2, tags="test", dtypes=_HALF),
    sampling("sampling-odd-2-iterations", (13, 18), 8, n_iter=2, channels=24, tags="test"),
    mapping("mapping", (13, 10), 4, channels=40, tags="test", dtypes=_HALF),
    sampling("sampling 28x28 cell 8", (28, 28), 8, channels=96, batch=2, tags="compile"),
    sampling("sampling 28x28 cell 4", (28, 28), 4, channels=96, batch=2, tags="compile"),
    mapping("mapping 28x28 cell 8", (28, 28), 8, channels=96, batch=2, tags="compile"),
    mapping("mapping 28x28 cell 4", (28, 28), 4, channels=96, batch=2, tags="compile"),
    super_token("2x56x56 c64 cell 8", (56, 56), 8, batch=2, channels=64, tags="cpu quick"),
    super_token("STViT stage 1, C64", (56, 56), 8, batch=128, channels=64, tags="model gpu"),
    super_token("STViT stage 2, C128", (28, 28), 4, batch=128, channels=128, tags="model"),
    large_kernel("9x10 c16", (9, 10), 16, tags="tiny"),
    large_kernel("tiny", (5, 5), 16, channels_last=True, tags="trial"),
    large_kernel("large-kernel", (9, 11), 12, batch=2, tags="test", dtypes=_HALF),
    large_kernel("large-kernel-33-channels", (7, 8), 33, kernels=(3, 5), dilation=2, tags="test"),
    large_kernel("28x28 c64", (28, 28), 64, batch=2, channels_last=True, tags="compile"),
    large_kernel("2x56x56 c64", (56, 56), 64, batch=2, tags="cpu quick"),
    large_kernel("VAN stage 1, C64", (56, 56), 64, batch=128, channels_last=True, tags="model gpu"),
    large_kernel("VAN stage 2, C128", (28, 28), 128, batch=128, channels_last=True, tags="model"),
    large_kernel("VAN stage 3, C320", (14, 14), 320, batch=128, channels_last=True, tags="model"),
)
