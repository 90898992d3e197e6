"""Images: scikit-learn's digits and everything that timm.data reads, in an order that a resumed run finds again."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from zoo.errors import UserError
from zoo.train.config import AugmentConfig, DataConfig
from zoo.train.state import World, derive_seed, isolated_rng

__all__ = ["Digits", "EvalLoader", "TrainLoader", "class_count", "create_mixup", "open_dataset", "resolve_transform"]

FOLDERS = ("imagefolder", "folder", "")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation", "test"),
}
_MISSING_PACKAGES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow-datasets"}


class Digits(Dataset[tuple[Image.Image, int]]):
    """scikit-learn's 1797 handwritten digits, 8 x 8, as 32 x 32 images.

    One fifth of each class is held out, always the same images: `split` is "train" (1438) or "validation" (359).
    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (the test set).
    """

    classes = [str(i) for i in range(10)]

    def __init__(self, split: str, mode: str = "RGB") -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        held_out = np.zeros(len(bunch.target), dtype=bool)
        order = np.random.RandomState(0).permutation(len(bunch.target))  # a stream that NumPy keeps unchanged
        for digit in range(10):
            members = order[bunch.target[order] == digit]
            held_out[members[: round(len(members) / 5)]] = True
        chosen = held_out if split in SPLITS["validation"] else ~held_out
        grey = np.rint(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
        self.images = [Image.fromarray(i).resize((32, 32), Image.Resampling.BICUBIC).convert(mode) for i in grey]
        self.targets = bunch.target[chosen].tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.targets[index]


def _split_folder(root: Path, split: str) -> Path:
    names = next((names for names in SPLITS.values() if split in names), (split,))
    for name in dict.fromkeys((split, *names)):
        if (root / name).is_dir():
            return root / name
    raise UserError(f"no folder {root / split} (nor {', '.join(n for n in names if n != split) or 'another name'}); "
                    f"put the {split} images in {root}/{names[0]}/CLASS/ or set the split's name")  # fmt: skip


def _open_folder(cfg: DataConfig, split: str, mode: str, class_map: Any) -> Any:
    folder = _split_folder(Path(str(cfg.root)), split)
    try:
        dataset = timm.data.create_dataset(
            "", root=str(folder), split=split, search_split=False, class_map=class_map, input_img_mode=mode
        )
    except RuntimeError as error:
        known = f" of the training classes {sorted(class_map)[:5]}" if class_map else ""
        raise UserError(f"no images{known} under {folder}; it must hold one folder of images per class") from error
    if class_map is not None:
        extra = sorted({p.name for p in folder.iterdir() if p.is_dir()} - set(class_map))
        if extra and not any(p.name in class_map for e in extra for p in (folder / e).rglob("*") if p.is_dir()):
            raise UserError(f"{folder} has classes that the training images lack: {', '.join(extra[:5])}; remove them")
    return dataset


def open_dataset(cfg: DataConfig, training: bool, in_chans: int = 3, class_map: Any = None, **extra: Any) -> Any:
    """Open a split as a dataset of (PIL image, class).

    Args:
        cfg: the data section of the configuration.
        training: the training split, else the held-out one.
        in_chans: 3 reads colour images, 1 grey ones.
        class_map: folder name -> class index, so that both splits number their classes alike.
        extra: handed to timm.data.create_dataset for the streaming schemes.

    Raises:
        UserError: the folder, the scheme or the package it needs is missing.
    """
    split = cfg.train_split if training else cfg.val_split
    mode = "L" if in_chans == 1 else "RGB"
    scheme, slash, _ = cfg.name.partition("/")
    if cfg.name == "digits":
        return Digits("train" if training else "validation", mode)
    if not slash and cfg.name not in FOLDERS:
        raise UserError(
            f"data.name={cfg.name!r} is not known; choose digits, imagefolder, hfds/..., wds/... or torch/..."
        )
    if cfg.root is None and (cfg.name in FOLDERS or scheme in ("torch", "wds")):
        raise UserError(f"data.name={cfg.name} reads a folder and data.root is not set; give data.root=PATH")
    if cfg.root is not None and not cfg.download and not Path(cfg.root).exists():
        raise UserError(f"no data folder at {cfg.root}; give the folder that holds the images as data.root=PATH")
    if cfg.name in FOLDERS:
        return _open_folder(cfg, split, mode, class_map)
    try:
        with redirect_stdout(StringIO()):  # timm prints what it is about to raise
            return timm.data.create_dataset(
            cfg.name, root=cfg.root, split=split, is_training=training, download=cfg.download,
            **({} if scheme == "torch" else {"input_img_mode": mode, **extra}),
        )  # fmt: skip
    except ImportError as error:
        package = _MISSING_PACKAGES.get(scheme, error.name or "a package")
        raise UserError(f"data.name={cfg.name} needs the package {package}; `pip install {package}`") from error
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data.name={cfg.name} split={split}: {first}; see data.name, data.root, data.download"
        ) from error


def class_count(cfg: DataConfig, dataset: Any) -> int | None:
    """How many classes the data have: what they say themselves, checked against data.num_classes; None if neither says.

    Raises:
        UserError: data.num_classes is smaller than what the data say.
    """
    reader = getattr(dataset, "reader", None)
    found = getattr(dataset, "classes", None) or getattr(reader, "class_to_idx", None)
    count = len(found) if found else None
    if cfg.num_classes is None:
        return count
    if count is not None and count > cfg.num_classes:
        raise UserError(
            f"data.num_classes={cfg.num_classes}, but {cfg.name} has {count} classes; set it to {count} or more"
        )
    return cfg.num_classes


def resolve_transform(cfg: DataConfig, model: Any, in_chans: int) -> dict[str, Any]:
    """Size, statistics, interpolation and crop: the configuration's, and where it is silent the model's own."""
    asked = {"in_chans": in_chans, "img_size": cfg.img_size}
    asked |= {k: getattr(cfg, k) for k in ("interpolation", "crop_pct")}
    found = timm.data.resolve_data_config(asked, pretrained_cfg=model.pretrained_cfg)
    found["input_size"] = (in_chans, *found["input_size"][-2:])
    for key in ("mean", "std"):
        values = list(getattr(cfg, key) or found[key])
        found[key] = tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans
    found["input_size"] = tuple(found["input_size"])
    return found


def _train_transform(shape: dict[str, Any], augment: AugmentConfig) -> Any:
    common = {k: shape[k] for k in ("input_size", "mean", "std", "interpolation")}
    common["interpolation"] = augment.interpolation or common["interpolation"]
    if not augment.enabled:
        return timm.data.create_transform(**common, is_training=True, no_aug=True)
    try:
        return timm.data.create_transform(
            **common,
            is_training=True,
            train_crop_mode=augment.crop_mode,
            scale=(augment.scale[0], augment.scale[1]),
            ratio=(augment.ratio[0], augment.ratio[1]),
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter or 0.0,
            auto_augment=augment.auto_augment,
            re_prob=augment.random_erasing,
            re_mode=augment.erase_mode,
            re_count=augment.erase_count,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"augment.auto_augment={augment.auto_augment!r} is not timm's ({error}); write rand-m9-mstd0.5-inc1"
        ) from error


def create_mixup(augment: AugmentConfig, num_classes: int, smoothing: float) -> Mixup | None:
    """timm's Mixup for the training batches, or None where nothing is mixed."""
    if not augment.enabled or (augment.mixup <= 0 and augment.cutmix <= 0):
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        mode=augment.mix_mode,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )


