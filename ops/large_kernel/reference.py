"""Large kernel attention in plain PyTorch: the definition that every other path is measured against."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["large_kernel_attention_reference"]


def large_kernel_attention_reference(
    x: Tensor,
    conv0_weight: Tensor,
    conv0_bias: Tensor | None,
    conv_spatial_weight: Tensor,
    conv_spatial_bias: Tensor | None,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    dilation: int,
) -> Tensor:
    """x * conv1(conv_spatial(conv0(x))): depth-wise, dilated depth-wise, 1x1; every convolution keeps H and W.

    Args:
        x: [B, C, H, W].
        conv0_weight: [C, 1, kh, kw]; conv_spatial_weight: [C, 1, Kh, Kw], taps `dilation` apart; all odd.
        conv1_weight: [C, C, 1, 1].
        conv0_bias, conv_spatial_bias, conv1_bias: [C] or None.
        dilation: of conv_spatial.

    Returns:
        [B, C, H, W].
    """
    attn = _depthwise(x, conv0_weight, conv0_bias, 1)
    attn = _depthwise(attn, conv_spatial_weight, conv_spatial_bias, dilation)
    return x * F.conv2d(attn, conv1_weight, conv1_bias)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    padding = [dilation * (k // 2) for k in weight.shape[-2:]]
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])
