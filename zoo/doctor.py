"""`zoo doctor`: the versions, the devices, and every op on the path that this machine takes, checked in seconds."""

import importlib.metadata
import platform
import time

import torch
from torch import Tensor

from zoo.ops import resolve_backend, without_triton
from zoo.ops.examples import Example, select

__all__ = ["main"]

_PACKAGES = ("attention-zoo", "torch", "torchvision", "timm", "triton", "hydra-core", "wandb", "mmdet", "onnx")
_TOLERANCE = 2e-5


def main() -> int:
    """Print the report; 0 when every op agrees with its definition, 1 otherwise."""
    print(f"python      {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        print(f"{package:<14} {_version(package)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"\ndevice      {device.type}: {name}\n")
    print(f"{'op':<26} {'path':<10} {'largest error':>14}  forward + backward")
    failed = False
    for example in select("tiny"):
        path, error, seconds = _check(example, device)
        bad = not error <= _TOLERANCE
        failed |= bad
        print(f"{example.op:<26} {path:<10} {error:14.1e}  {seconds * 1e3:6.1f} ms{'  DISAGREES' if bad else ''}")
    print("\nsome ops disagree with their definition" if failed else "\nevery op agrees with its definition")
    return 1 if failed else 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _check(example: Example, device: torch.device) -> tuple[str, float, float]:
    """The path, the largest difference of outputs and gradients relative to their size, and the time of one call."""
    inputs = [x.to(device) for x in example.inputs(generator=torch.Generator().manual_seed(0))]

    def run(backend: str | None) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        out = example.call(leaves, backend=backend)
        differentiable = [x for x in leaves if x.requires_grad]
        weight = torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
        grads = torch.autograd.grad((out * weight).sum(), differentiable, allow_unused=True)
        return [out.detach(), *(g for g in grads if g is not None)]

    expected = run("reference")
    run(None)
    start = time.perf_counter()
    actual = run(None)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    error = max(
        float((a - e).abs().max() / e.abs().max().clamp(min=1e-6)) for a, e in zip(actual, expected, strict=True)
    )
    return resolve_backend(example.op, None, inputs[0], without_triton(inputs[0])), error, seconds
