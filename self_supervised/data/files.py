"""What data sets of files have in common: labels, and files that cannot be read, found out by any worker."""

import copy
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from self_supervised.catalogue import MOST_WORKERS
from self_supervised.data.class_labels import class_numbers_of, composed
from self_supervised.data.file_search import folders_in

UNREADABLE = -(2**31)  # label of a row that stands in for an image which could not be read, in an evaluation
Sample = tuple[str, int | np.ndarray]  # path; class, or presences of all classes
File = str | BinaryIO  # a path, or what is in the file


class OnDisk:
    """Where each file is what its path says; others read them from larger files (data/tar_shards.py, data/arrow.py)."""

    def open(self, path: str) -> File:
        return path

    def signature(self, path: str) -> tuple:
        """What changes when the file does, or a file of the folder: its own time stays when one is overwritten."""
        status = os.stat(path)
        if not stat.S_ISDIR(status.st_mode):
            return status.st_size, status.st_mtime_ns
        inside = [entry.stat() for entry in os.scandir(path)]
        return len(inside), sum(s.st_size for s in inside), max((s.st_mtime_ns for s in inside), default=0)

    def shards(self, paths: list[str]) -> np.ndarray | None:
        """The number of the larger file in which each is, where it pays to read one after the other."""
        return None


class UnreadableFile(ValueError):
    """Of one in a worker, PyTorch makes another of the whole traceback, which ends with the sentence: that remains."""

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def class_numbers_of_split(split: Path) -> dict[str, int]:
    """Class folder of a split -> number of its class, by the sorted names of the class folders of `train` beside it
    (of its own, if there is no such folder), whatever other folders the split has.

    Raises:
        ValueError: the split has class folders that train lacks.
    """

    def names(folder: Path) -> list[str]:
        return sorted(path.name for path in folders_in(folder)) if folder.is_dir() else []

    here = names(split)
    train = names(split.with_name("train"))
    known = class_numbers_of(map(composed, train or here), {split.name: map(composed, here)}, split.parent)
    return {name: known[composed(name)] for name in here}


