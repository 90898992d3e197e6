"""Triton kernels of bi-level routing attention: a region's queries against the tokens of a list of regions.

Forward and dq walk a query region's own list. dk and dv walk the inverse list of a key region: who picked it, in the
order of a stable sort, so sums have a fixed order and nothing is atomic. Keys outside the map are zeros with logit 0.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops._local import tuning
from zoo.ops._local.tuning import Config

from .layout import Pair, grid_size, key_region_size

__all__ = ["routing_backward_triton", "routing_forward_triton"]

_LOG2E = math.log2(math.e)
_INTERPRET = triton.knobs.runtime.interpret


@triton.jit
def _load(ptr, offsets, mask, UPCAST: tl.constexpr):
    x = tl.load(ptr + offsets, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _place(region, token, cols, height, width, RH: tl.constexpr, RW: tl.constexpr):
    """Map position of a region's token, and whether it is on the map."""
    r = (region // cols * RH + token // RW).to(tl.int64)
    c = (region % cols * RW + token % RW).to(tl.int64)
    return r, c, (token < RH * RW) & (r < height) & (c < width)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, o_ptr, lse_ptr,
    heads, regions, cols, height, width, k_height, k_width, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn,
    TOPK: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    tile = program % TILES
    region = program // TILES % regions
    b = (program // TILES // regions).to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    qr, qc, valid = _place(region, m, cols, height, width, RH, RW)
    q_offset = b * q_sb + qr * q_sh + qc * q_sw + head * q_sn
    q = _load(q_ptr, q_offset[:, None] + d[None, :], valid[:, None] & (d[None, :] < D), UPCAST)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(0, TOPK * KH * KW, BLOCK_N):
        j = start + n
        listed = j < TOPK * KH * KW
        picked = tl.load(index_ptr + (b * regions + region) * TOPK + j // (KH * KW), mask=listed, other=0).to(tl.int32)
        kr, kc, inside = _place(picked, j % (KH * KW), cols, k_height, k_width, KH, KW)
        inside &= listed
        k_offset = b * k_sb + kr * k_sh + kc * k_sw + head * k_sn
        k = _load(k_ptr, k_offset[:, None] + d[None, :], inside[:, None] & (d[None, :] < D), UPCAST)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(listed[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        keep = tl.exp2(top - new_top)
        total = total * keep + tl.sum(p, 1)
        v_offset = b * v_sb + kr * v_sh + kc * v_sw + head * v_sn
        v = _load(v_ptr, v_offset[:, None] + e[None, :], inside[:, None] & (e[None, :] < DV), UPCAST)
        acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    position = ((b * height + qr) * width + qc) * heads + head
    o = acc / total[:, None]
    tl.store(
        o_ptr + (position * DV)[:, None] + e[None, :],
        o.to(o_ptr.dtype.element_ty),
        mask=valid[:, None] & (e[None, :] < DV),
    )
    tl.store(lse_ptr + position, (top + tl.log2(total)) * 0.6931471805599453, mask=valid)


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    heads, regions, cols, height, width, k_height, k_width, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, do_sb, do_sh, do_sw, do_sn,
    TOPK: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    tile = program % TILES
    region = program // TILES % regions
    b = (program // TILES // regions).to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    qr, qc, valid = _place(region, m, cols, height, width, RH, RW)
    position = ((b * height + qr) * width + qc) * heads + head
    q_offset = b * q_sb + qr * q_sh + qc * q_sw + head * q_sn
    q = _load(q_ptr, q_offset[:, None] + d[None, :], valid[:, None] & (d[None, :] < D), UPCAST)
    mask_o = valid[:, None] & (e[None, :] < DV)
    do_offset = b * do_sb + qr * do_sh + qc * do_sw + head * do_sn
    do = _load(do_ptr, do_offset[:, None] + e[None, :], mask_o, UPCAST)
    o = tl.load(o_ptr + (position * DV)[:, None] + e[None, :], mask=mask_o, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + position, delta, mask=valid)
    lse = tl.load(lse_ptr + position, mask=valid, other=0.0) * 1.4426950408889634
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, TOPK * KH * KW, BLOCK_N):
        j = start + n
        listed = j < TOPK * KH * KW
        picked = tl.load(index_ptr + (b * regions + region) * TOPK + j // (KH * KW), mask=listed, other=0).to(tl.int32)
        kr, kc, inside = _place(picked, j % (KH * KW), cols, k_height, k_width, KH, KW)
        inside &= listed
        k_offset = b * k_sb + kr * k_sh + kc * k_sw + head * k_sn
        k = _load(k_ptr, k_offset[:, None] + d[None, :], inside[:, None] & (d[None, :] < D), UPCAST)
        v_offset = b * v_sb + kr * v_sh + kc * v_sw + head * v_sn
        v = _load(v_ptr, v_offset[:, None] + e[None, :], inside[:, None] & (e[None, :] < DV), UPCAST)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        p = tl.where(listed[None, :], tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    dq = dq * (scale * 0.6931471805599453)
    tl.store(
        dq_ptr + (position * D)[:, None] + d[None, :],
        dq.to(dq_ptr.dtype.element_ty),
        mask=valid[:, None] & (d[None, :] < D),
    )


@triton.jit
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, pickers_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    heads, regions, cols, height, width, k_height, k_width, entries, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, do_sb, do_sh, do_sw, do_sn,
    RH: tl.constexpr, RW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    tile = program % TILES
    region = program // TILES % regions
    b = (program // TILES // regions).to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    kr, kc, valid = _place(region, m, cols, k_height, k_width, KH, KW)
    k_offset = b * k_sb + kr * k_sh + kc * k_sw + head * k_sn
    k = _load(k_ptr, k_offset[:, None] + d[None, :], valid[:, None] & (d[None, :] < D), UPCAST)
    v_offset = b * v_sb + kr * v_sh + kc * v_sw + head * v_sn
    v = _load(v_ptr, v_offset[:, None] + e[None, :], valid[:, None] & (e[None, :] < DV), UPCAST)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    first = tl.load(starts_ptr + b * (regions + 1) + region)
    count = (tl.load(starts_ptr + b * (regions + 1) + region + 1) - first) * (RH * RW)
    for start in range(0, count, BLOCK_N):
        j = start + n
        listed = j < count
        picker = tl.load(pickers_ptr + b * entries + first + j // (RH * RW), mask=listed, other=0).to(tl.int32)
        qr, qc, inside = _place(picker, j % (RH * RW), cols, height, width, RH, RW)
        inside &= listed
        position = ((b * height + qr) * width + qc) * heads + head
        q_offset = b * q_sb + qr * q_sh + qc * q_sw + head * q_sn
        q = _load(q_ptr, q_offset[:, None] + d[None, :], inside[:, None] & (d[None, :] < D), UPCAST)
        do_offset = b * do_sb + qr * do_sh + qc * do_sw + head * do_sn
        do = _load(do_ptr, do_offset[:, None] + e[None, :], inside[:, None] & (e[None, :] < DV), UPCAST)
        lse = tl.load(lse_ptr + position, mask=inside, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + position, mask=inside, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        p = tl.where(inside[None, :], tl.exp2(s - lse[None, :]), 0.0)
        dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    position = ((b * k_height + kr) * k_width + kc) * heads + head
    dk = dk * (scale * 0.6931471805599453)
    tl.store(
        dk_ptr + (position * D)[:, None] + d[None, :],
        dk.to(dk_ptr.dtype.element_ty),
        mask=valid[:, None] & (d[None, :] < D),
    )
    tl.store(
        dv_ptr + (position * DV)[:, None] + e[None, :],
        dv.to(dv_ptr.dtype.element_ty),
        mask=valid[:, None] & (e[None, :] < DV),
    )


def _block(count: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(count)))


def _configs(columns: int, stages: int) -> list[Config]:
    """The heuristic, the best first; the later ones need less shared memory."""
    return [Config(64, columns, 4, stages), Config(64, 32, 4, 1), Config(32, 32, 4, 1), Config(16, 16, 4, 1)]


def _launch(direction: str, q: Tensor, v: Tensor, box: tuple[int, int], configs: list[Config], run: Any) -> None:
    dim = max(q.shape[4], v.shape[4])
    problem = tuning.key("routing", direction, q, dim, box, q.shape[1] * q.shape[2])
    tuning.launch(problem, configs, q.device, run, q.shape[3:], v.shape[4])


def _common(q: Tensor, k: Tensor, v: Tensor, region: Pair, scale: float) -> dict[str, Any]:
    rows, cols = grid_size(q, region)
    key_region = key_region_size(q, k, region)
    strides = {
        f"{name}_s{a}": s
        for name, x in (("q", q), ("k", k), ("v", v))
        for a, s in zip("bhwn", x.stride(), strict=False)
    }
    return {
        "heads": q.shape[3],
        "regions": rows * cols,
        "cols": cols,
        "height": q.shape[1],
        "width": q.shape[2],
        "k_height": k.shape[1],
        "k_width": k.shape[2],
        "scale": scale * _LOG2E,
        "RH": region[0],
        "RW": region[1],
        "KH": key_region[0],
        "KW": key_region[1],
        "D": q.shape[4],
        "DV": v.shape[4],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[4])),
        "BLOCK_DV": max(16, triton.next_power_of_2(v.shape[4])),
        "UPCAST": _INTERPRET and q.dtype == torch.bfloat16,
        **strides,
    }


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def routing_forward_triton(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, region: Pair, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, H, W, heads, dim_v] and log-sum-exp [B, H, W, heads]; arguments as `reference.routing_attention`."""
    q, k, v = _unit(q), _unit(k), _unit(v)
    out = q.new_empty(*q.shape[:4], v.shape[4])
    lse = q.new_empty(q.shape[:4], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    common = _common(q, k, v, region, scale)
    tokens = region[0] * region[1]
    index = index.contiguous()
    topk = index.shape[2]
    keys = topk * common["KH"] * common["KW"]

    def run(config: Config) -> None:
        block_m = _block(tokens, config.tile)
        tiles = triton.cdiv(tokens, block_m)
        _forward_kernel[(q.shape[0] * common["regions"] * tiles, q.shape[3])](
            q, k, v, index, out, lse, **common, TOPK=topk, BLOCK_M=block_m, BLOCK_N=_block(keys, config.columns),
            TILES=tiles, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    _launch("forward", q, v, (tokens, keys), _configs(64, 2), run)
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
    q, k, v, grad = _unit(q), _unit(k), _unit(v), _unit(grad)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    common = _common(q, k, v, region, scale)
    common |= {f"do_s{a}": s for a, s in zip("bhwn", grad.stride(), strict=False)}
    delta = torch.empty_like(lse)
    batch, regions, topk = index.shape
    tokens, keys = region[0] * region[1], common["KH"] * common["KW"]
    listed = index.contiguous()

    def rows(config: Config) -> None:
        block_m = _block(tokens, config.tile)
        tiles = triton.cdiv(tokens, block_m)
        _dq_kernel[(batch * regions * tiles, q.shape[3])](
            q, k, v, listed, out, grad, lse, delta, dq, **common, TOPK=topk, BLOCK_M=block_m,
            BLOCK_N=_block(topk * keys, config.columns), TILES=tiles, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    _launch("rows", q, v, (tokens, topk * keys), _configs(64, 1), rows)

    # Who picked each region: a stable sort keeps the pickers in region order, and needs no word from the host.
    order, entry = index.flatten(1).sort(dim=1, stable=True)
    numbers = torch.arange(regions + 1, device=index.device, dtype=order.dtype).expand(batch, -1).contiguous()
    starts = torch.searchsorted(order, numbers).int()
    pickers = (entry // topk).int()

    def columns(config: Config) -> None:
        block_m = _block(keys, config.tile)
        tiles = triton.cdiv(keys, block_m)
        _dkv_kernel[(batch * regions * tiles, q.shape[3])](
            q, k, v, starts, pickers, grad, lse, delta, dk, dv, **common, entries=regions * topk, BLOCK_M=block_m,
            BLOCK_N=config.columns, TILES=tiles, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    _launch("columns", q, v, (keys, topk * tokens), _configs(64 if tokens > 16 else 32, 1), columns)
    return dq, dk, dv
