"""WebDataset's shards: tar files whose members of one name up to its first dot, `cat/7.jpg`, `cat/7.cls`, are a sample.

Every shard is indexed once, by its headers, and images are then read by their place in it. So splits, fractions, labels
and resuming at the very batch are those of image files, which a pipe from one shard to the next cannot give, and no
process waits for one that has more images. What shards are for remains: few large files, read one after the other, of
which each process reads its own (loader.Share deals them out). Source: https://github.com/webdataset/webdataset.
"""

import io
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from glob import escape, glob, has_magic
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from self_supervised import distributed
from self_supervised.data.file_search import PassedOver, files_below, image_suffixes, is_hidden
from self_supervised.data.files import OnDisk
from self_supervised.data.folders import SPLITS, ImageList, Label, as_label, has_images, of_folder, with_labels
from self_supervised.safe_files import atomic_write

SUFFIX = ".tar"
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|z)|tgz|tbz2?|txz)$", re.IGNORECASE)


def is_pattern(data_path: str) -> bool:
    is_shard = data_path.endswith(SUFFIX) or COMPRESSED.search(data_path) is not None
    return is_shard or "://" in data_path or data_path.startswith("pipe:")


def expanded_shards(pattern: str, passed_over: PassedOver) -> Iterator[str]:
    """The files that a pattern or a folder names. What is there under the very name is that: [ and { are letters then.

    Raises:
        ValueError: one that braces name is not there; a URL; a compressed shard.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(
            f"data_path={pattern!r} is no path: images are read by their place in a shard, so copy the shards to a "
            "disk, or mount them as a file system"
        )
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        yield from (os.path.join(pattern, path) for path in files_below(Path(pattern), (SUFFIX,), passed_over))
        return
    if COMPRESSED.search(pattern):
        raise ValueError(
            f"data_path={pattern!r} is compressed, so that no image has a place in it: unpack it to .tar (gunzip, ...)"
        )
    there = pattern
    while there and not os.path.exists(there):
        there = os.path.dirname(there)
    for rest in with_braces(pattern[len(there) :]):
        if not has_magic(rest) and not os.path.isfile(there + rest):
            raise ValueError(f"data_path={pattern!r} names {there + rest}, which is not there")
        yield from glob(escape(there) + rest)


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


# ---- WebDataset's shards: tar files; members of one name up to its first dot (cat/7.jpg, cat/7.cls) are a sample ----


SHARD_LABEL_KEYS = ("cls", "label")  # where no other is wanted
MOST_OPEN = 128  # shards, of each process
BLOCK = 512  # bytes, of which a tar file is made
VERSION = 2  # of the kept index
MOST_LINKS = 40  # from one to the next, as in file systems
Content = tuple[int, int]  # first byte, bytes
Place = tuple[int, int, Label]  # first byte, bytes, label
ShardSignature = tuple[int, int]  # size and time of a shard
How = tuple[tuple[str, ...], tuple[str, ...] | None]  # endings of images, keys of labels


class Shard(NamedTuple):
    places: dict[str, Place]  # of its images
    passed_over: PassedOver


known: dict[tuple[str, ShardSignature, How], Shard] = {}  # indices of shards, for all data sets of this process
open_shards: dict[tuple[str, ShardSignature], int] = {}  # descriptors


def shards_are_there(folder: Path) -> bool:
    """Whether a folder holds shards, and no image files."""
    return not has_images(folder) and next(files_below(folder, (SUFFIX,), PassedOver()), None) is not None


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
        found = PassedOver()
        shards = sorted(
            {os.path.abspath(shard) for part in data_path.split("::") for shard in expanded_shards(part, found)}
        )
        if not shards:
            raise ValueError(f"data_path={data_path!r} matches no shards: give the pattern of your .tar files")
        self.root = Path(os.path.commonpath([os.path.dirname(shard) for shard in shards]))
        endings = tuple(image_key.lower().split(";")) if image_key else tuple(suffix[1:] for suffix in image_suffixes())
        keys = None if labels_from is None else (label_key,) if label_key else SHARD_LABEL_KEYS
        self.labels_from = labels_from
        self.label_key = label_key
        self.signatures = {shard: shard_signature(shard) for shard in shards}
        indices = index(self.signatures, (endings, keys), index_file)
        self.index = {shard: one.places for shard, one in indices.items()}
        for one in indices.values():
            found.join(one.passed_over)
        self.found_beside = found
        self.passed_over = PassedOver()

    def find(self) -> ImageList:
        """All images, by the split that a word in the shard's name says ("train", "val", ...), or its folder's name;
        where none says so, all are for training."""
        split_of = {shard: split_in(os.path.relpath(shard, self.root)) for shard in self.signatures}
        if not any(split_of.values()):
            split_of = dict.fromkeys(split_of, "train")
        found: ImageList = {}
        for shard, split in split_of.items():
            below = os.path.relpath(shard, self.root)
            images = ((f"{below}/{member}", label) for member, (_, _, label) in self.index[shard].items())
            found.setdefault(split or "", []).extend(images)
        self.passed_over.clear()
        self.passed_over.join(self.found_beside)
        if self.label_key and self.labels_from and not self.has_labels:
            raise ValueError(
                f"label_key={self.label_key!r}: no sample in {self.root} has such an ending or .json entry"
            )
        return with_labels(found, self.label_of)

    @cached_property
    def has_labels(self) -> bool:
        return any(label is not None for places in self.index.values() for _, _, label in places.values())

    def label_of(self, path: str) -> Label:
        shard, member = self.parts(os.path.join(self.root, path))
        return self.index[shard][member][2] if self.has_labels else of_folder(member, self.labels_from)

    def holds(self, path: str) -> bool:
        shard, member = self.parts(str(self.root / path))
        return member in self.index.get(shard, ())

    def open(self, path: str) -> io.BytesIO:
        shard, member = self.parts(path)
        start, size, _ = self.index[shard][member]
        return io.BytesIO(read_member(shard, self.signatures[shard], start, size))

    def signature(self, path: str) -> tuple:
        shard, member = self.parts(path)
        return (*self.index[shard][member][:2], *self.signatures[shard])

    def shards(self, paths: list[str]) -> np.ndarray:
        numbers = {shard: number for number, shard in enumerate(self.signatures)}
        return np.array([numbers[self.parts(path)[0]] for path in paths])

    def parts(self, path: str) -> tuple[str, str]:
        """Shard and member; folders may be called like shards."""
        ends = (found.end() for found in re.finditer(re.escape(SUFFIX) + "/", path))
        end = next((end for end in ends if path[: end - 1] in self.signatures), 0)
        return path[: max(end - 1, 0)], path[end:]


def shard_signature(shard: str) -> ShardSignature:
    status = os.stat(shard)
    return status.st_size, status.st_mtime_ns


def index(signatures: dict[str, ShardSignature], how: How, file: Path | None) -> dict[str, Shard]:
    """Of every shard. What is not known to this process is taken from `file`, else read and written there."""

    def unknown() -> list[str]:
        return [shard for shard, signature in signatures.items() if (shard, signature, how) not in known]

    is_kept = file is not None and file.is_file()
    if is_kept and unknown():
        known.update(read_index(file, how))
    fresh = unknown()
    known.update(((shard, signatures[shard], how), indexed(shard, signatures[shard], *how)) for shard in fresh)
    found = {shard: known[shard, signature, how] for shard, signature in signatures.items()}
    if file is not None and (fresh or not is_kept) and distributed.rank() == 0:
        shards = {shard: {"stamp": signatures[shard], **one._asdict()} for shard, one in found.items()}
        atomic_write(file, json.dumps({"how": repr((VERSION, how)), "shards": shards}))
    return found


def read_index(file: Path, how: How) -> dict[tuple[str, ShardSignature, How], Shard]:
    """What `index` wrote; {} where it was made in another way, or is damaged: then the shards are read again."""
    try:
        kept = json.loads(file.read_text())
        shards = kept["shards"].items() if kept["how"] == repr((VERSION, how)) else ()
        return {
            (shard, tuple(one["stamp"]), how): Shard(dict(one["places"]), PassedOver(one["passed_over"]))
            for shard, one in shards
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def indexed(
    shard: str, signature: ShardSignature, endings: tuple[str, ...], label_keys: tuple[str, ...] | None
) -> Shard:
    """Image -> its place and label, in the order of the shard."""
    passed_over = PassedOver()
    places = {}
    try:
        contents = contents_of(shard, passed_over)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{shard} could not be read as a tar file ({error}): mend it, or unpack it if it is compressed"
        ) from error
    used = set()
    for image, sample in shard_samples(contents, endings, label_keys or ()):
        beside = {ending: contents[name] for ending, name in sample.items()}
        try:
            label = None if label_keys is None else label_of(shard, signature, beside, label_keys)
        except ValueError as error:
            raise ValueError(f"the label of {image} in {shard} could not be read: {error}") from error
        places[image] = (*contents[image], label)
        used.update(sample.values())
    for name in (name for name in contents if name not in places):
        suffix = posixpath.splitext(name)[1].lower() or "without an extension"
        if name not in used:
            passed_over.add(suffix, f"{shard}/{name}")
        elif suffix in image_suffixes():
            passed_over.add(f"{suffix} beside the image of a sample", f"{shard}/{name}")
    return Shard(places, passed_over)


def contents_of(shard: str, passed_over: PassedOver) -> dict[str, Content]:
    """Return member -> its bytes, without hidden members. A link is what it leads to.

    Raises:
        tarfile.TarError, OSError: some of the shard could not be read.
    """
    contents: dict[str, Content] = {}
    links: dict[str, str] = {}
    for member in members(shard):
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
            contents[name] = (member.offset_data, member.size)
    for name, target in links.items():
        for _ in range(MOST_LINKS):
            target = links.get(target, target)
        if target in contents:
            contents[name] = contents[target]
        else:
            passed_over.add("links to no file of the shard", f"{shard}/{name}")
    return contents


def members(shard: str) -> Iterator[tarfile.TarInfo]:
    """To the last byte of the shard: tarfile alone takes a damaged header for the end, without a word, and so the first
    end of tar files that were joined by `cat`."""
    start = 0
    with open(shard, "rb") as file:
        while start is not None:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield from tar
                end = tar.offset
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError(f"the header at byte {end} is damaged or cut off")
            start = next_used(file)


def next_used(file: BinaryIO) -> int | None:
    """The first byte of the next block that is not all zeros."""
    while piece := file.read(2**20):
        if used := piece.lstrip(b"\0"):
            byte = file.tell() - len(used)
            return byte - byte % BLOCK
    return None


def shard_samples(
    names: Iterable[str], endings: tuple[str, ...], keys: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (image, ending -> member) of each sample.

    By the rule of WebDataset, a sample's name ends at its first dot. Where this leaves it without an image, as of
    `IMG_2024.05.01.png`, its members are samples by their wanted endings, except for those that other samples have
    beside their image, such as `mask.png`.
    """
    grouped = by_sample(names, ())
    with_image = [sample for sample in grouped.values() if not sample.keys().isdisjoint(endings)]
    beside = {ending for sample in with_image for ending in sample}
    for sample in grouped.values():
        parts = [sample]
        if sample.keys().isdisjoint(endings):
            rest = (name for ending, name in sample.items() if ending not in beside)
            parts = by_sample(rest, {*endings, *keys, "json"}).values()
        for part in parts:
            image = next((part[ending] for ending in endings if ending in part), None)
            if image is not None:
                yield image, part


