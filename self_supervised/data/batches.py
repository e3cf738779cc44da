"""Batches: our DataLoader, which can resume within an epoch, and the formats that those of any loader may have."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from model_params import DROP_LAST
from self_supervised import distributed
from self_supervised.data.files import readable_rows

WINDOW = 2**14  # images in shards that are shuffled together, by all processes: for ImageNet, less than 2 GB


class ResumableSampler(DistributedSampler):
    """Sampler of one process's part of the indices, in an order that depends on seed and epoch only.

    Image n of process r is image n W + r of the epoch, whatever the number W of processes is. The first `skip` indices
    of this process are left out.

    A data set with more than WINDOW images in `shards` is shuffled in windows, so that shards are read one after the
    other: the shards are put in random order, and WINDOW images at a time are shuffled together. All other data sets
    are shuffled as a whole.

    Args:
        step: images per optimizer step on all processes and accumulated batches; drop_last drops the images of an
            incomplete step, unless it is the only one. None: those that cannot be divided equally among processes.
        same_order: whether the order is that of epoch 0 in all epochs, so that evaluations read the same images.
    """

    skip = 0

    def __init__(self, *args: Any, step: int | None = None, same_order: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.same_order = same_order
        if self.drop_last and step and len(self.dataset) >= step:
            self.total_size = len(self.dataset) // step * step
            self.num_samples = self.total_size // self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(0 if self.same_order else epoch)

    def __iter__(self) -> Iterator[int]:
        shards = getattr(self.dataset, "shards", None)
        in_windows = self.shuffle and isinstance(shards, np.ndarray) and len(shards) > WINDOW
        return islice(self.shuffled_in_windows(shards) if in_windows else super().__iter__(), self.skip, None)

    def shuffled_in_windows(self, shards: np.ndarray) -> Iterator[int]:
        """Return this process's indices, shard after shard and shuffled in windows. As in `DistributedSampler`, images
        are repeated or dropped at the end if they cannot be divided equally."""
        rng = np.random.default_rng((self.seed, self.epoch))
        used, shards = np.unique(shards, return_inverse=True)  # numbers of shards may have gaps, such as of a split
        stream = np.argsort(rng.permutation(len(used))[shards], kind="stable")  # shard after shard
        order = np.concatenate([rng.permutation(stream[i : i + WINDOW]) for i in range(0, len(stream), WINDOW)])
        return iter(np.resize(order, self.total_size)[self.rank :: self.num_replicas].tolist())


def begin_worker(initialize: Callable[[int], Any] | None, training_id: int, worker_id: int) -> None:
    """Let a worker ignore the signals at which the training saves and exits: launchers send them to all processes of a
    group, and the training needs its workers up to the next batch. It can still end them itself.

    Args:
        initialize: the user's function of the worker's number.
        training_id: process that the loader is of; not the worker's parent if a server forks workers.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=end_when_told, args=(training_id,), daemon=True).start()
    if initialize is not None:
        initialize(worker_id)