class _Seeded(Dataset[tuple[Tensor, int]]):
    """Samples named by (epoch, position, index), each with randomness of its own."""

    def __init__(self, dataset: Any, transform: Any, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int]:
        epoch, position, index = key
        with isolated_rng(self.seed, 1, epoch, position):
            image, target = self.dataset[index]
            return self.transform(image), int(target)


class _SeededStream(IterableDataset[tuple[Tensor, int]]):
    """A stream whose n-th sample of an epoch, in each worker, has randomness of its own."""

    def __init__(self, dataset: Any, transform: Any, seed: int, rank: int) -> None:
        self.dataset, self.transform, self.seed, self.rank, self.epoch = dataset, transform, seed, rank, 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        info = get_worker_info()
        stream = 0 if info is None else info.id
        for count, (image, target) in enumerate(self.dataset):
            with isolated_rng(self.seed, 2, self.epoch, self.rank, stream, count):
                sample = self.transform(image), int(target)
            yield sample


class _Plain(Dataset[tuple[Tensor, int]]):
    def __init__(self, dataset: Any, transform: Any) -> None:
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.dataset[index]
        return self.transform(image), int(target)


class _EpochBatches(Sampler[list[tuple[int, int, int]]]):
    """The batches of this process from `start` on: whole ones only, the same in number in every process."""

    def __init__(self, size: int, batch_size: int, seed: int, world: World, repeats: int) -> None:
        self.size, self.batch_size, self.seed, self.world = size, batch_size, seed, world
        self.epoch, self.start = 0, 0
        self.repeated = (
            RepeatAugSampler(range(size), world.size, world.rank, num_repeats=repeats, selected_round=0)
            if repeats > 1
            else None
        )
        share = len(self.repeated) if self.repeated is not None else size // world.size
        self.batches = share // batch_size

    def __len__(self) -> int:
        return self.batches - self.start

    def _share(self) -> list[int]:
        """This process's indices; batch b of rank r is part r of the b-th slice of one global order."""
        if self.repeated is not None:
            self.repeated.set_epoch(derive_seed(self.seed, 3, self.epoch))
            return list(self.repeated)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, 3, self.epoch))
        order = torch.randperm(self.size, generator=generator)[: self.batches * self.world.size * self.batch_size]
        return order.view(self.batches, self.world.size, self.batch_size)[:, self.world.rank].flatten().tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        indices = self._share()
        for batch in range(self.start, self.batches):
            first = batch * self.batch_size
            base = (batch * self.world.size + self.world.rank) * self.batch_size
            yield [(self.epoch, base + i, index) for i, index in enumerate(indices[first : first + self.batch_size])]


