"""Base classes of data sets of files: where files are read from, their labels, and how unreadable files are handled.

Loader workers share what they learn about unreadable files. Functions at the end remove the rows of such files.
"""

import copy
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from self_supervised.catalogue import MOST_WORKERS
from self_supervised.data.class_labels import class_numbers_of, composed
from self_supervised.data.file_search import folders_in
from self_supervised.data.shard_urls import UnreachableShard
from self_supervised.fields import first_of

UNREADABLE = -(2**31)  # label of a row that replaces an unreadable image in an evaluation
MOST_SKIPPED = 20  # files listed in a warning
Sample = tuple[str, int | np.ndarray]  # (path, class), or (path, multi-hot labels)
File = str | BinaryIO  # a path, or the content of a file


class OnDisk:
    """Source of files that lie on the disk under their own paths.

    Subclasses read them from larger files instead (data/tar_shards.py, data/arrow.py).
    """

    def open(self, path: str) -> File:
        """Return where to read the file from: its path, or its content as a binary stream."""
        return path

    def signature(self, path: str) -> tuple:
        """Return sizes and modification times that change when the file changes, or a file in the directory `path`.

        The directory's own time does not change when one of its files is overwritten.
        """
        status = os.stat(path)
        if not stat.S_ISDIR(status.st_mode):
            return status.st_size, status.st_mtime_ns
        inside = [entry.stat() for entry in os.scandir(path)]
        return len(inside), sum(s.st_size for s in inside), max((s.st_mtime_ns for s in inside), default=0)

    def shards(self, paths: list[str]) -> np.ndarray | None:
        """Return the number of the shard that holds each file; None if there are no shards."""
        return None

    def read_ahead(self, paths: Iterator[str]) -> None:
        """Prepare for reading these files in this order."""


