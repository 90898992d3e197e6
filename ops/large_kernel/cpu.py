"""The fast CPU path of large kernel attention: channels last, and the dilated convolution as dense ones."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops._checks import compute_dtype

__all__ = ["large_kernel_attention_backward_cpu", "large_kernel_attention_cpu"]

_CONV_BACKWARD = torch.ops.aten.convolution_backward.default


def large_kernel_attention_cpu(
    x: Tensor,
    conv0_weight: Tensor,
    conv0_bias: Tensor | None,
    conv_spatial_weight: Tensor,
    conv_spatial_bias: Tensor | None,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """The output, and what conv_spatial gave: [B, C, H, W] each, the second channels last in the computing dtype."""
    tokens = _tokens(x)
    attn = _depthwise(tokens, _wide(conv0_weight), _wide_bias(conv0_bias))
    phases = _depthwise(_split_phases(attn, dilation), _wide(conv_spatial_weight), _wide_bias(conv_spatial_bias))
    spatial = _join_phases(phases, dilation, x.shape)
    gate = F.linear(spatial, _wide(conv1_weight).flatten(1), _wide_bias(conv1_bias))
    return _like(gate.mul_(tokens), x), spatial.permute(0, 3, 1, 2)


def large_kernel_attention_backward_cpu(
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
) -> tuple[Tensor, ...]:
    """Gradients of x, then weight and bias of conv0, conv_spatial and conv1 (a bias gradient even where it is None)."""
    tokens, upstream, spatial = _tokens(x), _tokens(grad), spatial.permute(0, 2, 3, 1)
    channels = x.shape[1]
    w0, w, w1 = _wide(conv0_weight), _wide(conv_spatial_weight), _wide(conv1_weight).flatten(1)

    d_gate = (upstream * tokens).view(-1, channels)
    d_w1 = d_gate.t() @ spatial.reshape(-1, channels)
    d_b1 = d_gate.sum(0)
    dx = F.linear(spatial, w1, _wide_bias(conv1_bias)).mul_(upstream)

    d_spatial = (d_gate @ w1).view(tokens.shape)
    attn = _split_phases(_depthwise(tokens, w0, _wide_bias(conv0_bias)), dilation)
    d_attn, d_w = _depthwise_backward(_split_phases(d_spatial, dilation), attn, w)
    d_attn = _join_phases(d_attn, dilation, x.shape)
    d_tokens, d_w0 = _depthwise_backward(d_attn, tokens, w0)
    dx += d_tokens

    # The convolution's own bias gradient is a plain running sum; torch's sums pairwise.
    d_b0, d_b = (g.view(-1, channels).sum(0) for g in (d_attn, d_spatial))
    grads = (d_w0, d_b0, d_w, d_b, d_w1.view(conv1_weight.shape), d_b1)
    return _like(dx, x), *(g.to(x.dtype).contiguous() for g in grads)


def _wide(x: Tensor) -> Tensor:
    """Half precision is computed in float32: on a CPU that is no slower, and the sums need it."""
    return x.to(compute_dtype(x))


def _wide_bias(x: Tensor | None) -> Tensor | None:
    return None if x is None else _wide(x)


def _tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] in any strides -> contiguous [B, H, W, C] in the computing dtype."""
    return _wide(x.permute(0, 2, 3, 1)).contiguous()


def _like(tokens: Tensor, x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W] in the dtype of x, channels last if x is, else contiguous."""
    memory_format = output_format(x)
    out = tokens.permute(0, 3, 1, 2).to(x.dtype)
    return out.contiguous(memory_format=memory_format)


def output_format(x: Tensor) -> torch.memory_format:
    """The memory format of the output and of the gradient of x."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A dense depth-wise convolution of [B, H, W, C] that keeps H and W."""
    padding = [k // 2 for k in weight.shape[-2:]]
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=x.shape[-1])
    return y.permute(0, 2, 3, 1)


def _depthwise_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of input and weight of `_depthwise`."""
    channels, padding = x.shape[-1], [k // 2 for k in weight.shape[-2:]]
    dx, dw, _ = _CONV_BACKWARD(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None,
        [1, 1], padding, [1, 1], False, [0, 0], channels, [True, True, False],
    )  # fmt: skip
    return dx.permute(0, 2, 3, 1), dw


def _split_phases(x: Tensor, dilation: int) -> Tensor:
    """[B, H, W, C] -> [B * dilation**2, ceil(H / dilation), ceil(W / dilation), C]: tokens that see one another."""
    if dilation == 1:
        return x.contiguous()
    B, H, W, C = x.shape
    x = F.pad(x, (0, 0, 0, -W % dilation, 0, -H % dilation))
    rows, cols = x.shape[1] // dilation, x.shape[2] // dilation
    x = x.reshape(B, rows, dilation, cols, dilation, C).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B * dilation * dilation, rows, cols, C)


def _join_phases(x: Tensor, dilation: int, shape: torch.Size) -> Tensor:
    """The inverse of `_split_phases`; shape is [B, C, H, W]."""
    B, C, H, W = shape
    if dilation > 1:
        rows, cols = x.shape[1:3]
        x = x.reshape(B, dilation, dilation, rows, cols, C).permute(0, 3, 1, 4, 2, 5)
        x = x.reshape(B, rows * dilation, cols * dilation, C)[:, :H, :W]
    return x.contiguous()
