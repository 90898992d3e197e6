"""Whether an op may take a module's weights in place of a call of the module."""

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as _hooks

__all__ = ["is_plain_conv"]

_CONV_FORWARD = nn.Conv2d.forward


def is_plain_conv(module: nn.Module) -> bool:
    """Whether a call of the module is the convolution of its weight and bias and nothing else.

    It is not where anything is attached: a forward or backward hook (pruning, offloading, counters; of this module or
    of all), a subclass (parametrization, FSDP, quantization) or wrapper (LoRA), a patched `forward`, a weight of
    another tensor class (DTensor, torchao), or FX, which records modules. Then call it, or that is left out.
    """
    return (
        type(module) is nn.Conv2d
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
