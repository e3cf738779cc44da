"""WebDataset's shards: tar files, in which members of one name up to its first dot (`7.jpg`, `7.cls`) are a sample.

Every shard is indexed once, from its headers, and images are then read by their position in it. Unlike streaming, this
gives the same splits, fractions, labels and resuming within an epoch as image files, and every process has as many
images. Shards are still read one after the other, by all processes together (see batches.ResumableSampler).
Source: https://github.com/webdataset/webdataset. Order: source, index, samples and labels.
"""

import io
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from self_supervised import distributed
from self_supervised.data import shard_copies, shard_urls
from self_supervised.data.file_search import PassedOver, image_suffixes, is_hidden
from self_supervised.data.files import OnDisk
from self_supervised.data.folders import ImageList, Label, as_label, label_from_path, whole_number, with_labels
from self_supervised.data.shard_copies import ReadAhead
from self_supervised.data.shard_names import SUFFIX, expanded_shards, split_in
from self_supervised.safe_files import atomic_write

SHARD_LABEL_KEYS = ("cls", "label")  # default label keys
MOST_OPEN = 128  # shards that a process keeps open
MOST_REQUESTS = 16  # shards whose signatures are requested at the same time
BLOCK = 512  # bytes per block of a tar file
VERSION = 3  # of the stored index
MOST_LINKS = 40  # links that are followed from one to the next, as in file systems
Content = tuple[int, int]  # first byte, size
Place = tuple[int, int, Label]  # first byte, size, label
Members = dict[str, str]  # of a sample: extension -> member
ShardSignature = tuple[int, int | str]  # size and modification time of a shard, or its ETag
IndexSettings = tuple[tuple[str, ...], tuple[str, ...] | None]  # file extensions of images, label keys


class Shard(NamedTuple):  # the index of a shard
    places: dict[str, Place]  # member -> place of an image
    passed_over: PassedOver


known: dict[tuple[str, ShardSignature, IndexSettings], Shard] = {}  # indexes of all data sets in this process
open_shards: dict[tuple[str, ShardSignature], int] = {}  # file descriptors


