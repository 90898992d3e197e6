"""Triton kernels of bi-level routing attention: a region's queries against the tokens of a list of regions.

Two forms. Listed: a tile holds queries of one region and walks that region's list; for dk and dv it holds keys of one
region and walks the inverse list: who picked it, in the order of the pickers. Dense, for regions of a few tokens: a
tile holds tokens of many regions and walks the whole map, and the logarithm of how often one region picked another,
-1e30 for never, is added to the logits by a product with a table. Sums have a fixed order and nothing is atomic. Keys
outside the map are zeros with logit 0. Logits are kept in base 2; offsets inside an image are 32 bits unless WIDE.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops import _tuning as tuning
from zoo.ops._triton import INTERPRET, LOG2E, PRECISION, block, fits_int32, launcher, load, unit, upcast
from zoo.ops._tuning import Config

from .layout import Pair, grid_size, key_region_size

__all__ = ["routing_backward_triton", "routing_forward_triton", "routing_index_triton"]

_FEW_TOKENS = 16  # a dense tile gives every region this many places at most
_MOST_SORTED = 512  # regions that one program ranks at most
_SIDES = (1, 2, 4, 8)  # of square regions that kernels are compiled for; others are numbers, which costs divisions
_TINY_SCALE = 1e-6  # below it the table's logarithms, which are divided by the scale, would lose to -1e30


# What varies with the map must not compile anew.
_MAP = ["regions", "height", "width", "k_height", "k_width", "cols", "rh", "rw", "kh", "kw", "tiles"]


@triton.jit
def _place(region, token, height, width, cols, rh, rw, WIDE: tl.constexpr):
    """Map position of a region's token, and whether it is on the map, as no token of a region too many is."""
    r = region // cols * rh + token // rw
    c = region % cols * rw + token % rw
    inside = (token < rh * rw) & (r < height) & (c < width)
    if WIDE:
        r = r.to(tl.int64)
        c = c.to(tl.int64)
    return r, c, inside