class UnreadableFile(ValueError):
    """A file could not be read.

    PyTorch rebuilds a worker's exception with the worker's whole traceback as its message. Only the original message,
    at the end of it, is kept.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def class_numbers_of_split(split: Path) -> dict[str, int]:
    """Return class folder of a split -> class number.

    Numbers are positions among the sorted class folders of `train`, which is next to the split; if there is no `train`,
    among the split's own.

    Raises:
        ValueError: the split has class folders that train lacks.
    """

    def names(folder: Path) -> list[str]:
        return sorted(path.name for path in folders_in(folder)) if folder.is_dir() else []

    here = names(split)
    train = names(split.with_name("train"))
    known = class_numbers_of(map(composed, train or here), {split.name: map(composed, here)}, split.parent)
    return {name: known[composed(name)] for name in here}


class Samples(Sequence):
    """(path, label) of many files, in three blocks of memory instead of a list.

    Reading an object of Python writes to its memory (it counts references), so every worker would soon have a list of
    its own.
    """

    def __init__(self, samples: Sequence[Sample]):
        encoded = [path.encode("utf-8", "surrogatepass") for path, _ in samples]  # any name that a file may have
        self.paths = b"".join(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.labels = np.array([label for _, label in samples])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        i = range(len(self))[index]
        label = self.labels[i]
        path = self.paths[self.ends[i] : self.ends[i + 1]].decode("utf-8", "surrogatepass")
        return path, label if label.ndim else label.item()


class LabeledFiles(Dataset):
    """Data set with one sample per file. Subclasses implement `read(index)`.

    Args:
        files: (path, label) of each file.
        kind: what a file is, for the messages: "image" or "video".
        skip_unreadable: replace a file that cannot be read with the next readable one, instead of raising.
        evaluated: give such a replacement the label UNREADABLE, so that `readable_rows` removes it.
        source: opens the files; default: the disk.
    """

    def __init__(
        self, files: list[Sample], kind: str, skip_unreadable: bool, evaluated: bool, source: OnDisk | None = None
    ):
        self.files = Samples(files)
        self.kind = kind
        self.skip_unreadable = skip_unreadable
        self.evaluated = evaluated
        self.source = source or OnDisk()
        self.class_names: list[str] = []  # in the order of the class numbers; empty if unknown
        self.about_labels = ""  # class_labels.labels_text of the data set; "" if it is not known
        self.epoch = 0  # set by the loader
        self.share()

    def share(self) -> None:
        """Allocate the tensors that are shared with the loader's workers.

        `may_be_readable`: for each file, whether no worker failed to read it so far; one more True ends every search.
        `reading`: for each worker, its process id and the index of the file that it read last.
        """
        self.may_be_readable = torch.ones(len(self.files) + 1, dtype=torch.bool)
        if self.skip_unreadable:
            self.may_be_readable.share_memory_()
        self.reading = torch.full((MOST_WORKERS, 2), -1).share_memory_()

    @property
    def unreadable(self) -> Tensor:
        """Mask of the files that could not be read so far: bool [N]."""
        return ~self.may_be_readable[:-1]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> np.ndarray:
        """Class numbers [N], or multi-hot labels [N, K]."""
        return self.files.labels.copy()

    @property
    def shards(self) -> np.ndarray | None:
        """Number of the shard that holds each file, [N], for ResumableSampler; None if there are no shards."""
        return self.source.shards([path for path, _ in self.files])

    def read_ahead(self, order: Iterable[int]) -> None:
        """Let the source prepare for an epoch in this order of the files."""
        if getattr(self, "packed_pixels", None) is None:
            self.source.read_ahead(self.files[i][0] for i in order)

    def signatures(self) -> Iterator[tuple[str, tuple, int | np.ndarray]]:
        """Yield (path, signature, label) of each file; the signature changes when the file changes."""
        for path, label in self.files:
            try:
                yield path, self.source.signature(path), label
            except OSError as error:  # `readable` decides whether the file may be skipped
                yield path, (error.errno,), label

    def subset(self, indices: np.ndarray) -> Self:
        """Return a data set of these files only."""
        part = copy.copy(self)
        part.files = Samples([self.files[i] for i in indices])
        part.share()
        return part

    def read(self, index: int) -> Any:
        """Return the content of a file."""
        raise NotImplementedError

    def readable(self, index: int) -> tuple[Any, int | np.ndarray]:
        """Return what `read` returns for this index, or for the next readable one, and its label.

        Raises:
            UnreadableFile: the file, or every file, cannot be read.
        """
        index = range(len(self))[index]
        if (worker := get_worker_info()) is not None:
            self.reading[worker.id] = torch.tensor([os.getpid(), index])
        for start in (index, 0):  # from the index to the end, then from the start
            candidate = self.candidate(start)
            while candidate < len(self):
                try:
                    content = self.read(candidate)
                    label = self.files[candidate][1]
                    is_replaced = self.evaluated and candidate != index
                    return content, np.full_like(label, UNREADABLE)[()] if is_replaced else label
                except UnreachableShard:  # the image may be sound, and the others of its shard, too
                    raise
                except Exception as error:  # on corrupt files, readers raise exceptions of many types
                    self.refuse(candidate, error)
                    self.may_be_readable[candidate] = False
                    candidate = self.candidate(candidate)
        raise UnreadableFile(
            f"none of the {len(self)} {self.kind}s can be read, the last one is {self.files[index][0]}"
        )

    def refuse(self, index: int, error: Exception) -> None:
        """Raise UnreadableFile for a file that could not be read, unless `skip_unreadable` is set."""
        if not self.skip_unreadable:
            a = "an" if self.kind[0] in "aeiou" else "a"
            raise UnreadableFile(
                f"{self.files[index][0]} could not be read as {a} {self.kind} ({type(error).__name__}: {error}). "
                'Fix or remove it, or set unreadable_images="skip".'
            ) from error

    def why_unreadable(self, index: int) -> str:
        """Return the error of another attempt to read a file, as workers only share that there was one."""
        try:
            self.read(index)
        except Exception as error:
            return f"{type(error).__name__}: {error}".replace(f" {self.files[index][0]!r}", "")
        return "readable at a second attempt"

    def candidate(self, index: int) -> int:
        """Return the first index from `index` on whose file may be readable; N if there is none."""
        return index + int(self.may_be_readable.numpy()[index:].argmax())  # argmax of bools stops at the first True

    def skipped(self) -> list[str]:
        """Return the paths of the files that any worker could not read so far."""
        return [self.files[i][0] for i in self.unreadable.nonzero().flatten().tolist()]

    def last_read(self, process: int) -> str | None:
        """Return the path of the file that the worker with this process id read last; None if unknown."""
        return next((self.files[i][0] for reader, i in self.reading.tolist() if reader == process), None)


def name_skipped(*datasets: Any, already: int = 0) -> int:
    """Warn of the unreadable files of these data sets if there are more than `already`, and return their number."""
    paths = (path for dataset in datasets if isinstance(dataset, LabeledFiles) for path in dataset.skipped())
    skipped = list(dict.fromkeys(paths))
    if len(skipped) > already:
        how = "left out" if all(getattr(dataset, "evaluated", True) for dataset in datasets) else "skipped"
        named = first_of(skipped, MOST_SKIPPED)
        warnings.warn(f"{len(skipped)} files could not be read and were {how}: {named}", stacklevel=2)
    return len(skipped)


def readable_rows(labels: Tensor | None, *rows: Tensor) -> tuple[Tensor, ...]:
    """Return rows (images, features, ...) and their labels, without those of unreadable files."""
    if labels is None:
        return (*rows, None)
    kept = (labels != UNREADABLE).flatten(1).all(1) if labels.dim() > 1 else labels != UNREADABLE
    return tuple(part if kept.all() else part[kept] for part in (*rows, labels))


def nan_where_unreadable(rows: Tensor, labels: Tensor | None) -> Tensor:
    """Return rows [N, E] with NaN in those of unreadable files."""
    if labels is None:
        return rows
    unreadable = (labels == UNREADABLE).reshape(len(labels), -1).any(1)
    return rows.masked_fill(unreadable[:, None], float("nan"))
