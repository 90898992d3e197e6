"""Training order that resumes exactly: which images, in which batches, with which augmentation, is a pure function of
the seed, the epoch and the position; the loop can begin anywhere in an epoch.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS as ROOT_DATASETS
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import BatchSampler, Sampler

from zoo.errors import UserError
from zoo.train.images import ImageError, is_machine_trouble
from zoo.train.state import isolated_rng, restore_rng, rng_state

from .loading import LoadImage, read_bgr
from .registry import DATA_SAMPLERS, DATASETS, LOOPS

__all__ = ["EpochBatchSampler", "SeededDataset", "TrainLoop", "unreadable_images"]

_TRIES = 20  # unreadable images in a row after which the data set, not an image, is to blame


@DATASETS.register_module()
class SeededDataset:
    """A data set whose augmentation of a sample depends on (seed, epoch, index) alone, and that survives bad images.

    An image that cannot be read is written down in `report`. In training the next image takes its place; in
    evaluation an empty image does, so its objects count as missed.

    Args:
        dataset: an mmdet data set, or its config.
        seed: the run's seed.
        report: a file that collects unreadable images, one JSON line each, from all worker processes.
    """

    def __init__(self, dataset: BaseDataset | dict[str, Any], seed: int = 0, report: str | None = None) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells of its index
            self.dataset: Any = ROOT_DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.seed = seed
        self.report = report

    @property
    def metainfo(self) -> dict[str, Any]:
        """Classes and palette."""
        return self.dataset.metainfo

    def full_init(self) -> None:
        """Read the annotations."""
        self.dataset.full_init()

    def get_data_info(self, index: int) -> dict[str, Any]:
        """Annotation of an image."""
        return self.dataset.get_data_info(index)

    def picture(self, path: str) -> np.ndarray:
        """An image file, [H, W, 3] with blue first, as the pipeline reads it.

        Raises:
            ImageError: it cannot be read.
        """
        first = self.dataset.pipeline.transforms[0]
        return first({"img_path": path})["img"] if isinstance(first, LoadImage) else read_bgr(path)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, code: int) -> Any:
        """The sample epoch * len(self) + index, through the pipeline."""
        epoch, index = divmod(int(code), len(self))
        with isolated_rng(self.seed, 21, epoch, index):
            for _ in range(_TRIES):
                try:
                    data = self.dataset.prepare_data(index)
                except (ImageError, OSError, AssertionError, cv2.error) as error:
                    if is_machine_trouble(error) or not self._blame_image(index, error):
                        raise
                    if self.dataset.test_mode:
                        return self._empty(index)
                    index = (index + 1) % len(self)
                    continue
                if data is not None:
                    return data
                index = int(np.random.randint(len(self)))  # the pipeline left no object in the crop
        path = self.get_data_info(index)["img_path"]
        raise UserError(f"{_TRIES} images in a row cannot be read, the last is {path}; check data.root")

    def _blame_image(self, index: int, error: Exception) -> bool:
        """Write an image down if it is the image that failed, and not a transform."""
        path = self.get_data_info(index)["img_path"]
        readable = False
        if not isinstance(error, ImageError):
            with contextlib.suppress(ImageError):
                self.picture(path)
                readable = True
        if not readable and self.report is not None:
            reason = error.reason if isinstance(error, ImageError) else str(error) or type(error).__name__
            line = json.dumps({"image": path, "error": reason}) + "\n"
            descriptor = os.open(self.report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
        return not readable

    def _empty(self, index: int) -> Any:
        data = self.get_data_info(index)
        shape = (data["height"], data["width"])
        data.update(img=np.zeros((*shape, 3), np.uint8), img_shape=shape, ori_shape=shape)
        for transform in self.dataset.pipeline.transforms[1:]:
            data = transform(data)
        return data


def unreadable_images(report: str | Path) -> list[str]:
    """The different images that a report of `SeededDataset` names."""
    file = Path(report)
    if not file.is_file():
        return []
    return sorted({json.loads(line)["image"] for line in file.read_text().splitlines()})


@DATA_SAMPLERS.register_module()
class EpochBatchSampler(BatchSampler):
    """Batches of one epoch, portrait and landscape images apart, from any batch on.

    Yields epoch * len(dataset) + index, from which `SeededDataset` knows the epoch.

    Args:
        sampler: a sampler of mmengine, which knows its epoch and data set.
        batch_size: images per batch; the last batch may be smaller.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self.start = 0

    def _batches(self) -> list[list[int]]:
        source: Any = self.sampler
        groups: tuple[list[int], list[int]] = ([], [])
        batches = []
        for index in source:
            info = source.dataset.get_data_info(index)
            group = groups[info["width"] < info["height"]]
            group.append(index)
            if len(group) == self.batch_size:
                batches.append(group[:])
                group.clear()
        rest = groups[0] + groups[1]
        return batches + [rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        source: Any = self.sampler
        first = getattr(source, "epoch", 0) * len(source.dataset)
        for batch in self._batches()[self.start :]:
            yield [first + index for index in batch]

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)  # type: ignore[arg-type]


