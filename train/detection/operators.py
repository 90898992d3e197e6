"""Operators for mmcv-lite: a stand-in for the compiled module `mmcv._ext`, on torchvision's registered operators.

mmdet's detectors need `mmcv.ops`, which needs `mmcv._ext`, which is compiled for one version of torch at a time.
The stand-in keeps the call signatures of mmcv 2.1.0 (`mmcv/ops/csrc/pytorch/pybind.cpp`: results are written into
tensors that the caller allocated) and serves CPU and GPU alike. What it lacks raises NotImplementedError by name.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor

__all__ = ["install_operators", "StandInOperators"]

_TINY = torch.finfo(torch.float32).tiny
_HOW_TO_COMPILE = "uninstall mmcv-lite and build the compiled mmcv 2.1.0 for your torch (MMCV_WITH_OPS=1)"


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in a type that every torchvision kernel has on every device."""
    return tuple(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)


def nms(boxes: Tensor, scores: Tensor, *, iou_threshold: float, offset: int) -> Tensor:
    """Indices [K] of the boxes [N, 4] (xyxy) that stay, by falling score; sides are x2 - x1 + offset."""
    boxes, scores = _wide(boxes, scores)
    if offset:  # the same overlaps, for torchvision's kernel knows sides x2 - x1 only
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


def bbox_overlaps(boxes1: Tensor, boxes2: Tensor, ious: Tensor, *, mode: int, aligned: bool, offset: int) -> None:
    """IoU (mode 0) or intersection over the first box (mode 1) of all pairs, or of pairs in order (aligned)."""
    first, second = _wide(boxes1, boxes2)
    if not aligned:
        first, second = first[:, None], second[None]
    sides = (
        torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2]) + offset
    ).clamp(min=0)
    overlap = sides.prod(-1)
    area1 = (first[..., 2:] - first[..., :2] + offset).prod(-1)
    area2 = (second[..., 2:] - second[..., :2] + offset).prod(-1)
    union = (area1 + area2 - overlap if mode == 0 else area1.expand_as(overlap)).clamp(min=offset or _TINY)
    ious.copy_(overlap / union)


def _require_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            f"mmcv._ext stand-in: roi_align has pool_mode 'avg' only; for 'max' {_HOW_TO_COMPILE}"
        )


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign of input [B, C, H, W] at rois [N, 5] (index, xyxy) into output [N, C, aligned_height, aligned_width]."""
    _require_average(pool_mode)
    x, boxes = _wide(input, rois)
    output.copy_(
        torch.ops.torchvision.roi_align(
            x, boxes.to(x.dtype), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of `roi_align_forward` into grad_input [B, C, H, W]."""
    _require_average(pool_mode)
    grad, boxes = _wide(grad_output, rois)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad.contiguous(),
            boxes.to(grad.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )


def _class_weight(weight: Tensor, target: Tensor) -> Tensor:
    """The weight of each sample's class [N]; ones where no weights are given."""
    return weight[target] if weight.numel() else weight.new_ones(target.shape)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Focal loss of logits [N, C] and classes [N] (C means background) into output [N, C]; weight [C] or empty."""
    (x,) = _wide(input)
    p = x.sigmoid()
    hit = target[:, None] == torch.arange(x.shape[1], device=x.device)
    positive = -alpha * (1 - p) ** gamma * p.clamp(min=_TINY).log()
    negative = -(1 - alpha) * p**gamma * (1 - p).clamp(min=_TINY).log()
    loss = torch.where(hit, positive, negative)
    output.copy_(loss * _class_weight(weight, target)[:, None])


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Derivative of each element of `sigmoid_focal_loss_forward` by its logit."""
    (x,) = _wide(input)
    p = x.sigmoid()
    hit = target[:, None] == torch.arange(x.shape[1], device=x.device)
    positive = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * p.clamp(min=_TINY).log())
    negative = -(1 - alpha) * p**gamma * (gamma * (1 - p) * (1 - p).clamp(min=_TINY).log() - p)
    grad = torch.where(hit, positive, negative)
    grad_input.copy_(grad * _class_weight(weight, target)[:, None])


def _deform_geometry(
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int,
) -> tuple[int, ...]:  # fmt: skip
    return dH, dW, padH, padW, dilationH, dilationW, group, deformable_group


def _modulated_geometry(
    kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
    dilation_h: int, dilation_w: int, group: int, deformable_group: int,
) -> tuple[int, ...]:  # fmt: skip
    return stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group


def _deform_arguments(
    x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, geometry: tuple[int, ...]
) -> tuple[Any, ...]:
    """What torchvision's kernels take; without mask or bias they want placeholders of a certain shape."""
    x, weight, offset = _wide(x, weight, offset)
    mask_ = x.new_zeros(x.shape[0], 1) if mask is None else _wide(mask)[0]
    bias_ = x.new_zeros(weight.shape[0]) if bias is None else _wide(bias)[0]
    return (*(t.contiguous() for t in (x, weight, offset, mask_, bias_)), *geometry, mask is not None)


