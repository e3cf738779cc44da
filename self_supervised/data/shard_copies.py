"""Copies of shards from URLs in `$DATA_PATH/shards_from_urls`, which are downloaded ahead of the reader.

A copy has the shard's signature (size and ETag) in its name. The least recently used copies are removed when all of
them exceed URL_CACHE_GB. An image without a copy is read by a range request.
"""

import errno
import hashlib
import io
import math
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from self_supervised.data.shard_urls import (
    RangeFile,
    Signature,
    UnreachableShard,
    copies_folder,
    file_system,
    part_of,
    signature_of,
    url_of,
)
from self_supervised.folder_lock import POLL, locked
from self_supervised.safe_files import UNFINISHED, atomic_file, check_folder, remove_leftovers

CACHE_GB = 50.0  # default of the environment variable URL_CACHE_GB
PIECE = 2**23  # bytes of a request for a part of a shard
AT_ONCE = 3  # requests of a download at the same time
HEADERS = 2**16  # bytes of a request for a header
COMPARED_EVERY = 600  # seconds between looks at whether a shard that has no copy is still the same
LARGE = 2**20  # bytes: if a shard has only a sample in so many, its headers are read alone
last_compared: dict[str, float] = {}  # place -> when this process last found the shard unchanged


# ---- copies ----


def copies_limit() -> float:
    """Return the bytes that all copies may have together.

    Raises:
        ValueError: the environment variable is not a number.
    """
    given = os.environ.get("URL_CACHE_GB", str(CACHE_GB))
    try:
        return float(given) * 1e9
    except ValueError:
        raise ValueError(f"URL_CACHE_GB={given} is not a number. Set it to gigabytes for downloaded shards.") from None


