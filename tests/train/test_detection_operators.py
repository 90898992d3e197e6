"""The stand-in for mmcv._ext: every operator through mmcv's own Python, against torchvision and by hand."""

import subprocess
import sys

import pytest

pytest.importorskip("mmdet")

import torch
import torchvision.ops as tv
from torch import Tensor
from torch.autograd import gradcheck

from zoo.train.detection.operators import StandInOperators, install_operators

STAND_IN = install_operators()
if not STAND_IN:
    pytest.skip("a compiled mmcv is installed and serves its own operators", allow_module_level=True)

from mmcv import ops  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def rois(device: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(
        [[0, 1.2, 2.7, 11.9, 13.4], [1, 0, 0, 15, 15], [1, 3.5, 3.5, 4.1, 9.0], [0, -3, -2, 6, 40]],
        device=device,
        dtype=dtype,
    )


def boxes(device: str, count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=generator) * 40
    size = torch.rand(count, 2, generator=generator) * 20 + 1
    return torch.cat([corner, corner + size], 1).to(device), torch.rand(count, generator=generator).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_nms_equals_torchvision(device: str, threshold: float) -> None:
    found, scores = boxes(device)
    dets, keep = ops.nms(found, scores, threshold)
    assert keep.tolist() == tv.nms(found, scores, threshold).tolist()
    torch.testing.assert_close(dets, torch.cat([found[keep], scores[keep, None]], 1), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_nms_by_hand(device: str) -> None:
    # overlaps of the first two: 80 / 120 without offset, 99 / 143 with sides counted as pixels (offset 1)
    found = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [30, 30, 40, 40]], device=device)
    scores = torch.tensor([0.8, 0.9, 0.1], device=device)
    assert ops.nms(found, scores, 0.66)[1].tolist() == [1, 2]
    assert ops.nms(found, scores, 0.67)[1].tolist() == [1, 0, 2]
    assert ops.nms(found, scores, 0.68, offset=1)[1].tolist() == [1, 2]
    assert ops.nms(found, scores, 0.70, offset=1)[1].tolist() == [1, 0, 2]
    assert ops.nms(found, scores, 0.66, score_threshold=0.2)[1].tolist() == [1]
    assert ops.nms(found[:0], scores[:0], 0.5)[1].tolist() == []


@pytest.mark.parametrize("device", DEVICES)
def test_batched_nms_keeps_classes_apart(device: str) -> None:
    found = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 9.9]], device=device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    classes = torch.tensor([0, 1, 0], device=device)
    assert ops.batched_nms(found, scores, classes, {"type": "nms", "iou_threshold": 0.5})[1].tolist() == [0, 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling", [0, 2])
def test_roi_align_equals_torchvision(device: str, aligned: bool, sampling: int) -> None:
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, device=device, requires_grad=True)
    out = ops.roi_align(x, rois(device), (5, 4), 0.5, sampling, "avg", aligned)
    expected = tv.roi_align(x, rois(device), (5, 4), 0.5, sampling, aligned)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    weight = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * weight).sum(), x)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


def test_roi_align_by_hand() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)  # a plane: value 4 y + x at pixel centres
    box = torch.tensor([[0.0, 1, 1, 3, 3]])
    # centres of the four bins are at 1.5 and 2.5; aligned takes half a pixel off
    out = ops.roi_align(x, box, 2, 1.0, 1, "avg", True)
    torch.testing.assert_close(out.flatten(), torch.tensor([5.0, 6, 9, 10]))
    out = ops.roi_align(x, box, 2, 1.0, 1, "avg", False)
    torch.testing.assert_close(out.flatten(), torch.tensor([7.5, 8.5, 11.5, 12.5]))
    assert ops.roi_align(x, box[:0], 2, 1.0, 0, "avg", True).shape == (0, 1, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roi_align_in_low_precision(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 16, 16, dtype=dtype, requires_grad=True)
    out = ops.roi_align(x, rois("cpu", dtype), 4, 0.5, 0, "avg", True)
    assert out.dtype == dtype
    expected = tv.roi_align(x.detach().float(), rois("cpu", dtype).float(), 4, 0.5, 0, True)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert x.grad.abs().sum() > 0


def test_roi_align_max_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="roi_align has pool_mode 'avg' only"):
        ops.roi_align(torch.randn(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]), 2, 1.0, 0, "max", True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 2])
