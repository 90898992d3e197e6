"""The public function: argument checks, registration with torch.library, choice of the path."""

import math
from typing import Any

import torch
from torch import Tensor

from zoo.ops._backend import resolve_backend, run_reference, runs_triton, without_triton
from zoo.ops._checks import check_agreement, check_layout, compute_dtype, require
from zoo.ops._overrides import overridable
from zoo.ops._register import call, register_pair

from .cpu import large_kernel_attention_backward_cpu, large_kernel_attention_cpu, output_format
from .reference import large_kernel_attention_reference

__all__ = ["large_kernel_attention"]

_NAME = "large_kernel_attention"
_PARAMETERS = ("conv0_weight", "conv0_bias", "conv_spatial_weight", "conv_spatial_bias", "conv1_weight", "conv1_bias")


@overridable
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
    arguments = (
        x, conv0_weight, conv0_bias, conv_spatial_weight, conv_spatial_bias, conv1_weight, conv1_bias, dilation,
    )  # fmt: skip
    _check(_NAME, *arguments)
    backend = resolve_backend(_NAME, backend, x, without_triton(x))
    if backend == "reference":
        return run_reference(large_kernel_attention_reference, *arguments)
    out: Tensor = call(_NAME, *arguments, backend)[0]
    return out


def _check(op: str, x: Tensor, *arguments: Any) -> None:
    parameters, dilation = dict(zip(_PARAMETERS, arguments, strict=False)), arguments[6]
    check_layout(op, "x", x, "[B, C, H, W]")
    require(isinstance(dilation, int) and dilation >= 1, op, "dilation must be an int >= 1, got {!r}", dilation)
    channels = x.shape[1]
    for name, parameter in parameters.items():
        if parameter is None and name.endswith("bias"):
            continue
        shape = tuple(parameter.shape)
        if name.endswith("bias"):
            require(shape == (channels,), op, "{} must be [{}] or None, got {}", name, channels, shape)
        elif name == "conv1_weight":
            fits = shape == (channels, channels, 1, 1)
            require(fits, op, "{} must be [{}, {}, 1, 1], got {}", name, channels, channels, shape)
        else:
            fits = len(shape) == 4 and shape[:2] == (channels, 1) and shape[2] % 2 == 1 and shape[3] % 2 == 1
            message = "{} must be [{}, 1, odd, odd] for x of {} channels, got {}"
            require(fits, op, message, name, channels, channels, shape)
    check_agreement(op, {"x": x}, **parameters)


def _forward(
    x: Tensor,
    conv0_weight: Tensor, conv0_bias: Tensor | None,
    conv_spatial_weight: Tensor, conv_spatial_bias: Tensor | None,
    conv1_weight: Tensor, conv1_bias: Tensor | None,
    dilation: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    arguments = (
        x, conv0_weight, conv0_bias, conv_spatial_weight, conv_spatial_bias, conv1_weight, conv1_bias, dilation,
    )  # fmt: skip
    if runs_triton(_NAME, backend, x):
        from .kernels import large_kernel_attention_triton

        out, spatial = _fake(*arguments, backend)
        large_kernel_attention_triton(*arguments, out=out, spatial=spatial)
        return out, spatial
    return large_kernel_attention_cpu(*arguments)


def _backward(
    grad: Tensor, x: Tensor,
    conv0_weight: Tensor, conv0_bias: Tensor | None,
    conv_spatial_weight: Tensor, conv_spatial_bias: Tensor | None,
    conv1_weight: Tensor, conv1_bias: Tensor | None,
    spatial: Tensor, dilation: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads: Any
    arguments = (
        grad, x, conv0_weight, conv0_bias, conv_spatial_weight, conv_spatial_bias, conv1_weight, conv1_bias, spatial,
        dilation,
    )  # fmt: skip
    if runs_triton(_NAME, backend, x):
        from .kernels import large_kernel_attention_backward_triton

        dx = _empty(x)
        grads = dx, *large_kernel_attention_backward_triton(*arguments, dx=dx)
    else:
        grads = large_kernel_attention_backward_cpu(*arguments)
    x_grad, conv0, bias0, spatial_grad, bias_spatial, conv1, bias1 = grads
    return x_grad, conv0, bias0, spatial_grad, bias_spatial, conv1, bias1


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=output_format(x))


def _fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    # the kernels sum in float32 and keep what they save as narrow as the input
    dtype = x.dtype if runs_triton(_NAME, arguments[-1], x) else compute_dtype(x)
    spatial = torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    return _empty(x), spatial


def _backward_fake(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    pairs = ((x.new_empty(weight.shape), x.new_empty((x.shape[1],))) for weight in arguments[0:6:2])
    return _empty(x), *(t for pair in pairs for t in pair)


def _flops(x: Any, conv0_weight: Any, conv_spatial_weight: Any) -> int:
    taps = math.prod(conv0_weight[2:]) + math.prod(conv_spatial_weight[2:])
    return 2 * math.prod(x) * (taps + x[1])


register_pair(
    _NAME, _forward, _backward, _fake,
    outputs=("out", "spatial"),
    backward_fake=_backward_fake,
    flops=_flops,
    backward_flops=3,
    shared=_PARAMETERS,
    check=_check,
)  # fmt: skip
