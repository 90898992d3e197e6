"""Batches whose order and randomness depend on (seed, epoch, position) alone, whatever cannot be read."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info

from zoo.errors import UserError
from zoo.train.augment import eval_transform, train_transform
from zoo.train.config import AugmentConfig, DataConfig
from zoo.train.images import BadImages, ImageError
from zoo.train.state import World, derive_seed, isolated_rng

__all__ = ["EvalLoader", "TrainLoader"]

_ATTEMPTS = 64  # images drawn in place of an unreadable one
# image (None: unreadable), class, unreadable ones (name, why)
Sample = tuple[Tensor | None, int, list[tuple[str, str]]]
_Batch = tuple[Tensor, Tensor, list[tuple[str, str]], list[int]]


class _Seeded(Dataset[Sample]):
    """Samples named by (epoch, position, index), each with randomness of its own.

    In place of an unreadable image stands another one, drawn by (seed, epoch, position) alone.
    """

    def __init__(self, dataset: Any, transform: Any, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        epoch, position, index = key
        unreadable: list[tuple[str, str]] = []
        for attempt in range(_ATTEMPTS):
            try:
                with isolated_rng(self.seed, 1, epoch, position):
                    image, target = self.dataset[index]
                    return self.transform(image), int(target), unreadable
            except ImageError as error:
                unreadable.append(_named(error, self.dataset, index))
                index = derive_seed(self.seed, 6, epoch, position, attempt) % len(self.dataset)
        return None, -1, unreadable


class _SeededStream(IterableDataset[Sample]):
    """A stream whose n-th sample of an epoch, in each worker, has randomness of its own.

    An unreadable image is left out of training; in evaluation it comes without a picture.
    """

    def __init__(self, dataset: Any, transform: Any, seed: int, rank: int, training: bool) -> None:
        self.dataset, self.transform, self.seed, self.rank, self.training = dataset, transform, seed, rank, training
        self.epoch = 0

    def __iter__(self) -> Iterator[Sample]:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        info = get_worker_info()
        stream = 0 if info is None else info.id
        unreadable: list[tuple[str, str]] = []
        for count, (image, target) in enumerate(self.dataset):
            if isinstance(image, ImageError):
                unreadable.append((image.source or f"image {count} of stream {self.rank}.{stream}", image.reason))
                if self.training:
                    continue
                sample: Sample = (None, int(target), unreadable)
            else:
                with isolated_rng(self.seed, 2, self.epoch, self.rank, stream, count):
                    sample = self.transform(image), int(target), unreadable
            yield sample
            unreadable = []


def _check_shape(image: Any, side: float) -> None:
    """Refuse a picture so narrow that it would need more memory than any other once its short side has `side` pixels.

    Raises:
        ImageError: it is one.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if isinstance(image, Image.Image) and limit and max(image.size) / min(image.size) * side * side > 2 * limit:
        raise ImageError(f"{image.width} x {image.height} pixels, too long for its width")


class _Plain(Dataset[Sample]):
    def __init__(self, dataset: Any, transform: Any, side: float) -> None:
        self.dataset, self.transform, self.side = dataset, transform, side

    def __getitem__(self, index: int) -> Sample:
        try:
            image, target = self.dataset[index]
            _check_shape(image, self.side)
        except ImageError as error:
            return None, -1, [_named(error, self.dataset, index)]
        return self.transform(image), int(target), []


def _named(error: ImageError, dataset: Any, index: int) -> tuple[str, str]:
    name = getattr(dataset, "name", None)
    return error.source or (name(index) if callable(name) else f"image {index}"), error.reason


def _collate(samples: Sequence[Sample]) -> _Batch:
    """Images [B, C, H, W] and classes [B] of the readable samples, the unreadable ones, and where the former stood."""
    readable = [(image, target) for image, target, _ in samples if image is not None]
    places = [place for place, (image, _, _) in enumerate(samples) if image is not None]
    unreadable = [entry for *_, entries in samples for entry in entries]
    if not readable:
        return torch.empty(0), torch.empty(0, dtype=torch.int64), unreadable, places
    images, targets = default_collate(readable)
    return images, targets, unreadable, places