def end_when_told(training_id: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training_id:
        pass
    os._exit(0)


class ResumableDataLoader(DataLoader):
    """DataLoader over a `ResumableSampler`, with a state (epoch, batches yielded) that Lightning saves in checkpoints.

    If the data set has an attribute `epoch`, it is set before the workers start. If it has a method `read_ahead`, it is
    called with the order of the epoch.
    """

    position = {"epoch": 0, "batches": 0}
    resumed: dict[str, int] | None = None  # position to resume from
    workers: tuple[BaseProcess, ...] = ()  # of the latest epoch

    def __init__(self, *args: Any, of_dataset_name: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.of_dataset_name = of_dataset_name  # False: of the user
        if self.persistent_workers:
            raise ValueError("persistent_workers=True: the workers would stay in the first epoch. Leave it out.")

    def __iter__(self) -> Iterator[Any]:
        if not isinstance(self.sampler, ResumableSampler):  # Lightning replaces it for overfit_batches
            yield from super().__iter__()
            return
        # As a generator, this starts the workers at the first batch. Lightning creates the iterator before it sets the
        # epoch of a resumed run, so that they would start with the wrong epoch.
        epoch = self.sampler.epoch
        resumed = self.resumed
        self.resumed = None
        start = resumed["batches"] if resumed is not None and resumed["epoch"] == epoch else 0
        self.position = {"epoch": epoch, "batches": start}
        self.sampler.skip = start * self.batch_size
        if hasattr(self.dataset, "epoch"):
            self.dataset.epoch = epoch
        if hasattr(self.dataset, "read_ahead"):
            self.dataset.read_ahead(self.sampler)
        batches = self.batches()
        try:
            for batch in batches:
                self.position["batches"] += 1
                yield batch
        except Exception as error:
            if isinstance(error, OSError | EOFError):  # the connection to a worker is lost; its exit code comes later
                wait([worker.sentinel for worker in self.workers], timeout=1 if self.workers else 0)
            if hasattr(batches, "_shutdown_workers"):
                # The error refers to the iterator, so only the garbage collector would shut the workers down, at some
                # later time. By then the queues are closed, and each worker costs a wait of five seconds.
                batches._shutdown_workers()
            raise

    def batches(self) -> Iterator[Any]:
        """Return the batches of an epoch, and store its workers.

        A data set with a method `order` is on the device, to which the indices of the epoch are copied once.
        """
        if not callable(getattr(self.dataset, "order", None)):
            others = set(active_children())
            initialize = self.worker_init_fn
            self.worker_init_fn = partial(begin_worker, initialize, os.getpid())
            try:
                batches = super().__iter__()
            finally:
                self.worker_init_fn = initialize  # Lightning sets one of its own if there is none
            self.workers = tuple(set(active_children()) - others)
            return batches
        order = self.dataset.order(list(self.sampler))
        if self.drop_last:
            order = order[: len(order) // self.batch_size * self.batch_size]
        return map(self.dataset.__getitems__, order.split(self.batch_size))

    def dead_workers(self) -> Iterator[tuple[int, str]]:
        """Yield (process id, exit code or signal) of failed workers."""
        for worker in self.workers:
            if worker.exitcode not in (None, 0, -signal.SIGTERM):  # with which PyTorch ends those that are not ready
                code = worker.exitcode
                yield worker.pid, f"exit code {code}" if code > 0 else signal.Signals(-code).name

    def state_dict(self) -> dict[str, int]:
        return dict(self.position)

    @staticmethod
    def is_position(state: Any) -> bool:
        """Return whether `state` is that of a ResumableDataLoader, and not of another loader."""
        return isinstance(state, dict) and state.keys() == {"epoch", "batches"}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume after `batches` batches of epoch `epoch`; other epochs start from their first batch."""
        self.resumed = dict(state)


def size_of_batches(loader: Any) -> int | None:
    """Return the batch size of any loader, or that of its batch sampler; None if it has none."""
    return getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)


def images_and_labels(batch: Any) -> tuple[Tensor | list[Tensor], Tensor | None]:
    """Return (images or list of views, labels or None) of a batch of any loader.

    A batch is images, or images and labels; or two or more views, with or without labels after them; or a list of views
    and labels. The last tensor is taken as labels if it has one axis, or two (multi-hot). File names at the end, which
    lightly's LightlyDataset adds, are dropped.

    Raises:
        ValueError: the batch is something else, or its images are neither uint8 nor float.
    """
    parts = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, list | tuple) else []
    if parts and isinstance(parts[-1], list | tuple) and all(isinstance(name, str) for name in parts[-1]):
        parts.pop()
    labels = parts.pop() if len(parts) > 1 and isinstance(parts[-1], Tensor) and parts[-1].dim() < 3 else None
    if len(parts) == 1 and isinstance(parts[0], list | tuple):
        parts = list(parts[0])
    if not parts or not all(isinstance(part, Tensor) and part.dim() > 2 for part in parts):
        given = batch if isinstance(batch, list | tuple) else [batch]
        kinds = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in given]
        kinds = list(batch) if isinstance(batch, Mapping) else kinds
        raise ValueError(
            f"batch={type(batch).__name__} with {kinds}: this format is unknown. A loader yields images [N, C, H, W], "
            "(images, labels), a list of views, or (list of views, labels), with labels [N]. Return one of "
            "these from the data set or a collate_fn."
        )
    wrong = next((part for part in parts if part.dtype != torch.uint8 and not part.is_floating_point()), None)
    if wrong is not None:
        raise ValueError(
            f"images={wrong.dtype} {list(wrong.shape)}: a loader yields uint8 images with values from 0 to 255, or "
            f"normalized float images. {way_to_uint8(wrong)}, or leave out what is not an image."
        )
    return (parts[0] if len(parts) == 1 else parts), labels


def way_to_uint8(images: Tensor) -> str:
    """Return how to convert integer images: .to(torch.uint8) alone would wrap values outside 0 to 255."""
    values = images.detach().cpu().to(torch.int64)  # uint16 has no minimum on its own
    low, high = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
    if low >= 0 and high <= 255:
        return "Convert them with .to(torch.uint8)"
    example = "such as 16 bits with (images / 257).to(torch.uint8)"
    return f"Scale their values from {low} to {high} to 0 to 255 first, {example}"


def first_batches_of_user(loaders: Any) -> Iterator[tuple[int, Any]]:
    """Yield number and first batch of each validation loader of the user, without a change of the random states.

    Raises:
        ValueError: a loader has no batch.
    """
    for index, loader in enumerate(list_of_loaders(loaders)):
        if not isinstance(loader, DataLoader) or isinstance(loader, ResumableDataLoader):
            continue
        with isolate_rng():
            batch = next(iter(loader), None)
        if batch is None:
            raise ValueError(f"the validation loader {index} has no batch. Pass more images, or leave out drop_last.")
        yield index, batch


def class_indices(labels: Tensor | None) -> Tensor | None:
    """Return class labels [N] or [N, 1] of any type as int64 [N]; multi-hot labels [N, K] are unchanged.

    Values are not read, which would wait for the device.
    """
    if labels is None:
        return None
    labels = labels[:, 0] if labels.dim() == 2 and labels.shape[1] == 1 else labels
    return labels.long() if labels.dim() == 1 else labels


def check_views(views: Any, n: int) -> None:
    """Raise ValueError unless a training batch has n views or more of each image."""
    if isinstance(views, Tensor):
        raise ValueError(
            f"a batch is a tensor {tuple(views.shape)}, not a list of views. Your LightningDataModule's "
            "on_after_batch_transfer replaces ours, which makes the views. Convert images in on_before_batch_transfer."
        )
    if len(views) < n:
        raise ValueError(
            f"the loader yields {len(views)} of the {n} views needed of each image. Yield a list of views, a tensor "
            "N x V x C x H x W, or uint8 images, which are augmented here."
        )


@contextmanager
def explain_batch_of_one(x: Tensor) -> Iterator[None]:
    """Add a way out to PyTorch's error about a batch of one image in train mode, which has no batch statistics."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        way_out = f"choose a larger batch_size or micro_batch_size or, if it is the last one, {DROP_LAST}"
        raise ValueError(f"a batch of {len(x)} image has no batch statistics: {way_out} ({error})") from error


def is_of_dataset_name(loader: Any) -> bool:
    """Return whether a loader is that of `dataset_name`, with labels that were checked, and not one of the user."""
    return getattr(loader, "of_dataset_name", False)


def list_of_loaders(held: Any) -> list:
    """Return what Lightning holds, a loader or a collection of loaders, as a list."""
    if isinstance(held, dict):
        return list(held.values())
    return list(held) if isinstance(held, list | tuple) else [held]


def gathered(outputs_of: dict[int, list[tuple]], loaders: Any) -> list[tuple[Tensor | None, ...]]:
    """Return (features, labels or None) of each loader, gathered over processes and without unreadable files.

    Args:
        outputs_of: loader's index -> (features, labels) of its batches. It is emptied.
        loaders: the loader or loaders that the Trainer holds.
    """
    sets = []
    for index, outputs in sorted(outputs_of.items()):
        loader = list_of_loaders(loaders)[index]
        x, y = zip(*outputs, strict=True)
        if len({labels is None for labels in y}) > 1:
            raise ValueError(f"the loader {index} yields labels with some batches only. Yield -1 where there is none.")
        x = distributed.gather_evaluated(torch.cat(x), loader)
        sets.append(readable_rows(None if y[0] is None else distributed.gather_evaluated(torch.cat(y), loader), x))
    outputs_of.clear()
    return sets


def numbered(scores: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the scores of the loader `index` under names that end in its number, unless it is the first."""
    return {f"{name}_{index}": value for name, value in scores.items()} if index else scores
