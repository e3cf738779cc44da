"""Shards from a server on loopback: a plain download, and an epoch of ours (`python -m benchmarks.loader --urls`).

The server, in a process of its own, sends the shards as fast as it can, or at 1 Gbit/s. A plain download is that of
urllib, one shard after the other, to a file that is flushed to the disk. Ours starts without copies, and reads every
image of an epoch without decoding it, in windows of WINDOW images; or it downloads the copies alone.
"""

import math
import multiprocessing
import os
import re
import shutil
import tarfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks import harness
from self_supervised.data import batches, shard_copies, shard_urls
from self_supervised.data.batches import ResumableDataLoader, ResumableSampler
from self_supervised.data.file_search import data_path
from self_supervised.data.files import LabeledFiles
from self_supervised.data.tar_shards import TarShards

WINDOW = 1000  # images of a shard, and images that are shuffled together
GIGABIT = 125e6  # bytes per second


class Sender(BaseHTTPRequestHandler):
    """Sends ranges of the files in the server's `folder`, all connections together at most `rate` bytes per second."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with open(f"{self.server.folder}{self.path}", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, size)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            while self.command == "GET" and start < end:
                n = min(2**18, end - start)
                with self.server.turn:
                    self.server.free = max(self.server.free, time.monotonic()) + n / self.server.rate
                time.sleep(max(0.0, self.server.free - time.monotonic()))
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, n)


def serve(folder: str, rate: float, pipe) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Sender) as server:
        server.folder, server.rate, server.free, server.turn = folder, rate, 0.0, threading.Lock()
        pipe.send(f"http://127.0.0.1:{server.server_port}")
        server.serve_forever()


@contextmanager
def served(folder: Path, rate: float) -> Iterator[str]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(str(folder), rate, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


class Contents(LabeledFiles):
    """Number of bytes of each image."""

    def __init__(self, source: TarShards):
        files = [(str(source.root / path), 0) for path, _ in source.find()["train"]]
        super().__init__(files, "image", skip_unreadable=False, evaluated=False, source=source)

    def __getitem__(self, index: int) -> int:
        return self.source.open(self.files[index][0]).getbuffer().nbytes


def removed(folder: Path) -> float:
    """Remove the downloads of the last turn, which is not timed, and return the time at which the turn begins."""
    for copy in folder.rglob("*.tar*"):
        if copy.suffix != ".json" and copy.is_file():
            copy.unlink()
    return time.perf_counter()


def plain_download(urls: list[str], folder: Path) -> float:
    folder.mkdir(exist_ok=True)
    start = removed(folder)
    for url in urls:
        with urllib.request.urlopen(url) as answer, open(folder / url.rpartition("/")[2], "wb") as copy:
            shutil.copyfileobj(answer, copy, 2**20)
            os.fsync(copy.fileno())
    return time.perf_counter() - start


def copies_alone(source: TarShards) -> float:
    start = removed(shard_urls.copies_folder())
    for shard, signature in source.signatures.items():
        shard_copies.download(shard, signature)
    return time.perf_counter() - start


def first_epoch(contents: Contents, n_bytes: int, batch_size: int, workers: int) -> float:
    start = removed(shard_urls.copies_folder())
    order = ResumableSampler(contents, 1, 0, seed=0)
    read = ResumableDataLoader(contents, batch_size, sampler=order, num_workers=workers, collate_fn=sum)
    assert sum(read) == n_bytes
    return time.perf_counter() - start


def write_shards(paths: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for start in range(0, len(paths), WINDOW):
        with tarfile.open(folder / f"train-{start // WINDOW}.tar", "w") as tar:
            for path in paths[start : start + WINDOW]:
                tar.add(path, f"{path.parent.name}-{path.name}")


def measure(paths: list[Path], batch_size: int, rounds: int) -> list[harness.Row]:
    """Return the rows of the table, of shards with the files of these paths."""
    batches.WINDOW = WINDOW
    folder = data_path() / "server"
    write_shards(paths, folder)
    shards = sorted(folder.iterdir())
    megabytes = sum(shard.stat().st_size for shard in shards) / 1e6
    n_bytes = sum(path.stat().st_size for path in paths)
    rows = []
    for server, rate in {"loopback": math.inf, "1 Gbit/s": GIGABIT}.items():
        with served(folder, rate) as url:
            urls = [f"{url}/{shard.name}" for shard in shards]
            contents = Contents(TarShards("::".join(urls), None, None, None))
            runs: dict[str, Callable] = {"plain download": partial(plain_download, urls, data_path() / "plain")}
            runs["ours, copies alone"] = partial(copies_alone, contents.source)
            runs |= {f"ours, {n} workers": partial(first_epoch, contents, n_bytes, batch_size, n) for n in (0, 1, 2)}
            times = harness.in_turns(runs, rounds, warmup=0)
        keys = ("server", "contestant", "MB/s", "over the plain download")
        plain = times["plain download"]
        rows += [dict(zip(keys, (server, name, megabytes / t, plain / t), strict=True)) for name, t in times.items()]
    return rows
