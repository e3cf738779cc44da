"""WebDataset's shards: tar files whose members of one name up to its first dot, `cat/7.jpg`, `cat/7.cls`, are a sample.

Every shard is indexed once, by its headers, and images are then read by their place in it. So splits, fractions, labels
and resuming at the very batch are those of image files, which a pipe from one shard to the next cannot give, and no
process waits for one that has more images. What shards are for remains: few large files, read one after the other, of
which each process reads its own (loader.Share deals them out). Source: https://github.com/webdataset/webdataset.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from functools import cache
from glob import escape, glob
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np

import ddp
from files import OnDisk
from image_folders import SPLITS, SUFFIXES, Found, Label, as_label, has_images, of_folder
from whole_files import write_whole

SUFFIX = ".tar"
LABEL_KEYS = ("cls", "label")  # where no other is wanted
MOST_OPEN = 128  # shards, of each process
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # name and ending of a member
Place = tuple[int, int, Label]  # first byte, bytes, label
Stamp = tuple[int, int]  # size and time of a shard
How = tuple[tuple[str, ...], tuple[str, ...] | None]  # endings of images, keys of labels

opened: dict[tuple[str, Stamp], int] = {}  # descriptors


def is_pattern(data_path: str) -> bool:
    return data_path.endswith(SUFFIX) or "://" in data_path or data_path.startswith("pipe:")


def are_there(folder: Path) -> bool:
    """Whether a folder holds shards, and no image files."""
    return not has_images(folder) and next(folder.rglob(f"*{SUFFIX}"), None) is not None


class TarShards(OnDisk):
    """The images of some shards; a path is SHARD/MEMBER.

    Args:
        data_path: a folder with shards, a glob, or a pattern such as "shards/{train-{000..099},val-{00..09}}.tar"; "::"
            separates several.
        image_key: endings of the images, the first that a sample has: "jpg;png"; None: of any image.
        label_key: ending of the file, or entry of the .json, with a sample's label; None: those of LABEL_KEYS, else the
            member's folder.
        labels_from: folder of a member that is its class; None: no labels at all.
        index_file: keeps the index for other processes.

    Raises:
        ValueError: no shards, one is missing or damaged, or none has such a label.
    """

    def __init__(
        self,
        data_path: str,
        image_key: str | None,
        label_key: str | None,
        labels_from: str | None,
        index_file: Path | None = None,
    ):
        shards = sorted({os.path.abspath(shard) for part in data_path.split("::") for shard in expanded(part)})
        if not shards:
            raise ValueError(f"data_path={data_path!r} matches no shards: give the pattern of your .tar files")
        self.root = Path(os.path.commonpath([os.path.dirname(shard) for shard in shards]))
        endings = tuple(image_key.lower().split(";")) if image_key else tuple(suffix[1:] for suffix in SUFFIXES)
        keys = None if labels_from is None else (label_key,) if label_key else LABEL_KEYS
        self.labels_from, self.label_key = labels_from, label_key
        self.stamps = {shard: stamp(shard) for shard in shards}
        self.index = index(self.stamps, (endings, keys), index_file)

    def find(self) -> Found:
        """All images, by the split that a word in the shard's name says ("train", "val", ...), or its folder's name;
        where none says so, all are for training."""
        split_of = {shard: split_in(os.path.relpath(shard, self.root)) for shard in self.stamps}
        if not any(split_of.values()):
            split_of = dict.fromkeys(split_of, "train")
        found: Found = {split: [] for split in (*SPLITS, "")}
        for shard, split in split_of.items():
            below, images = os.path.relpath(shard, self.root), self.index[shard] if split else {}
            found[split or ""] += [(f"{below}/{member}", label) for member, (_, _, label) in images.items()]
        found.pop("")
        if self.labels_from and all(label is None for images in found.values() for _, label in images):
            if self.label_key:
                raise ValueError(
                    f"label_key={self.label_key!r}: no sample in {self.root} has such an ending or .json entry"
                )
            found = {split: [(path, self.of_folder(path)) for path, _ in images] for split, images in found.items()}
        return found

    def of_folder(self, path: str) -> str | None:
        return of_folder(parts(path)[1], self.labels_from)

    def holds(self, path: str) -> bool:
        shard, member = parts(str(self.root / path))
        return shard in self.stamps and member in self.index[shard]

    def open(self, path: str) -> io.BytesIO:
        shard, member = parts(path)
        start, size, _ = self.index[shard][member]
        return io.BytesIO(read(shard, self.stamps[shard], start, size))

    def stamp(self, path: str) -> tuple:
        shard, member = parts(path)
        return (*self.index[shard][member][:2], *self.stamps[shard])

    def shards(self, paths: list[str]) -> np.ndarray:
        numbers = {shard: number for number, shard in enumerate(self.stamps)}
        return np.array([numbers[parts(path)[0]] for path in paths])


# ---- names ----


def expanded(pattern: str) -> Iterator[str]:
    """The files that a pattern or a folder names.

    Raises:
        ValueError: one that braces name is not there; a URL.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(
            f"data_path={pattern!r} is no path: images are read by their place in a shard, so copy the shards to a "
            "disk, or mount them as a file system"
        )
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        yield from glob(f"{escape(pattern)}/**/*{SUFFIX}", recursive=True)
        return
    for name in with_braces(pattern):
        if not re.search(r"[*?\[]", name) and not os.path.isfile(name):
            raise ValueError(f"data_path={pattern!r} names {name}, which is not there")
        yield from glob(name) if re.search(r"[*?\[]", name) else [name]


