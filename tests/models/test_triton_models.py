"""Every family on its Triton kernels: recorded outputs, and every gradient against the reference.

Without a GPU the kernels run in Triton's interpreter, which is slow: there the recorded cases see one image of the two,
and those of more than half a minute are slow tests. `test_gradients` keeps every family in the quick ones.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from families import FAMILIES
from golden import assert_matches, image, npz, published, samples, save_checkpoint
from torch import Tensor, nn
from triton.runtime.interpreter import GridExecutor
from triton_cases import DEVICE

import zoo  # noqa: F401

SCRIPTED = ("davit", "maxvit", "halonet", "van", "biformer")
WITH_KERNELS = {key: row for key, row in FAMILIES.items() if row.kernels}
_QUICK_AND_SLOW = [pytest.param(key, marks=pytest.mark.slow if row.slow else ()) for key, row in WITH_KERNELS.items()]


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """On a GPU TF32 products and convolutions would hide an error of the kernels."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def small(family: str, **kwargs: Any) -> tuple[nn.Module, Tensor]:
    name, size, args = FAMILIES[family].shrunk
    torch.manual_seed(0)
    model = timm.create_model(name, drop_path_rate=0.0, **args, **kwargs).to(DEVICE).eval()
    return model, image(*size)[:1].to(DEVICE)


@pytest.mark.parametrize("family", _QUICK_AND_SLOW)
def test_recorded(family: str, tmp_path: Path) -> None:
    case = FAMILIES[family].recorded
    original, size = case.file.split(".")
    data = {k.replace(".", "_").replace("_val", "_sample"): v for k, v in npz(f"{case.file}.npz").items()}
    gain = float(data["bn_weight_gain"]) if family == "halonet" else 1.0
    path = save_checkpoint(tmp_path / "published.pth", published(original, gain), case.wrapper)
    overlay = {"file": path}
    model = timm.create_model(case.name, pretrained=True, pretrained_cfg_overlay=overlay, attn_backend="triton")
    images = image(*map(int, size.split("x")), seed=int(data.get("input_seed", 0)))
    if DEVICE == "cpu":
        images = images[:1]
    with torch.inference_mode():
        features, stages = model.to(DEVICE).eval().forward_intermediates(images.to(DEVICE), FAMILIES[family].blocks)
        logits = model.forward_head(features).cpu()
    for i, stage in enumerate(stages[-4:], 1):
        assert list(stage.shape[1:]) == data[f"stage{i}_shape"].tolist()[1:]
        seen = data[f"stage{i}_idx"] < stage.numel()  # the samples of the images that were run
        assert seen.sum() >= 16
        actual = samples(stage.cpu(), data[f"stage{i}_idx"][seen])
        std = float(data[f"stage{i}_std"])
        assert_matches(actual, data[f"stage{i}_sample"][seen], std, case.tolerance, f"stage {i}")
    expected = data["logits"]
    assert_matches(logits, expected[: len(logits)], expected.std().item(), case.tolerance, "logits")


@pytest.mark.parametrize("family", WITH_KERNELS)
def test_gradients(family: str) -> None:
    """Logits and the gradient of the images and of every parameter, in a shrunken model."""
    found = {}
    for backend in ("reference", "triton"):
        model, images = small(family, attn_backend=backend)
        images.requires_grad_()
        logits = model(images)
        logits.square().mean().backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        found[backend] = {"logits": logits.detach(), "images": images.grad, **grads}
    expected, actual = found["reference"], found["triton"]
    assert expected.keys() == actual.keys()
    largest = max(float(e.abs().max()) for k, e in expected.items() if k != "logits")
    for name, e in expected.items():
        # a gradient that is zero but for rounding is compared with the largest one
        size = max(float(e.abs().max()), 0.0 if name == "logits" else 1e-3 * largest)
        error = float((actual[name] - e).abs().max())
        assert error <= 5e-5 * size, f"{name}: {error:.2e} of {size:.2e}"


@pytest.mark.parametrize("family", WITH_KERNELS)
def test_the_kernels_are_what_runs(family: str) -> None:
    """The kernels refuse float64: a model that did not pass its backend on would return logits."""
    model, images = small(family, attn_backend="triton", dtype=torch.float64)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this call: the kernels compute in float32"):
        model(images.double())


@pytest.mark.parametrize("family", WITH_KERNELS)
def test_the_kernels_are_what_a_scripted_model_runs(family: str) -> None:
    """TorchScript passes the backend on: in float64, which the kernels refuse, with the reason."""
    model, images = small(family, attn_backend="triton", dtype=torch.float64)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this call: the kernels compute in float32"):
        torch.jit.script(model)(images.double())


def counted(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result of a call, and how many of the kernels it launches."""
    if DEVICE == "cuda":  # a launch that was seen before does not pass through any function of Triton's
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            result = run()
            torch.cuda.synchronize()
        return result, sum(e.count for e in trace.key_averages() if re.fullmatch(r"\w+_kernel", e.key))
    launches = 0
    call = GridExecutor.__call__

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal launches
        launches += 1
        return call(self, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", count):
        return run(), launches


@pytest.mark.parametrize("family", SCRIPTED)
def test_scripted(family: str) -> None:
    """The scripted model launches as many kernels as the model, and gives its very numbers."""
    model, images = small(family, attn_backend="triton")
    with torch.inference_mode():
        expected, eager = counted(lambda: model(images))
        logits, launches = counted(lambda: torch.jit.script(model)(images))
    assert launches == eager > 0
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
