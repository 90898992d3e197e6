"""Images and their order: fixed splits, randomness that depends on the position alone, every image once."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch.utils.data import IterableDataset

import zoo.train.data as data
from zoo.errors import UserError
from zoo.train.config import AugmentConfig, DataConfig
from zoo.train.data import Digits, EvalLoader, TrainLoader, class_count, open_dataset, resolve_transform
from zoo.train.labels import label_names
from zoo.train.state import World, derive_seed, isolated_rng, restore_rng, rng_state

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
AUGMENT = AugmentConfig(auto_augment="rand-m9", random_erasing=0.5, interpolation="random", hflip=0.5)


def loader(workers: int = 0, batch: int = 32, world: World | None = None, **augment: Any) -> TrainLoader:
    cfg = DataConfig(name="digits", num_workers=workers)
    choice = AugmentConfig(**{**vars(AUGMENT), **augment})
    return TrainLoader(Digits("train"), cfg, choice, SHAPE, batch, 3, world or World(CPU))


def test_digits_split_is_fixed_and_stratified() -> None:
    train, held_out = Digits("train"), Digits("validation")
    assert (len(train), len(held_out)) == (1438, 359)
    assert held_out.targets[:12] == Digits("val").targets[:12]
    shares = np.bincount(held_out.targets) / (np.bincount(train.targets) + np.bincount(held_out.targets))
    assert abs(shares - 0.2).max() < 0.003
    pixels = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in pixels for image in held_out.images)
    assert train[0][0].size == (32, 32)
    assert Digits("train", "L")[0][0].mode == "L"


def test_isolated_rng_leaves_no_trace() -> None:
    state = rng_state()
    with isolated_rng(1, 2):
        a = torch.rand(3), np.random.rand(3)
    with isolated_rng(1, 2):
        b = torch.rand(3), np.random.rand(3)
    with isolated_rng(2, 1):
        c = torch.rand(3)
    assert torch.equal(a[0], b[0])
    assert (a[1] == b[1]).all()
    assert not torch.equal(a[0], c)
    assert torch.equal(rng_state()["torch"], state["torch"])
    first = torch.rand(2), np.random.rand()
    restore_rng(state)
    assert torch.equal(first[0], torch.rand(2))
    assert first[1] == np.random.rand()


def test_seeds_differ() -> None:
    keys = [(s, e, i) for s in range(8) for e in range(8) for i in range(8)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= derive_seed(*key) < 2**63 for key in keys)


@pytest.mark.parametrize("workers", [0, 2])
def test_middle_of_an_epoch(workers: int) -> None:
    """From batch 40 on, the images are those that an epoch from its start would have had."""
    whole = list(loader().epoch(1))
    assert len(whole) == 1438 // 32
    late = loader(workers)
    list(zip(range(2), late.epoch(0), strict=False))  # an epoch that was left early
    rest = list(late.epoch(1, 40))
    assert len(rest) == len(whole) - 40
    for (images, targets), (again, same) in zip(whole[40:], rest, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(targets, same)


def test_epochs_and_copies_differ() -> None:
    one = loader()
    first, second = next(iter(one.epoch(0))), next(iter(one.epoch(1)))
    assert not torch.equal(first[1], second[1])
    repeated = loader(repeats=3)
    images, targets = next(iter(repeated.epoch(0)))
    assert torch.equal(targets[0:30:3], targets[1:30:3])  # copies lie side by side in one process
    assert not torch.equal(images[0], images[1])
    assert len(list(repeated.epoch(0))) == 1438 // 32


def test_loading_draws_nothing_from_the_global_generators() -> None:
    before = rng_state()
    list(zip(range(3), loader().epoch(0), strict=False))
    after = rng_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    assert torch.equal(before["numpy"][1], after["numpy"][1])


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_batches_of_one(size: int) -> None:
    """Batch b of all processes together is batch b of a single process with the summed batch size."""
    single = loader(batch=12 * size)
    parts = [loader(batch=12, world=World(CPU, rank, size)) for rank in range(size)]
    for whole, *shares in zip(single.epoch(2), *(p.epoch(2) for p in parts), strict=True):
        assert torch.equal(whole[0], torch.cat([images for images, _ in shares]))
        assert torch.equal(whole[1], torch.cat([targets for _, targets in shares]))


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("workers", [0, 1])
def test_held_out_images_come_once(size: int, workers: int) -> None:
    dataset = Digits("validation")
    cfg = DataConfig(name="digits", num_workers=workers)
    seen = [
        t
        for rank in range(size)
        for _, targets in EvalLoader(dataset, cfg, SHAPE, 50, World(CPU, rank, size))
        for t in targets
    ]
    assert len(seen) == 359
    assert np.bincount(seen).tolist() == np.bincount(dataset.targets).tolist()


def test_grey_images_and_their_statistics() -> None:
    class Model:
        pretrained_cfg = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.3), "input_size": (3, 64, 64)}

    shape = resolve_transform(DataConfig(name="digits"), Model(), 1)
    assert shape["input_size"] == (1, 64, 64)
    assert shape["mean"] == pytest.approx((0.4,))
    shape = resolve_transform(DataConfig(name="digits", img_size=48, mean=[0.5] * 3, crop_pct=0.9), Model(), 3)
    assert shape["input_size"] == (3, 48, 48)
    assert shape["mean"] == (0.5,) * 3
    assert shape["crop_pct"] == 0.9


def _folders(root: Path) -> Path:
    for split, classes in (("train", ("ant", "bee", "cow")), ("val", ("bee", "cow"))):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 36), (i * 99, 0, 0)).save(root / split / name / f"{i}.png")
    return root


def test_folders_number_their_classes_alike(tmp_path: Path) -> None:
    cfg = DataConfig(name="imagefolder", root=str(_folders(tmp_path)))
    train = open_dataset(cfg, True)
    held_out = open_dataset(cfg, False, class_map=train.reader.class_to_idx)
    assert class_count(cfg, train) == 3
    assert [held_out[i][1] for i in range(len(held_out))] == [1, 1, 2, 2]


def test_schemes_go_through_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = DataConfig(name="torch/folder", root=str(_folders(tmp_path)))
    train = open_dataset(cfg, True)
    assert class_count(cfg, train) == 3
    assert len(train) == 6
    asked = {}

    class Reader:
        """What timm's reader of Hugging Face data sets gives: an open file and the class."""

        class_to_idx = {"ant": 0, "bee": 1}

        def __getitem__(self, index: int) -> tuple[Any, int]:
            file = io.BytesIO()
            Image.fromarray(np.full((4, 4), 257 * 99, dtype=np.uint16)).save(file, "PNG")
            file.seek(0)
            return file, 1

        def __len__(self) -> int:
            return 3

    def create(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        return timm.data.ImageDataset(None, reader=Reader())

    monkeypatch.setattr(data.timm.data, "create_dataset", create)
    dataset = open_dataset(DataConfig(name="hfds/some/set", train_split="tr"), True, 1, batch_size=8)
    assert label_names(dataset) == ["ant", "bee"]
    image, target = dataset[2]
    assert (len(dataset), target, image.mode, image.getpixel((0, 0))) == (3, 1, "L", 99)
    assert asked == {
        "name": "hfds/some/set", "root": None, "split": "tr", "is_training": True, "download": False,
        "input_img_mode": "L", "batch_size": 8,
    }  # fmt: skip


class Stream(IterableDataset[Any]):
    """What timm.data makes of webdataset and the like: a shuffled stream that is told the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 70

    def __iter__(self) -> Any:
        for i in torch.randperm(70, generator=torch.Generator().manual_seed(self.epoch)).tolist():
            yield Image.fromarray(np.full((40, 40, 3), i, dtype=np.uint8)), i % 10


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_continues_in_the_middle(workers: int) -> None:
    cfg = DataConfig(name="wds/x", num_workers=workers)
    whole = list(TrainLoader(Stream(), cfg, AUGMENT, SHAPE, 16, 3, World(CPU)).epoch(2))
    assert len(whole) == 4
    rest = list(TrainLoader(Stream(), cfg, AUGMENT, SHAPE, 16, 3, World(CPU)).epoch(2, 3))
    assert len(rest) == 1
    assert torch.equal(rest[0][0], whole[3][0])
    with pytest.raises(UserError, match="stream"):
        TrainLoader(Stream(), cfg, AugmentConfig(repeats=2), SHAPE, 16, 3, World(CPU))
