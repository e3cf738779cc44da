"""Shards at URLs, through fsspec: the places by which they are known, and requests for them.

A shard of a URL is known by its place in `$DATA_PATH/shards_from_urls`, PROTOCOL/HOST/PATH, whether or not a copy is on
the disk, so that names, order, splits and lists are those of shards in a directory.
"""

import io
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from self_supervised.data.file_search import data_path

WAITS = (0.5, 1, 2, 4, 8, 16)  # seconds between attempts
AWAY = 60  # seconds in which a shard that could not be reached is not requested again
SILENCE = 30  # seconds without a byte after which a request counts as failed
STAMPS = ("ETag", "etag", "generation", "Last-Modified", "LastModified", "updated", "mtime", "created")  # in fs.info
STAMPS += ("blob_id", "xet_hash")  # of hf://
Signature = tuple[int, str]  # size and ETag, or another stamp
ShardResponse = TypeVar("ShardResponse")
away: dict[str, tuple[float, str]] = {}  # URL -> (when it may be requested again, error)


class UnreachableShard(ValueError):
    """A shard could not be read from its URL."""


# ---- places ----


def copies_folder() -> Path:
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
    return f"{copies_folder()}/{protocol}/{rest}"


def url_of(place: str) -> str | None:
    """Return the URL of a shard; None if it is not from a URL."""
    inside = place.removeprefix(f"{copies_folder()}/")
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


def retried(url: str, request: Callable[[], ShardResponse]) -> ShardResponse:
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