def _init_worker(worker_id: int) -> None:
    # The trainer decides when to stop; a signal to the whole process group must not take its workers away.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _loader_options(cfg: DataConfig, device: torch.device, seed: int) -> dict[str, Any]:
    return {
        "num_workers": cfg.num_workers,
        "pin_memory": cfg.pin_memory and device.type == "cuda",
        "persistent_workers": cfg.num_workers > 0,
        "worker_init_fn": _init_worker,
        # making an iterator draws a number, from the global generator unless the loader has its own
        "generator": torch.Generator().manual_seed(seed),
    }


def _stop_workers(loader: DataLoader[Any]) -> None:
    """Send a loader's workers home: at its exit the interpreter would ask them with SIGTERM, which they ignore."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()
        loader._iterator = None


class TrainLoader:
    """Training batches, from any position of any epoch."""

    def __init__(
        self,
        dataset: Any,
        cfg: DataConfig,
        augment: AugmentConfig,
        shape: dict[str, Any],
        batch_size: int,
        seed: int,
        world: World,
    ) -> None:
        transform = _train_transform(shape, augment)
        repeats = augment.repeats if augment.enabled else 1
        options = _loader_options(cfg, world.device, derive_seed(seed, 4))
        self.batches: int
        self.sampler: _EpochBatches | None = None
        if isinstance(dataset, IterableDataset):
            if repeats > 1:
                raise UserError(
                    f"augment.repeats={repeats} needs a dataset with an index; {cfg.name} is a stream; set it to 1"
                )
            if hasattr(dataset, "set_loader_cfg"):
                dataset.set_loader_cfg(num_workers=cfg.num_workers)
            self.stream = _SeededStream(dataset, transform, seed, world.rank)
            # persistent workers would keep the epoch that they were started with
            options["persistent_workers"] = False
            self.loader: DataLoader[Any] = DataLoader(self.stream, batch_size=batch_size, drop_last=True, **options)
            self.batches = len(dataset) // (batch_size * world.size)  # type: ignore[arg-type]
        else:
            self.sampler = _EpochBatches(len(dataset), batch_size, seed, world, repeats)
            self.loader = DataLoader(_Seeded(dataset, transform, seed), batch_sampler=self.sampler, **options)
            self.batches = self.sampler.batches
        if self.batches == 0:
            raise UserError(
                f"{cfg.name or 'the folder'} has {len(dataset)} training images, fewer than one batch of {batch_size}"
                f"{f' in each of {world.size} processes' if world.distributed else ''}; lower batch_size"
            )

    def epoch(self, epoch: int, start: int = 0) -> Iterable[tuple[Tensor, Tensor]]:
        """The batches of an epoch, counted from 0, from the batch `start` on."""
        if self.sampler is not None:
            self.sampler.epoch, self.sampler.start = epoch, start
            return self.loader
        self.stream.epoch = epoch
        return islice(iter(self.loader), start, self.batches)

    def close(self) -> None:
        """Stop the workers; the next epoch starts new ones."""
        _stop_workers(self.loader)


class EvalLoader:
    """Held-out batches; over all processes every image comes exactly once."""

    def __init__(self, dataset: Any, cfg: DataConfig, shape: dict[str, Any], batch_size: int, world: World) -> None:
        options = {k: shape[k] for k in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
        if options["interpolation"] == "random":  # a choice for training only
            options["interpolation"] = "bilinear"
        transform = timm.data.create_transform(**options, is_training=False)
        options = _loader_options(cfg, world.device, 0)
        if isinstance(dataset, IterableDataset):
            options["persistent_workers"] = False
            self.loader: DataLoader[Any] = DataLoader(
                _SeededStream(dataset, transform, 0, world.rank), batch_size=batch_size, **options
            )
            return
        indices = range(world.rank, len(dataset), world.size)
        batches = [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
        self.loader = DataLoader(_Plain(dataset, transform), batch_sampler=batches, **options)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.loader)

    def close(self) -> None:
        """Stop the workers; the next pass starts new ones."""
        _stop_workers(self.loader)
