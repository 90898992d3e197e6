"""Triton kernels of large kernel attention: depth-wise convolutions, and the 1x1 product with its gate.

All strides are given, so NCHW and channels_last maps are read in place. Weight gradients are summed per share of the
pixels and then over the shares: a fixed order, nothing atomic.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops._local import tuning
from zoo.ops._local.tuning import Config

__all__ = ["large_kernel_attention_backward_triton", "large_kernel_attention_triton"]

_INTERPRET = triton.knobs.runtime.interpret


@triton.jit
def _load(ptr, offsets, mask, UPCAST: tl.constexpr):
    x = tl.load(ptr + offsets, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _depthwise_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, height, width, x_sb, x_sc, x_sh, x_sw, y_sb, y_sc, y_sh, y_sw,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr, BIAS: tl.constexpr,
    FLIP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[p, c] = bias[c] + sum over taps of w[c, tap] * x[p + tap, c]; FLIP gives the transposed convolution."""
    b = tl.cast(tl.program_id(2), tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    ch = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    h = p // width
    w = p % width
    mask_p = p < height * width
    mask_c = ch < C
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if BIAS:
        acc += tl.load(bias_ptr + ch, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    for tap in range(KH * KW):
        r = h + (tap // KW - KH // 2) * DILATION
        c = w + (tap % KW - KW // 2) * DILATION
        inside = mask_p & (r >= 0) & (r < height) & (c >= 0) & (c < width)
        offset = (r.to(tl.int64) * x_sh + c.to(tl.int64) * x_sw)[:, None] + (ch.to(tl.int64) * x_sc)[None, :]
        x = tl.load(x_ptr + b * x_sb + offset, mask=inside[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        where = KH * KW - 1 - tap if FLIP else tap
        weight = tl.load(w_ptr + ch * (KH * KW) + where, mask=mask_c, other=0.0).to(tl.float32)
        acc += x * weight[None, :]
    offset = (h.to(tl.int64) * y_sh + w.to(tl.int64) * y_sw)[:, None] + (ch.to(tl.int64) * y_sc)[None, :]
    tl.store(y_ptr + b * y_sb + offset, acc.to(y_ptr.dtype.element_ty), mask=mask_p[:, None] & mask_c[None, :])


@triton.jit
def _depthwise_weight_kernel(
    x_ptr, g_ptr, dw_ptr, db_ptr, pixels, height, width, share,
    x_sb, x_sc, x_sh, x_sw, g_sb, g_sc, g_sh, g_sw,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[split, c, row, :] and db[split, c]: one kernel row's gradient, summed over a share of all pixels."""
    split = tl.program_id(0)
    ch = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(2)
    mask_c = ch < C
    taps = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(split * share, min((split + 1) * share, pixels), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask_p = p < min((split + 1) * share, pixels)
        b = (p // (height * width)).to(tl.int64)
        h = p % (height * width) // width
        w = p % width
        g_offset = (b * g_sb + h.to(tl.int64) * g_sh + w.to(tl.int64) * g_sw)[:, None] + (ch.to(tl.int64) * g_sc)[
            None, :
        ]
        g = tl.load(g_ptr + g_offset, mask=mask_p[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        total += tl.sum(g, 0)
        r = h + (row - KH // 2) * DILATION
        for tap in range(KW):
            c = w + (tap - KW // 2) * DILATION
            inside = mask_p & (r >= 0) & (r < height) & (c >= 0) & (c < width)
            x_offset = (b * x_sb + r.to(tl.int64) * x_sh + c.to(tl.int64) * x_sw)[:, None] + (ch.to(tl.int64) * x_sc)[
                None, :
            ]
            x = tl.load(x_ptr + x_offset, mask=inside[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
            acc += tl.where((taps == tap)[:, None], tl.sum(x * g, 0)[None, :], 0.0)
    place = ((split * C + ch)[None, :] * KH + row) * KW + taps[:, None]
    tl.store(dw_ptr + place, acc, mask=(taps < KW)[:, None] & mask_c[None, :])
    if row == 0:
        tl.store(db_ptr + split * C + ch, total, mask=mask_c)


@triton.jit
def _pointwise_kernel(
    a_ptr, gate_ptr, w_ptr, bias_ptr, out_gate_ptr, y_ptr, height, width,
    a_sb, a_sc, a_sh, a_sw, gate_sb, gate_sc, gate_sh, gate_sw, out_gate_sb, out_gate_sc, out_gate_sh, out_gate_sw,
    y_sb, y_sc, y_sh, y_sw, w_in, w_out,
    C: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, OUT_GATE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_CO: tl.constexpr, BLOCK_CI: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y = ((a * gate) @ w + bias) * out_gate per pixel; each of gate, bias and out_gate is optional."""
    b = tl.cast(tl.program_id(2), tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    co = tl.program_id(1) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    h = (p // width).to(tl.int64)
    w = (p % width).to(tl.int64)
    mask_p = p < height * width
    acc = tl.zeros([BLOCK_P, BLOCK_CO], tl.float32)
    for start in range(0, C, BLOCK_CI):
        ci = (start + tl.arange(0, BLOCK_CI)).to(tl.int64)
        mask = mask_p[:, None] & (ci < C)[None, :]
        a = _load(a_ptr, b * a_sb + (h * a_sh + w * a_sw)[:, None] + (ci * a_sc)[None, :], mask, UPCAST)
        if GATE:
            offset = b * gate_sb + (h * gate_sh + w * gate_sw)[:, None] + (ci * gate_sc)[None, :]
            a = (a.to(tl.float32) * tl.load(gate_ptr + offset, mask=mask, other=0.0).to(tl.float32)).to(a.dtype)
        weight = _load(w_ptr, ci[:, None] * w_in + co[None, :] * w_out, (ci < C)[:, None] & (co < C)[None, :], UPCAST)
        acc += tl.dot(a, weight.to(a.dtype), input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + co, mask=co < C, other=0.0).to(tl.float32)[None, :]
    mask = mask_p[:, None] & (co < C)[None, :]
    co = co.to(tl.int64)
    if OUT_GATE:
        offset = b * out_gate_sb + (h * out_gate_sh + w * out_gate_sw)[:, None] + (co * out_gate_sc)[None, :]
        acc *= tl.load(out_gate_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    offset = b * y_sb + (h * y_sh + w * y_sw)[:, None] + (co * y_sc)[None, :]
    tl.store(y_ptr + offset, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pointwise_weight_kernel(
    a_ptr, g_ptr, gate_ptr, dw_ptr, db_ptr, pixels, area, width, share,
    a_sb, a_sc, a_sh, a_sw, g_sb, g_sc, g_sh, g_sw, gate_sb, gate_sc, gate_sh, gate_sw,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_CO: tl.constexpr, BLOCK_CI: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dw[split, co, ci] = sum of (g * gate)[p, co] * a[p, ci], db[split, co] = sum of (g * gate)[p, co]."""
    split = tl.program_id(0)
    co = (tl.program_id(1) * BLOCK_CO + tl.arange(0, BLOCK_CO)).to(tl.int64)
    ci = (tl.program_id(2) * BLOCK_CI + tl.arange(0, BLOCK_CI)).to(tl.int64)
    acc = tl.zeros([BLOCK_CO, BLOCK_CI], tl.float32)
    total = tl.zeros([BLOCK_CO], tl.float32)
    for start in range(split * share, min((split + 1) * share, pixels), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask_p = p < min((split + 1) * share, pixels)
        b = (p // area).to(tl.int64)
        h = (p % area // width).to(tl.int64)
        w = (p % width).to(tl.int64)
        mask = mask_p[:, None] & (co < C)[None, :]
        g = _load(g_ptr, (b * g_sb + h * g_sh + w * g_sw)[:, None] + (co * g_sc)[None, :], mask, UPCAST)
        gate = tl.load(
            gate_ptr + (b * gate_sb + h * gate_sh + w * gate_sw)[:, None] + (co * gate_sc)[None, :],
            mask=mask,
            other=0.0,
        )
        t = (g.to(tl.float32) * gate.to(tl.float32)).to(g.dtype)
        total += tl.sum(t.to(tl.float32), 0)
        mask = mask_p[:, None] & (ci < C)[None, :]
        a = _load(a_ptr, (b * a_sb + h * a_sh + w * a_sw)[:, None] + (ci * a_sc)[None, :], mask, UPCAST)
        acc += tl.dot(tl.trans(t), a.to(t.dtype), input_precision="ieee")
    mask = (co < C)[:, None] & (ci < C)[None, :]
    tl.store(dw_ptr + (split * C + co)[:, None] * C + ci[None, :], acc, mask=mask)
    if tl.program_id(2) == 0:
        tl.store(db_ptr + split * C + co, total, mask=co < C)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_s{axis}": stride for axis, stride in zip("bchw", x.stride(), strict=True)}


def _block(count: int, most: int) -> int:
    return min(max(16, most), max(16, triton.next_power_of_2(count)))


def _launch(direction: str, x: Tensor, weight: Tensor, columns: int, run: Callable[[Config], None]) -> None:
    """tile: pixels of a block, columns: channels of a block."""
    heuristic = [Config(64, columns, 4, 3), Config(64, 32, 4, 2), Config(32, 32, 4, 1), Config(16, 16, 4, 1)]
    box = (weight.shape[2], weight.shape[3])
    problem = tuning.key("large_kernel", direction, x, x.shape[1], box, x.shape[2] * x.shape[3])
    tuning.launch(problem, heuristic, x.device, run)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, y: Tensor, flip: bool = False) -> Tensor:
    batch, channels, height, width = x.shape

    def run(config: Config) -> None:
        block_p, block_c = _block(height * width, config.tile), _block(channels, config.columns)
        grid = (triton.cdiv(height * width, block_p), triton.cdiv(channels, block_c), batch)
        _depthwise_kernel[grid](
            x, weight.contiguous(), x if bias is None else bias, y, height, width,
            **_strides("x", x), **_strides("y", y),
            C=channels, KH=weight.shape[2], KW=weight.shape[3], DILATION=dilation, BIAS=bias is not None, FLIP=flip,
            BLOCK_P=block_p, BLOCK_C=block_c, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    _launch("depthwise", x, weight, 32, run)
    return y


def _split(pixels: int, programs: int, block: int) -> tuple[int, int]:
    """Shares of the pixels that keep a GPU busy, and the pixels of a share."""
    splits = max(1, min(triton.cdiv(pixels, 4 * block), 1024 // max(1, programs)))
    share = triton.cdiv(triton.cdiv(pixels, splits), block) * block
    return triton.cdiv(pixels, share), share


def _depthwise_weight(x: Tensor, grad: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    kh, kw = weight.shape[2:]
    splits, share = _split(batch * height * width, triton.cdiv(channels, 32) * kh, 64)
    dw = torch.empty((splits, channels, kh, kw), dtype=torch.float32, device=x.device)
    db = torch.empty((splits, channels), dtype=torch.float32, device=x.device)

    def run(config: Config) -> None:
        block_c = _block(channels, config.columns)
        _depthwise_weight_kernel[(splits, triton.cdiv(channels, block_c), kh)](
            x, grad, dw, db, batch * height * width, height, width, share, **_strides("x", x), **_strides("g", grad),
            C=channels, KH=kh, KW=kw, DILATION=dilation, BLOCK_P=max(16, config.tile), BLOCK_C=block_c,
            BLOCK_K=triton.next_power_of_2(kw), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    _launch("depthwise_weight", x, weight, 32, run)
    return dw.sum(0).view(weight.shape).to(weight.dtype), db.sum(0).to(weight.dtype)


def _pointwise(
    a: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    out_gate: Tensor | None = None,
    transpose: bool = False,
) -> Tensor:
    """weight is [out, in]; transposed, the product goes from out to in."""
    batch, channels, height, width = a.shape
    matrix = weight.reshape(channels, channels)
    w_in, w_out = (matrix.stride(0), matrix.stride(1)) if transpose else (matrix.stride(1), matrix.stride(0))

    def run(config: Config) -> None:
        block_p, block_c = _block(height * width, config.tile), _block(channels, config.columns)
        grid = (triton.cdiv(height * width, block_p), triton.cdiv(channels, block_c), batch)
        _pointwise_kernel[grid](
            a, a if gate is None else gate, matrix, a if bias is None else bias, a if out_gate is None else out_gate,
            y, height, width, **_strides("a", a), **_strides("gate", a if gate is None else gate),
            **_strides("out_gate", a if out_gate is None else out_gate), **_strides("y", y), w_in=w_in, w_out=w_out,
            C=channels, GATE=gate is not None, BIAS=bias is not None, OUT_GATE=out_gate is not None,
            BLOCK_P=block_p, BLOCK_CO=block_c, BLOCK_CI=_block(channels, 32),
            UPCAST=_INTERPRET and a.dtype == torch.bfloat16, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    _launch("pointwise", a, weight, 64, run)
    return y


def _pointwise_weight(a: Tensor, grad: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = a.shape
    pixels = batch * height * width
    splits, share = _split(pixels, triton.cdiv(channels, 64) ** 2, 64)
    dw = torch.empty((splits, channels, channels), dtype=torch.float32, device=a.device)
    db = torch.empty((splits, channels), dtype=torch.float32, device=a.device)

    def run(config: Config) -> None:
        block = _block(channels, config.columns)
        blocks = triton.cdiv(channels, block)
        _pointwise_weight_kernel[(splits, blocks, blocks)](
            a, grad, gate, dw, db, pixels, height * width, width, share,
            **_strides("a", a), **_strides("g", grad), **_strides("gate", gate),
            C=channels, BLOCK_P=max(16, config.tile), BLOCK_CO=block, BLOCK_CI=block,
            UPCAST=_INTERPRET and a.dtype == torch.bfloat16, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    _launch("pointwise_weight", a, weight, 64, run)
    return dw.sum(0).view(weight.shape).to(weight.dtype), db.sum(0).to(weight.dtype)


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
    """Write the output, and conv_spatial(conv0(x)), which the backward reuses, into the two tensors given."""
    if x.numel() == 0:
        return
    local = _depthwise(x, conv0_weight, conv0_bias, 1, torch.empty_like(spatial))
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
    """Write the gradient of x into dx; the gradients of the three weights and biases in the order of the arguments."""
    if x.numel() == 0:
        weights = (conv0_weight, conv_spatial_weight, conv1_weight)
        return tuple(t for w in weights for t in (torch.zeros_like(w), w.new_zeros(w.shape[0])))
    local = _depthwise(x, conv0_weight, conv0_bias, 1, torch.empty_like(spatial))
    dconv1 = _pointwise_weight(spatial, grad, x, conv1_weight)
    dspatial = _pointwise(grad, conv1_weight, torch.empty_like(spatial), gate=x, transpose=True)
    dconv_spatial = _depthwise_weight(local, dspatial, conv_spatial_weight, dilation)
    dlocal = _depthwise(dspatial, conv_spatial_weight, None, dilation, torch.empty_like(spatial), flip=True)
    dconv0 = _depthwise_weight(x, dlocal, conv0_weight, 1)
    # x both enters the convolutions and gates their product
    through = _depthwise(dlocal, conv0_weight, None, 1, torch.empty_like(spatial), flip=True)
    _pointwise(spatial, conv1_weight, dx, bias=conv1_bias, out_gate=grad)
    dx.add_(through)
    return (*dconv0, *dconv_spatial, *dconv1)
