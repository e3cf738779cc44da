"""Files that appear under their names only when all of them is on the disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_folder(name: str, folder: str | Path) -> None:
    """Raise ValueError, naming the option, unless files can be written into the folder, which need not exist yet."""
    folder = Path(folder).expanduser()
    there = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not there.is_dir():
        raise ValueError(f"{name}={folder}: {there} is a file. Choose another directory.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={folder}: {there} cannot be written. Choose another directory.")


def check_file(name: str, path: str | Path) -> None:
    """Raise ValueError, naming the option, unless a file can be written there."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{name}={path} is a directory. Name a file.")
    check_folder(name, path.parent)


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


def sync_folder(folder: Path) -> None:
    """Have the new name on the disk, too, before an older file is deleted."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
