"""Which shards a pattern names, and to which split a shard belongs by its name."""

import os
import re
from collections.abc import Iterator
from glob import escape, glob
from itertools import pairwise

import numpy as np

from image_folders import SPLITS

SUFFIX = ".tar"
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")


def is_pattern(data_path: str) -> bool:
    return data_path.endswith(SUFFIX) or "://" in data_path or data_path.startswith("pipe:")


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
