"""Search for files below a directory, without hidden files and files of other kinds, which are counted and reported.

Data sets that have a name are below `data_path()`.
"""

import os
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

from PIL import Image
from pytorch_lightning.utilities import rank_zero_info

from self_supervised.program import in_one_line
from self_supervised.safe_files import local_path

ARRAY_SUFFIX = ".npy"
COMMON_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ARRAY_SUFFIX)
# Formats that Pillow recognizes but cannot decode by itself
ONLY_RECOGNIZED = {"BUFR", "GRIB", "HDF5", "MPEG", "EPS", "WMF"}
OF_THE_SYSTEM = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
MOST_REASONS = 6  # reasons listed in a message

logged_lines: set[str] = set()  # lines that this process has logged


def data_path() -> Path:
    """Return the environment variable DATA_PATH (`~` is expanded), or ./data."""
    return local_path("DATA_PATH", os.environ.get("DATA_PATH") or "data")


@cache
def image_suffixes() -> tuple[str, ...]:
    """Return the file extensions of images: .npy, and those of all formats that the installed Pillow decodes.

    The order is also a preference: if a sample of a shard has multiple images, the first extension decides.
    """
    Image.init()
    readable = (set(Image.OPEN) | {"MPO"}) - ONLY_RECOGNIZED  # MPO is read as JPEG
    decoded = {suffix for suffix, name in Image.registered_extensions().items() if name in readable}
    return (*COMMON_SUFFIXES, *sorted(decoded.difference(COMMON_SUFFIXES)))


def is_hidden(path: str) -> bool:
    """Return whether a relative path has a part that is hidden (`._x.png`, `.ipynb_checkpoints`), or a directory of the
    system, with copies or deleted images."""
    parts = path.split("/")
    return any((part.startswith(".") and part not in (".", "..")) or part in OF_THE_SYSTEM for part in parts)


class PassedOver(dict[str, list]):
    """Counts of the files that are not used: reason -> [number of files, path of one]."""

    def add(self, reason: str, path: str | Path, n: int = 1) -> None:
        self.setdefault(reason, [0, str(path)])[0] += n

    def join(self, other: dict[str, list]) -> None:
        for reason, (n, path) in other.items():
            self.add(reason, path, n)

    def __str__(self) -> str:
        """Return "; passed over: 3 hidden (such as cats/._1.png), 1 .txt (such as notes.txt)"; "" if there are none."""
        rows = sorted(self.items(), key=lambda row: -row[1][0])
        more = [f"{sum(n for _, (n, _) in rows[MOST_REASONS:])} others"] if len(rows) > MOST_REASONS else []
        reasons = [*(f"{n:,} {reason} (such as {path})" for reason, (n, path) in rows[:MOST_REASONS]), *more]
        return in_one_line(f"; passed over: {', '.join(reasons)}") if reasons else ""


def log_counts(where: str | Path, n: int, kind: str, passed_over: PassedOver) -> None:
    """Log how many images or videos a source has, and what was passed over; each line once per process."""
    log_once(f"{where}: {n:,} {kind}{passed_over}")


def log_once(line: str) -> None:
    if line not in logged_lines:
        logged_lines.add(line)
        rank_zero_info(line)


def folders_below(base: Path, passed_over: PassedOver) -> Iterator[tuple[str, list[str]]]:
    """Yield (path, names of the files) of `base` and of every directory below it.

    Links are followed last, and no directory is entered twice. So each image is found once, under the directory itself,
    and links that lead to one another do not loop.
    """
    starts = [str(base)]
    seen = set()

    def unreadable(error: OSError) -> None:
        passed_over.add("folders that cannot be read", error.filename)

    while starts:
        for here, folders, files in os.walk(starts.pop(0), onerror=unreadable):
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                passed_over.add("links to folders that were already searched", here)
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            for name in filter(is_hidden, folders + files):
                passed_over.add("hidden", os.path.join(here, name))
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            starts += [path for name in folders if os.path.islink(path := os.path.join(here, name))]
            yield here, [name for name in files if not is_hidden(name)]


def files_below(base: Path, suffixes: Collection[str], passed_over: PassedOver) -> Iterator[str]:
    """Yield the paths, relative to `base` and with "/", of files with one of these extensions, in any case."""
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
    """Return the directories directly in `base`, without hidden ones, sorted by name."""
    return sorted(path for path in base.iterdir() if path.is_dir() and not is_hidden(path.name))
