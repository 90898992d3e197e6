"""Augmentation: every policy of timm's runs with this Pillow, and gives what timm's own gives wherever that runs."""

import random
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image, ImageOps

from zoo.errors import UserError
from zoo.train.augment import resolve_transform, train_transform
from zoo.train.config import AugmentConfig, DataConfig

POLICIES = (
    "v0", "v0r", "original", "originalr", "3a", "v0-mstd0.5", "v0r-mstd2", "original-mstd1", "originalr-mstdinf",
    "3a-mstd3", "augmix", "augmix-m5-w4-d2", "augmix-m10-mstd2", "augmix-m15-b1", "augmix-mstd0-a0.2", "rand",
    *(f"rand-m{m}-mstd{s}-inc{i}" for m in (0, 5, 9, 10, 15) for s in ("0", "0.5", "inf", "101") for i in (0, 1)),
    "rand-m9-mstd0.5-inc1-p1", "rand-m15-mmax15-inc1", "rand-m15-mmax15-mstd1", "rand-m30-mmax30-inc1-mstd3",
    "rand-m9-n15-mstd0.5-inc1", "rand-mstd1-tweights", "rand-m9-mstd0.5-t3a", "rand-m9-mstd0.5-t3aw-inc1",
)  # fmt: skip


def shape(channels: int, interpolation: str = "bilinear", mean: float = 0.5) -> dict[str, Any]:
    size, mean_of, std = (channels, 16, 16), (mean,) * channels, (0.5,) * channels
    return {"input_size": size, "mean": mean_of, "std": std, "interpolation": interpolation}


def pictures(mode: str) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)) for _ in range(6)]
    flat = [Image.new("RGB", (9, 9)), Image.new("RGB", (1, 1), (255, 255, 255)), Image.new("RGB", (40, 2), (9, 99, 0))]
    return [image.convert(mode) for image in (*noise, *flat)]


def run(policy: str, channels: int, images: int, interpolation: str = "bilinear", mean: float = 0.5) -> None:
    transform = train_transform(shape(channels, interpolation, mean), AugmentConfig(auto_augment=policy))
    random.seed(0)
    np.random.seed(0)
    sources = pictures("L" if channels == 1 else "RGB")
    for i in range(images):
        result = transform(sources[i % len(sources)])
    assert tuple(result.shape) == (channels, 16, 16)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_runs(policy: str) -> None:
    run(policy, 3, 60)
    run(policy, 1, 20)


@pytest.mark.parametrize("interpolation", ["random", "lanczos", "nearest", "bicubic"])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1-p1", "v0", "originalr-mstd2", "augmix", "3a"])
def test_with_every_interpolation(policy: str, interpolation: str) -> None:
    run(policy, 3, 60, interpolation)
    run(policy, 3, 10, mean=0.0)
    run(policy, 3, 10, mean=1.0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_runs_on_20000_images(policy: str) -> None:
    run(policy, 3, 20_000)
    run(policy, 1, 2_000)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "v0", "originalr-mstd2", "augmix", "rand-m9-inc1-p1"])
def test_what_timm_runs_is_unchanged(policy: str) -> None:
    choice, source = AugmentConfig(auto_augment=policy), pictures("RGB")[0]
    ours = train_transform(shape(3), choice)
    theirs = timm.data.create_transform(
        **shape(3), is_training=True, scale=(0.08, 1.0), ratio=(0.75, 1.3333), hflip=0.5, auto_augment=policy
    )
    compared = 0
    for seed in range(300):
        results = []
        for transform in (theirs, ours):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            try:
                results.append(transform(source))
            except ValueError as error:  # bits that Pillow refuses
                if transform is ours or "bits" not in str(error):
                    raise
                break
        if len(results) == 2:
            compared += 1
            assert torch.equal(results[0], results[1])
    assert compared > 250


@pytest.mark.parametrize(("magnitude", "kept"), [(0, 4), (5, 2), (10, 1), (15, 1)])
def test_posterize_keeps_at_least_one_bit(magnitude: int, kept: int) -> None:
    transform = train_transform(shape(3), AugmentConfig(auto_augment=f"rand-m{magnitude}-mmax15-inc1-p1"))
    step = next(s for s in transform.transforms if hasattr(s, "ops"))
    operation = next(o for o in step.ops if o.name.startswith("Posterize"))
    source = pictures("RGB")[0]
    assert operation(source).tobytes() == ImageOps.posterize(source, kept).tobytes()


def test_timm_itself_is_left_alone() -> None:
    before = dict(timm.data.auto_augment.NAME_TO_OP)
    train_transform(shape(3), AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1"))
    assert before == timm.data.auto_augment.NAME_TO_OP
    assert timm.data.auto_augment.posterize.__module__ == "timm.data.auto_augment"


@pytest.mark.parametrize(
    "policy",
    [
        "rnd-m9", "v1", "rand-m9-x3", "rand-m9-mstd", "rand-m9.5", "rand-minf", "rand-m9-tnone", "rand-n16-tweights",
        "augmix-w0", "augmix-a0", "augmix-q1", "original-m3", "v0-mstd-1", "rand--m9", "rand-m9-mstd0.5-inc",
    ],
)  # fmt: skip
def test_policies_that_timm_would_read_in_part(policy: str) -> None:
    with pytest.raises(UserError, match=f"{policy}"):
        train_transform(shape(3), AugmentConfig(auto_augment=policy))


class Model:
    pretrained_cfg = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.3), "input_size": (3, 64, 64)}


@pytest.mark.parametrize(("key", "values"), [("mean", [0.5]), ("std", [0.5, 0.5]), ("mean", [0.1] * 4)])
def test_statistics_of_the_wrong_length(key: str, values: list[float]) -> None:
    with pytest.raises(UserError, match=rf"data\.{key}=.*has {len(values)} values.*3 channels"):
        resolve_transform(DataConfig(name="digits", **{key: values}), Model(), 3)


def test_statistics_of_grey_images() -> None:
    assert resolve_transform(DataConfig(name="digits", mean=[0.1, 0.2, 0.6]), Model(), 1)["mean"] == pytest.approx(
        (0.3,)
    )
    assert resolve_transform(DataConfig(name="digits", mean=[0.25]), Model(), 1)["mean"] == (0.25,)
    with pytest.raises(UserError, match="has 2 values"):
        resolve_transform(DataConfig(name="digits", std=[0.5, 0.5]), Model(), 1)