class LabeledFiles(Dataset):
    """Paths and labels of files, each a sample of its own. A subclass reads one: `read(index)`.

    Args:
        files: (path, label) of each.
        kind: what a file is, for the messages.
        skip_unreadable: take the next readable file in place of one that cannot be read, instead of stopping.
        evaluated: label what stands in for an unreadable file UNREADABLE, so that `readable_rows` leaves it out.
        source: opens them; default: the disk.
    """

    def __init__(
        self, files: list[Sample], kind: str, skip_unreadable: bool, evaluated: bool, source: OnDisk | None = None
    ):
        self.files = files
        self.kind = kind
        self.skip_unreadable = skip_unreadable
        self.evaluated = evaluated
        self.source = source or OnDisk()
        self.class_names: list[str] = []  # in the order of their numbers, where they are known
        self.epoch = 0  # told by the loader
        self.share()

    def share(self) -> None:
        """With the workers: of each file the next one that may be readable (itself, until it was found unreadable), and
        which file each worker (by process) read last."""
        self.next = torch.arange(len(self.files) + 1, dtype=torch.int32)
        if self.skip_unreadable:
            self.next.share_memory_()
        self.reading = torch.full((MOST_WORKERS, 2), -1).share_memory_()

    @property
    def unreadable(self) -> Tensor:
        """Which files could not be read so far: bool [N]."""
        return self.next[:-1] != torch.arange(len(self))

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> np.ndarray:
        return np.array([label for _, label in self.files])

    @property
    def shards(self) -> np.ndarray | None:
        """Of each file, for loader.Share."""
        return self.source.shards([path for path, _ in self.files])

    def signatures(self) -> Iterator[tuple[str, tuple, int | np.ndarray]]:
        """(path, what changes when the file does, label) of each."""
        for path, label in self.files:
            try:
                yield path, self.source.signature(path), label
            except OSError as error:  # whether it may be left out is decided when it is read
                yield path, (error.errno,), label

    def subset(self, indices: np.ndarray) -> Self:
        """These files alone."""
        part = copy.copy(self)
        part.files = [self.files[i] for i in indices]
        part.share()
        return part

    def read(self, index: int) -> Any:
        raise NotImplementedError

    def readable(self, index: int) -> tuple[Any, int | np.ndarray]:
        """What `read` returns for this index, or for the next one that can be read; and its label.

        Raises:
            UnreadableFile: names the path.
        """
        index = range(len(self))[index]
        if (worker := get_worker_info()) is not None:
            self.reading[worker.id] = torch.tensor([os.getpid(), index])
        for start in (index, 0):  # from here to the end, then around
            candidate = self.candidate(start)
            while candidate < len(self):
                try:
                    found = self.read(candidate)
                    label = self.files[candidate][1]
                    left_out = self.evaluated and candidate != index
                    return found, np.full_like(label, UNREADABLE)[()] if left_out else label
                except Exception as error:  # readers raise many kinds of them on damaged files
                    self.refuse(candidate, error)
                    self.next[candidate] = candidate + 1
                    candidate = self.candidate(candidate)
        raise UnreadableFile(
            f"none of the {len(self)} {self.kind}s could be read, the last one was {self.files[index][0]}"
        )

    def refuse(self, index: int, error: Exception) -> None:
        """Raise UnreadableFile for a file that could not be read, unless such are skipped."""
        if not self.skip_unreadable:
            a = "an" if self.kind[0] in "aeiou" else "a"
            raise UnreadableFile(
                f"{self.files[index][0]} could not be read as {a} {self.kind} ({type(error).__name__}: {error}): "
                'mend or remove it, or set unreadable_images="skip"'
            ) from error

    def candidate(self, index: int) -> int:
        """Return the first file from `index` on that may be readable; N if there is none. The way is shortened for
        those who come after, so that a run of B unreadable files costs about B steps, however many ask for them."""
        following = self.next.numpy()
        while following[index] != index:
            following[index] = following[following[index]]
            index = int(following[index])
        return index

    def skipped(self) -> list[str]:
        """Paths of the files found unreadable so far, by any worker."""
        return [self.files[i][0] for i in self.unreadable.nonzero().flatten().tolist()]

    def last_read(self, process: int) -> str | None:
        """Path of the file that this worker read last."""
        return next((self.files[i][0] for reader, i in self.reading.tolist() if reader == process), None)


def name_skipped(*datasets: Any, already: int = 0) -> int:
    """Warn of the unreadable files of these data sets, if there are more than `already`. Returns how many."""
    skipped = [path for dataset in datasets if isinstance(dataset, LabeledFiles) for path in dataset.skipped()]
    if len(skipped) > already:
        how = "left out" if all(getattr(dataset, "evaluated", True) for dataset in datasets) else "skipped"
        more = f" and {len(skipped) - 20} more" if len(skipped) > 20 else ""
        named = f"{', '.join(skipped[:20])}{more}"
        warnings.warn(f"{len(skipped)} files could not be read and were {how}: {named}", stacklevel=2)
    return len(skipped)


def readable_rows(labels: Tensor | None, *rows: Tensor) -> tuple[Tensor, ...]:
    """Return rows (images, features, ...) and their labels without those that stand in for unreadable files."""
    if labels is None:
        return (*rows, None)
    kept = (labels != UNREADABLE).flatten(1).all(1) if labels.dim() > 1 else labels != UNREADABLE
    return tuple(part if kept.all() else part[kept] for part in (*rows, labels))


def nan_where_unreadable(rows: Tensor, labels: Tensor | None) -> Tensor:
    """Return rows [N, E], NaN for those that stand in for unreadable files."""
    if labels is None:
        return rows
    unreadable = (labels == UNREADABLE).reshape(len(labels), -1).any(1)
    return rows.masked_fill(unreadable[:, None], float("nan"))