@triton.jit
def _vectors(ptr, offsets, inside, d, D: tl.constexpr, ALL: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of an image, zeros where not inside; a mask that varies inside a row would keep loads from being wide."""
    full = offsets[:, None] + d[None, :]
    if ALL and d.shape[0] == D:
        x = tl.load(ptr + full)
        if UPCAST:
            x = x.to(tl.float32)
    elif ALL:
        x = load(ptr, full, d[None, :] < D, UPCAST)
    elif d.shape[0] == D:
        x = load(ptr, full, inside[:, None], UPCAST)
    else:
        x = load(ptr, full, inside[:, None] & (d[None, :] < D), UPCAST)
    return x


@triton.jit
def _store(ptr, offsets, x, inside, d, D: tl.constexpr):
    full = offsets[:, None] + d[None, :]
    if d.shape[0] == D:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & (d[None, :] < D)
    tl.store(ptr + full, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _program(regions, tiles, HEADS: tl.constexpr, DENSE: tl.constexpr):
    """Head, tile, region and image of a program; heads are neighbours in memory, so they run side by side."""
    program = tl.program_id(0)
    head = tl.cast(program % HEADS, tl.int64)
    tile = program // HEADS % tiles
    group = program // HEADS // tiles
    if DENSE:
        region = 0
        b = group
    else:
        region = group % regions
        b = group // regions
    return head, tile, region, tl.cast(b, tl.int64)


@triton.jit
def _nearest(region, regions):
    """A region's number; a caller's index may hold numbers that are no region's."""
    return tl.minimum(tl.maximum(region, 0), regions - 1)


@triton.jit
def _picks(index_ptr, n, entries, regions):
    """Entries of an image's index, and `regions` beyond its end."""
    return tl.where(n < entries, _nearest(tl.load(index_ptr + n, mask=n < entries, other=0), regions), regions)


@triton.jit
def _listed(list_ptr, start, n, count, regions, tokens, WHOLE: tl.constexpr):
    """Regions and tokens at start + n of a list of `count` regions, and which of them the list has.

    WHOLE: a region has whole blocks of tokens.
    """
    if WHOLE:
        region = tl.load(list_ptr + start // tokens).to(tl.int32)
        token = start % tokens + n
        there = n >= 0
    else:
        j = start + n
        there = j < count * tokens
        region = tl.load(list_ptr + j // tokens, mask=there, other=0).to(tl.int32)
        token = j % tokens
    return _nearest(region, regions), token, there


@triton.jit(do_not_specialize=["regions", "height", "width", "cols", "rh", "rw"])
def _mean_kernel(
    x_ptr, mean_ptr, regions, channels, height, width, cols, rh, rw, x_sb, x_sh, x_sw, x_sn, D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mean over the tokens of a region inside the map, of a block of the channels of all heads."""
    group = tl.cast(tl.program_id(0), tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, BLOCK_T)
    x_ptr += group // regions * x_sb
    offset = c // D * x_sn + c % D
    total = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    count = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, rh * rw, BLOCK_T):
        r, w, inside = _place(tl.program_id(0) % regions, start + t, height, width, cols, rh, rw, WIDE)
        x = tl.load(
            x_ptr + (r * x_sh + w * x_sw)[:, None] + offset[None, :],
            mask=inside[:, None] & (c[None, :] < channels),
            other=0.0,
        )
        total += x.to(tl.float32)
        count += inside.to(tl.float32)
    mean = tl.div_rn(tl.sum(total, 0), tl.zeros([BLOCK], tl.float32) + tl.sum(count, 0))
    tl.store(mean_ptr + group * channels + c, mean, mask=c < channels)


@triton.jit(do_not_specialize=["regions"])
def _nearest_kernel(
    q_ptr, k_ptr, index_ptr, regions, channels,
    TOPK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The TOPK regions of the largest inner product, best first, the lower region first among equals."""
    tiles = tl.cdiv(regions, BLOCK_M)
    b = tl.cast(tl.program_id(0) // tiles, tl.int64)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_R)
    q_ptr += b * regions * channels
    k_ptr += b * regions * channels
    s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        there = c[None, :] < channels
        q = tl.load(q_ptr + m[:, None] * channels + c[None, :], mask=(m[:, None] < regions) & there, other=0.0)
        k = tl.load(k_ptr + n[:, None] * channels + c[None, :], mask=(n[:, None] < regions) & there, other=0.0)
        s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
    # value and region in one integer, so that there are no ties: the value's bits in the order of values, then n
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    rank = (bits.to(tl.int64) << 32) - n[None, :]
    rank = tl.where(n[None, :] < regions, rank, -9223372036854775808)
    index_ptr += (b * regions + m) * TOPK
    for t in range(0, TOPK):
        best = tl.max(rank, 1)
        tl.store(index_ptr + t, (0 - best) & 0xFFFFFFFF, mask=m < regions)
        rank = tl.where(rank == best[:, None], -9223372036854775808, rank)


@triton.jit(do_not_specialize=["regions", "blocks"])
def _table_kernel(
    index_ptr, table_ptr, regions, blocks, unscale, TOPK: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is added to a region's logits, COUNT regions to a block: a high part each, a low part each, zeros."""
    row = tl.cast(tl.program_id(0), tl.int64)
    t = tl.arange(0, BLOCK_T)
    picked = tl.load(index_ptr + row * TOPK + t, mask=t < TOPK, other=0).to(tl.int32)
    picked = tl.where(t < TOPK, _nearest(picked, regions), -1)
    table_ptr += row * blocks * WIDTH
    for start in range(0, blocks * COUNT, BLOCK):
        x = start + tl.arange(0, BLOCK)
        times = tl.sum((picked[:, None] == x[None, :]).to(tl.int32), 0)
        value = tl.where(times > 0, tl.log2(tl.maximum(times, 1).to(tl.float32)) * unscale, -1e30)
        for part in tl.static_range(WIDTH // COUNT):
            stored = value.to(table_ptr.dtype.element_ty)
            place = x // COUNT * WIDTH + part * COUNT + x % COUNT
            tl.store(table_ptr + place, stored, mask=x < blocks * COUNT)
            value = value - stored.to(tl.float32) if part == 0 else value * 0.0


@triton.jit(do_not_specialize=["regions"])
def _pickers_kernel(index_ptr, starts_ptr, pickers_ptr, regions, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    """The places of a region in its image's index, in order, behind those of the lower regions."""
    b = tl.cast(tl.program_id(0) // regions, tl.int64)
    region = tl.program_id(0) % regions
    entries = regions * TOPK
    n = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, entries, BLOCK):
        x = _picks(index_ptr + b * entries, start + n, entries, regions)
        before += (x < region).to(tl.int32)
    place = tl.sum(before, 0)
    for start in range(0, entries, BLOCK):
        x = _picks(index_ptr + b * entries, start + n, entries, regions)
        hit = (x == region).to(tl.int32)
        target = place + tl.cumsum(hit, 0) - hit
        tl.store(pickers_ptr + b * entries + target, (start + n) // TOPK, mask=hit > 0)
        place += tl.sum(hit, 0)
    tl.store(starts_ptr + b * (regions + 1) + region + 1, place)
    tl.store(starts_ptr + b * (regions + 1), 0, mask=region == 0)


@triton.jit(do_not_specialize=_MAP)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, table_ptr, o_ptr, lse_ptr,
    regions, height, width, k_height, k_width, cols, rh, rw, kh, kw, tiles, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn,
    HEADS: tl.constexpr, TOPK: tl.constexpr, COLS: tl.constexpr, SIDE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr, WHOLE_LIST: tl.constexpr, FILLED: tl.constexpr,
    EVEN: tl.constexpr, DENSE: tl.constexpr, FLIP: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    UPCAST_TABLE: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = EVEN and not DENSE and WHOLE_LIST
    if SIDE > 0:
        cols, rh, rw, kh, kw = COLS, SIDE, SIDE, SIDE, SIDE
    head, tile, region, b = _program(regions, tiles, HEADS, DENSE)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    token = m
    if DENSE:
        region = m // (rh * rw)
        token = m % (rh * rw)
        row = tl.minimum(region, regions - 1)
        w = tl.arange(0, WIDTH)
        spread = (w[:, None] % (BLOCK_N // PLACES) == n[None, :] // PLACES) & (w[:, None] < 2 * (BLOCK_N // PLACES))
        blocks = tl.cdiv(regions * PLACES, BLOCK_N)
        table_ptr += b * regions * blocks * WIDTH
        steps = blocks * BLOCK_N
    else:
        index_ptr += (b * regions + region) * TOPK
        steps = TOPK * kh * kw
    qr, qc, valid = _place(region, token, height, width, cols, rh, rw, WIDE)
    q = _vectors(q_ptr + b * q_sb + head * q_sn, qr * q_sh + qc * q_sw, valid, d, D, False, UPCAST)
    if FLIP:
        q = -q
    k_ptr += b * k_sb + head * k_sn
    v_ptr += b * v_sb + head * v_sn
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(0, steps, BLOCK_N):
        if DENSE:
            picked = start // PLACES + n // PLACES
            place = n % PLACES
            there = place < kh * kw
        else:
            picked, place, there = _listed(index_ptr, start, n, TOPK, regions, kh * kw, WHOLE)
        kr, kc, inside = _place(picked, place, k_height, k_width, cols, kh, kw, WIDE)
        k = _vectors(k_ptr, kr * k_sh + kc * k_sw, inside & there, d, D, ALL, UPCAST)
        if DENSE:
            t = _vectors(table_ptr, (row * blocks + start // BLOCK_N) * WIDTH, row, w, WIDTH, True, UPCAST_TABLE)
            s = tl.dot(t, spread.to(t.dtype), input_precision=PRECISION)
            s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
            if not FILLED:
                s = tl.where(there[None, :], s, float("-inf"))
        else:
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if not WHOLE_LIST:
                s = tl.where(there[None, :], s, float("-inf"))
        if DENSE:  # a product that is fused with the difference is not zero for two equal logits of -1e30
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2((s - new_top[:, None]) * scale)
            keep = tl.exp2((top - new_top) * scale)
        else:
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new_top[:, None])
            keep = tl.exp2(top - new_top)
        total = total * keep + tl.sum(p, 1)
        v = _vectors(v_ptr, kr * v_sh + kc * v_sw, inside & there, e, DV, ALL, UPCAST)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
        top = new_top
    o_ptr += (b * height * width * HEADS + head) * DV
    _store(o_ptr, (qr * width + qc) * (HEADS * DV), acc * (1.0 / total)[:, None], valid, e, DV)
    lse_ptr += b * height * width * HEADS + head
    if DENSE:
        top = top * scale
    tl.store(lse_ptr + (qr * width + qc) * HEADS, (top + tl.log2(total)) * 0.6931471805599453, mask=valid)


@triton.jit(do_not_specialize=_MAP)
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, table_ptr, o_ptr, do_ptr, lse_ptr, rows_ptr, dq_ptr,
    regions, height, width, k_height, k_width, cols, rh, rw, kh, kw, tiles, scale, factor,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, do_sb, do_sh, do_sw, do_sn,
    HEADS: tl.constexpr, TOPK: tl.constexpr, COLS: tl.constexpr, SIDE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr, WHOLE_LIST: tl.constexpr, FILLED: tl.constexpr,
    EVEN: tl.constexpr, DENSE: tl.constexpr, FLIP: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    UPCAST_TABLE: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = EVEN and not DENSE and WHOLE_LIST
    if SIDE > 0:
        cols, rh, rw, kh, kw = COLS, SIDE, SIDE, SIDE, SIDE
    head, tile, region, b = _program(regions, tiles, HEADS, DENSE)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    token = m
    if DENSE:
        region = m // (rh * rw)
        token = m % (rh * rw)
        row = tl.minimum(region, regions - 1)
        w = tl.arange(0, WIDTH)
        spread = (w[:, None] % (BLOCK_N // PLACES) == n[None, :] // PLACES) & (w[:, None] < 2 * (BLOCK_N // PLACES))
        blocks = tl.cdiv(regions * PLACES, BLOCK_N)
        table_ptr += b * regions * blocks * WIDTH
        steps = blocks * BLOCK_N
    else:
        index_ptr += (b * regions + region) * TOPK
        steps = TOPK * kh * kw
    qr, qc, valid = _place(region, token, height, width, cols, rh, rw, WIDE)
    q = _vectors(q_ptr + b * q_sb + head * q_sn, qr * q_sh + qc * q_sw, valid, d, D, False, UPCAST)
    if FLIP:
        q = -q
    do = _vectors(do_ptr + b * do_sb + head * do_sn, qr * do_sh + qc * do_sw, valid, e, DV, False, UPCAST)
    image = b * height * width * HEADS + head
    position = qr * width + qc
    o = _vectors(o_ptr + image * DV, position * (HEADS * DV), valid, e, DV, False, UPCAST)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    lse = tl.load(lse_ptr + image + position * HEADS, mask=valid, other=float("inf")) * 1.4426950408889634
    if DENSE:
        kept = region < regions
    else:
        kept = token < rh * rw
    rows_ptr += ((b * HEADS + head) * 2 * regions + (0 if DENSE else region)) * (rh * rw)
    tl.store(rows_ptr + m, lse, mask=kept)
    tl.store(rows_ptr + regions * (rh * rw) + m, delta, mask=kept)
    k_ptr += b * k_sb + head * k_sn
    v_ptr += b * v_sb + head * v_sn
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, steps, BLOCK_N):
        if DENSE:
            picked = start // PLACES + n // PLACES
            place = n % PLACES
            there = place < kh * kw
        else:
            picked, place, there = _listed(index_ptr, start, n, TOPK, regions, kh * kw, WHOLE)
        kr, kc, inside = _place(picked, place, k_height, k_width, cols, kh, kw, WIDE)
        k = _vectors(k_ptr, kr * k_sh + kc * k_sw, inside & there, d, D, ALL, UPCAST)
        v = _vectors(v_ptr, kr * v_sh + kc * v_sw, inside & there, e, DV, ALL, UPCAST)
        if DENSE:
            t = _vectors(table_ptr, (row * blocks + start // BLOCK_N) * WIDTH, row, w, WIDTH, True, UPCAST_TABLE)
            s = tl.dot(t, spread.to(t.dtype), input_precision=PRECISION)
            s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
        else:
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(s * scale - lse[:, None])
        if (DENSE and not FILLED) or (not DENSE and not WHOLE_LIST):
            p = tl.where(there[None, :], p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    _store(dq_ptr + image * D, position * (HEADS * D), dq * factor, valid, d, D)


@triton.jit(do_not_specialize=_MAP)
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, pickers_ptr, table_ptr, do_ptr, rows_ptr, dk_ptr, dv_ptr,
    regions, height, width, k_height, k_width, cols, rh, rw, kh, kw, tiles, scale, factor,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, do_sb, do_sh, do_sw, do_sn,
    HEADS: tl.constexpr, TOPK: tl.constexpr, COLS: tl.constexpr, SIDE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr, WHOLE_LIST: tl.constexpr, FILLED: tl.constexpr,
    EVEN: tl.constexpr, DENSE: tl.constexpr, FLIP: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    UPCAST_TABLE: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = EVEN and not DENSE and WHOLE
    if SIDE > 0:
        cols, rh, rw, kh, kw = COLS, SIDE, SIDE, SIDE, SIDE
    head, tile, region, b = _program(regions, tiles, HEADS, DENSE)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    token = m
    if DENSE:
        region = m // PLACES
        token = m % PLACES
        w = tl.arange(0, WIDTH)
        i = tl.arange(0, BLOCK_M)
        spread = (w[None, :] % (BLOCK_M // PLACES) == i[:, None] // PLACES) & (w[None, :] < 2 * (BLOCK_M // PLACES))
        table_ptr += (b * regions * tiles + tile) * WIDTH
        steps = regions * (rh * rw)
    else:
        starts_ptr += b * (regions + 1) + region
        first = tl.load(starts_ptr)
        count = tl.load(starts_ptr + 1) - first
        pickers_ptr += b * regions * TOPK + first
        steps = count * (rh * rw)
    kr, kc, valid = _place(region, token, k_height, k_width, cols, kh, kw, WIDE)
    k = _vectors(k_ptr + b * k_sb + head * k_sn, kr * k_sh + kc * k_sw, valid, d, D, False, UPCAST)
    if FLIP:
        k = -k
    v = _vectors(v_ptr + b * v_sb + head * v_sn, kr * v_sh + kc * v_sw, valid, e, DV, False, UPCAST)
    q_ptr += b * q_sb + head * q_sn
    do_ptr += b * do_sb + head * do_sn
    rows_ptr += (b * HEADS + head) * 2 * regions * (rh * rw)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(0, steps, BLOCK_N):
        if DENSE:
            picker = (start + n) // (rh * rw)
            place = (start + n) % (rh * rw)
            there = n >= 0
        else:
            picker, place, there = _listed(pickers_ptr, start, n, count, regions, rh * rw, WHOLE)
        qr, qc, inside = _place(picker, place, height, width, cols, rh, rw, WIDE)
        inside &= there
        q = _vectors(q_ptr, qr * q_sh + qc * q_sw, inside, d, D, ALL, UPCAST)
        do = _vectors(do_ptr, qr * do_sh + qc * do_sw, inside, e, DV, ALL, UPCAST)
        if DENSE:
            row = start + n
            there = row < steps
        else:
            row = picker * (rh * rw) + place
        if not DENSE and WHOLE:
            lse = tl.load(rows_ptr + row)
            delta = tl.load(rows_ptr + regions * (rh * rw) + row)
        else:
            lse = tl.load(rows_ptr + row, mask=there, other=float("inf"))
            delta = tl.load(rows_ptr + regions * (rh * rw) + row, mask=there, other=0.0)
        if DENSE:
            t = _vectors(
                table_ptr, tl.minimum(picker, regions - 1) * (tiles * WIDTH), row, w, WIDTH, True, UPCAST_TABLE
            )
            s = tl.dot(spread.to(t.dtype), tl.trans(t), input_precision=PRECISION)
            s = tl.dot(k, tl.trans(q), s, input_precision=PRECISION)
        else:
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(s * scale - lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    image = b * k_height * k_width * HEADS + head
    position = (kr * k_width + kc) * HEADS
    _store(dk_ptr + image * D, position * D, dk * factor, valid, d, D)
    _store(dv_ptr + image * DV, position * DV, dv, valid, e, DV)


def _power(count: int) -> int:
    return int(triton.next_power_of_2(count))


def _configs(rows: int, columns: int, stages: int, tile: int = 64) -> list[Config]:
    """The heuristic, the best first; the later ones need less shared memory. A warp multiplies 16 rows at least."""
    warps = min(4, block(rows, tile) // 16)
    tiles = [(tile, columns, stages), (64, 32, 1), (32, 32, 1), (16, 16, 1)]
    return [Config(t, c, min(warps, max(1, t // 16)), s) for t, c, s in tiles]


def _launch(direction: str, q: Tensor, v: Tensor, box: tuple[int, int], configs: list[Config], run: Any) -> None:
    dim = max(q.shape[4], v.shape[4])
    problem = tuning.key("routing", direction, q, dim, box, q.shape[1] * q.shape[2])
    tuning.launch(problem, configs, q.device, run, q.shape[3:], v.shape[4])


def _is_dense(q: Tensor, k: Tensor, index: Tensor, region: Pair, scale: float) -> bool:
    """Whether a walk over all regions costs less than one of the list, whose tiles have 16 rows at least.

    The table, 4 bytes a pair of regions, must not be larger than q.
    """
    rows, cols = grid_size(q, region)
    regions, tokens = rows * cols, region[0] * region[1]
    keys = _keys(q, k, region)
    products = regions * tokens * _power(keys) <= max(16, tokens) * index.shape[2] * keys
    small = 4 * regions <= tokens * q.shape[3] * q.shape[4] * q.element_size()
    return products and small and _power(keys) <= _FEW_TOKENS and abs(scale) >= _TINY_SCALE


def _keys(q: Tensor, k: Tensor, region: Pair) -> int:
    """Tokens of a key region."""
    key_region = key_region_size(q, k, region)
    return key_region[0] * key_region[1]


def _common(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, region: Pair, scale: float, dense: bool, *others: Tensor
) -> dict[str, Any]:
    """What all kernels are told; `others` are further tensors that they address."""
    rows, cols = grid_size(q, region)
    key_region = key_region_size(q, k, region)
    strides = {
        f"{name}_s{a}": s
        for name, x in (("q", q), ("k", k), ("v", v))
        for a, s in zip("bhwn", x.stride(), strict=False)
    }
    maps = ((q, region), (k, key_region))
    places = _power(key_region[0] * key_region[1]) if dense else 16
    side = region[0] if len({*region, *key_region}) == 1 and region[0] in _SIDES else 0
    return {
        "regions": rows * cols,
        "height": q.shape[1],
        "width": q.shape[2],
        "k_height": k.shape[1],
        "k_width": k.shape[2],
        "scale": max(abs(scale) * LOG2E, 1e-30),  # the sign is FLIP's; 0 would turn -inf into NaN
        "HEADS": q.shape[3],
        "TOPK": index.shape[2],
        "cols": cols,
        "rh": region[0],
        "rw": region[1],
        "kh": key_region[0],
        "kw": key_region[1],
        "COLS": cols if side else 0,
        "SIDE": side,
        "D": q.shape[4],
        "DV": v.shape[4],
        "BLOCK_D": max(16, _power(q.shape[4])),
        "BLOCK_DV": max(16, _power(v.shape[4])),
        "PLACES": places,
        "FILLED": places == key_region[0] * key_region[1],
        "EVEN": all(x.shape[1] % r[0] == 0 and x.shape[2] % r[1] == 0 for x, r in maps),
        "DENSE": dense,
        "FLIP": scale < 0,
        "WIDE": not fits_int32(q, k, v, *others),
        "UPCAST": upcast(q.dtype),
        "UPCAST_TABLE": INTERPRET and q.dtype != torch.float32,
        **strides,
    }


def _table(index: Tensor, dtype: torch.dtype, scale: float, count: int) -> tuple[Tensor, int]:
    """The dense form's table [B, R, blocks, WIDTH] for blocks of `count` regions, and WIDTH."""
    batch, regions, topk = index.shape
    width, blocks = max(16, 2 * count), triton.cdiv(regions, count)
    dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16  # -1e30 is beyond float16
    table = torch.empty(batch, regions, blocks, width, dtype=dtype, device=index.device)
    launcher(_table_kernel, (batch * regions,))(
        index, table, regions, blocks, 1 / scale, TOPK=topk, WIDTH=width, COUNT=count, BLOCK_T=_power(topk), BLOCK=64,
        num_warps=1,
    )  # fmt: skip
    return table, width


def sorts_in_a_kernel(q: Tensor, region: Pair) -> bool:
    """Whether `routing_index_triton` takes so many regions."""
    rows, cols = grid_size(q, region)
    return rows * cols <= _MOST_SORTED


def routing_index_triton(q: Tensor, k: Tensor, region: Pair, topk: int) -> Tensor:
    """As `reference.routing_index`, [B, R, topk] int64, for maps of one size and at most _MOST_SORTED regions."""
    batch, (rows, cols), channels = q.shape[0], grid_size(q, region), q.shape[3] * q.shape[4]
    regions = rows * cols
    index = torch.empty(batch, regions, topk, dtype=torch.int64, device=q.device)
    if batch == 0:
        return index
    means = []
    for x in (unit(q), unit(k)):
        mean = torch.empty(batch, regions, channels, dtype=torch.float32, device=q.device)
        size = min(128, _power(channels))
        launcher(_mean_kernel, (batch * regions, triton.cdiv(channels, size)))(
            x, mean, regions, channels, x.shape[1], x.shape[2], cols, *region, *x.stride()[:4],
            D=x.shape[4], BLOCK_T=min(16, _power(region[0] * region[1])), BLOCK=size, WIDE=not fits_int32(x),
            num_warps=1,
        )  # fmt: skip
        means.append(mean)
    launcher(_nearest_kernel, (batch * triton.cdiv(regions, 16),))(
        *means, index, regions, channels, TOPK=topk, BLOCK_M=16, BLOCK_R=max(16, _power(regions)), BLOCK_C=32,
        num_warps=4 if regions <= 128 else 8, num_stages=1,  # loads ahead would not fit a multiprocessor of 100 KiB
    )  # fmt: skip
    return index


def _pickers(index: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse lists: where each region's begins [B, R + 1], and who picked it [B, R * topk]."""
    batch, regions, topk = index.shape
    starts = torch.empty(batch, regions + 1, dtype=torch.int32, device=index.device)
    pickers = torch.empty(batch, regions * topk, dtype=torch.int32, device=index.device)
    size = min(1024, _power(regions * topk))
    launcher(_pickers_kernel, (batch * regions,))(index, starts, pickers, regions, TOPK=topk, BLOCK=size, num_warps=1)
    return starts, pickers


def routing_forward_triton(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, region: Pair, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, H, W, heads, dim_v] and log-sum-exp [B, H, W, heads]; arguments as `reference.routing_attention`."""
    q, k, v, index = unit(q), unit(k), unit(v), index.contiguous()
    out = q.new_empty(*q.shape[:4], v.shape[4])
    lse = q.new_empty(q.shape[:4], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    dense = _is_dense(q, k, index, region, scale)
    common = _common(q, k, v, index, region, scale, dense, out)
    batch, regions, topk = index.shape
    tokens, keys, places = region[0] * region[1], _keys(q, k, region), common["PLACES"]

    def run(config: Config) -> None:
        rows = regions * tokens if dense else tokens
        block_m = block(rows, config.tile)
        tiles = triton.cdiv(rows, block_m)
        block_n = max(places, block(regions * places, config.columns)) if dense else block(topk * keys, config.columns)
        table, table_width = _table(index, q.dtype, common["scale"], block_n // places) if dense else (lse, 16)
        launcher(_forward_kernel, (batch * (1 if dense else regions) * tiles * q.shape[3],))(
            q, k, v, index, table, out, lse, **common, BLOCK_M=block_m, BLOCK_N=block_n, tiles=tiles,
            WIDTH=table_width, WHOLE=keys % block_n == 0, WHOLE_LIST=topk * keys % block_n == 0,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    heuristic = _configs(regions * tokens, 32, 1, 128) if dense else _configs(tokens, 64, 2)
    _launch("forward", q, v, (tokens, topk * keys), heuristic, run)
    return out, lse


def routing_backward_triton(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    region: Pair,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    q, k, v, grad, index = unit(q), unit(k), unit(v), unit(grad), index.contiguous()
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    dense = _is_dense(q, k, index, region, scale)
    common = _common(q, k, v, index, region, scale, dense, grad, out, dq, dk, dv)
    common |= {f"do_s{a}": s for a, s in zip("bhwn", grad.stride(), strict=False)}
    common["factor"] = scale
    batch, regions, topk = index.shape
    tokens, keys, places = region[0] * region[1], _keys(q, k, region), common["PLACES"]
    per_row = lse.new_empty(
        batch, q.shape[3], 2, regions * tokens
    )  # log-sum-exp in base 2, infinite off the map; delta

    def rows(config: Config) -> None:
        queries = regions * tokens if dense else tokens
        block_m = block(queries, config.tile)
        tiles = triton.cdiv(queries, block_m)
        block_n = max(places, block(regions * places, config.columns)) if dense else block(topk * keys, config.columns)
        table, table_width = _table(index, q.dtype, common["scale"], block_n // places) if dense else (lse, 16)
        launcher(_dq_kernel, (batch * (1 if dense else regions) * tiles * q.shape[3],))(
            q, k, v, index, table, out, grad, lse, per_row, dq, **common, BLOCK_M=block_m, BLOCK_N=block_n, tiles=tiles,
            WIDTH=table_width, WHOLE=keys % block_n == 0, WHOLE_LIST=topk * keys % block_n == 0,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    heuristic = _configs(regions * tokens, 32, 1, 128) if dense else _configs(tokens, 64, 1)
    _launch("rows", q, v, (tokens, topk * keys), heuristic, rows)
    starts, pickers = (index, index) if dense else _pickers(index)

    def columns(config: Config) -> None:
        slots = regions * places if dense else keys
        block_m = max(places, block(slots, config.tile)) if dense else block(slots, config.tile)
        tiles = triton.cdiv(slots, block_m)
        block_n = block(regions * tokens, config.columns)
        table, table_width = _table(index, q.dtype, common["scale"], block_m // places) if dense else (lse, 16)
        launcher(_dkv_kernel, (batch * (1 if dense else regions) * tiles * q.shape[3],))(
            q, k, v, starts, pickers, table, grad, per_row, dk, dv, **common, BLOCK_M=block_m,
            BLOCK_N=block_n, tiles=tiles, WIDTH=table_width, WHOLE=tokens % block_n == 0, WHOLE_LIST=False,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    heuristic = _configs(regions * places, 32, 1, 64) if dense else _configs(keys, 64 if tokens > 16 else 32, 1)
    _launch("columns", q, v, (keys, topk * tokens), heuristic, columns)
    return dq, dk, dv
