"""Whether an op may take a module's weights in place of a call of the module."""

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as _hooks

__all__ = ["is_plain_conv"]

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