def _last_line(error: BaseException) -> str:
    """The last line of an error's message: in what a worker hands over, that of the traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _batches(loader: DataLoader[Any]) -> Iterator[_Batch]:
    """A loader's batches; an error in a worker becomes the line that says its cause.

    Raises:
        UserError: a worker said so, or was killed.
    """
    try:
        yield from loader
    except UserError as error:
        line = _last_line(error)
        raise UserError(line.split("UserError: ", 1)[-1]) from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error) and ("killed by signal" in str(error) or "exited unex" in str(error)):
            raise UserError(
                f"a loader's worker ended: {str(error).splitlines()[0].strip()}; most often memory has run out: lower "
                "data.num_workers or batch_size, and resume"
            ) from error
        if "in DataLoader worker process" in str(error):
            raise RuntimeError(_last_line(error)) from error
        raise
    except Exception as error:
        if "in DataLoader worker process" in str(error):
            raise RuntimeError(_last_line(error)) from error
        raise


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
        "collate_fn": _collate,
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
    """Training batches, from any position of any epoch; `bad` collects the unreadable images.

    Raises:
        UserError: fewer images than a batch, or a policy that is not timm's.
    """

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
        transform = train_transform(shape, augment)
        repeats = augment.repeats if augment.enabled else 1
        options = _loader_options(cfg, world.device, derive_seed(seed, 4))
        self.batch_size, self.max_bad = batch_size, cfg.max_bad
        self.bad = BadImages()
        self.images: int
        self.batches: int
        self.sampler: _EpochBatches | None = None
        if isinstance(dataset, IterableDataset):
            if repeats > 1:
                raise UserError(
                    f"augment.repeats={repeats} needs a dataset with an index; {cfg.name} is a stream; set it to 1"
                )
            if hasattr(dataset, "set_loader_cfg"):
                dataset.set_loader_cfg(num_workers=cfg.num_workers)
            self.images = len(dataset)  # type: ignore[arg-type]
            self.stream = _SeededStream(dataset, transform, seed, world.rank, training=True)
            # persistent workers would keep the epoch that they were started with
            options["persistent_workers"] = False
            self.loader: DataLoader[Any] = DataLoader(self.stream, batch_size=batch_size, drop_last=True, **options)
            self.batches = self.images // (batch_size * world.size)
        else:
            self.images = len(dataset)
            self.sampler = _EpochBatches(len(dataset), batch_size, seed, world, repeats)
            self.loader = DataLoader(_Seeded(dataset, transform, seed), batch_sampler=self.sampler, **options)
            self.batches = self.sampler.batches
        if self.batches == 0:
            raise UserError(
                f"{cfg.name or 'the folder'} has {len(dataset)} training images, fewer than one batch of {batch_size}"
                f"{f' in each of {world.size} processes' if world.distributed else ''}; lower batch_size"
            )

    def too_many_bad(self) -> bool:
        """Whether more training images are unreadable than data.max_bad allows."""
        allowed = self.max_bad if self.max_bad >= 1 else self.max_bad * self.images
        return self.bad.count("train") > allowed

    def check_bad(self) -> None:
        """Raise UserError where there are too many."""
        if self.too_many_bad():
            raise UserError(
                f"{self.bad.count('train')} of {self.images} training images are unreadable, more than "
                f"data.max_bad={self.max_bad:g} allows (such as "
                f"{self.bad.first('train')}); mend them, or raise data.max_bad and resume"
            )

    def _readable(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets, unreadable, _ in _batches(self.loader):
            if unreadable:
                self.bad.merge(("train", name, reason) for name, reason in unreadable)
            if len(images) < self.batch_size:
                self.check_bad()
                raise UserError(
                    f"no readable image among {_ATTEMPTS} that were drawn (such as {self.bad.first('train')}); "
                    "check data.root"
                )
            yield images, targets

    def epoch(self, epoch: int, start: int = 0) -> Iterable[tuple[Tensor, Tensor]]:
        """The batches of an epoch, counted from 0, from the batch `start` on."""
        if self.sampler is not None:
            self.sampler.epoch, self.sampler.start = epoch, start
            return self._readable()
        self.stream.epoch = epoch
        return islice(self._readable(), start, self.batches)

    def close(self) -> None:
        """Stop the workers; the next epoch starts new ones."""
        _stop_workers(self.loader)


class EvalLoader:
    """Held-out batches of the readable images; over all processes every image comes exactly once.

    `unreadable` lists the images (name, reason) that the last pass could not read; `places` are the indices in the data
    set, or in this process's part of a stream, of the images of the last batch.
    """

    def __init__(self, dataset: Any, cfg: DataConfig, shape: dict[str, Any], batch_size: int, world: World) -> None:
        transform = eval_transform(shape)
        options = _loader_options(cfg, world.device, 0)
        self.unreadable: list[tuple[str, str]] = []
        self.places: list[int] = []
        self.order: list[list[int]] | None = None  # the indices of every batch
        if isinstance(dataset, IterableDataset):
            options["persistent_workers"] = False
            stream = _SeededStream(dataset, transform, 0, world.rank, training=False)
            self.loader: DataLoader[Any] = DataLoader(stream, batch_size=batch_size, **options)
            return
        indices = range(world.rank, len(dataset), world.size)
        side = max(shape["input_size"][-2:]) / (shape["crop_pct"] or 0.875)
        batches = [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
        self.order = batches
        self.loader = DataLoader(_Plain(dataset, transform, side), batch_sampler=batches, **options)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.unreadable = []
        first = 0
        for number, (images, targets, unreadable, places) in enumerate(_batches(self.loader)):
            self.unreadable += unreadable
            self.places = [self.order[number][p] if self.order is not None else first + p for p in places]
            first += len(places) + len(unreadable)
            if len(images):
                yield images, targets

    def close(self) -> None:
        """Stop the workers; the next pass starts new ones."""
        _stop_workers(self.loader)
