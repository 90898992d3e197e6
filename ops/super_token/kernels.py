"""Triton kernels of super-token attention. A cell is th x tw pixels; its pixels see the 3 x 3 tokens around it.

Three kernels serve both passes: affinity (pixels against 9 tokens), aggregate (9 cells into a token) and spread
(9 tokens onto a pixel). Tokens gather from their cells, so no sum needs an atomic and no map-sized scratch exists.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops._local import tuning
from zoo.ops._local.tuning import Config

from .reference import EPS

__all__ = ["mapping_backward_triton", "mapping_triton", "sampling_backward_triton", "sampling_triton"]

_INTERPRET = triton.knobs.runtime.interpret


@triton.jit
def _load(ptr, offsets, mask, UPCAST: tl.constexpr):
    x = tl.load(ptr + offsets, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _neighbour(cell_r, cell_c, s, rows, cols):
    """Neighbour s of a cell, row by row, and whether it is on the map."""
    r = cell_r + s // 3 - 1
    c = cell_c + s % 3 - 1
    return r, c, (s < 9) & (r >= 0) & (r < rows) & (c >= 0) & (c < cols)


@triton.jit
def _affinity_kernel(
    x_ptr, tokens_ptr, out_ptr, height, width, rows, cols, scale,
    x_sb, x_sh, x_sw, t_sb, t_sh, t_sw,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    SOFTMAX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[pixel, 9]: pixel . token * scale, through a softmax over the 9 or as it is."""
    cell = tl.program_id(0)
    b = tl.cast(tl.program_id(1), tl.int64)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    s = tl.arange(0, 16)
    cell_r = cell // cols
    cell_c = cell % cols
    r = (cell_r * TH + p // TW).to(tl.int64)
    c = (cell_c * TW + p % TW).to(tl.int64)
    valid = (p < TH * TW) & (r < height) & (c < width)
    nr, nc, there = _neighbour(cell_r, cell_c, s, rows, cols)
    acc = tl.zeros([BLOCK_P, 16], tl.float32)
    for start in range(0, C, BLOCK_C):
        ch = start + tl.arange(0, BLOCK_C)
        x = _load(
            x_ptr, b * x_sb + (r * x_sh + c * x_sw)[:, None] + ch[None, :], valid[:, None] & (ch[None, :] < C), UPCAST
        )
        t_offset = b * t_sb + (nr * t_sh + nc * t_sw)[:, None] + ch[None, :]
        t = _load(tokens_ptr, t_offset, there[:, None] & (ch[None, :] < C), UPCAST)
        acc += tl.dot(x, tl.trans(t).to(x.dtype), input_precision="ieee")
    acc *= scale
    if SOFTMAX:
        acc = tl.where((s < 9)[None, :], acc, float("-inf"))
        acc = tl.exp(acc - tl.max(acc, 1)[:, None])
        acc = acc / tl.sum(acc, 1)[:, None]
    out = ((b * height + r) * width + c) * 9
    tl.store(
        out_ptr + out[:, None] + s[None, :], acc.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (s[None, :] < 9)
    )


@triton.jit
def _aggregate_kernel(
    x_ptr, affinity_ptr, out_ptr, mass_ptr, height, width, rows, cols, eps,
    x_sb, x_sh, x_sw,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    MEAN: tl.constexpr, NORMALIZE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[token]: its pixels' sum under their affinity, as it is or over the mass; or the mean of its own cell."""
    cell = tl.program_id(0)
    b = tl.cast(tl.program_id(1), tl.int64)
    ch = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    cell_r = cell // cols
    cell_c = cell % cols
    acc = tl.zeros([BLOCK_C], tl.float32)
    mass = tl.zeros([BLOCK_P], tl.float32)
    for s in range(4 if MEAN else 0, 5 if MEAN else 9):
        nr, nc, there = _neighbour(cell_r, cell_c, s, rows, cols)
        for start in range(0, TH * TW, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            r = tl.cast(nr * TH + p // TW, tl.int64)
            c = tl.cast(nc * TW + p % TW, tl.int64)
            in_cell = (p < TH * TW) & there
            valid = in_cell & (r < height) & (c < width)
            x = tl.load(
                x_ptr + b * x_sb + (r * x_sh + c * x_sw)[:, None] + ch[None, :],
                mask=valid[:, None] & (ch[None, :] < C),
                other=0.0,
            ).to(tl.float32)
            if MEAN:
                acc += tl.sum(x, 0) / (TH * TW)
            else:
                # the token stands opposite to where its pixels' cell stands; a padded pixel is uniform over its 9
                a = tl.load(affinity_ptr + ((b * height + r) * width + c) * 9 + (8 - s), mask=valid, other=0.0).to(
                    tl.float32
                )
                acc += tl.sum(x * a[:, None], 0)
                mass += tl.where(valid, a, tl.where(in_cell, 1.0 / 9.0, 0.0))
    place = (b * rows + cell_r) * cols + cell_c
    if NORMALIZE:
        total = tl.sum(mass, 0) + eps
        acc = acc / total
        if tl.program_id(2) == 0:
            tl.store(mass_ptr + place, total)
    tl.store(out_ptr + place * C + ch, acc.to(out_ptr.dtype.element_ty), mask=ch < C)


@triton.jit
def _spread_kernel(
    tokens_ptr, affinity_ptr, mass_ptr, out_ptr, height, width, rows, cols,
    t_sb, t_sh, t_sw,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    DIVIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[pixel]: the 9 tokens around its cell under its affinity; tokens over their mass where DIVIDE."""
    cell = tl.program_id(0)
    b = tl.cast(tl.program_id(1), tl.int64)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    s = tl.arange(0, 16)
    cell_r = cell // cols
    cell_c = cell % cols
    r = (cell_r * TH + p // TW).to(tl.int64)
    c = (cell_c * TW + p % TW).to(tl.int64)
    valid = (p < TH * TW) & (r < height) & (c < width)
    nr, nc, there = _neighbour(cell_r, cell_c, s, rows, cols)
    position = (b * height + r) * width + c
    a = tl.load(affinity_ptr + (position * 9)[:, None] + s[None, :], mask=valid[:, None] & (s[None, :] < 9), other=0.0)
    if UPCAST:
        a = a.to(tl.float32)
    if DIVIDE:
        mass = tl.load(mass_ptr + (b * rows + nr) * cols + nc, mask=there, other=1.0)
    for start in range(0, C, BLOCK_C):
        ch = start + tl.arange(0, BLOCK_C)
        t_offset = b * t_sb + (nr * t_sh + nc * t_sw)[:, None] + ch[None, :]
        t = tl.load(tokens_ptr + t_offset, mask=there[:, None] & (ch[None, :] < C), other=0.0)
        if DIVIDE:
            t = (t.to(tl.float32) / mass[:, None]).to(t.dtype)
        y = tl.dot(a, t.to(a.dtype), input_precision="ieee")
        tl.store(
            out_ptr + (position * C)[:, None] + ch[None, :],
            y.to(out_ptr.dtype.element_ty),
            mask=valid[:, None] & (ch[None, :] < C),
        )


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_sb": x.stride(0), f"{name}_sh": x.stride(1), f"{name}_sw": x.stride(2)}


def _block(count: int, most: int) -> int:
    return min(max(16, most), max(16, triton.next_power_of_2(count)))


def _launch(direction: str, x: Tensor, th: int, tw: int, run: Callable[[Config], None]) -> None:
    """tile: pixels of a block, columns: channels of a block."""
    heuristic = [Config(64, 64, 4, 3), Config(64, 32, 4, 2), Config(32, 32, 4, 1), Config(16, 16, 4, 1)]
    problem = tuning.key("super_token", direction, x, x.shape[3], (th, tw), x.shape[1] * x.shape[2])
    tuning.launch(problem, heuristic, x.device, run)


def _cells(height: int, width: int, th: int, tw: int) -> tuple[int, int]:
    return triton.cdiv(height, th), triton.cdiv(width, tw)


def _common(
    size: tuple[int, int], th: int, tw: int, channels: int, dtype: torch.dtype, config: Config
) -> dict[str, Any]:
    rows, cols = _cells(*size, th, tw)
    block_p, block_c = _block(th * tw, config.tile), _block(channels, config.columns)
    return {
        "height": size[0], "width": size[1], "rows": rows, "cols": cols,
        "C": channels, "TH": th, "TW": tw, "BLOCK_P": block_p, "BLOCK_C": block_c,
        "UPCAST": _INTERPRET and dtype == torch.bfloat16, "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def _affinity(x: Tensor, tokens: Tensor, out: Tensor, th: int, tw: int, scale: float, softmax: bool) -> None:
    def run(config: Config) -> None:
        common = _common((x.shape[1], x.shape[2]), th, tw, x.shape[3], x.dtype, config)
        grid = (common["rows"] * common["cols"], x.shape[0], triton.cdiv(th * tw, common["BLOCK_P"]))
        _affinity_kernel[grid](
            x, tokens, out, scale=scale, **_strides("x", x), **_strides("t", tokens), **common, SOFTMAX=softmax
        )

    _launch("affinity", x, th, tw, run)


def _aggregate(x: Tensor, affinity: Tensor | None, out: Tensor, mass: Tensor | None, th: int, tw: int) -> None:
    def run(config: Config) -> None:
        common = _common((x.shape[1], x.shape[2]), th, tw, x.shape[3], x.dtype, config)
        grid = (common["rows"] * common["cols"], x.shape[0], triton.cdiv(x.shape[3], common["BLOCK_C"]))
        _aggregate_kernel[grid](
            x, x if affinity is None else affinity, out, x if mass is None else mass, eps=EPS,
            **_strides("x", x), **common, MEAN=affinity is None, NORMALIZE=mass is not None,
        )  # fmt: skip

    _launch("aggregate", x, th, tw, run)


def _spread(tokens: Tensor, affinity: Tensor, mass: Tensor | None, out: Tensor, th: int, tw: int) -> None:
    def run(config: Config) -> None:
        common = _common((out.shape[1], out.shape[2]), th, tw, out.shape[3], affinity.dtype, config)
        grid = (common["rows"] * common["cols"], out.shape[0], triton.cdiv(th * tw, common["BLOCK_P"]))
        _spread_kernel[grid](
            tokens, affinity, tokens if mass is None else mass, out,
            **_strides("t", tokens), **common, DIVIDE=mass is not None,
        )  # fmt: skip

    _launch("spread", out, th, tw, run)


def sampling_triton(x: Tensor, th: int, tw: int, n_iter: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, hh, ww, C], affinity [B, H, W, 9] and the mass [B, hh, ww, 1] that every token gathered."""
    x = _unit(x)
    batch, height, width, channels = x.shape
    rows, cols = _cells(height, width, th, tw)
    tokens = x.new_empty(batch, rows, cols, channels)
    affinity = x.new_empty(batch, height, width, 9)
    mass = x.new_empty(batch, rows, cols, 1, dtype=torch.float32)
    if x.numel() == 0:
        return tokens, affinity, mass
    current = torch.empty_like(tokens, dtype=torch.float32)
    weights = torch.empty_like(affinity, dtype=torch.float32) if n_iter > 1 else affinity
    _aggregate(x, None, current, None, th, tw)
    for i in range(n_iter):
        last = i == n_iter - 1
        _affinity(x, current, affinity if last else weights, th, tw, scale, softmax=True)
        _aggregate(x, affinity if last else weights, tokens if last else current, mass, th, tw)
    return tokens, affinity, mass


def sampling_backward_triton(grad: Tensor, affinity: Tensor, mass: Tensor, th: int, tw: int) -> Tensor:
    """dx [B, H, W, C] from the tokens' gradient; the affinity counts as constant."""
    grad = _unit(grad)
    out = grad.new_empty(*affinity.shape[:3], grad.shape[-1])
    if out.numel():
        _spread(grad, affinity.contiguous(), mass, out, th, tw)
    return out


def mapping_triton(tokens: Tensor, affinity: Tensor, th: int, tw: int) -> Tensor:
    """Pixels [B, H, W, C]: every one the mean of 9 tokens under its affinity."""
    tokens = _unit(tokens)
    out = tokens.new_empty(*affinity.shape[:3], tokens.shape[-1])
    if out.numel():
        _spread(tokens, affinity.contiguous(), None, out, th, tw)
    return out


def mapping_backward_triton(
    grad: Tensor, tokens: Tensor, affinity: Tensor, th: int, tw: int, need_affinity: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens and, if needed (else an empty tensor), of the affinity."""
    grad, tokens, affinity = _unit(grad), _unit(tokens), affinity.contiguous()
    dtokens = tokens.new_empty(tokens.shape)
    daffinity = affinity.new_empty(affinity.shape if need_affinity else (0,))
    if grad.numel() == 0:
        return dtokens.zero_(), daffinity
    _aggregate(grad, affinity, dtokens, None, th, tw)
    if need_affinity:
        _affinity(grad, tokens, daffinity, th, tw, 1.0, softmax=False)
    return dtokens, daffinity
