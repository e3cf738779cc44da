"""Which files below a folder are used: hidden ones and those of other kinds are passed over, and counted."""

import os
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

from PIL import Image
from pytorch_lightning.utilities import rank_zero_info

ARRAY_SUFFIX = ".npy"
FIRST = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ARRAY_SUFFIX)
# Formats that Pillow recognizes, but decodes with other programs only; MPO is read as JPEG.
ONLY_RECOGNIZED = {"BUFR", "GRIB", "HDF5", "MPEG", "EPS", "WMF"}
MOST_REASONS = 6  # of a line

told: set[str] = set()  # lines of this process


@cache
def image_suffixes() -> tuple[str, ...]:
    """Return the file extensions of images: arrays, and all formats that the installed Pillow decodes. Of the images
    of one sample of a shard, the one whose extension comes first is used."""
    Image.init()
    readable = (set(Image.OPEN) | {"MPO"}) - ONLY_RECOGNIZED
    decoded = {suffix for suffix, name in Image.registered_extensions().items() if name in readable}
    return (*FIRST, *sorted(decoded.difference(FIRST)))


def is_hidden(path: str) -> bool:
    """Whether a relative path has a hidden part: `._x.png`, `.DS_Store`, `.ipynb_checkpoints`, `__MACOSX`."""
    parts = path.split("/")
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in parts)


class PassedOver(dict[str, list]):
    """Files that are not used: reason -> [how many, the path of one]."""

    def add(self, reason: str, path: str | Path, n: int = 1) -> None:
        self.setdefault(reason, [0, str(path)])[0] += n

    def join(self, other: dict[str, list]) -> None:
        for reason, (n, path) in other.items():
            self.add(reason, path, n)

    def __str__(self) -> str:
        """Return "; passed over: 3 hidden (such as cats/._1.png), 1 .txt (such as notes.txt)", or nothing for none."""
        rows = sorted(self.items(), key=lambda row: -row[1][0])
        more = [f"{sum(n for _, (n, _) in rows[MOST_REASONS:])} others"] if len(rows) > MOST_REASONS else []
        found = [*(f"{n:,} {reason} (such as {path})" for reason, (n, path) in rows[:MOST_REASONS]), *more]
        return f"; passed over: {', '.join(found)}" if found else ""


def tell(where: str | Path, n: int, kind: str, passed_over: PassedOver) -> None:
    """Say, once in a process, how many images or videos a source has, and what it passes over."""
    line = f"{where}: {n:,} {kind}{passed_over}"
    if line not in told:
        told.add(line)
        rank_zero_info(line)


def folders_below(base: Path, passed_over: PassedOver) -> Iterator[tuple[str, list[str]]]:
    """Yield (path, names of the files) of `base` and of every folder below it.

    Links are followed after all else, and no folder is entered twice: each image has one place, that of the folder
    itself, and links that lead to one another come to an end.
    """
    starts, seen = [str(base)], set()

    def unreadable(error: OSError) -> None:
        passed_over.add("folders that cannot be read", error.filename)

    while starts:
        for here, folders, files in os.walk(starts.pop(0), onerror=unreadable):
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                passed_over.add("links to folders that are used already", here)
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            for name in filter(is_hidden, folders + files):
                passed_over.add("hidden", os.path.join(here, name))
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            starts += [path for name in folders if os.path.islink(path := os.path.join(here, name))]
            yield here, [name for name in files if not is_hidden(name)]


def files_below(base: Path, suffixes: Collection[str], passed_over: PassedOver) -> Iterator[str]:
    """Yield the paths below `base`, with "/", of files with one of these extensions, in lower or upper case."""
    suffixes = frozenset(suffixes)
    for here, names in folders_below(base, passed_over):
        folder = Path(here).relative_to(base).as_posix()
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes:
                yield name if folder == "." else f"{folder}/{name}"
            else:
                passed_over.add(suffix or "without an extension", os.path.join(here, name))


def folders_in(base: Path) -> list[Path]:
    """Return the folders directly in `base`, hidden ones aside, in the order of their names."""
    return sorted(path for path in base.iterdir() if path.is_dir() and not is_hidden(path.name))
