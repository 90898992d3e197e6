"""The public function: argument checks, registration with torch.library, choice of the path."""

from typing import Any

import torch
from torch import Tensor

from zoo.ops._dispatch import (
    autocast_dtype,
    register_op,
    require,
    resolve_backend,
    runs_triton,
    without_triton,
)

from .cpu import large_kernel_attention_backward_cpu, large_kernel_attention_cpu, output_format
from .reference import large_kernel_attention_reference

__all__ = ["large_kernel_attention"]

_NAME = "large_kernel_attention"
_PARAMETERS = (
    "Tensor conv0_weight, Tensor? conv0_bias, Tensor conv_spatial_weight, Tensor? conv_spatial_bias, "
    "Tensor conv1_weight, Tensor? conv1_bias"
)


def large_kernel_attention(
    x: Tensor,
    conv0_weight: Tensor,
    conv0_bias: Tensor | None,
    conv_spatial_weight: Tensor,
    conv_spatial_bias: Tensor | None,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    *,
    dilation: int = 3,
    backend: str | None = None,
) -> Tensor:
    """Large kernel attention: x * conv1(conv_spatial(conv0(x))).

    A depth-wise convolution, a dilated depth-wise convolution and a 1x1 convolution make the gate of the input; all of
    them pad with zeros and keep H and W. The published VAN has kernels 5 and 7 with dilation 3: a window of 23 x 23.

    Visual Attention Network (arXiv:2202.09741), section 3.2; `LKA` in models/van.py of VAN-Classification.

    Args:
        x: [B, C, H, W], any strides. Where it is channels last, so is the output.
        conv0_weight: [C, 1, kh, kw], odd sizes.
        conv0_bias: [C] or None, as the other biases.
        conv_spatial_weight: [C, 1, Kh, Kw], odd sizes, taps `dilation` pixels apart.
        conv1_weight: [C, C, 1, 1].
        dilation: of conv_spatial, on both axes.
        backend: "reference", "cpu", "triton" or None for the best that can run.

    Returns:
        [B, C, H, W] in the dtype of x.

    Raises:
        ValueError: a shape, dtype or the dilation does not fit; the message names it.
        RuntimeError: the named backend cannot run this call.
    """
    biases = {"conv0_bias": conv0_bias, "conv_spatial_bias": conv_spatial_bias, "conv1_bias": conv1_bias}
    _check(x, conv0_weight, conv_spatial_weight, conv1_weight, biases, dilation)
    backend = resolve_backend(_NAME, backend, x, without_triton(x))
    arguments = (x, conv0_weight, conv0_bias, conv_spatial_weight, conv_spatial_bias, conv1_weight, conv1_bias)
    if backend == "reference":
        return large_kernel_attention_reference(*arguments, dilation)
    out: Tensor = _forward(*arguments, dilation, backend)[0]
    return out


def _check(x: Tensor, conv0: Tensor, spatial: Tensor, conv1: Tensor, biases: dict[str, Any], dilation: int) -> None:
    require(x.dim() == 4, f"{_NAME}: x must be [B, C, H, W], got shape {tuple(x.shape)}")
    require(x.is_floating_point(), f"{_NAME}: x must be floating point, got {x.dtype}")
    require(min(x.shape[1:]) > 0, f"{_NAME}: x must have C, H and W of at least 1, got shape {tuple(x.shape)}")
    require(isinstance(dilation, int) and dilation >= 1, f"{_NAME}: dilation must be an int >= 1, got {dilation!r}")
    channels = x.shape[1]
    for name, weight in (("conv0_weight", conv0), ("conv_spatial_weight", spatial)):
        shape = tuple(weight.shape)
        fits = len(shape) == 4 and shape[:2] == (channels, 1) and shape[2] % 2 == 1 and shape[3] % 2 == 1
        require(fits, f"{_NAME}: {name} must be [{channels}, 1, odd, odd] for x of {channels} channels, got {shape}")
    fits = tuple(conv1.shape) == (channels, channels, 1, 1)
    require(fits, f"{_NAME}: conv1_weight must be [{channels}, {channels}, 1, 1], got {tuple(conv1.shape)}")
    for name, bias in biases.items():
        fits = bias is None or tuple(bias.shape) == (channels,)
        require(fits, f"{_NAME}: {name} must be [{channels}] or None, got {None if fits else tuple(bias.shape)}")
    tensors = {"conv0_weight": conv0, "conv_spatial_weight": spatial, "conv1_weight": conv1, **biases}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        require(tensor.device == x.device, f"{_NAME}: {name} is on {tensor.device}, x on {x.device}")
        same = tensor.dtype == x.dtype or autocast_dtype(x) is not None
        require(same, f"{_NAME}: {name} has dtype {tensor.dtype}, x has {x.dtype}")


def _forward_impl(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if runs_triton(_NAME, arguments[-1], x):
        from .kernels import large_kernel_attention_triton

        out, spatial = _forward_fake(x, *arguments)
        large_kernel_attention_triton(x, *arguments[:-1], out=out, spatial=spatial)
        return out, spatial
    return large_kernel_attention_cpu(x, *arguments[:-1])


def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if runs_triton(_NAME, arguments[-1], x):
        dtype = x.dtype  # the kernels sum in float32 and keep what they save as narrow as the input
    else:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    spatial = torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=output_format(x)), spatial


def _backward_impl(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    if runs_triton(_NAME, arguments[-1], x):
        from .kernels import large_kernel_attention_backward_triton

        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=output_format(x))
        return dx, *large_kernel_attention_backward_triton(grad, x, *arguments[:-1], dx=dx)
    return large_kernel_attention_backward_cpu(grad, x, *arguments[:-1])


def _backward_fake(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=output_format(x))
    weights = [x.new_empty(w.shape) for w in arguments[0:6:2]]
    biases = [x.new_empty((x.shape[1],)) for _ in weights]
    return dx, *(t for pair in zip(weights, biases, strict=True) for t in pair)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.arguments = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # a map of zeros for the second output


def _backward_autograd(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    grads = _backward(grad, *saved, *ctx.arguments)
    return *(g if given is not None else None for g, given in zip(grads, saved[:7], strict=True)), None, None


_backward = register_op(
    f"{_NAME}_backward(Tensor grad, Tensor x, {_PARAMETERS}, Tensor spatial, int dilation, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
    autocast=False,
)
_forward = register_op(
    f"{_NAME}(Tensor x, {_PARAMETERS}, int dilation, str backend) -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
    setup_context=_setup_context,
    backward=_backward_autograd,
)
