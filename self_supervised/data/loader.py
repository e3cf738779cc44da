"""The DataLoader of our own data sets, which goes on within an epoch; and what any loader may yield."""

import signal
from collections.abc import Iterator
from itertools import islice
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

WINDOW = 2**14  # images of shards that are shuffled together: of ImageNet's, less than 2 GB


class ResumableSampler(DistributedSampler):
    """This process's share of the indices, in an order that follows from seed and epoch, without the first `skip`.

    Of a large data set with `shards`, each process gets a run of whole shards (and parts of those at its ends), in
    random order, of which WINDOW images at a time are shuffled together: a disk or network reads one shard after the
    other. What fits into the window is shuffled as a whole, like any other data set.
    """

    skip = 0

    def __iter__(self) -> Iterator[int]:
        shards = getattr(self.dataset, "shards", None)
        in_runs = self.shuffle and shards is not None and len(shards) > WINDOW
        return islice(self.of_shards(shards) if in_runs else super().__iter__(), self.skip, None)

    def of_shards(self, shards: np.ndarray) -> Iterator[int]:
        """Runs differ by one image where they must: the shorter ones repeat one at their ends, which is where
        `ddp.gather_evaluated` leaves it out, or (drop_last) the longer ones lose it."""
        rng = np.random.default_rng((self.seed, self.epoch))
        places = rng.permutation(shards.max() + 1)
        stream = np.argsort(places[shards], kind="stable")  # shard after shard
        run = np.array_split(stream, self.num_replicas)[self.rank][: self.num_samples]
        windows = [rng.permutation(run[i : i + WINDOW]) for i in range(0, len(run), WINDOW)]
        return iter([*np.concatenate(windows).tolist(), *run[:1].tolist()][: self.num_samples])


class ResumableDataLoader(DataLoader):
    """DataLoader over a `ResumableSampler` with a state, (epoch, batches yielded), that Lightning saves in checkpoints.

    A data set with an `epoch` is told it before its workers start.
    """

    position = {"epoch": 0, "batches": 0}
    resumed: dict[str, int] | None = None
    workers: tuple[BaseProcess, ...] = ()  # of the epoch begun last

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.persistent_workers:
            raise ValueError("persistent_workers=True would keep the workers in the first epoch: leave it out")

    def __iter__(self) -> Iterator[Any]:
        if not isinstance(self.sampler, ResumableSampler):  # Lightning's choice, to overfit
            yield from super().__iter__()
            return
        # A generator: nothing happens before the first batch is asked for. Lightning wants the iterator before it has
        # set the epoch of a resumed run, and workers would begin with the wrong one.
        epoch = self.sampler.epoch
        resumed = self.resumed
        self.resumed = None
        start = resumed["batches"] if resumed is not None and resumed["epoch"] == epoch else 0
        self.position = {"epoch": epoch, "batches": start}
        self.sampler.skip = start * self.batch_size
        if hasattr(self.dataset, "epoch"):
            self.dataset.epoch = epoch
        try:
            for batch in self.batches():
                self.position["batches"] += 1
                yield batch
        except (OSError, EOFError):  # the connection to a worker is lost, before the system says that it died
            wait([worker.sentinel for worker in self.workers], timeout=1 if self.workers else 0)
            raise

    def batches(self) -> Iterator[Any]:
        """A data set that knows `order` has its images on the device: the order of the epoch goes there once."""
        if not hasattr(self.dataset, "order"):
            others = set(active_children())
            batches = super().__iter__()
            self.workers = tuple(set(active_children()) - others)
            return batches
        order = self.dataset.order(list(self.sampler))
        if self.drop_last:
            order = order[: len(order) // self.batch_size * self.batch_size]
        return map(self.dataset.__getitems__, order.split(self.batch_size))

    def dead_workers(self) -> Iterator[tuple[int, str]]:
        """(process, how it ended) of those that did not end well. PyTorch itself ends late ones, by SIGTERM."""
        for worker in self.workers:
            if worker.exitcode not in (None, 0, -signal.SIGTERM):
                code = worker.exitcode
                yield worker.pid, f"exit code {code}" if code > 0 else signal.Signals(-code).name

    def state_dict(self) -> dict[str, int]:
        return dict(self.position)

    @staticmethod
    def is_position(state: Any) -> bool:
        """Whether it is the state of such a loader, and not of one of the user's."""
        return isinstance(state, dict) and state.keys() == {"epoch", "batches"}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after that many batches of that epoch; other epochs begin at their beginning."""
        self.resumed = dict(state)


def images_and_labels(batch: Any) -> tuple[Tensor | list[Tensor], Tensor | None]:
    """What a loader may yield -> (images or list of views, labels or None). Labels are known by their one axis, or two
    (presences of all classes).

    Raises:
        ValueError: the batch is none of: images; images and labels; two or more views, then labels or none; a list of
            views, and labels. Or the images are neither uint8 nor float.
    """
    parts = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, list | tuple) else []
    labels = parts.pop() if len(parts) > 1 and isinstance(parts[-1], Tensor) and parts[-1].dim() < 3 else None
    if len(parts) == 1 and isinstance(parts[0], list | tuple):
        parts = list(parts[0])
    if not parts or not all(isinstance(part, Tensor) and part.dim() > 2 for part in parts):
        kinds = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        raise ValueError(
            f"a batch of {type(batch).__name__} with {kinds} was not understood: a loader yields images [N, C, H, W], "
            "(images, labels), a list of views, or (list of views, labels), with labels [N]"
        )
    if not all(part.dtype == torch.uint8 or part.is_floating_point() for part in parts):
        raise ValueError(
            f"images={parts[0].dtype}: a loader yields uint8 images with values from 0 to 255, or normalized float "
            "images. Convert them with .to(torch.uint8)"
        )
    return parts[0] if len(parts) == 1 else parts, labels


def whole_numbers(labels: Tensor | None) -> Tensor | None:
    """Classes [N] or [N, 1] of any type -> int64 [N]; presences [N, K] as they are. Looks at no values."""
    if labels is None:
        return None
    labels = labels[:, 0] if labels.dim() == 2 and labels.shape[1] == 1 else labels
    return labels.long() if labels.dim() == 1 else labels
