"""Shards from a real HTTP server on loopback that drops connections, is slow, fails and sends too little."""

import errno
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_custom_data import params as custom_params
from test_stored_data import write_shards, write_tar

from self_supervised.data import data_sets, foreign_paths, loading, packed_files, shard_copies, shard_urls, tar_shards
from self_supervised.embeddings import sources
from self_supervised.embeddings.batches import batches_of

FAULTS = ("none", "500", "none", "dropped", "short", "slow", "none", "reset")
pytestmark = pytest.mark.filterwarnings("ignore:collapse")


class Server(ThreadingHTTPServer):
    """Server of a directory with range requests.

    `faults`: what happens to successive requests for content; `gone`: a part of the paths that always fail; `sent`:
    bytes of each file; `watch`: called at each request.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.url = root, f"http://127.0.0.1:{self.server_port}"
        self.faults, self.gone, self.sent, self.etag = cycle(["none"]), None, Counter(), "1"
        self.has_ranges, self.watch = True, lambda: None

    def handle_error(self, *_) -> None:
        """Connections that clients close are expected."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(is_head=True)

    def do_GET(self) -> None:
        self.answer(is_head=False)

    def answer(self, is_head: bool) -> None:
        self.server.watch()
        path = self.server.root / self.path[1:]
        fault = "none" if is_head else next(self.server.faults)
        if not path.is_file():
            return self.send_error(404)
        if fault == "500" or (self.server.gone and self.server.gone in self.path):
            return self.send_error(500)
        if fault == "reset":
            self.close_connection = True
            return None
        content = path.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.server.has_ranges else None
        part = content[int(asked[1]) : int(asked[2]) + 1] if asked else content
        part = part[: len(part) // 2] if fault == "short" else part
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        if is_head:
            return None
        if fault == "slow":
            time.sleep(0.02)
        if fault == "dropped":
            part, self.close_connection = part[: len(part) // 2], True
        self.server.sent[path.name] += len(part)
        self.wfile.write(part)
        return None


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    write_shards(folder)
    return folder


@pytest.fixture
def server(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_urls, "WAITS", (0.001,) * 6)
    monkeypatch.setattr(shard_copies, "PIECE", 20_000)
    monkeypatch.setattr(shard_urls, "away", {})
    monkeypatch.setattr(tar_shards, "known", {})
    with Server(shards) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def params(root: object, **fields):
    root = f"{root}/train-{{000000..000004}}.tar"
    return custom_params(root, **{"val_size": 0, "test_size": 0, "batch_size": 4, "num_data_workers": 0, **fields})


def copies() -> list[Path]:
    return [path for path in shard_urls.copies_folder().rglob("*.tar.*") if path.suffix not in (".json", ".loading")]


def batches(root: object, epochs: int = 2, **fields) -> list[list[torch.Tensor]]:
    """Return the batches of some epochs. Copies that the search for images left are deleted first."""
    p = params(root, **fields)
    dataset = data_sets.get_dataset(p, ("train",), ())
    for copy in copies() if isinstance(root, str) else ():
        copy.unlink()
    batches_of = loading.get_loader(p, dataset, training=True)
    found = []
    for epoch in range(epochs):
        batches_of.sampler.set_epoch(epoch)
        found += list(batches_of)
    return found


def same(a: list, b: list) -> bool:
    parts = [[part for batch in found for part in batch] for found in (a, b)]
    return len(a) == len(b) and all(map(torch.equal, *parts))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_epochs_from_a_faulty_server_are_those_of_the_disk(server, shards, workers):
    server.faults = cycle(FAULTS)
    assert same(batches(server.url, num_data_workers=workers), batches(shards))
    assert len(copies()) == 5


def test_each_shard_is_downloaded_once_by_all_workers(server, shards):
    batches(server.url, num_data_workers=2)
    for copy in copies():
        copy.unlink()
    server.sent.clear()
    batches(server.url, num_data_workers=2)
    assert server.sent == {path.name: path.stat().st_size for path in shards.glob("*.tar")}


@pytest.mark.parametrize("workers", [0, 2])
def test_copies_stay_within_the_limit_and_images_are_the_same(server, shards, workers, monkeypatch):
    """In windows of 12 images, which are in 2 or 3 shards."""
    monkeypatch.setattr("self_supervised.data.batches.WINDOW", 12)
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    monkeypatch.setenv("URL_CACHE_GB", str(4 * largest / 1e9))
    most = []
    server.watch = lambda: most.append(sum(path.stat().st_size for path in copies() if path.is_file()))
    assert same(batches(server.url, 3, num_data_workers=workers), batches(shards, 3))
    assert 2 * largest < max(most) <= 4 * largest


def test_images_are_read_by_range_if_the_limit_is_too_low(server, shards, monkeypatch):
    monkeypatch.setenv("URL_CACHE_GB", "1e-5")
    server.faults = cycle(FAULTS)
    with pytest.warns(UserWarning, match="URL_CACHE_GB=1e-05 is less than"):
        assert same(batches(server.url, 1), batches(shards, 1))
    assert not copies()


def test_a_shard_that_was_replaced_is_not_read_by_the_old_index(server, shards, monkeypatch):
    """Also without a copy: its images would get the labels of others."""
    monkeypatch.setenv("URL_CACHE_GB", "0")
    images = data_sets.get_dataset(params(server.url), ("train",))
    assert images[0][1] == data_sets.get_dataset(params(shards), ("train",))[0][1]
    server.etag = "2"
    images[1]  # the shard was compared a moment ago
    for every in (0, 600):
        monkeypatch.setattr(shard_copies, "COMPARED_EVERY", every)
        with pytest.raises(shard_urls.UnreachableShard, match="has changed since it was indexed. Start again"):
            images[2]


def test_a_full_disk_leaves_requests_of_parts(server, shards, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(shard_copies, "download", full)
    assert same(batches(server.url, 1), batches(shards, 1)) and not copies()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_reader_goes_on_without_the_thread_that_reads_ahead(server, shards, monkeypatch):
    def lost(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(shard_copies.ReadAhead, "is_done", lost)
    assert same(batches(server.url, 1), batches(shards, 1))


def test_splits_and_resuming_are_those_of_the_disk(server, shards, tmp_path):
    def rest(root: object) -> tuple[list, list, list]:
        p = params(root, val_size=0.2, splits_path=str(tmp_path / str(root)[:4]))
        train, val = (data_sets.get_dataset(p, (split,)) for split in ("train", "val"))
        resumed = loading.get_loader(p, train, training=True)
        resumed.load_state_dict({"epoch": 0, "batches": 3})
        names = [path.partition("train-0")[2] for images in (train, val) for path, _ in images.files]
        return list(resumed), names, [label for images in (train, val) for _, label in images.files]

    (ours, *lists), (theirs, *expected) = rest(server.url), rest(shards)
    assert same(ours, theirs) and lists == expected and len(ours) == 7


def test_the_index_is_kept_until_the_etag_changes(server, monkeypatch):
    forgotten = []
    monkeypatch.setattr(shard_urls.file_system(server.url), "invalidate_cache", lambda: forgotten.append(1))

    def read() -> int:
        tar_shards.known.clear(), server.sent.clear()
        data_sets.get_dataset(params(server.url), ("train",))
        return len(server.sent)

    assert (read(), read()) == (5, 0) and len(forgotten) == 1 + 5 + 1  # before the requests, and after each download
    server.etag = "2"
    assert (read(), read()) == (5, 0)


def test_shards_are_downloaded_to_be_packed(server):
    dataset = data_sets.get_dataset(params(server.url), ("train",), ())
    for copy in copies():
        copy.unlink()
    packed_files.pack_files(dataset, workers=0)
    assert len(copies()) == 5 and all(dataset.packed_pixels(i) is not None for i in range(len(dataset)))


def test_shards_on_the_hub_are_known_by_their_hash(monkeypatch):
    info = {"size": 7, "blob_id": "abc", "last_commit": None}
    monkeypatch.setattr(shard_urls, "file_system", lambda _: SimpleNamespace(info=lambda _: info))
    assert shard_urls.signature_of(shard_urls.place_of("hf://datasets/a/b/0.tar")) == (7, "abc")


def test_of_large_members_only_headers_are_read(server, tmp_path, monkeypatch):
    server.root = tmp_path
    rng = np.random.default_rng(0)
    contents = {f"{i}.npy": rng.bytes(2_000_000) for i in range(6)}
    write_tar(tmp_path / "train.tar", contents)
    dataset = data_sets.get_dataset(custom_params(f"{server.url}/train.tar", val_size=0, test_size=0), ("train",))
    assert 0 < sum(server.sent.values()) < 2**20 + 10 * 2**16 and not copies()
    path = dataset.files[4][0]
    assert dataset.source.open(path).getvalue() == contents["4.npy"]


def test_a_shard_that_stays_away_is_named(server, shards):
    for how, workers in (("stop", 0), ("stop", 1), ("skip", 0)):  # its images may be sound
        server.gone = None
        p = params(server.url, unreadable_images=how, num_data_workers=workers)
        dataset = data_sets.get_dataset(p, ("train",))
        for copy in copies():
            copy.unlink()
        server.gone = "train-000003"
        with pytest.raises(ValueError, match=rf"{server.url}/train-000003.tar cannot be read .*500.*after 7 attempts"):
            list(loading.get_loader(p, dataset, training=True))
        shard_urls.away.clear()
        dataset.source.ahead.stop()
    server.gone = None
    source = sources.open_source(p.data_path)
    for copy in copies():
        copy.unlink()
    server.gone = "train-000003"  # programs that embed do not take it for broken images either
    with pytest.raises(shard_urls.UnreachableShard):
        list(batches_of(source, p, source.paths(), 8, 0))


def test_a_url_may_name_a_user_without_a_password():
    place = shard_urls.place_of("abfs://photos@account.dfs.core.windows.net/train-0.tar")
    assert place.endswith("abfs/photos@account.dfs.core.windows.net/train-0.tar")


def test_what_is_refused_of_urls(server, shards, monkeypatch):
    server.root = shards
    for root, message in {
        "https://me:secret@example.org/train-0.tar": r"data_path='https://example.org/train-0.tar' .*password",
        "https://example.org/train-0.tar?token=secret": r"data_path='https://example.org/train-0.tar' .*query",
        "https://example.org/../train-0.tar": "is not the URL of a .tar file",
        "https://example.org/train-0.tar.gz": "is not the URL of a .tar file",
        "nothing://example.org/train-0.tar": "data_path='nothing://'.*Protocol not known",
        "s3://bucket/train-0.tar": r"data_path='s3://'.*pip install s3fs gcsfs",
        f"{server.url}/train-{{0..1}}.tar": rf"{server.url}/train-0.tar cannot be read .*404.*after 1 attempt\)",
    }.items():
        if root.startswith("s3"):
            monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
        with pytest.raises(ValueError, match=message) as refused:
            data_sets.get_dataset(custom_params(root), ("train",))
        assert "secret" not in str(refused.value)
    server.has_ranges = False
    with pytest.raises(ValueError, match="has no range requests"):
        data_sets.get_dataset(params(server.url), ("train",))


def test_a_url_of_a_checkpoint_is_foreign(tmp_path):
    settings = {"data_path": "https://example.org/train-0.tar"}
    found = foreign_paths.vetted(settings, tmp_path / "a.ckpt")["data_path"]
    with pytest.raises(ValueError, match="data_path="):
        foreign_paths.refuse_foreign("data_path", found)
    (tmp_path / "config.yaml").write_text("data_path: https://example.org/train-0.tar")
    assert type(foreign_paths.vetted(settings, tmp_path / "a.ckpt")["data_path"]) is str