def _deform(
    x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, geometry: tuple[int, ...]
) -> Tensor:
    return torch.ops.torchvision.deform_conv2d(*_deform_arguments(x, weight, offset, mask, bias, geometry))


def _deform_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """Gradients by input, weight, offset, mask and bias."""
    arguments = _deform_arguments(x, weight, offset, mask, bias, geometry)
    return torch.ops.torchvision._deform_conv2d_backward(_wide(grad)[0].contiguous(), *arguments)


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    *,
    im2col_step: int,
    **geometry: int,
) -> None:
    """Deformable convolution v1; offset [B, 2 * groups * kH * kW, h, w] holds (dy, dx) per tap."""
    output.copy_(_deform(input, weight, offset, None, None, _deform_geometry(**geometry)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    *,
    im2col_step: int,
    **geometry: int,
) -> None:
    """Gradients of `deform_conv_forward` by input and offset."""
    grads = _deform_backward(grad_output, input, weight, offset, None, None, _deform_geometry(**geometry))
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    *,
    scale: float,
    im2col_step: int,
    **geometry: int,
) -> None:
    """Gradient of `deform_conv_forward` by the weight, times scale, added to grad_weight."""
    grads = _deform_backward(grad_output, input, grad_weight, offset, None, None, _deform_geometry(**geometry))
    grad_weight.add_(grads[1].to(grad_weight.dtype), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    *,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Deformable convolution v2: taps are multiplied by mask [B, groups * kH * kW, h, w]."""
    output.copy_(_deform(input, weight, offset, mask, bias if with_bias else None, _modulated_geometry(**geometry)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    *,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Gradients of `modulated_deform_conv_forward`."""
    grads = _deform_backward(
        grad_output, input, weight, offset, mask, bias if with_bias else None, _modulated_geometry(**geometry)
    )
    for target, grad in zip((grad_input, grad_weight, grad_offset, grad_mask), grads, strict=False):
        target.copy_(grad)
    if with_bias:
        grad_bias.copy_(grads[4])


def ms_deform_attn_forward(
    value: Tensor,
    shapes: Tensor,
    level_start: Tensor,
    locations: Tensor,
    weights: Tensor,
    *,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention: value [B, sum HW, heads, dim], locations [B, Q, heads, levels, points, 2]."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes.tolist(), locations, weights)


def ms_deform_attn_backward(
    value: Tensor,
    shapes: Tensor,
    level_start: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_locations: Tensor,
    grad_weights: Tensor,
    *,
    im2col_step: int,
) -> None:
    """Gradients of `ms_deform_attn_forward`, by computing it again."""
    leaves = [t.detach().requires_grad_() for t in (value, locations, weights)]
    with torch.enable_grad():
        out = ms_deform_attn_forward(leaves[0], shapes, level_start, leaves[1], leaves[2], im2col_step=im2col_step)
    for target, grad in zip(
        (grad_value, grad_locations, grad_weights), torch.autograd.grad(out, leaves, grad_output), strict=True
    ):
        target.copy_(grad)


def get_compiler_version() -> str:
    """What mmdet's collect_env prints for mmcv's compiler."""
    return "none (mmcv-lite with torchvision's operators)"


def get_compiling_cuda_version() -> str:
    """What mmdet's collect_env prints for mmcv's CUDA."""
    return "none (mmcv-lite with torchvision's operators)"


_OPERATORS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        nms,
        bbox_overlaps,
        roi_align_forward,
        roi_align_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
        ms_deform_attn_forward,
        ms_deform_attn_backward,
        get_compiler_version,
        get_compiling_cuda_version,
    )
}


class StandInOperators(ModuleType):
    """The module `mmcv._ext` without a compiler: an operator that is missing raises when it is called, by name."""

    def __init__(self) -> None:
        super().__init__("mmcv._ext", "Operators of mmcv on torchvision.")
        self.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
        self.__dict__.update(_OPERATORS)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f"mmcv operator {name!r} is not among those that zoo serves without a compiler; "
                f"to use it, {_HOW_TO_COMPILE}"
            )

        return missing


def install_operators() -> bool:
    """Serve `mmcv._ext` unless a compiled one is there; whether the stand-in serves.

    Raises:
        ImportError: mmcv is not installed.
    """
    loaded = sys.modules.get("mmcv._ext")
    if loaded is not None:
        return isinstance(loaded, StandInOperators)
    import mmcv

    if importlib.util.find_spec("mmcv._ext") is not None:
        return False
    module = StandInOperators()
    sys.modules["mmcv._ext"] = module
    mmcv._ext = module
    return True
