"""Triton kernels of large kernel attention: depth-wise convolutions, and the 1x1 product with its gate.

The convolutions read and write maps whose channels have unit stride, a column of output pixels per thread, so that a
pixel is loaded and widened once for all the pixels of the column that it reaches. Weight gradients are summed per
share of the pixels and then over the shares: a fixed order, nothing atomic.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops import _tuning as tuning
from zoo.ops._triton import INTERPRET, PRECISION, block, launcher, load, summed, upcast
from zoo.ops._tuning import Config

__all__ = ["large_kernel_attention_backward_triton", "large_kernel_attention_triton"]

_MOST_ROWS = 7  # kernel rows whose weights a thread holds at once
_OUTPUTS = (1, 2, 3, 5, 7, 10)  # of a column that a thread sums at once; each is a kernel of its own
_LONG = 64  # lines from which on the choice makes little difference
_MOST_TAPS = 56  # taps whose gradients a thread sums at once
_MOST_PROGRAMS = 1024  # of a weight gradient: each writes its own partial sums


@triton.jit
def _wide(x):
    """To float32. A bfloat16 is the upper half of one: a shift or a mask, where a conversion takes two instructions."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["strips", "height", "width"])
def _depthwise_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, strips, height, width, channels, x_sb, x_sh, x_sw, y_sb, y_sh, y_sw,
    EVEN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr, BIAS: tl.constexpr,
    FLIP: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[p, c] = bias[c] + sum over taps of w[tap, c] * x[p + tap, c]; FLIP gives the transposed convolution.

    A strip is ROWS outputs, DILATION apart, of one column of one image. TAPS: kernel rows held at once.
    """
    CHUNKS: tl.constexpr = (KH + TAPS - 1) // TAPS
    strip = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    group = tl.program_id(1)
    top = group // DILATION * (ROWS * DILATION) + group % DILATION
    b = (strip // width).to(tl.int64)
    w = strip % width
    # whole tiles of weights, though alike in every strip: they then arrive in the layout that the pixels have
    ch = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :] + tl.zeros([BLOCK_P, 1], tl.int32)
    base = x_ptr + ((b * x_sb + w.to(tl.int64) * x_sw)[:, None] + ch)
    first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if BIAS:
        first = tl.load(bias_ptr + ch, mask=None if EVEN else ch < channels).to(tl.float32)
    acc = (first,) * ROWS
    for step in range(KW * CHUNKS):
        kw = step % KW if CHUNKS > 1 else step
        above = step // KW * TAPS if CHUNKS > 1 else 0
        shift = (kw - KW // 2) * DILATION
        inside = ((strip < strips) & (w + shift >= 0) & (w + shift < width))[:, None]
        inside = tl.broadcast_to(inside, [BLOCK_P, BLOCK_C]) if EVEN else inside & (ch < channels)
        column = base + tl.cast(shift, tl.int64) * x_sw
        taps = ()
        for i in tl.static_range(TAPS):
            tap = (above + i) * KW + kw
            where = (KH * KW - 1 - tap if FLIP else tap) * channels + ch
            if CHUNKS * TAPS > KH:
                taps += (tl.load(w_ptr + where, mask=ch < tl.where(above + i < KH, channels, 0), other=0.0),)  # type: ignore[assignment]
            elif EVEN:
                taps += (tl.load(w_ptr + where),)  # type: ignore[assignment]
            else:
                taps += (tl.load(w_ptr + where, mask=ch < channels, other=0.0),)  # type: ignore[assignment]
        pixels = ()  # all of a column, so that its loads are under way together
        for i in tl.static_range(ROWS + TAPS - 1):
            row = top + (above + i - KH // 2) * DILATION
            there = inside & (row >= 0) & (row < height)
            pixels += (tl.load(column + tl.cast(row, tl.int64) * x_sh, mask=there, other=0.0),)  # type: ignore[assignment]
        for i in tl.static_range(ROWS + TAPS - 1):
            row = top + (above + i - KH // 2) * DILATION
            if (row >= 0) & (row < height):
                x = _wide(pixels[i])
                sums = ()
                for j in tl.static_range(ROWS):
                    if i - j >= 0 and i - j < TAPS:
                        sums += (acc[j] + x * taps[i - j],)  # type: ignore[assignment]
                    else:
                        sums += (acc[j],)  # type: ignore[assignment]
                acc = sums
    out = y_ptr + ((b * y_sb + w.to(tl.int64) * y_sw)[:, None] + ch)
    if EVEN:
        inside = tl.broadcast_to((strip < strips)[:, None], [BLOCK_P, BLOCK_C])
    else:
        inside = (strip < strips)[:, None] & (ch < channels)
    for j in tl.static_range(ROWS):
        row = top + j * DILATION
        if row < height:
            tl.store(out + tl.cast(row, tl.int64) * y_sh, acc[j].to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "height", "width", "share"])
def _depthwise_weight_kernel(
    x_ptr, g_ptr, partial_ptr, rows, height, width, channels, share, x_sb, x_sh, x_sw, g_sb, g_sh, g_sw,
    EVEN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[split]: dw[c, tap], then db[c], summed over a share of all rows: BLOCK_P rows at a time, from the left.

    TAPS kernel rows are summed by a program. A pixel of x meets the KW pixels of the gradient that are held.
    """
    HALF: tl.constexpr = KW // 2
    split = tl.program_id(0)
    ch = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    above = tl.program_id(2) * TAPS
    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    acc = (zero,) * (TAPS * KW)
    total = zero
    last = min((split + 1) * share, rows)
    for start in range(split * share, last, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        b = (row // height).to(tl.int64)
        h = (row % height).to(tl.int64)
        mask_c = (ch >= 0 if EVEN else ch < channels)[None, :]
        r = h + (above - KH // 2) * DILATION
        g_row = g_ptr + ((b * g_sb + h * g_sh)[:, None] + ch[None, :])
        x_row = x_ptr + ((b * x_sb + r * x_sh)[:, None] + ch[None, :])
        for phase in range(DILATION):
            count = (width - phase + DILATION - 1) // DILATION
            held = (zero,) * (KW - 1)
            for i in tl.static_range(HALF):
                c = phase + i * DILATION
                mask = (row < tl.where(c < width, last, 0))[:, None] & mask_c
                g = _wide(tl.load(g_row + tl.cast(c, tl.int64) * g_sw, mask=mask, other=0.0))
                total += g
                held = (g,) + held[: KW - 2]
            # the pixels of a step are loaded a step before, while those of the last are multiplied
            nearer = tl.load(
                g_row + tl.cast(phase + HALF * DILATION, tl.int64) * g_sw,
                mask=(row < tl.where(phase + HALF * DILATION < width, last, 0))[:, None] & mask_c, other=0.0,
            )  # fmt: skip
            pixels = ()
            for i in tl.static_range(TAPS):
                end = tl.where(above + i < KH, height, 0)
                there = (row < last) & (r + i * DILATION >= 0) & (r + i * DILATION < end) & (phase < width)
                place = tl.cast(i * DILATION, tl.int64) * x_sh + tl.cast(phase, tl.int64) * x_sw
                pixels += (tl.load(x_row + place, mask=there[:, None] & mask_c, other=0.0),)  # type: ignore[assignment]
            for q in range(count):
                g = _wide(nearer)
                total += g
                held = (g,) + held
                c = phase + (q + 1) * DILATION
                ahead = c + HALF * DILATION
                mask = (row < tl.where(ahead < width, last, 0))[:, None] & mask_c
                nearer = tl.load(g_row + tl.cast(ahead, tl.int64) * g_sw, mask=mask, other=0.0)
                sums = ()
                following = ()
                for i in tl.static_range(TAPS):
                    x = _wide(pixels[i])
                    end = tl.where((above + i < KH) & (c < width), height, 0)
                    there = (row < last) & (r + i * DILATION >= 0) & (r + i * DILATION < end)
                    place = tl.cast(i * DILATION, tl.int64) * x_sh + tl.cast(c, tl.int64) * x_sw
                    following += (tl.load(x_row + place, mask=there[:, None] & mask_c, other=0.0),)  # type: ignore[assignment]
                    for t in tl.static_range(KW):
                        sums += (acc[i * KW + t] + x * held[t],)  # type: ignore[assignment]
                acc = sums
                pixels = following
                held = held[: KW - 1]
    partial_ptr += split * (channels * (KH * KW + 1))
    for i in tl.static_range(TAPS):
        for t in tl.static_range(KW):
            place = (ch * KH + above + i) * KW + t
            tl.store(partial_ptr + place, tl.sum(acc[i * KW + t], 0), mask=ch < tl.where(above + i < KH, channels, 0))
    if above == 0:
        tl.store(partial_ptr + channels * KH * KW + ch, tl.sum(total, 0), mask=ch < channels)


@triton.jit(do_not_specialize=["pixels"])
def _pointwise_kernel(
    a_ptr, gate_ptr, w_ptr, bias_ptr, out_gate_ptr, add_ptr, y_ptr, pixels,
    a_sb, a_sc, a_sp, gate_sb, gate_sc, gate_sp, out_gate_sb, out_gate_sc, out_gate_sp, add_sb, add_sc, add_sp,
    y_sb, y_sc, y_sp, w_in, w_out,
    C: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, OUT_GATE: tl.constexpr, ADD: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_CO: tl.constexpr, BLOCK_CI: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y = ((a * gate) @ w + bias) * out_gate + add per pixel; each of gate, bias, out_gate and add is optional.

    A program's first pixel is added to the pointers in 64 bits; WIDE: offsets from there need them too.
    """
    tiles = tl.cdiv(pixels, BLOCK_P)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_P
    p = tl.arange(0, BLOCK_P)[:, None]
    co = tl.program_id(1) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    mask_p = p < pixels - first
    if WIDE:
        p = p.to(tl.int64)
        co = co.to(tl.int64)
    acc = tl.zeros([BLOCK_P, BLOCK_CO], tl.float32)
    for start in range(0, C, BLOCK_CI):
        ci = start + tl.arange(0, BLOCK_CI)
        if WIDE:
            ci = ci.to(tl.int64)
        mask = mask_p if C % BLOCK_CI == 0 else mask_p & (ci < C)[None, :]
        a = load(a_ptr + (b * a_sb + first * a_sp), p * a_sp + ci[None, :] * a_sc, mask, UPCAST)
        if GATE:
            offsets = p * gate_sp + ci[None, :] * gate_sc
            gate = load(gate_ptr + (b * gate_sb + first * gate_sp), offsets, mask, UPCAST)
            a = (_wide(a) * _wide(gate)).to(a.dtype)
        mask = (ci < C)[:, None] & (co < C)[None, :]
        weight = load(w_ptr, ci[:, None] * w_in + co[None, :] * w_out, mask, UPCAST)
        acc += tl.dot(a, weight, input_precision=PRECISION)
    co = co[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + co, mask=co < C, other=0.0).to(tl.float32)
    mask = mask_p if C % BLOCK_CO == 0 else mask_p & (co < C)
    if OUT_GATE:
        acc *= _wide(
            load(
                out_gate_ptr + (b * out_gate_sb + first * out_gate_sp), p * out_gate_sp + co * out_gate_sc, mask, UPCAST
            )
        )
    if ADD:
        acc += _wide(load(add_ptr + (b * add_sb + first * add_sp), p * add_sp + co * add_sc, mask, UPCAST))
    tl.store(y_ptr + (b * y_sb + first * y_sp) + (p * y_sp + co * y_sc), acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles", "tiles_of_image", "pixels", "share"])
def _pointwise_weight_kernel(
    a_ptr, g_ptr, gate_ptr, partial_ptr, tiles, tiles_of_image, pixels, share,
    a_sb, a_sc, a_sp, g_sb, g_sc, g_sp, gate_sb, gate_sc, gate_sp,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_CO: tl.constexpr, BLOCK_CI: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """partial[split]: dw[co, ci] = sum of (g * gate)[p, co] * a[p, ci], then db[co] = sum of (g * gate)[p, co]."""
    split = tl.program_id(0)
    co = (tl.program_id(1) * BLOCK_CO + tl.arange(0, BLOCK_CO))[None, :]
    ci = (tl.program_id(2) * BLOCK_CI + tl.arange(0, BLOCK_CI))[None, :]
    p = tl.arange(0, BLOCK_P)[:, None]
    if WIDE:
        p = p.to(tl.int64)
    g_offset = p * g_sp + co * g_sc
    gate_offset = p * gate_sp + co * gate_sc
    a_offset = p * a_sp + ci * a_sc
    acc = tl.zeros([BLOCK_CO, BLOCK_CI], tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_CO], tl.float32)
    for tile in range(split * share, min((split + 1) * share, tiles)):
        b = (tile // tiles_of_image).to(tl.int64)
        first = (tile % tiles_of_image).to(tl.int64) * BLOCK_P
        mask_p = p < pixels - first
        mask = mask_p if C % BLOCK_CO == 0 else mask_p & (co < C)
        g = load(g_ptr + (b * g_sb + first * g_sp), g_offset, mask, UPCAST)
        gate = load(gate_ptr + (b * gate_sb + first * gate_sp), gate_offset, mask, UPCAST)
        t = (_wide(g) * _wide(gate)).to(g.dtype)
        total += _wide(t)
        mask = mask_p if C % BLOCK_CI == 0 else mask_p & (ci < C)
        a = load(a_ptr + (b * a_sb + first * a_sp), a_offset, mask, UPCAST)
        acc += tl.dot(tl.trans(t), a, input_precision=PRECISION)
    co = tl.program_id(1) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    partial_ptr += split * (C * (C + 1))
    tl.store(partial_ptr + co[:, None] * C + ci, acc, mask=(co < C)[:, None] & (ci < C))
    if tl.program_id(2) == 0:
        tl.store(partial_ptr + C * C + co, tl.sum(total, 0), mask=co < C)


def _launch(direction: str, x: Tensor, weight: Tensor, first: Config, run: Callable[[Config], None]) -> None:
    """columns: channels of a block. tile: its pixels; in the convolutions 8 times, in their weights' gradients 16
    times the strips or rows side by side."""
    heuristic = [first, Config(64, 32, 4, 2), Config(32, 32, 4, 1), Config(16, 16, 4, 1)]
    if INTERPRET:  # a block of any size takes about the same time
        heuristic = [replace(c, tile=4 * c.tile) for c in heuristic]
    box = (weight.shape[2], weight.shape[3])
    problem = tuning.key("large_kernel", direction, x, x.shape[1], box, x.shape[2] * x.shape[3])
    tuning.launch(problem, heuristic, x.device, run)


def _chunks(count: int, most: int) -> int:
    """The size of equal chunks of `count` things."""
    return triton.cdiv(count, triton.cdiv(count, most))


def _lines(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_sb": x.stride(0), f"{name}_sh": x.stride(2), f"{name}_sw": x.stride(3)}


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, y: Tensor, flip: bool = False) -> Tensor:
    """x and y have channels of unit stride."""
    batch, channels, height, width = x.shape
    kh, kw = weight.shape[2:]
    table = torch.empty((kh * kw, channels), dtype=torch.float32, device=x.device)
    table.copy_(weight.reshape(channels, kh * kw).t())
    taps = _chunks(kh, _MOST_ROWS)
    lines = triton.cdiv(height, dilation)
    # a load costs about as much as the products of two taps
    outputs = _OUTPUTS if lines <= _LONG else _OUTPUTS[-1:]
    rows = min(outputs, key=lambda n: triton.cdiv(lines, n) * (2 * (n + taps - 1) + n * taps))
    groups = triton.cdiv(lines, rows) * dilation

    def run(config: Config) -> None:
        block_p, block_c = max(1, config.tile // 8), block(channels, config.columns)
        launcher(_depthwise_kernel, (triton.cdiv(batch * width, block_p), groups, triton.cdiv(channels, block_c)))(
            x, table, x if bias is None else bias, y, batch * width, height, width, channels,
            **_lines("x", x), **_lines("y", y), EVEN=channels % block_c == 0, KH=kh, KW=kw, DILATION=dilation,
            BIAS=bias is not None, FLIP=flip, ROWS=rows, TAPS=taps, BLOCK_P=block_p, BLOCK_C=block_c,
            num_warps=config.warps, num_stages=1,
        )  # fmt: skip

    _launch("depthwise", x, weight, Config(64, 64, 2, 1), run)
    return y


def _depthwise_weight(x: Tensor, grad: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """x and grad have channels of unit stride."""
    batch, channels, height, width = x.shape
    kh, kw = weight.shape[2:]
    taps = _chunks(kh, max(1, _MOST_TAPS // kw))
    groups = triton.cdiv(kh, taps)
    # taps * kw sums for each of its channels in a thread: 2, 4 or 8 channels
    side = 2 if taps * kw > 32 else 4 if taps * kw > 16 else 8

    def run(config: Config) -> None:
        block_p, block_c = max(1, config.tile // 16), block(channels, config.columns)
        blocks = triton.cdiv(channels, block_c)
        splits, share = _shares(batch * height, block_p, blocks * groups)
        partial = torch.empty((splits, channels * (kh * kw + 1)), dtype=torch.float32, device=x.device)
        launcher(_depthwise_weight_kernel, (splits, blocks, groups))(
            x, grad, partial, batch * height, height, width, channels, share, **_lines("x", x), **_lines("g", grad),
            EVEN=channels % block_c == 0, KH=kh, KW=kw, DILATION=dilation, TAPS=taps, BLOCK_P=block_p, BLOCK_C=block_c,
            num_warps=config.warps, num_stages=1,
        )  # fmt: skip
        found.append(summed(partial, weight.dtype))

    found: list[Tensor] = []
    _launch("depthwise_weight", x, weight, Config(16 * side, 64, 2, 1), run)
    return _parted(found[-1], weight)


def _parted(gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a weight and of its bias, which follow one another, as tensors of their own."""
    return gradient[: weight.numel()].view(weight.shape), gradient[weight.numel() :].clone()


def _shares(count: int, step: int, programs: int) -> tuple[int, int]:
    """How many programs share `count` things, and the share of each, a multiple of step."""
    splits = max(1, min(triton.cdiv(count, step), _MOST_PROGRAMS // programs))
    share = triton.cdiv(triton.cdiv(count, splits), step) * step
    return triton.cdiv(count, share), share


def _pixel_stride(x: Tensor) -> int | None:
    """The stride from a pixel to the next one in row-major order; None where there is no such stride."""
    _, _, height, width = x.shape
    if width == 1:
        return x.stride(2)
    return x.stride(3) if height == 1 or x.stride(2) == width * x.stride(3) else None


def _pixels(tensors: dict[str, Tensor]) -> tuple[int, int, dict[str, int], bool]:
    """Images and their pixels, or one image with the pixels of all; the strides; whether an image needs 64 bits."""
    batch, channels, height, width = next(iter(tensors.values())).shape
    area, joined, wide = height * width, True, False
    strides: dict[str, int] = {}
    for name, x in tensors.items():
        step = _pixel_stride(x)
        assert step is not None
        strides |= {f"{name}_sb": x.stride(0), f"{name}_sc": x.stride(1), f"{name}_sp": step}
        joined = joined and (batch == 1 or x.stride(0) == area * step)
        wide = wide or channels * abs(x.stride(1)) + 1024 * abs(step) >= 2**31
    return (1, batch * area, strides, wide) if joined else (batch, area, strides, wide)


def _pointwise(
    a: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    out_gate: Tensor | None = None,
    add: Tensor | None = None,
    transpose: bool = False,
) -> Tensor:
    """weight is [out, in]; transposed, the product goes from out to in. `add` may be y itself."""
    channels = a.shape[1]
    matrix = weight.reshape(channels, channels)
    w_in, w_out = (matrix.stride(0), matrix.stride(1)) if transpose else (matrix.stride(1), matrix.stride(0))
    maps = {"a": a, "gate": gate, "out_gate": out_gate, "add": add, "y": y}
    batch, pixels, strides, wide = _pixels({name: a if x is None else x for name, x in maps.items()})

    def run(config: Config) -> None:
        block_p, block_c = max(16, config.tile), block(channels, config.columns)
        launcher(_pointwise_kernel, (triton.cdiv(pixels, block_p) * batch, triton.cdiv(channels, block_c)))(
            a, a if gate is None else gate, matrix, a if bias is None else bias, a if out_gate is None else out_gate,
            a if add is None else add, y, pixels, **strides, w_in=w_in, w_out=w_out,
            C=channels, GATE=gate is not None, BIAS=bias is not None, OUT_GATE=out_gate is not None,
            ADD=add is not None, BLOCK_P=block_p, BLOCK_CO=block_c, BLOCK_CI=block(channels, 128 // a.element_size()),
            WIDE=wide, UPCAST=upcast(a.dtype), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    _launch("pointwise", a, weight, Config(64, 64, 4, 3), run)
    return y


def _pointwise_weight(a: Tensor, grad: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    channels = a.shape[1]
    batch, pixels, strides, wide = _pixels({"a": a, "g": grad, "gate": gate})

    def run(config: Config) -> None:
        block_p, block_c = max(16, config.tile), block(channels, config.columns)
        blocks, tiles = triton.cdiv(channels, block_c), triton.cdiv(pixels, block_p)
        splits, share = _shares(batch * tiles, 1, blocks**2)
        partial = torch.empty((splits, channels * (channels + 1)), dtype=torch.float32, device=a.device)
        launcher(_pointwise_weight_kernel, (splits, blocks, blocks))(
            a, grad, gate, partial, batch * tiles, tiles, pixels, share, **strides,
            C=channels, BLOCK_P=block_p, BLOCK_CO=block_c, BLOCK_CI=block_c,
            WIDE=wide, UPCAST=upcast(a.dtype), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        found.append(summed(partial, weight.dtype))

    found: list[Tensor] = []
    _launch("pointwise_weight", a, weight, Config(64, 64, 4, 2), run)
    return _parted(found[-1], weight)


def _regular(x: Tensor) -> Tensor:
    """A map whose pixels follow one another at one stride: x itself if it is NCHW or channels last."""
    return x if _pixel_stride(x) is not None else x.contiguous(memory_format=torch.channels_last)


def _has_unit_channels(x: Tensor) -> bool:
    return x.stride(1) == 1 or x.shape[1] == 1


def _channels_last(x: Tensor) -> Tensor:
    """The memory of a dense map, whatever its format, as a channels-last map."""
    _, channels, height, width = x.shape
    return x.as_strided(x.shape, (channels * height * width, 1, width * channels, channels))


def large_kernel_attention_triton(
    x: Tensor,
    conv0_weight: Tensor,
    conv0_bias: Tensor | None,
    conv_spatial_weight: Tensor,
    conv_spatial_bias: Tensor | None,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    dilation: int,
    *,
    out: Tensor,
    spatial: Tensor,
) -> None:
    """Write the output, and conv_spatial(conv0(x)), which the backward reuses, into the two dense tensors given."""
    if x.numel() == 0:
        return
    x = _regular(x)
    # until they are written, they hold what comes before them
    last = x if _has_unit_channels(x) else spatial.copy_(x)
    local = _depthwise(last, conv0_weight, conv0_bias, 1, _channels_last(out))
    _depthwise(local, conv_spatial_weight, conv_spatial_bias, dilation, spatial)
    _pointwise(spatial, conv1_weight, out, bias=conv1_bias, out_gate=x)


def large_kernel_attention_backward_triton(
    grad: Tensor,
    x: Tensor,
    conv0_weight: Tensor,
    conv0_bias: Tensor | None,
    conv_spatial_weight: Tensor,
    conv_spatial_bias: Tensor | None,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    spatial: Tensor,
    dilation: int,
    *,
    dx: Tensor,
) -> tuple[Tensor, ...]:
    """Write the gradient of x into the dense dx; the gradients of the weights and biases, in their order."""
    if x.numel() == 0:
        weights = (conv0_weight, conv_spatial_weight, conv1_weight)
        return tuple(t for w in weights for t in (torch.zeros_like(w), w.new_zeros(w.shape[0])))
    x, grad, spatial = _regular(x), _regular(grad), _regular(spatial)
    one, two = _channels_last(dx), torch.empty_like(_channels_last(dx))
    last = x if _has_unit_channels(x) else torch.empty_like(one).copy_(x)
    local = _depthwise(last, conv0_weight, conv0_bias, 1, two)
    dconv1 = _pointwise_weight(spatial, grad, x, conv1_weight)
    dspatial = _pointwise(grad, conv1_weight, one, gate=x, transpose=True)
    dconv_spatial = _depthwise_weight(local, dspatial, conv_spatial_weight, dilation)
    dlocal = _depthwise(dspatial, conv_spatial_weight, None, dilation, two, flip=True)
    dconv0 = _depthwise_weight(last, dlocal, conv0_weight, 1)
    # x both enters the convolutions and gates their product
    free = one if _has_unit_channels(dx) else last if last is not x else torch.empty_like(one)
    through = _depthwise(dlocal, conv0_weight, None, 1, free, flip=True)
    _pointwise(spatial, conv1_weight, dx, bias=conv1_bias, out_gate=grad, add=through)
    return (*dconv0, *dconv_spatial, *dconv1)
