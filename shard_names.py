"""Which shards a pattern names, and to which split a shard belongs by its name."""

import os
import re
from collections.abc import Iterator
from glob import escape, glob, has_magic
from itertools import pairwise
from pathlib import Path

import numpy as np

from file_search import PassedOver, files_below
from image_folders import SPLITS

SUFFIX = ".tar"
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|z)|tgz|tbz2?|txz)$", re.IGNORECASE)


def is_pattern(data_path: str) -> bool:
    is_shard = data_path.endswith(SUFFIX) or COMPRESSED.search(data_path) is not None
    return is_shard or "://" in data_path or data_path.startswith("pipe:")


def expanded(pattern: str, passed_over: PassedOver) -> Iterator[str]:
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
