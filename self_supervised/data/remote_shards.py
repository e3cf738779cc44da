"""Shards from URLs, through fsspec: full shards are downloaded into `$DATA_PATH/shards_from_urls`, ahead of the reader.

A shard of a URL is known by its place there, PROTOCOL/HOST/PATH, whether or not a copy is on the disk, so that names,
order, splits and lists are those of shards in a directory. Its copy has the signature (size and ETag) in its name. The
least recently used copies are removed when all of them exceed URL_CACHE_GB. An image without a copy is read by a range
request. Order: places, requests, copies, reading ahead.
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
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from self_supervised.data.packed import data_path
from self_supervised.folder_lock import POLL, locked
from self_supervised.safe_files import UNFINISHED, atomic_file, check_folder, remove_leftovers

CACHE_GB = 50.0  # default of the environment variable URL_CACHE_GB
WAITS = (0.5, 1, 2, 4, 8, 16)  # seconds between attempts
AWAY = 60  # seconds in which a shard that could not be reached is not requested again
SILENCE = 30  # seconds without a byte after which a request counts as failed
PIECE = 2**23  # bytes of a request for a part of a shard
AT_ONCE = 3  # requests of a download at the same time
HEADERS = 2**16  # bytes of a request for a header
LARGE = 2**20  # bytes: if a shard has only a sample in so many, its headers are read alone
STAMPS = ("ETag", "etag", "generation", "Last-Modified", "LastModified", "updated", "mtime", "created")  # in fs.info
STAMPS += ("blob_id", "xet_hash")  # of hf://
Signature = tuple[int, str]  # size and ETag, or another stamp
Answer = TypeVar("Answer")
away: dict[str, tuple[float, str]] = {}  # URL -> (when it may be requested again, error)


class UnreachableShard(ValueError):
    """A shard could not be read from its URL."""


# ---- places ----


def folder() -> Path:
    return Path(os.path.abspath(data_path())) / "shards_from_urls"


def place_of(url: str) -> str:
    """Return the path by which the shard of a URL is known.

    Raises:
        ValueError: the URL holds a password or a token, or is not that of a .tar file.
    """
    protocol, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    user = host.rpartition("@")[0]  # of abfs, a container
    if (user and protocol in ("http", "https", "ftp")) or ":" in user or "?" in rest or "#" in rest:
        shown = f"{protocol}://{host.rpartition('@')[2]}/{path.partition('?')[0].partition('#')[0]}"
        raise ValueError(
            f"data_path={shown!r} was passed with a password or a token (before an @) or a query (after a ?). It would "
            "be written into checkpoints and logs. Leave it out, and pass it in the environment (docs/own_data.md)."
        )
    if not path.endswith(".tar") or {"", ".", ".."} & {protocol, host, *path.split("/")}:
        raise ValueError(f"data_path={url!r} is not the URL of a .tar file. Pass the pattern of your .tar files.")
    return f"{folder()}/{protocol}/{rest}"


def url_of(place: str) -> str | None:
    """Return the URL of a shard; None if it is not from a URL."""
    inside = place.removeprefix(f"{folder()}/")
    protocol, _, rest = inside.partition("/")
    return None if inside == place else f"{protocol}://{rest}"


def matching(url: str) -> Iterator[str]:
    """Yield the places of the shards that a URL names, which may have a `*`."""
    if "*" not in url:
        yield place_of(url)
        return
    place_of(url)  # refuses passwords before the request
    files = file_system(url)
    for path in retried(url, lambda: files.glob(url)):
        yield place_of(files.unstrip_protocol(path))


# ---- requests ----


def file_system(url: str) -> Any:
    return file_system_of(url.partition("://")[0], os.getpid())


@cache  # fsspec keeps one for each thread, with connections of its own; none may be used in a forked process
def file_system_of(protocol: str, _: int) -> Any:
    """Return fsspec's file system of a protocol.

    Raises:
        ValueError: its package is not installed, or the protocol is unknown.
    """
    try:
        import fsspec  # optional

        options = fsspec.config.apply_config(fsspec.get_filesystem_class(protocol), {})  # those of the environment
        if protocol in ("http", "https"):
            import aiohttp  # optional

            silence = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
            options["client_kwargs"] = {"timeout": silence, **options.get("client_kwargs", {})}
            options["headers"] = {"Accept-Encoding": "identity", **options.get("headers", {})}  # sizes as on the disk
        return fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"data_path={protocol + '://'!r}: {error}. For s3:// and gs://, run pip install s3fs gcsfs; "
            "for others, install the package that fsspec names."
        ) from error


def retried(url: str, request: Callable[[], Answer]) -> Answer:
    """Return the result of a request, which is repeated if it fails.

    Raises:
        UnreachableShard: it failed len(WAITS) + 1 times, the shard does not exist, or access is denied.
    """
    until, problem = away.get(url, (0.0, ""))
    if time.monotonic() < until:
        raise UnreachableShard(problem)
    for attempt, wait in enumerate((*WAITS, None), 1):
        try:
            return request()
        except UnreachableShard:
            raise
        except Exception as error:  # every file system has its own types
            if wait is not None and not is_final(url, error):
                time.sleep(wait)
                continue
            cause = error.__cause__ or error
            how = f"{type(cause).__name__}: {cause}, after {attempt} attempt{'s' * (attempt > 1)}"
            problem = f"{url} cannot be read ({how}). Check that it exists and that its server is reachable"
            away[url] = (time.monotonic() + AWAY, problem)
            raise UnreachableShard(problem) from error
    raise AssertionError("the last attempt returns or raises")


def is_final(url: str, error: Exception) -> bool:
    """Return whether repeating a request is useless. fsspec reports every failed HTTP request for a file's size as
    FileNotFoundError."""
    status = getattr(error.__cause__ or error, "status", None)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 429)
    is_any = url.startswith("http") and error.__cause__ is not None
    return isinstance(error, FileNotFoundError | PermissionError) and not is_any


def signature_of(place: str) -> Signature:
    url = url_of(place)
    files = file_system(url)
    info = retried(url, lambda: files.info(url))
    if info["size"] is None or info.get("partial") is False:
        raise UnreachableShard(f"{url}: its server tells no size, or has no range requests. Copy the shard to a disk.")
    return int(info["size"]), str(next((info[name] for name in STAMPS if info.get(name)), ""))


def part_of(url: str, start: int, end: int) -> bytes:
    """Return the bytes from `start` to `end` of a shard."""

    def request() -> bytes:
        content = file_system(url).cat_file(url, start=start, end=end)
        if len(content) > end - start:
            raise UnreachableShard(f"{url}: its server has no range requests. Use another server (nginx has them).")
        if len(content) < end - start:
            raise EOFError(f"{len(content)} of {end - start} bytes from byte {start}")
        return content

    return retried(url, request) if end > start else b""


class RangeFile(io.RawIOBase):
    """File at a URL. Each reading is a request, so wrap it in a BufferedReader."""

    def __init__(self, url: str, size: int):
        self.url = url
        self.size = size
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        part = part_of(self.url, self.position, min(self.position + len(buffer), self.size))
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


# ---- copies ----


def limit() -> float:
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
        if signature[0] > limit() or has_large_members(url, signature[0]):
            return io.BufferedReader(RangeFile(url, signature[0]), HEADERS)
        check_folder("DATA_PATH", folder())
        with suppress(OSError), locked(loading(copy), wait=math.inf):
            if not copy.is_file():
                download(place, signature)
        if not copy.is_file():  # such as on a full disk
            return io.BufferedReader(RangeFile(url, signature[0]), LARGE)
    return str(copy)


def loading(copy: Path) -> Path:
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
        with locked(folder(), wait=math.inf):
            make_room(size, keep)
            file.truncate(size)  # reserves it for the next one who makes room

        def write(start: int) -> None:
            piece = part_of(url, start, min(start + PIECE, size))
            if os.pwrite(file.fileno(), piece, start) < len(piece):
                raise OSError(errno.ENOSPC, f"No space left on the disk of {folder()}.")

        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                list(pool.map(write, range(0, size, PIECE)))
            finally:
                pool.shutdown(cancel_futures=True)
        file_system(url).invalidate_cache()
        if signature_of(place) != signature:
            raise UnreachableShard(f"{url} has changed since it was indexed. Start again to have it indexed anew.")


def make_room(size: int, keep: Collection[Path]) -> None:
    """Remove the least recently used copies until `size` bytes more are within the limit and on the disk."""
    copies = []
    for path in folder().rglob("*.tar.*"):
        with suppress(FileNotFoundError):  # another process removed it
            if path.suffix == UNFINISHED:
                remove_leftovers(path.with_name(path.name[1:].rsplit(".", 4)[0]))
            if path.suffix != ".json" and path.is_file():
                copies.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    excess = sum(n for _, n, _ in copies) + size - limit()
    excess = max(excess, size - shutil.disk_usage(folder()).free)
    for _, n, path in sorted(copies):
        if excess > 0 and path.suffix != UNFINISHED and path not in keep:
            path.unlink(missing_ok=True)
            excess -= n


def read_remote(place: str, signature: Signature, start: int, size: int) -> bytes:
    """Return a part of a shard, from its copy if there is one. Copies are not kept open, since they may be removed."""
    with suppress(FileNotFoundError), open(copy_of(place, signature), "rb", buffering=0) as file:
        with suppress(OSError):  # a copy of another user, or on a disk that is read-only
            os.utime(file.fileno())
        return os.pread(file.fileno(), size, start)
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
        self.until = np.searchsorted(ends, ends[self.oldest] + limit(), side="right") - 1
        excess = ends[1:] - ends[self.oldest]
        if (self.until <= np.arange(len(self.order))).any():
            rank_zero_warn(
                f"URL_CACHE_GB={limit() / 1e9:g} is less than the {excess.max() / 1e9:.1f} GB of the shards that are "
                "shuffled together. Every image is read by a request of its own, which is slow. Set it higher."
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
                with locked(loading(copy)):
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
