"""Triton kernels of super-token attention. A cell is th x tw pixels; its pixels see the 3 x 3 tokens around it.

Three kernels serve both passes: affinity (pixels against 9 tokens), aggregate (9 cells into a token) and spread
(9 tokens onto a pixel); a fourth starts the tokens as means. Tokens gather from their cells, so no sum needs an atomic
and no map-sized scratch exists. Offsets inside an image have 32 bits unless WIDE says that it is too large for them.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops import _tuning as tuning
from zoo.ops._triton import PRECISION, block, fits_int32, launcher, load, unit, upcast
from zoo.ops._tuning import Config

from .reference import EPS

__all__ = ["mapping_backward_triton", "mapping_triton", "sampling_backward_triton", "sampling_triton"]

_MAP = ["height", "width", "rows", "cols"]  # what varies with the map must not compile anew
_TILE = 4  # tokens along a side of what one program of the aggregate kernel gathers: 16, the rows of a product


@triton.jit
def _neighbour(cell_r, cell_c, s, rows, cols):
    """Neighbour s of a cell, row by row, and whether it is on the map."""
    r = cell_r + s // 3 - 1
    c = cell_c + s % 3 - 1
    return r, c, (s < 9) & (r >= 0) & (r < rows) & (c >= 0) & (c < cols)


@triton.jit
def _pixels(cell_r, cell_c, p, height, width, TH: tl.constexpr, TW: tl.constexpr):
    """Row and column of pixels p of a cell, whether they are of the cell, and whether they are on the map."""
    r = cell_r * TH + p // TW
    c = cell_c * TW + p % TW
    in_cell = p < TH * TW
    return r, c, in_cell, in_cell & (r < height) & (c < width)


@triton.jit(do_not_specialize=_MAP)
def _affinity_kernel(
    x_ptr, tokens_ptr, out_ptr, height, width, rows, cols, scale,
    x_sb, x_sh, x_sw, t_sb, t_sh, t_sw,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    SOFTMAX: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[pixel, 9]: pixel . token * scale, through a softmax over the 9 or as it is."""
    cell = tl.program_id(0) % (rows * cols)
    b = (tl.program_id(0) // (rows * cols)).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    s = tl.arange(0, 16)
    r, c, _, valid = _pixels(cell // cols, cell % cols, p, height, width, TH, TW)
    nr, nc, there = _neighbour(cell // cols, cell % cols, s, rows, cols)
    if WIDE:
        r, c, nr, nc = r.to(tl.int64), c.to(tl.int64), nr.to(tl.int64), nc.to(tl.int64)
    x_offset = (r * x_sh + c * x_sw)[:, None]
    t_offset = (nr * t_sh + nc * t_sw)[:, None]
    acc = tl.zeros([BLOCK_P, 16], tl.float32)
    for start in range(0, C, BLOCK_C):
        ch = (start + tl.arange(0, BLOCK_C))[None, :]
        even: tl.constexpr = C % BLOCK_C == 0
        mask_x = valid[:, None] if even else valid[:, None] & (ch < C)
        mask_t = there[:, None] if even else there[:, None] & (ch < C)
        x = load(x_ptr + b * x_sb, x_offset + ch, mask_x, UPCAST)
        t = load(tokens_ptr + b * t_sb, t_offset + ch, mask_t, UPCAST)
        acc += tl.dot(x, tl.trans(t).to(x.dtype), input_precision=PRECISION)
    acc *= scale
    if SOFTMAX:
        acc = tl.where((s < 9)[None, :], acc, float("-inf"))
        acc = tl.exp(acc - tl.max(acc, 1)[:, None])
        acc = acc * (1 / tl.sum(acc, 1))[:, None]
    out = (r * width + c)[:, None] * 9 + s[None, :]
    mask = valid[:, None] & (s[None, :] < 9)
    tl.store(out_ptr + b * height * width * 9 + out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_MAP)
def _mean_kernel(
    x_ptr, out_ptr, height, width, rows, cols, x_sb, x_sh, x_sw,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[token]: the mean of its cell, whose pixels outside the map are zeros."""
    cell = tl.program_id(0) % (rows * cols)
    b = (tl.program_id(0) // (rows * cols)).to(tl.int64)
    ch = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, TH * TW, BLOCK_P):
        r, c, _, valid = _pixels(cell // cols, cell % cols, start + tl.arange(0, BLOCK_P), height, width, TH, TW)
        if WIDE:
            r, c = r.to(tl.int64), c.to(tl.int64)
        mask = valid[:, None] if C % BLOCK_C == 0 else valid[:, None] & (ch < C)[None, :]
        acc += load(x_ptr + b * x_sb, (r * x_sh + c * x_sw)[:, None] + ch[None, :], mask, UPCAST).to(tl.float32)
    mean = tl.sum(acc, 0) * (1 / (TH * TW))
    place = b * rows * cols + cell
    tl.store(out_ptr + place * C + ch, mean.to(out_ptr.dtype.element_ty), mask=ch < C)


@triton.jit(do_not_specialize=_MAP)
def _aggregate_kernel(
    x_ptr, affinity_ptr, out_ptr, mass_ptr, height, width, rows, cols, eps, x_sb, x_sh, x_sw,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, TILE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[token]: its 9 cells' sum under their affinity, as it is or over the mass.

    A program gathers TILE x TILE tokens, and reads each of the cells on and around them once.
    """
    CHUNKS: tl.constexpr = (TH * TW + BLOCK_P - 1) // BLOCK_P
    tiles = (cols + TILE - 1) // TILE
    count = (rows + TILE - 1) // TILE * tiles
    tile = tl.program_id(0) % count
    b = (tl.program_id(0) // count).to(tl.int64)
    ch = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    top = tile // tiles * TILE
    left = tile % tiles * TILE
    t = tl.arange(0, TILE * TILE)
    token_r = top + t // TILE
    token_c = left + t % TILE
    on_map = (token_r < rows) & (token_c < cols)
    first_r = tl.maximum(top - 1, 0)
    first_c = tl.maximum(left - 1, 0)
    across = tl.minimum(left + TILE + 1, cols) - first_c
    cells = (tl.minimum(top + TILE + 1, rows) - first_r) * across
    x_base = x_ptr + b * x_sb
    a_base = affinity_ptr + b * height * width * 9
    acc = tl.zeros([TILE * TILE, BLOCK_C], tl.float32)
    mass = tl.zeros([TILE * TILE, BLOCK_P], tl.float32)
    for step in range(cells * CHUNKS):
        cell_r = first_r + step // CHUNKS // across
        cell_c = first_c + step // CHUNKS % across
        p = step % CHUNKS * BLOCK_P + tl.arange(0, BLOCK_P)
        r, c, in_cell, valid = _pixels(cell_r, cell_c, p, height, width, TH, TW)
        if WIDE:
            r, c = r.to(tl.int64), c.to(tl.int64)
        # where the token stands in the 3 x 3 around the cell
        down = token_r - cell_r + 1
        right = token_c - cell_c + 1
        near = on_map & (down >= 0) & (down < 3) & (right >= 0) & (right < 3)
        place = (r * width + c)[None, :] * 9 + (down * 3 + right)[:, None]
        a = load(a_base, place, near[:, None] & valid[None, :], UPCAST)
        mask = valid[:, None] if C % BLOCK_C == 0 else valid[:, None] & (ch < C)
        x = load(x_base, (r * x_sh + c * x_sw)[:, None] + ch, mask, UPCAST)
        acc += tl.dot(a, x.to(a.dtype), input_precision=PRECISION)
        if NORMALIZE:
            # a padded pixel is uniform over its 9
            mass += tl.where(near[:, None] & (in_cell & (valid == 0))[None, :], 1.0 / 9.0, a.to(tl.float32))
    place = b * rows * cols + token_r * cols + token_c
    if NORMALIZE:
        total = tl.sum(mass, 1) + eps
        acc = acc * (1 / total)[:, None]
        if tl.program_id(1) == 0:
            tl.store(mass_ptr + place, total, mask=on_map)
    tl.store(out_ptr + place[:, None] * C + ch, acc.to(out_ptr.dtype.element_ty), mask=on_map[:, None] & (ch < C))


@triton.jit(do_not_specialize=_MAP)
def _spread_kernel(
    tokens_ptr, affinity_ptr, mass_ptr, out_ptr, height, width, rows, cols, t_sb, t_sh, t_sw,
    C: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    DIVIDE: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[pixel]: the 9 tokens around its cell under its affinity; tokens over their mass where DIVIDE."""
    cell = tl.program_id(0) % (rows * cols)
    b = (tl.program_id(0) // (rows * cols)).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    s = tl.arange(0, 16)
    r, c, _, valid = _pixels(cell // cols, cell % cols, p, height, width, TH, TW)
    nr, nc, there = _neighbour(cell // cols, cell % cols, s, rows, cols)
    if DIVIDE:
        share = 1 / tl.load(mass_ptr + b * rows * cols + nr * cols + nc, mask=there, other=1.0)[:, None]
    if WIDE:
        r, c, nr, nc = r.to(tl.int64), c.to(tl.int64), nr.to(tl.int64), nc.to(tl.int64)
    position = (r * width + c)[:, None]
    image = b * height * width
    a = load(affinity_ptr + image * 9, position * 9 + s[None, :], valid[:, None] & (s[None, :] < 9), UPCAST)
    t_offset = (nr * t_sh + nc * t_sw)[:, None]
    for start in range(0, C, BLOCK_C):
        ch = (start + tl.arange(0, BLOCK_C))[None, :]
        even: tl.constexpr = C % BLOCK_C == 0
        t = load(tokens_ptr + b * t_sb, t_offset + ch, there[:, None] if even else there[:, None] & (ch < C), UPCAST)
        if DIVIDE:
            t = (t.to(tl.float32) * share).to(t.dtype)
        y = tl.dot(a, t.to(a.dtype), input_precision=PRECISION).to(out_ptr.dtype.element_ty)
        mask = valid[:, None] if even else valid[:, None] & (ch < C)
        tl.store(out_ptr + image * C + (position * C + ch), y, mask=mask)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_sb": x.stride(0), f"{name}_sh": x.stride(1), f"{name}_sw": x.stride(2)}


def _launch(direction: str, x: Tensor, th: int, tw: int, run: Callable[[Config], None]) -> None:
    """tile: pixels of a block, columns: channels of a block."""
    heuristic = [Config(64, 128, 4, 3), Config(64, 32, 4, 2), Config(32, 32, 4, 1), Config(16, 16, 4, 1)]
    problem = tuning.key("super_token", direction, x, x.shape[3], (th, tw), x.shape[1] * x.shape[2])
    tuning.launch(problem, heuristic, x.device, run)


def _cells(height: int, width: int, th: int, tw: int) -> tuple[int, int]:
    return triton.cdiv(height, th), triton.cdiv(width, tw)


def _common(x: Tensor, th: int, tw: int, config: Config, *others: Tensor) -> dict[str, Any]:
    """Arguments about a map [B, H, W, C], which has the pixels."""
    _, height, width, channels = x.shape
    rows, cols = _cells(height, width, th, tw)
    return {
        "height": height, "width": width, "rows": rows, "cols": cols, "C": channels, "TH": th, "TW": tw,
        "BLOCK_P": block(th * tw, config.tile), "BLOCK_C": block(channels, config.columns),
        "WIDE": not fits_int32(x, *others) or (height + th) * (width + tw) * max(channels, 9) >= 2**31,
        "UPCAST": upcast(x.dtype), "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def _affinity(x: Tensor, tokens: Tensor, out: Tensor, th: int, tw: int, scale: float, softmax: bool) -> None:
    def run(config: Config) -> None:
        common = _common(x, th, tw, config, tokens)
        grid = (common["rows"] * common["cols"] * x.shape[0], triton.cdiv(th * tw, common["BLOCK_P"]))
        launcher(_affinity_kernel, grid)(
            x, tokens, out, scale=scale, **_strides("x", x), **_strides("t", tokens), **common, SOFTMAX=softmax
        )

    _launch("affinity", x, th, tw, run)


def _mean(x: Tensor, out: Tensor, th: int, tw: int) -> None:
    def run(config: Config) -> None:
        common = _common(x, th, tw, config)
        grid = (common["rows"] * common["cols"] * x.shape[0], triton.cdiv(x.shape[3], common["BLOCK_C"]))
        launcher(_mean_kernel, grid)(x, out, **_strides("x", x), **common)

    _launch("mean", x, th, tw, run)


def _aggregate(x: Tensor, affinity: Tensor, out: Tensor, mass: Tensor | None, th: int, tw: int) -> None:
    def run(config: Config) -> None:
        common = _common(x, th, tw, config)
        tiles = triton.cdiv(common["rows"], _TILE) * triton.cdiv(common["cols"], _TILE)
        launcher(_aggregate_kernel, (tiles * x.shape[0], triton.cdiv(x.shape[3], common["BLOCK_C"])))(
            x, affinity, out, x if mass is None else mass, eps=EPS, **_strides("x", x), **common,
            TILE=_TILE, NORMALIZE=mass is not None,
        )  # fmt: skip

    _launch("aggregate", x, th, tw, run)


def _spread(tokens: Tensor, affinity: Tensor, mass: Tensor | None, out: Tensor, th: int, tw: int) -> None:
    def run(config: Config) -> None:
        common = _common(out, th, tw, config, tokens)
        grid = (common["rows"] * common["cols"] * out.shape[0], triton.cdiv(th * tw, common["BLOCK_P"]))
        launcher(_spread_kernel, grid)(
            tokens, affinity, tokens if mass is None else mass, out,
            **_strides("t", tokens), **common, DIVIDE=mass is not None,
        )  # fmt: skip

    _launch("spread", out, th, tw, run)


def sampling_triton(x: Tensor, th: int, tw: int, n_iter: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, hh, ww, C], affinity [B, H, W, 9] and the mass [B, hh, ww, 1] that every token gathered."""
    x = unit(x)
    batch, height, width, channels = x.shape
    rows, cols = _cells(height, width, th, tw)
    tokens = x.new_empty(batch, rows, cols, channels)
    affinity = x.new_empty(batch, height, width, 9)
    mass = x.new_empty(batch, rows, cols, 1, dtype=torch.float32)
    if x.numel() == 0:
        return tokens, affinity, mass
    current = torch.empty_like(tokens, dtype=torch.float32)
    weights = torch.empty_like(affinity, dtype=torch.float32) if n_iter > 1 else affinity
    _mean(x, current, th, tw)
    for i in range(n_iter):
        last = i == n_iter - 1
        _affinity(x, current, affinity if last else weights, th, tw, scale, softmax=True)
        _aggregate(x, affinity if last else weights, tokens if last else current, mass, th, tw)
    return tokens, affinity, mass


def sampling_backward_triton(grad: Tensor, affinity: Tensor, mass: Tensor, th: int, tw: int) -> Tensor:
    """dx [B, H, W, C] from the tokens' gradient; the affinity counts as constant."""
    grad = unit(grad)
    out = grad.new_empty(*affinity.shape[:3], grad.shape[-1])
    if out.numel():
        _spread(grad, affinity.contiguous(), mass, out, th, tw)
    return out


def mapping_triton(tokens: Tensor, affinity: Tensor, th: int, tw: int) -> Tensor:
    """Pixels [B, H, W, C]: every one the mean of 9 tokens under its affinity."""
    tokens = unit(tokens)
    out = tokens.new_empty(*affinity.shape[:3], tokens.shape[-1])
    if out.numel():
        _spread(tokens, affinity.contiguous(), None, out, th, tw)
    return out


def mapping_backward_triton(
    grad: Tensor, tokens: Tensor, affinity: Tensor, th: int, tw: int, need_affinity: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens and, if needed (else an empty tensor), of the affinity."""
    grad, tokens, affinity = unit(grad), unit(tokens), affinity.contiguous()
    dtokens = tokens.new_empty(tokens.shape)
    daffinity = affinity.new_empty(affinity.shape if need_affinity else (0,))
    if grad.numel() == 0:
        return dtokens.zero_(), daffinity
    _aggregate(grad, affinity, dtokens, None, th, tw)
    if need_affinity:
        _affinity(grad, tokens, daffinity, th, tw, 1.0, softmax=False)
    return dtokens, daffinity