class TarShards(OnDisk):
    """Images in tar shards. The path of an image is SHARD/MEMBER.

    Args:
        data_path: a directory with shards, a glob, or a pattern such as "shards/{train-{000..099},val-{00..09}}.tar" or
            a URL; "::" separates multiple ones.
        image_key: file extensions of the images, in order of preference: "jpg;png"; None: those of all image formats.
        label_key: file extension, or key in the .json, of a sample's label; None: those in SHARD_LABEL_KEYS, else the
            directory of the member.
        labels_from: which directory of a member is its class; None: no labels at all.
        index_file: where the index is stored for other processes.

    Raises:
        ValueError: there are no shards, one is missing or corrupt, or no sample has the requested label.
    """

    def __init__(
        self,
        data_path: str,
        image_key: str | None,
        label_key: str | None,
        labels_from: str | None,
        index_file: Path | None = None,
    ):
        not_images = PassedOver()
        shards = sorted(
            {os.path.abspath(shard) for part in data_path.split("::") for shard in expanded_shards(part, not_images)}
        )
        if not shards:
            raise ValueError(f"data_path={data_path!r} matches no shards. Pass the pattern of your .tar files.")
        self.root = Path(os.path.commonpath([os.path.dirname(shard) for shard in shards]))
        suffixes = image_key.lower().split(";") if image_key else [suffix[1:] for suffix in image_suffixes()]
        keys = None if labels_from is None else (label_key,) if label_key else SHARD_LABEL_KEYS
        self.labels_from = labels_from
        self.label_key = label_key
        for protocol in {url.partition("://")[0] for url in map(shard_urls.url_of, shards) if url}:
            shard_urls.file_system(protocol).invalidate_cache()  # once for all shards
        with ThreadPoolExecutor(MOST_REQUESTS) as pool:
            self.signatures = dict(zip(shards, pool.map(shard_signature, shards), strict=True))
        self.ahead: ReadAhead | None = None
        indexes = index(self.signatures, (tuple(suffixes), keys), index_file)
        self.index = {shard: one.places for shard, one in indexes.items()}
        for one in indexes.values():
            not_images.join(one.passed_over)
        self.not_images = not_images
        self.passed_over = PassedOver()

    def find(self) -> ImageList:
        """Return all images by split, which is a word ("train", "val", ...) in the name of the shard or its directory.
        If no name has such a word, all images are for training."""
        split_of = {shard: split_in(os.path.relpath(shard, self.root)) for shard in self.signatures}
        if not any(split_of.values()):
            split_of = dict.fromkeys(split_of, "train")
        images_of: ImageList = {}
        for shard, split in split_of.items():
            below = os.path.relpath(shard, self.root)
            images = ((f"{below}/{member}", label) for member, (_, _, label) in self.index[shard].items())
            images_of.setdefault(split or "", []).extend(images)
        self.passed_over.clear()
        self.passed_over.join(self.not_images)
        if self.label_key and self.labels_from and not self.has_labels:
            raise ValueError(f"label_key={self.label_key!r}: no sample in {self.root} has this extension or .json key")
        return with_labels(images_of, self.label_of)

    def splits_inside(self) -> list[str]:
        """Return the first directories of the members if these are splits, train and others, which no shard's name is;
        else []."""
        if any(split_in(os.path.relpath(shard, self.root)) for shard in self.signatures):
            return []
        folders = {member.rpartition("/")[0].split("/")[0] for places in self.index.values() for member in places}
        splits = set(map(split_in, folders))
        return sorted(folders) if "train" in splits and len(splits) > 1 and None not in splits else []

    @cached_property
    def has_labels(self) -> bool:
        return any(label is not None for places in self.index.values() for _, _, label in places.values())

    def label_of(self, path: str) -> Label:
        shard, member = self.parts(os.path.join(self.root, path))
        return self.index[shard][member][2] if self.has_labels else label_from_path(member, self.labels_from)

    def holds(self, path: str) -> bool:
        shard, member = self.parts(str(self.root / path))
        return member in self.index.get(shard, ())

    def open(self, path: str) -> io.BytesIO:
        shard, member = self.parts(path)
        start, size, _ = self.index[shard][member]
        if self.ahead is not None:
            self.ahead.wait_for(shard)
        return io.BytesIO(read_member(shard, self.signatures[shard], start, size))

    def signature(self, path: str) -> tuple:
        shard, member = self.parts(path)
        return (*self.index[shard][member][:2], *self.signatures[shard])

    def shards(self, paths: list[str]) -> np.ndarray:
        numbers = {shard: number for number, shard in enumerate(self.signatures)}
        return np.array([numbers[self.parts(path)[0]] for path in paths], dtype=np.int64)

    def read_ahead(self, paths: Iterator[str]) -> None:
        if self.ahead is not None:
            self.ahead.stop()
            self.ahead = None
        remote = [shard_urls.url_of(shard) is not None for shard in self.signatures]
        if any(remote):
            shards = self.shards(list(paths))
            self.ahead = ReadAhead(np.where(np.array(remote)[shards], shards, -1), self.signatures)

    def parts(self, path: str) -> tuple[str, str]:
        """Return (shard, member) of an image's path. A directory's name may end with .tar, too."""
        ends = (match.end() for match in re.finditer(re.escape(SUFFIX) + "/", path, re.IGNORECASE))
        end = next((end for end in ends if path[: end - 1] in self.signatures), 0)
        return path[: max(end - 1, 0)], path[end:]


# ---- index ----


def shard_signature(shard: str) -> ShardSignature:
    if shard_urls.url_of(shard):
        return shard_urls.signature_of(shard)
    status = os.stat(shard)
    return status.st_size, status.st_mtime_ns