def short_hash(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def copy_of(place: str, signature: Signature) -> Path:
    return Path(f"{place}.{short_hash(signature)}")


def index_file(place: str, settings: Any) -> Path | None:
    """Return where the index of a shard is kept; None if the shard is not from a URL."""
    return Path(f"{place}.{short_hash(settings)}.json") if url_of(place) else None


def to_index(place: str, signature: Signature) -> str | BinaryIO:
    """Return the file from which a shard is indexed: its copy, or, if that is cheaper, ranges of it at its URL."""
    copy = copy_of(place, signature)
    if not copy.is_file():
        url = url_of(place)
        if signature[0] > copies_limit() or has_large_members(url, signature[0]):
            return io.BufferedReader(RangeFile(url, signature[0]), HEADERS)
        check_folder("DATA_PATH", copies_folder())
        with suppress(OSError), locked(download_lock(copy), wait=math.inf):
            if not copy.is_file():
                download(place, signature)
        if not copy.is_file():  # such as on a full disk
            return io.BufferedReader(RangeFile(url, signature[0]), LARGE)
    return str(copy)


def download_lock(copy: Path) -> Path:
    """Return the directory that is locked during a download."""
    return copy.with_name(f"{copy.name}.loading")


def has_large_members(url: str, size: int) -> bool:
    file = io.BufferedReader(RangeFile(url, size), LARGE)
    with suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:") as tar:
        for n, _ in enumerate(tar, 1):
            if tar.offset > LARGE:
                return n <= 2  # an image and its label
    return False


def download(place: str, signature: Signature, keep: Collection[Path] = ()) -> None:
    """Write the copy of a shard, with room made for it by removing others, but none of `keep`."""
    url, (size, _) = url_of(place), signature
    with atomic_file(copy_of(place, signature)) as unfinished, open(unfinished, "wb") as file:
        with locked(copies_folder(), wait=math.inf):
            make_room(size, keep)
            file.truncate(size)  # reserves it for the next one who makes room

        def write(start: int) -> None:
            piece = part_of(url, start, min(start + PIECE, size))
            if os.pwrite(file.fileno(), piece, start) < len(piece):
                raise OSError(errno.ENOSPC, f"No space left on the disk of {copies_folder()}.")

        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                list(pool.map(write, range(0, size, PIECE)))
            finally:
                pool.shutdown(cancel_futures=True)
        refuse_another_shard(place, signature)


def make_room(size: int, keep: Collection[Path]) -> None:
    """Remove the least recently used copies until `size` bytes more are within the limit and on the disk."""
    copies = []
    for path in copies_folder().rglob("*.tar.*"):
        with suppress(FileNotFoundError):  # another process removed it
            if path.suffix == UNFINISHED:
                remove_leftovers(path.with_name(path.name[1:].rsplit(".", 4)[0]))
            if path.suffix != ".json" and path.is_file():
                copies.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    excess = sum(n for _, n, _ in copies) + size - copies_limit()
    excess = max(excess, size - shutil.disk_usage(copies_folder()).free)
    for _, n, path in sorted(copies):
        if excess > 0 and path.suffix != UNFINISHED and path not in keep:
            path.unlink(missing_ok=True)
            excess -= n


def refuse_another_shard(place: str, signature: Signature) -> None:
    """Raise UnreachableShard if there is another shard at the URL than the one that was indexed."""
    url = url_of(place)
    last_compared.pop(place, None)  # whoever reads a replaced shard next is refused, too
    file_system(url).invalidate_cache()
    if signature_of(place) != signature:
        raise UnreachableShard(f"{url} has changed since it was indexed. Start again to have it indexed anew.")
    last_compared[place] = time.monotonic()


def read_remote(place: str, signature: Signature, start: int, size: int) -> bytes:
    """Return a part of a shard, from its copy if there is one. Copies are not kept open, since they may be removed.

    Raises:
        UnreachableShard: there is no copy, and another shard at the URL (asked every COMPARED_EVERY seconds).
    """
    with suppress(FileNotFoundError), open(copy_of(place, signature), "rb", buffering=0) as file:
        with suppress(OSError):  # a copy of another user, or on a disk that is read-only
            os.utime(file.fileno())
        return os.pread(file.fileno(), size, start)
    if time.monotonic() > last_compared.get(place, -math.inf) + COMPARED_EVERY:
        refuse_another_shard(place, signature)
    return part_of(url_of(place), start, start + size)


# ---- reading ahead ----


class ReadAhead:
    """Downloads of the shards of an epoch, in the order in which they are needed, by a thread in each worker.

    Shards that are still needed are kept, and further ones are downloaded as long as all of them are within the limit.

    Args:
        shards: the shard's number of each image, in the order of the epoch; -1: not from a URL.
        signatures: place -> signature of each shard, in the order of the numbers.
    """

    def __init__(self, shards: np.ndarray, signatures: dict[str, Signature]):
        numbers, first = np.unique(shards, return_index=True)
        last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
        by_need = [i for i in np.argsort(first) if numbers[i] >= 0]
        every = list(signatures.items())
        self.order = [every[numbers[i]] for i in by_need]
        ends = np.cumsum([0] + [size for _, (size, _) in self.order])
        # shard k is needed first when all shards before oldest[k] are not needed anymore
        self.oldest = np.searchsorted(np.maximum.accumulate(last[by_need]), first[by_need])
        self.until = np.searchsorted(ends, ends[self.oldest] + copies_limit(), side="right") - 1
        excess = ends[1:] - ends[self.oldest]
        if (self.until <= np.arange(len(self.order))).any():
            rank_zero_warn(
                f"URL_CACHE_GB={copies_limit() / 1e9:g} is less than the {excess.max() / 1e9:.1f} GB of the shards "
                "that are shuffled together. Every image is read by a request of its own, which is slow. Set it higher."
            )
            self.order = []
        self.rank = {place: k for k, (place, _) in enumerate(self.order)}
        self.pending = dict.fromkeys(range(len(self.order)))
        self.process = -1  # whose thread it is
        self.reached = 0
        self.is_stopped = False

    def wait_for(self, place: str) -> None:
        """Return when the shard was downloaded, or could not be."""
        if (k := self.rank.get(place)) is None:
            return
        if self.process != os.getpid():
            self.process = os.getpid()
            self.changed = threading.Condition()
            self.thread = threading.Thread(target=self.work, daemon=True)
            self.thread.start()
        with self.changed:
            self.reached = max(self.reached, k)
            self.changed.notify_all()
            while k in self.pending and self.thread.is_alive() and not copy_of(*self.order[k]).is_file():
                self.changed.wait(POLL)  # another process may download it

    def work(self) -> None:
        while self.pending and not self.is_stopped:
            done = next((k for k in self.pending if k < self.until[self.reached] and self.is_done(k)), None)
            with self.changed:
                if done is None:
                    self.changed.wait(POLL)
                else:
                    del self.pending[done]
                    self.changed.notify_all()

    def is_done(self, k: int) -> bool:
        """Download a shard unless another process is doing that. Return whether nothing is left to do for it."""
        copy = copy_of(*self.order[k])
        window = range(self.oldest[self.reached], self.until[self.reached])
        try:
            if not copy.is_file():
                with locked(download_lock(copy)):
                    if not copy.is_file():
                        download(*self.order[k], keep={copy_of(*self.order[i]) for i in window})
        except UnreachableShard:  # the reader meets the same error
            pass
        except OSError as error:
            rank_zero_info(f"{error} Its images are read by requests of their own.")
        except ValueError:  # locked by another process
            return False
        return True

    def stop(self) -> None:
        self.is_stopped = True