@LOOPS.register_module()
class TrainLoop(EpochBasedTrainLoop):
    """mmengine's epoch loop that can begin and end inside an epoch.

    Hooks may have two more methods: `after_step(runner)` when a step is complete, with all counters advanced, and
    `after_round(runner)` when an epoch and its evaluation are.

    Args:
        max_steps: end after so many steps, with an evaluation; the schedule still spans the epochs.
        kwargs: the arguments of EpochBasedTrainLoop.
    """

    def __init__(self, *args: Any, max_steps: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last_step = self._max_iters if max_steps is None else min(self._max_iters, max_steps)
        self.interrupted = False
        self.evaluated_step = 0  # after which the last evaluation was
        self.round_pending: dict[str, Any] | None = None  # the generators' states while an epoch awaits its evaluation

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch."""
        return len(self.dataloader)

    def resume_at(self, epoch: int, step: int, generators: dict[str, Any], pending: bool) -> None:
        """Set the position: epochs and steps that are complete, and whether the last epoch awaits its evaluation."""
        self._epoch, self._iter = epoch, step
        self.round_pending = generators if pending else None
        restore_rng(generators)

    def run(self) -> Any:
        """Train to the end, or until `interrupted` is set."""
        self.runner.call_hook("before_train")
        while not self.interrupted and (self.round_pending or self._unfinished()):
            if self.round_pending is None:
                self.run_epoch()
                if self.interrupted:
                    break
                self.round_pending = rng_state()
            done = self._iter >= self.last_step
            if self.runner.val_loop is not None and (done or self._epoch % self.val_interval == 0):
                self.runner.val_loop.run()
                self.evaluated_step = self._iter
            restore_rng(self.round_pending)  # so an evaluation that is done twice leaves no trace
            self.round_pending = None
            self.runner.call_hook("after_round")
        self.runner.call_hook("after_train")
        return self.runner.model

    def _unfinished(self) -> bool:
        """Whether steps remain, or the last one is made and its evaluation was not: a run may stop between the two."""
        return self._iter < self.last_step or (self.runner.val_loop is not None and self.evaluated_step < self._iter)

    def run_epoch(self) -> None:
        """Train to the end of the epoch under way."""
        sampler = self.dataloader.batch_sampler
        position = self._iter - self._epoch * self.steps_per_epoch
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        sampler.start = position
        generators = rng_state()
        batches = iter(self.dataloader)
        restore_rng(generators)  # making the iterator drew a seed for the workers, which a resumed run does once more
        for index, batch in enumerate(batches, start=position):
            if self._iter >= self.last_step:
                break
            self.run_iter(index, batch)
            self.runner.call_hook("after_step")
            if self.interrupted or self._iter >= self.last_step:
                break
        sampler.start = 0
        if self._iter == (self._epoch + 1) * self.steps_per_epoch and not self.interrupted:
            self.runner.call_hook("after_train_epoch")
            self._epoch += 1