def by_sample(names: Iterable[str], wanted: Collection[str]) -> dict[str, dict[str, str]]:
    """Return sample -> ending -> member. An ending begins at the first dot of a name after which it is one of `wanted`;
    if there is none, at the first dot, or (with `wanted`) at the last one."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        folder, base = posixpath.split(name)
        first, *others = base.split(".")
        at = len(others) - 1 if wanted else 0
        at = next((i for i in range(len(others)) if ".".join(others[i:]).lower() in wanted), at)
        sample = posixpath.join(folder, ".".join([first, *others[:at]]))
        found.setdefault(sample, {})[".".join(others[at:]).lower()] = name
    return found


def label_of(shard: str, signature: ShardSignature, sample: dict[str, Content], keys: tuple[str, ...]) -> Label:
    """Of the first of the keys that is an ending of the sample, or an entry of its .json."""

    def content(ending: str) -> str:
        return read_member(shard, signature, *sample[ending]).decode()

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


def read_member(shard: str, signature: ShardSignature, start: int, size: int) -> bytes:
    """Workers share the descriptors that were there when they started: nothing moves a position."""
    key = (shard, signature)
    if key not in open_shards:
        while len(open_shards) >= MOST_OPEN:
            os.close(open_shards.pop(next(iter(open_shards))))
        open_shards[key] = os.open(shard, os.O_RDONLY)
    content = os.pread(open_shards[key], size, start)
    if len(content) < size:
        raise ValueError(f"{shard} ends before byte {start + size}")
    return content
