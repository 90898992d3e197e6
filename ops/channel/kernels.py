"""Triton kernels of channel attention: the dim x dim product over tokens, the map made of it, and its application.

The first token of a block is added to the pointers in 64 bits; offsets inside the block have 32 unless WIDE says that
the tokens are too far apart. The heads of a block of tokens run side by side, as they lie in memory.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops import _tuning as tuning
from zoo.ops._triton import PRECISION, launcher, load, unit, upcast
from zoo.ops._tuning import Config

__all__ = ["channel_backward_triton", "channel_forward_triton"]


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, out_ptr, tokens, heads, share, a_sb, a_sn, a_sh, b_sb, b_sn, b_sh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[image, head, split, i, j]: the sum of a[n, i] * b[n, j] over the split's tokens."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    split = tl.program_id(1)
    b = (tl.program_id(0) // heads).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    if WIDE:
        n = n.to(tl.int64)
    a_offset = n * a_sn + d
    b_offset = n * b_sn + d
    a_base = a_ptr + (b * a_sb + head * a_sh)
    b_base = b_ptr + (b * b_sb + head * b_sh)
    acc = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    last = min((split + 1) * share, tokens)
    for start in range(split * share, last, BLOCK_N):
        mask = n < last - start
        if D != BLOCK_D:
            mask = mask & (d < D)
        x = load(a_base + tl.cast(start, tl.int64) * a_sn, a_offset, mask, UPCAST)
        y = load(b_base + tl.cast(start, tl.int64) * b_sn, b_offset, mask, UPCAST)
        acc += tl.dot(tl.trans(x), y, input_precision=PRECISION)
    i = tl.arange(0, BLOCK_D)[:, None]
    place = ((b * heads + head) * tl.num_programs(1) + split) * (D * D) + i * D + d
    tl.store(out_ptr + place, acc, mask=(i < D) & (d < D))


@triton.jit
def _map_kernel(
    partial_ptr, maps_ptr, out_ptr, splits, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, GRADIENT: tl.constexpr
):
    """Of one head, with s the sum over its splits: softmax(scale * s), or that map's gradient's way back through it."""
    place = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_D)[:, None]
    j = tl.arange(0, BLOCK_D)[None, :]
    mask = (i < D) & (j < D)
    total = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + (place * splits + split) * (D * D) + (i * D + j), mask=mask, other=0.0)
    if GRADIENT:
        attn = tl.load(maps_ptr + place * (D * D) + (i * D + j), mask=mask, other=0.0)
        out = (total - tl.sum(total * attn, 1)[:, None]) * attn * scale
    else:
        total = tl.where(j < D, total * scale, float("-inf"))
        out = tl.exp(total - tl.max(total, 1)[:, None])
        out = out / tl.sum(out, 1)[:, None]
    tl.store(out_ptr + place * (D * D) + (i * D + j), out, mask=mask)


@triton.jit
def _apply_kernel(
    x_ptr, map_ptr, out_ptr, tokens, heads, map_row, map_column, x_sb, x_sn, x_sh, out_sb, out_sn, out_sh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[n, i]: the sum over j of x[n, j] * map[j * map_row + i * map_column]."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    blocks = tl.cdiv(tokens, BLOCK_N)
    first = (tl.program_id(0) // heads % blocks).to(tl.int64) * BLOCK_N
    b = (tl.program_id(0) // heads // blocks).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = n < tokens - first
    if D != BLOCK_D:
        mask = mask & (d < D)
    if WIDE:
        n = n.to(tl.int64)
    x = load(x_ptr + (b * x_sb + head * x_sh + first * x_sn), n * x_sn + d, mask, UPCAST)
    j = tl.arange(0, BLOCK_D)[:, None]
    m_ptr = map_ptr + (b * heads + head) * (D * D)
    m = tl.load(m_ptr + (j * map_row + d * map_column), mask=(j < D) & (d < D), other=0.0)
    y = tl.dot(x, m.to(x.dtype), input_precision=PRECISION)
    out = out_ptr + (b * out_sb + head * out_sh + first * out_sn)
    tl.store(out + (n * out_sn + d), y.to(out_ptr.dtype.element_ty), mask=mask)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_sb": x.stride(0), f"{name}_sn": x.stride(1), f"{name}_sh": x.stride(2)}


def _launch(direction: str, x: Tensor, first: int, run: Callable[[Config], None]) -> None:
    """tile: tokens of a block. The columns are the whole dim x dim map and no table can change them."""
    heuristic = [Config(tile, 16, 4, stages) for tile, stages in ((first, 3), (32, 2), (16, 1))]
    problem = tuning.key("channel", direction, x, x.shape[3], (x.shape[3],) * 2, x.shape[1])
    tuning.launch(problem, heuristic, x.device, run, x.shape[2])


def _common(config: Config, *tensors: Tensor) -> dict[str, Any]:
    dim = tensors[0].shape[3]
    return {
        "D": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_N": max(16, config.tile),
        "WIDE": any(abs(x.stride(1)) * max(16, config.tile) + dim >= 2**31 for x in tensors),
        "UPCAST": upcast(tensors[0].dtype), "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def _map(a: Tensor, b: Tensor, scale: float, maps: Tensor | None = None) -> Tensor:
    """[B, heads, dim, dim] in float32: softmax(scale * a^T b), or given that map and with a^T b its gradient, the
    gradient of a^T b before the softmax. Splits of the tokens are added in a fixed order."""
    batch, tokens, heads, dim = a.shape
    # the batch has no say: an image's bits would depend on the others
    splits = max(1, min(triton.cdiv(tokens, 512), 16))
    share = triton.cdiv(triton.cdiv(tokens, splits), 64) * 64
    splits = triton.cdiv(tokens, share)
    partial = torch.empty((batch, heads, splits, dim, dim), dtype=torch.float32, device=a.device)

    def run(config: Config) -> None:
        launcher(_product_kernel, (heads * batch, splits))(
            a, b, partial, tokens, heads, share, **_strides("a", a), **_strides("b", b), **_common(config, a, b)
        )

    _launch("product", a, 64, run)
    out = torch.empty((batch, heads, dim, dim), dtype=torch.float32, device=a.device)
    block_d = max(16, triton.next_power_of_2(dim))
    launcher(_map_kernel, (batch * heads,))(
        partial, out if maps is None else maps, out, splits, scale,
        D=dim, BLOCK_D=block_d, GRADIENT=maps is not None, num_warps=4 if block_d <= 64 else 8,
    )  # fmt: skip
    return out


def _apply(x: Tensor, maps: Tensor, out: Tensor, transpose: bool) -> None:
    """out[n] = x[n] @ maps, or its transpose."""
    batch, tokens, heads, dim = x.shape

    def run(config: Config) -> None:
        common = _common(config, x, out)
        launcher(_apply_kernel, (heads * triton.cdiv(tokens, common["BLOCK_N"]) * batch,))(
            x, maps, out, tokens, heads, 1 if transpose else dim, dim if transpose else 1,
            **_strides("x", x), **_strides("out", out), **common,
        )  # fmt: skip

    _launch("apply", x, 128, run)


def channel_forward_triton(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output [B, N, heads, dim] and the attention maps [B, heads, dim, dim] in float32."""
    q, k, v = unit(q), unit(k), unit(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0:
        return out, torch.empty((q.shape[0], *q.shape[2:], q.shape[3]), dtype=torch.float32, device=q.device)
    maps = _map(k, v, scale)
    _apply(q, maps, out, transpose=True)
    return out, maps


def channel_backward_triton(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, maps: Tensor, scale: float, into: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Write dq, dk, dv into the three tensors given, which have unit last stride."""
    if q.numel() == 0:
        return
    grad, q, k, v = unit(grad), unit(q), unit(k), unit(v)
    dq, dk, dv = into
    _apply(grad, maps, dq, transpose=False)
    dscores = _map(grad, q, scale, maps.contiguous())
    _apply(v, dscores, dk, transpose=True)
    _apply(k, dscores, dv, transpose=False)
