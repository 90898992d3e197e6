"""Layers that families share, and whether an op may take a module's weights in place of a call of the module."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as _hooks

__all__ = ["DWMlp", "channels_last", "global_attention", "is_plain_conv"]

_CONV_FORWARD = nn.Conv2d.forward


def is_plain_conv(module: nn.Module, dilation: int = 1) -> bool:
    """Whether a call of the module does nothing but convolve with its weight and bias, so that an op may do it.

    The convolution is one of stride 1 and zero padding that keeps the map's size. Otherwise the module is to be called:
    it has hooks (of pruning, offloading or counters; hooks of every module count), is of a subclass (parametrized,
    sharded, quantized) or a wrapper (an adapter), has a `forward` of its own, a weight of another tensor class
    (DTensor, torchao), or is seen by FX, which records modules.
    """
    return (
        type(module) is nn.Conv2d
        and module.stride == (1, 1)
        and module.dilation == (dilation, dilation)
        and module.padding == tuple(dilation * (k // 2) for k in module.kernel_size)
        and module.padding_mode == "zeros"
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and not _hooks._has_any_global_hook()
        and "forward" not in module.__dict__
        and nn.Conv2d.forward is _CONV_FORWARD
        and _is_plain_tensor(module.weight)
        and (module.bias is None or _is_plain_tensor(module.bias))
    )


def _is_plain_tensor(x: Tensor) -> bool:
    # the last two stand for parameters in torch.export
    return type(x) in (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


def channels_last(x: Tensor) -> Tensor:
    """The same (B, C, H, W) map with its channels last in memory: by permutations, for torch.vmap knows no formats."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def global_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Attention of every pixel to every pixel, scaled by dim ** -0.5: (B, H, W, 3 C), heads within q, k, v, to C."""
    B, H, W, C = qkv.shape
    q, k, v = qkv.reshape(B, H * W, 3, num_heads, C // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C // 3)


class DWMlp(nn.Module):
    """fc1 - depthwise 3x3 - GELU - fc2 on (B, H, W, C)."""

    def __init__(
        self, dim: int, hidden_dim: int, proj_drop: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.fc2(self.act(x)))
