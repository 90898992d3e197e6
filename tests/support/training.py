"""What the tests of training share: a run that takes a second, and the comparison of two runs."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zoo.train.app import main

# a NAT of 20 thousand parameters, 11 updates an epoch
TINY = (
    "model.kwargs.depths=[1,1]",
    "model.kwargs.num_heads=[1,2]",
    "model.kwargs.embed_dim=16",
    "batch_size=128",
    "device=cpu",
)
# everything that draws random numbers
RANDOM = (
    "model.drop_path_rate=0.3",
    "model.drop_rate=0.1",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.random_erasing=0.5",
    "augment.auto_augment=rand-m9-mstd0.5",
    "augment.interpolation=random",
    "ema.enabled=true",
    "ema.decay=0.9",
    "ema.warmup=false",
)
# what depends on the clock or names the folder
_FREE = ("seconds", "images_per_second", "data_wait", "run_dir", "profile")


def train(run_dir: Path, *overrides: str, expect: int = 0) -> Path:
    """Train in this process and return the run folder."""
    assert main("train", [f"run_dir={run_dir}", *TINY, *overrides]) == expect
    return run_dir


def resume(run_dir: Path, *overrides: str, expect: int = 0) -> None:
    assert main("train", [f"resume={run_dir}", *overrides]) == expect


def checkpoint(run_dir: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / f"{name}.pt", weights_only=True)


def metrics(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with open(run_dir / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k not in _FREE} for row in csv.DictReader(file)]


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two checkpoints differ in any bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {*a, *b} - set(_FREE):
            if (key in a) != (key in b):
                yield f"{path}.{key} is on one side only"
            else:
                yield from differences(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            yield f"{path}: {len(a)} and {len(b)} items"
        for index, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, f"{path}[{index}]")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield f"{path}: tensors differ"
    elif type(a) is not type(b) or a != b:
        yield f"{path}: {a!r} and {b!r}"


def assert_same_run(a: Path, b: Path, ignore: tuple[str, ...] = ()) -> None:
    """Weights, averages, optimizer, schedule, scaler, generators and metrics agree to the bit."""
    found = [d for d in differences(checkpoint(a), checkpoint(b)) if not d.startswith(ignore or ("\0",))]
    assert not found, found[:8]
    assert metrics(a) == metrics(b)
