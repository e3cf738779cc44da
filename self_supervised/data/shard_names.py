"""Names of shards: what a pattern, a directory or a URL names, and in which split a shard is."""

import os
import re
from collections.abc import Iterator
from glob import escape, glob, has_magic
from itertools import pairwise
from pathlib import Path

import numpy as np

from self_supervised.data import shard_urls
from self_supervised.data.file_search import PassedOver, files_below
from self_supervised.data.folders import SPLITS, has_images

SUFFIX = ".tar"
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|z)|tgz|tbz2?|txz)$", re.IGNORECASE)


def shards_are_there(folder: Path) -> bool:
    """Return whether a directory holds shards, and no image files."""
    return not has_images(folder) and next(files_below(folder, (SUFFIX,), PassedOver()), None) is not None


def is_pattern(data_path: str) -> bool:
    """Return whether a path looks like a pattern of shards, even one that is not supported."""
    if os.path.isdir(os.path.expanduser(data_path)):
        return False
    parts = (end for part in data_path.split("::") for end in with_braces(part))
    is_shard = any(part.lower().endswith(SUFFIX) or COMPRESSED.search(part) for part in parts)
    return is_shard or "::" in data_path or "://" in data_path or data_path.startswith("pipe:")


def expanded_shards(pattern: str, passed_over: PassedOver) -> Iterator[str]:
    """Yield the shards that a pattern or a directory names. A part of the pattern that exists is taken literally.

    Raises:
        ValueError: a shard named by braces is missing, or the pattern is a command, a path as a URL, or names
            compressed shards.
    """
    if pattern.startswith("pipe:"):
        raise ValueError(f"data_path={pattern!r} is a command. Pass the URL of the shards, or copy them to a disk.")
    if pattern.startswith("file://"):
        raise ValueError(f"data_path={pattern!r} is on this machine. Pass the path without file://.")
    if "://" in pattern:
        for url in with_braces(pattern):
            yield from shard_urls.matching(url)
        return
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        yield from (os.path.join(pattern, path) for path in files_below(Path(pattern), (SUFFIX,), passed_over))
        return
    there = pattern
    while there and not os.path.exists(there):
        there = os.path.dirname(there)
    for rest in with_braces(pattern[len(there) :]):
        if COMPRESSED.search(there + rest):
            raise ValueError(
                f"data_path={pattern!r} is compressed. Unpack it to .tar, so that images can be read directly."
            )
        if not has_magic(rest) and not os.path.isfile(there + rest):
            raise ValueError(f"data_path={pattern!r}: {there + rest} does not exist. Add it, or change the pattern.")
        yield from glob(escape(there) + rest, recursive=True)


def with_braces(pattern: str) -> Iterator[str]:
    """Yield a pattern with its braces expanded: {00..12} to numbers of this width, {a,b} to a and b. They may nest."""
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
    """Return the split that is a word of a shard's path."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, names in SPLITS.items() if any(name in words for name in names)), None)