def with_braces(pattern: str) -> Iterator[str]:
    """{00..12} is every number with as many digits, {a,b} either; they may be nested."""
    start = pattern.find("{")
    depths = np.cumsum([(c == "{") - (c == "}") for c in pattern[start:]]) if start >= 0 else np.empty(0)
    if not (depths == 0).any():
        yield pattern
        return
    end = start + int(np.argmax(depths == 0))
    commas = [i for i in range(start, end) if pattern[i] == "," and depths[i - start] == 1]
    choices = [pattern[i + 1 : j] for i, j in pairwise([start, *commas, end])]
    if numbers := NUMBERS.fullmatch(pattern[start + 1 : end]):
        choices = [f"{n:0{len(numbers[1])}d}" for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    for choice in choices:
        yield from with_braces(pattern[:start] + choice + pattern[end + 1 :])


def split_in(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, names in SPLITS.items() if any(name in words for name in names)), None)


def parts(path: str) -> tuple[str, str]:
    """Shard and member."""
    shard, _, member = path.partition(f"{SUFFIX}/")
    return shard + SUFFIX, member


# ---- content ----


def stamp(shard: str) -> Stamp:
    status = os.stat(shard)
    return status.st_size, status.st_mtime_ns


def index(stamps: dict[str, Stamp], how: How, file: Path | None) -> dict[str, dict[str, Place]]:
    """Of every shard; taken from `file` for those that are as they were, and written there."""
    kept = json.loads(file.read_text()) if file and file.is_file() else {}
    kept = kept.get("shards", {}) if kept.get("how") == repr(how) else {}
    fresh = [shard for shard in stamps if shard not in kept or tuple(kept[shard]["stamp"]) != stamps[shard]]
    found = {shard: one["places"] for shard, one in kept.items() if shard in stamps}
    found |= {shard: indexed(shard, stamps[shard], *how) for shard in fresh}
    if file and fresh and ddp.rank() == 0:
        shards = {shard: {"stamp": stamps[shard], "places": places} for shard, places in found.items()}
        write_whole(file, json.dumps({"how": repr(how), "shards": shards}))
    return {shard: found[shard] for shard in stamps}


@cache
def indexed(shard: str, stamp: Stamp, endings: tuple[str, ...], label_keys: tuple[str, ...] | None) -> dict[str, Place]:
    """Image -> its place and label, in the order of the shard."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile() and (found := SAMPLE.fullmatch(member.name)):
                    samples.setdefault(found[1], {})[found[2].lower()] = member
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{shard} could not be read as a tar file ({error}): mend it, or unpack it if it is compressed"
        ) from error
    places = {}
    for sample in samples.values():
        image = next((sample[ending] for ending in endings if ending in sample), None)
        if image is not None:
            label = None if label_keys is None else label_of(shard, stamp, sample, label_keys)
            places[str(PurePosixPath(image.name)).lstrip("/")] = (image.offset_data, image.size, label)
    return places


def label_of(shard: str, stamp: Stamp, sample: dict[str, tarfile.TarInfo], keys: tuple[str, ...]) -> Label:
    """Of the first of the keys that is an ending of the sample, or an entry of its .json."""

    def content(ending: str) -> str:
        return read(shard, stamp, sample[ending].offset_data, sample[ending].size).decode()

    entries = None
    for key in keys:
        if key in sample:
            return as_label(content(key))
        if "json" in sample:
            entries = json.loads(content("json")) if entries is None else entries
            value = entries.get(key) if isinstance(entries, dict) else None
            if isinstance(value, int | str):
                return as_label(str(value))
    return None


def read(shard: str, stamp: Stamp, start: int, size: int) -> bytes:
    """Workers share the descriptors that were there when they started: nothing moves a position."""
    key = (shard, stamp)
    if key not in opened:
        while len(opened) >= MOST_OPEN:
            os.close(opened.pop(next(iter(opened))))
        opened[key] = os.open(shard, os.O_RDONLY)
    content = os.pread(opened[key], size, start)
    if len(content) < size:
        raise ValueError(f"{shard} ends before byte {start + size}")
    return content