def test_deformable_convolutions_equal_torchvision(device: str, groups: int) -> None:
    kwargs = {"dtype": torch.float64, "device": device}
    x = torch.randn(3, 4, 9, 8, **kwargs, requires_grad=True)
    weight = torch.randn(6, 4 // groups, 3, 2, **kwargs, requires_grad=True)
    offset = torch.randn(3, 2 * 2 * 6, 5, 4, **kwargs, requires_grad=True)
    mask = torch.rand(3, 2 * 6, 5, 4, **kwargs, requires_grad=True)
    bias = torch.randn(6, **kwargs, requires_grad=True)
    options = {"stride": (2, 2), "padding": (1, 0), "dilation": (1, 1)}

    def compare(out: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        cotangent = torch.randn_like(out)
        for ours, theirs in zip(
            torch.autograd.grad(out, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    out = ops.deform_conv2d(x, offset, weight, *options.values(), groups, 2)
    compare(out, tv.deform_conv2d(x, offset, weight, **options), [x, offset, weight])
    out = ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *options.values(), groups, 2)
    compare(out, tv.deform_conv2d(x, offset, weight, bias, **options, mask=mask), [x, offset, weight, mask, bias])
    out = ops.modulated_deform_conv2d(x, offset, mask, weight, None, *options.values(), groups, 2)
    compare(out, tv.deform_conv2d(x, offset, weight, **options, mask=mask), [x, offset, weight, mask])


def test_deformable_convolution_by_hand() -> None:
    # without offsets it is a convolution; (dy, dx) = (0, 1) on every tap is the convolution one column further right
    x, weight = torch.randn(2, 3, 6, 7), torch.randn(4, 3, 3, 3)
    plain = torch.nn.functional.conv2d(x, weight)
    offset = torch.zeros(2, 18, 4, 5)
    torch.testing.assert_close(ops.deform_conv2d(x, offset, weight), plain, rtol=1e-5, atol=1e-5)
    offset[:, 1::2] = 1.0
    torch.testing.assert_close(ops.deform_conv2d(x, offset, weight)[..., :-1], plain[..., 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(device: str, weighted: bool) -> None:
    logits = torch.randn(7, 5, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.tensor([0, 4, 2, 2, 1, 3, 0], device=device)
    weight = torch.rand(5, dtype=torch.float64, device=device) if weighted else None
    out = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "none")
    hot = torch.nn.functional.one_hot(target, 5).double()
    expected = tv.sigmoid_focal_loss(logits, hot, alpha=0.25, gamma=2.0)
    expected = expected if weight is None else expected * weight[target][:, None]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
    (grad,) = torch.autograd.grad(out.sum(), logits)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_sigmoid_focal_loss_of_background(device: str) -> None:
    logits = torch.zeros(1, 2, dtype=torch.float64, device=device)
    out = ops.sigmoid_focal_loss(logits, torch.tensor([2], device=device), 2.0, 0.25, None, "sum")
    assert out.item() == pytest.approx(2 * 0.75 * 0.25 * 0.6931471805599453)  # (1 - alpha) p^2 log 2, for two classes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize("offset", [0, 1])
def test_bbox_overlaps(device: str, mode: str, offset: int) -> None:
    first, second = boxes(device, 9)[0], boxes(device, 14)[0][5:]
    out = ops.bbox_overlaps(first, second, mode=mode, offset=offset)
    if mode == "iou" and offset == 0:
        torch.testing.assert_close(out, tv.box_iou(first, second))
    for i in range(3):
        for j in range(3):
            a, b = first[i].tolist(), second[j].tolist()
            wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
            high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
            area = [(c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b)]
            union = area[0] + area[1] - wide * high if mode == "iou" else area[0]
            assert out[i, j].item() == pytest.approx(wide * high / union, abs=1e-5)
    paired = ops.bbox_overlaps(first, second, mode=mode, aligned=True, offset=offset)
    torch.testing.assert_close(paired, out.diagonal())


@pytest.mark.parametrize("device", DEVICES)
def test_multi_scale_deformable_attention(device: str) -> None:
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

    shapes = torch.tensor([[4, 5], [2, 3]], device=device)
    starts = torch.tensor([0, 20], device=device)
    kwargs = {"dtype": torch.float64, "device": device}
    value = torch.randn(2, 26, 2, 3, **kwargs, requires_grad=True)
    places = torch.rand(2, 7, 2, 2, 4, 2, **kwargs, requires_grad=True)
    weights = torch.rand(2, 7, 2, 2, 4, **kwargs, requires_grad=True)
    out = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, places, weights, 64)
    expected = multi_scale_deformable_attn_pytorch(value, shapes.tolist(), places, weights)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(out)
    leaves = [value, places, weights]
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_roi_align_gradient_is_the_derivative() -> None:
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: ops.roi_align(t, rois("cpu"), 2, 0.4, 2, "avg", True), (x,))


def test_missing_operators_are_loud() -> None:
    with pytest.raises(NotImplementedError, match="'softnms'.*compiled mmcv"):
        ops.soft_nms(torch.rand(2, 4), torch.rand(2))
    for call in (
        lambda: ops.nms_rotated(torch.rand(2, 5), torch.rand(2), 0.5),
        lambda: ops.CARAFE(3, 1, 2)(torch.randn(1, 1, 4, 4), torch.randn(1, 9, 8, 8)),
    ):
        with pytest.raises(NotImplementedError, match="mmcv operator"):
            call()


def test_installation_is_idempotent_and_yields() -> None:
    module = sys.modules["mmcv._ext"]
    assert isinstance(module, StandInOperators)
    assert install_operators()
    assert sys.modules["mmcv._ext"] is module
    with pytest.raises(AttributeError):
        module.__wrapped__  # noqa: B018  dunder names must not look present to inspect and pickle
    script = (
        "import sys, types; import mmcv; compiled = types.ModuleType('mmcv._ext'); sys.modules['mmcv._ext'] = compiled;"
        "import importlib.util as u; spec = u.spec_from_file_location('operators', sys.argv[1]);"
        "m = u.module_from_spec(spec); spec.loader.exec_module(m);"
        "assert m.install_operators() is False and sys.modules['mmcv._ext'] is compiled"
    )
    from zoo.train.detection import operators

    subprocess.run([sys.executable, "-c", script, operators.__file__], check=True)
