"""Files that appear under their names only when all of them is on the disk."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` once the block is done, and is removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    with whole(path) as unfinished:
        unfinished.write_text(text)


def to_json(content: Any, **options: Any) -> str:
    """JSON that every reader takes: null in place of NaN and infinity, which JSON does not have."""
    return json.dumps(without_nan(content), allow_nan=False, **options)


def without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def sync_folder(folder: Path) -> None:
    """Have the new name on the disk, too, before an older file is deleted."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