def index(signatures: dict[str, ShardSignature], settings: IndexSettings, file: Path | None) -> dict[str, Shard]:
    """Return the index of every shard: from memory, else `file`, else the shard; then it is stored in `file`.

    The index of a shard from a URL has also a file of its own, next to the copy of the shard.
    """

    def unknown() -> list[str]:
        return [shard for shard, signature in signatures.items() if (shard, signature, settings) not in known]

    is_kept = file is not None and file.is_file()
    if is_kept and unknown():
        known.update(read_index(file, settings))
    fresh = unknown()
    for shard in fresh:
        own = shard_copies.index_file(shard, settings)
        if own not in (None, file):
            index({shard: signatures[shard]}, settings, own)
        else:
            known[shard, signatures[shard], settings] = indexed(shard, signatures[shard], settings)
    indexes = {shard: known[shard, signature, settings] for shard, signature in signatures.items()}
    if file is not None and (fresh or not is_kept) and (distributed.rank() == 0 or shard_urls.url_of(str(file))):
        shards = {shard: {"stamp": signatures[shard], **one._asdict()} for shard, one in indexes.items()}
        with suppress(OSError):  # it only saves time, and may belong to someone else
            atomic_write(file, json.dumps({"how": repr((VERSION, settings)), "shards": shards}))
    return indexes


