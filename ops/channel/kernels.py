"""Triton kernels of channel attention: the dim x dim product over tokens, and its application to every token."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops._local import tuning
from zoo.ops._local.tuning import Config

__all__ = ["channel_backward_triton", "channel_forward_triton"]

_INTERPRET = triton.knobs.runtime.interpret


@triton.jit
def _load(ptr, offsets, mask, UPCAST: tl.constexpr):
    x = tl.load(ptr + offsets, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, out_ptr, tokens, heads, share,
    a_sb, a_sn, a_sh, b_sb, b_sn, b_sh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[split, image, head, i, j]: the sum of a[n, i] * b[n, j] over the split's tokens."""
    split = tl.program_id(0)
    image = tl.program_id(1)
    head = tl.cast(tl.program_id(2), tl.int64)
    b = tl.cast(image, tl.int64)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for start in range(split * share, min((split + 1) * share, tokens), BLOCK_N):
        token = (start + n).to(tl.int64)
        mask = (token < min((split + 1) * share, tokens))[:, None] & (d[None, :] < D)
        x = _load(a_ptr, b * a_sb + (token * a_sn)[:, None] + head * a_sh + d[None, :], mask, UPCAST)
        y = _load(b_ptr, b * b_sb + (token * b_sn)[:, None] + head * b_sh + d[None, :], mask, UPCAST)
        acc += tl.dot(tl.trans(x), y, input_precision="ieee")
    place = ((split * tl.num_programs(1) + b) * heads + head) * D * D + d[:, None] * D + d[None, :]
    tl.store(out_ptr + place, acc, mask=(d[:, None] < D) & (d[None, :] < D))


@triton.jit
def _apply_kernel(
    x_ptr, map_ptr, out_ptr, tokens, heads, map_row, map_column,
    x_sb, x_sn, x_sh, out_sb, out_sn, out_sh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[n, i]: the sum over j of x[n, j] * map[j * map_row + i * map_column]."""
    b = tl.cast(tl.program_id(1), tl.int64)
    head = tl.cast(tl.program_id(2), tl.int64)
    token = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = (token < tokens)[:, None] & (d[None, :] < D)
    x = _load(x_ptr, b * x_sb + (token * x_sn)[:, None] + head * x_sh + d[None, :], mask, UPCAST)
    place = (b * heads + head) * D * D + d[:, None] * map_row + d[None, :] * map_column
    m = tl.load(map_ptr + place, mask=(d[:, None] < D) & (d[None, :] < D), other=0.0)
    y = tl.dot(x.to(tl.float32), m, input_precision="ieee") if x.dtype == tl.float32 else tl.dot(x, m.to(x.dtype))
    out = b * out_sb + (token * out_sn)[:, None] + head * out_sh + d[None, :]
    tl.store(out_ptr + out, y.to(out_ptr.dtype.element_ty), mask=mask)


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_sb": x.stride(0), f"{name}_sn": x.stride(1), f"{name}_sh": x.stride(2)}


def _launch(direction: str, x: Tensor, run: Callable[[Config], None]) -> None:
    """tile: tokens of a block. The columns are the whole dim x dim map and no table can change them."""
    heuristic = [Config(tile, 16, 4, stages) for tile, stages in ((64, 3), (32, 2), (16, 1))]
    problem = tuning.key("channel", direction, x, x.shape[3], (x.shape[3],) * 2, x.shape[1])
    tuning.launch(problem, heuristic, x.device, run, x.shape[2])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[B, heads, dim, dim] in float32; splits of the tokens are added in a fixed order."""
    batch, tokens, heads, dim = a.shape
    # the batch has no say: an image's bits would depend on the others
    splits = max(1, min(triton.cdiv(tokens, 512), 16))
    share = triton.cdiv(triton.cdiv(tokens, splits), 64) * 64
    splits = triton.cdiv(tokens, share)
    partial = torch.empty((splits, batch, heads, dim, dim), dtype=torch.float32, device=a.device)

    def run(config: Config) -> None:
        _product_kernel[(splits, batch, heads)](
            a, b, partial, tokens, heads, share, **_strides("a", a), **_strides("b", b),
            D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_N=max(16, config.tile),
            UPCAST=_INTERPRET and a.dtype == torch.bfloat16, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    _launch("product", a, run)
    return partial.sum(0)


def _apply(x: Tensor, maps: Tensor, out: Tensor, transpose: bool) -> None:
    """out[n] = x[n] @ maps, or its transpose."""
    batch, tokens, heads, dim = x.shape

    def run(config: Config) -> None:
        tile = max(16, config.tile)
        _apply_kernel[(triton.cdiv(tokens, tile), batch, heads)](
            x, maps, out, tokens, heads, 1 if transpose else dim, dim if transpose else 1,
            **_strides("x", x), **_strides("out", out),
            D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_N=tile,
            UPCAST=_INTERPRET and x.dtype == torch.bfloat16, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    _launch("apply", x, run)


def channel_forward_triton(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output [B, N, heads, dim] and the attention maps [B, heads, dim, dim] in float32."""
    q, k, v = _unit(q), _unit(k), _unit(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0:
        return out, torch.empty((q.shape[0], *q.shape[2:], q.shape[3]), dtype=torch.float32, device=q.device)
    maps = _product(k, v).mul_(scale).softmax(-1)
    _apply(q, maps, out, transpose=True)
    return out, maps


def channel_backward_triton(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, maps: Tensor, scale: float, into: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Write dq, dk, dv into the three tensors given, which have unit last stride."""
    if q.numel() == 0:
        return
    grad, q, k, v = _unit(grad), _unit(q), _unit(k), _unit(v)
    dq, dk, dv = into
    dmaps = _product(grad, q)
    _apply(grad, maps, dq, transpose=False)
    dscores = (dmaps - (dmaps * maps).sum(-1, keepdim=True)).mul_(maps).mul_(scale)
    _apply(v, dscores, dk, transpose=True)
    _apply(k, dscores, dv, transpose=False)
