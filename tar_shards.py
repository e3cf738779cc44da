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
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

import ddp
from files import OnDisk
from image_folders import SUFFIXES, Found, Label, as_label, has_images, labelled, of_folder
from shard_names import SUFFIX, expanded, split_in
from whole_files import write_whole

LABEL_KEYS = ("cls", "label")  # where no other is wanted
MOST_OPEN = 128  # shards, of each process
SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # name and ending of a member
Place = tuple[int, int, Label]  # first byte, bytes, label
Stamp = tuple[int, int]  # size and time of a shard
How = tuple[tuple[str, ...], tuple[str, ...] | None]  # endings of images, keys of labels

known: dict[tuple[str, Stamp, How], dict[str, Place]] = {}  # indices of shards, for all data sets of this process
opened: dict[tuple[str, Stamp], int] = {}  # descriptors


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
        found: Found = {}
        for shard, split in split_of.items():
            below = os.path.relpath(shard, self.root)
            images = ((f"{below}/{member}", label) for member, (_, _, label) in self.index[shard].items())
            found.setdefault(split or "", []).extend(images)
        if self.label_key and self.labels_from and not self.has_labels:
            raise ValueError(
                f"label_key={self.label_key!r}: no sample in {self.root} has such an ending or .json entry"
            )
        return labelled(found, self.label_of)

    @cached_property
    def has_labels(self) -> bool:
        return any(label is not None for places in self.index.values() for _, _, label in places.values())

    def label_of(self, path: str) -> Label:
        shard, member = parts(os.path.join(self.root, path))
        return self.index[shard][member][2] if self.has_labels else of_folder(member, self.labels_from)

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


def parts(path: str) -> tuple[str, str]:
    """Shard and member."""
    shard, _, member = path.partition(f"{SUFFIX}/")
    return shard + SUFFIX, member


def stamp(shard: str) -> Stamp:
    status = os.stat(shard)
    return status.st_size, status.st_mtime_ns


def index(stamps: dict[str, Stamp], how: How, file: Path | None) -> dict[str, dict[str, Place]]:
    """Of every shard. What is not known to this process is taken from `file`, else read and written there."""

    def unknown() -> list[str]:
        return [shard for shard, stamp in stamps.items() if (shard, stamp, how) not in known]

    is_kept = file is not None and file.is_file()
    if is_kept and unknown():
        known.update(read_index(file, how))
    fresh = unknown()
    known.update(((shard, stamps[shard], how), indexed(shard, stamps[shard], *how)) for shard in fresh)
    found = {shard: known[shard, stamp, how] for shard, stamp in stamps.items()}
    if file is not None and (fresh or not is_kept) and ddp.rank() == 0:
        shards = {shard: {"stamp": stamps[shard], "places": places} for shard, places in found.items()}
        write_whole(file, json.dumps({"how": repr(how), "shards": shards}))
    return found


def read_index(file: Path, how: How) -> dict[tuple[str, Stamp, How], dict[str, Place]]:
    """What `index` wrote; {} where it was made in another way, or is damaged: then the shards are read again."""
    try:
        kept = json.loads(file.read_text())
        shards = kept["shards"].items() if kept["how"] == repr(how) else ()
        return {(shard, tuple(one["stamp"]), how): dict(one["places"]) for shard, one in shards}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


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
            try:
                label = None if label_keys is None else label_of(shard, stamp, sample, label_keys)
            except ValueError as error:
                raise ValueError(f"the label of {image.name} in {shard} could not be read: {error}") from error
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