def read_index(file: Path, settings: IndexSettings) -> dict[tuple[str, ShardSignature, IndexSettings], Shard]:
    """Return what `index` stored; {} if the file is corrupt, or was written with other settings."""
    try:
        kept = json.loads(file.read_text())
        shards = kept["shards"].items() if kept["how"] == repr((VERSION, settings)) else ()
        return {
            (shard, tuple(one["stamp"]), settings): Shard(dict(one["places"]), PassedOver(one["passed_over"]))
            for shard, one in shards
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def indexed(shard: str, signature: ShardSignature, settings: IndexSettings) -> Shard:
    """Return the index of a shard, read from it, with images in the order of the shard."""
    _, label_keys = settings
    passed_over = PassedOver()
    places = {}
    file = shard_copies.to_index(shard, signature) if shard_urls.url_of(shard) else shard
    try:
        contents = contents_of(shard, file, passed_over)
    except shard_urls.UnreachableShard:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{shard} could not be read as a tar file ({error}). Fix or decompress it.") from error
    used = set()
    for image, sample in shard_samples(contents, settings):
        parts = {suffix: contents[name] for suffix, name in sample.items()}
        try:
            label = None if label_keys is None else label_of(shard, signature, parts, label_keys)
        except ValueError as error:
            raise ValueError(f"the label of {image} in {shard} could not be read: {error}") from error
        places[image] = (*contents[image], label)
        used.update(sample.values())
    for name in (name for name in contents if name not in places):
        suffix = posixpath.splitext(name)[1].lower() or "without an extension"
        if name not in used:
            passed_over.add(suffix, f"{shard}/{name}")
        elif suffix in image_suffixes():
            passed_over.add(f"{suffix} next to the image of a sample", f"{shard}/{name}")
    return Shard(places, passed_over)


def contents_of(shard: str, file: str | BinaryIO, passed_over: PassedOver) -> dict[str, Content]:
    """Return member -> where its content is in the shard, which is read from `file`. Hidden members are left out; a
    link has the content of its target.

    Raises:
        tarfile.TarError, OSError: a part of the shard could not be read.
    """
    contents: dict[str, Content] = {}
    links: dict[str, str] = {}
    for member in members(file):
        name = posixpath.normpath(member.name).lstrip("/")
        if member.isdir():
            continue
        if is_hidden(name):
            passed_over.add("hidden", f"{shard}/{name}")
        elif member.islnk() or member.issym():
            inside = "" if member.islnk() else posixpath.dirname(name)
            links[name] = posixpath.normpath(posixpath.join(inside, member.linkname)).lstrip("/")
        elif not member.isfile() or member.issparse():
            passed_over.add("sparse files and devices", f"{shard}/{name}")
        else:
            if name in contents:
                passed_over.add("replaced by a later member of the same name", f"{shard}/{name}")
            contents[name] = (member.offset_data, member.size)
    for name, target in links.items():
        for _ in range(MOST_LINKS):
            target = links.get(target, target)
        if target in contents:
            contents[name] = contents[target]
        else:
            passed_over.add("links to no file of the shard", f"{shard}/{name}")
    return contents


def members(shard: str | BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members up to the shard's last byte. tarfile alone stops silently at a corrupt header, and at the first
    end in tar files that were joined with `cat`."""
    start = 0
    with open(shard, "rb") if isinstance(shard, str) else shard as file:
        while start is not None:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield from tar
                end = tar.offset
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError(f"the header at byte {end} is corrupt or truncated")
            start = next_used(file)


def next_used(file: BinaryIO) -> int | None:
    """Return the first byte of the next block that is not all zeros; None if there is none."""
    while chunk := file.read(2**20):
        if used := chunk.lstrip(b"\0"):
            byte = file.tell() - len(used)
            return byte - byte % BLOCK
    return None


def read_member(shard: str, signature: ShardSignature, start: int, size: int) -> bytes:
    """Return the content of a member. `pread` moves no file position: workers share descriptors opened before them."""
    if shard_urls.url_of(shard):
        return shard_copies.read_remote(shard, signature, start, size)
    key = (shard, signature)
    if key not in open_shards:
        while len(open_shards) >= MOST_OPEN:
            os.close(open_shards.pop(next(iter(open_shards))))
        open_shards[key] = os.open(shard, os.O_RDONLY)
    content = os.pread(open_shards[key], size, start)
    if len(content) < size:
        raise ValueError(f"{shard} ends before byte {start + size}. Copy it again.")
    return content


# ---- samples and labels ----


def shard_samples(names: Iterable[str], settings: IndexSettings) -> Iterator[tuple[str, Members]]:
    """Yield (image, extension -> member) of each sample.

    WebDataset's rule: a sample's name ends at its first dot. If a sample then has no image (`IMG_2024.05.01.png`), its
    members are grouped again by known extensions, except for extensions of samples that have an image (`mask.png`).
    """
    suffixes, label_keys = settings
    grouped = by_sample(names, ())
    with_image = [sample for sample in grouped.values() if not sample.keys().isdisjoint(suffixes)]
    of_samples = {suffix for sample in with_image for suffix in sample}
    for sample in grouped.values():
        parts = [sample]
        if sample.keys().isdisjoint(suffixes):
            rest = (name for suffix, name in sample.items() if suffix not in of_samples)
            parts = by_sample(rest, {*suffixes, *(label_keys or ()), "json"}).values()
        for part in parts:
            image = next((part[suffix] for suffix in suffixes if suffix in part), None)
            if image is not None:
                yield image, part


def by_sample(names: Iterable[str], wanted: Collection[str]) -> dict[str, Members]:
    """Return sample -> extension -> member. An extension begins at the first dot of a name after which it is `wanted`;
    if there is none, at the first dot, or (with any `wanted`) at the last one."""
    members_of: dict[str, Members] = {}
    for name in names:
        folder, base = posixpath.split(name)
        first, *others = base.split(".")
        at = len(others) - 1 if wanted else 0
        at = next((i for i in range(len(others)) if ".".join(others[i:]).lower() in wanted), at)
        sample = posixpath.join(folder, ".".join([first, *others[:at]]))
        members_of.setdefault(sample, {})[".".join(others[at:]).lower()] = name
    return members_of


def label_of(shard: str, signature: ShardSignature, sample: dict[str, Content], keys: tuple[str, ...]) -> Label:
    """Return the label under the first of the keys that is an extension in the sample, or a key of its .json."""

    def content(suffix: str) -> str:
        return read_member(shard, signature, *sample[suffix]).decode()

    entries = None
    for key in keys:
        if key in sample:
            return as_label(content(key))
        if "json" in sample:
            entries = json.loads(content("json")) if entries is None else entries
            value = entries.get(key) if isinstance(entries, dict) else None
            value = whole_number(value)
            if isinstance(value, int | str):
                return as_label(str(value))
            if value is not None and keys != SHARD_LABEL_KEYS:  # the default keys may have another meaning
                raise ValueError(f"{value!r} under {key!r} is not a class. Set label_key to another key.")
    return None
