"""Images in a folder: which there are, by layout, and the labels that lists or folders say.

The first of these that the folder holds:
1. train.txt, and val.txt, test.txt if there are: a relative path in each line, and behind a comma or a space the
   label, if wanted; without one the folder says it.
2. folders train, and val, test if there are, with class folders or images in them.
3. class folders, or images, directly.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from array_files import ARRAY_SUFFIX
from files import OnDisk

SUFFIXES = (*IMG_EXTENSIONS, ARRAY_SUFFIX)
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # split -> its names
Label = str | int | None  # name or number of a class
Found = dict[str, list[tuple[str, Label]]]  # split -> (path below the root, label)


class ImageFolder(OnDisk):
    """Image files below a folder.

    Args:
        labels_from: "first_folder" or "last_folder" of a path; None: no labels.
    """

    def __init__(self, root: Path, labels_from: str | None):
        if not root.is_dir():
            raise ValueError(f"data_path={str(root)!r} is no folder: give that of your images, or set DATA_PATH")
        self.root, self.labels_from = root, labels_from

    def find(self) -> Found:
        """All images, by split; `train` alone where the folder knows no splits."""
        root, how = self.root, self.labels_from
        if (root / "train.txt").is_file():
            found = lists(root)
            check_that_all_are_there(self, found, root)
            by_folder = {split: [(path, of_folder(path, how)) for path, _ in found[split]] for split in found}
            listed = {split: any(label is not None for _, label in found[split]) for split in found}
            return {split: found[split] if listed[split] else by_folder[split] for split in found}
        if not (root / "train").is_dir():
            return {"train": below(root, root, how)}
        there = {split: [root / name for name in names if (root / name).is_dir()] for split, names in SPLITS.items()}
        return {split: below(folders[0], root, how) for split, folders in there.items() if folders}

    def holds(self, path: str) -> bool:
        return (self.root / path).is_file()


def has_images(folder: Path) -> bool:
    return (folder / "train.txt").is_file() or next(files_below(folder), None) is not None


def below(base: Path, root: Path, labels_from: str | None) -> list[tuple[str, Label]]:
    """Images anywhere below `base`, sorted by path."""
    paths, prefix = sorted(path.relative_to(base).as_posix() for path in files_below(base)), base.relative_to(root)
    return [((prefix / path).as_posix(), of_folder(path, labels_from)) for path in paths]


def files_below(base: Path) -> Iterator[Path]:
    """Images; hidden files and folders are passed over, links are followed."""
    for here, folders, files in os.walk(base, followlinks=True):
        real = Path(here).resolve()  # a link to one of the folders around it would never end
        folders[:] = [f for f in folders if not f.startswith(".") and not real.is_relative_to((real / f).resolve())]
        names = (name for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES))
        yield from (Path(here, name) for name in names)


def of_folder(path: str, labels_from: str | None) -> str | None:
    """The class that a relative path says."""
    folders = path.split("/")[:-1]
    return None if labels_from is None or not folders else folders[0 if labels_from == "first_folder" else -1]


# ---- lists ----


def lists(folder: Path) -> Found:
    names = [split for split in SPLITS if (folder / f"{split}.txt").is_file()]
    return {split: list(entries((folder / f"{split}.txt").read_text())) for split in names}


def entries(text: str) -> Iterator[tuple[str, Label]]:
    """(path, label or None) of each line. A line that ends like an image's name is a path alone, spaces and all."""
    for line in filter(None, map(str.strip, text.splitlines())):
        path, label = line, ""
        if not line.lower().endswith(SUFFIXES):
            path, _, label = line.rpartition(",") if "," in line else line.rpartition(" ")
        yield path.strip(), as_label(label)


def as_label(text: str) -> Label:
    """A whole number is the number of a class, other text its name, and nothing is no label."""
    text = text.strip()
    return int(text) if text.removeprefix("-").isdecimal() else text or None


def check_that_all_are_there(source, found: Found, folder: Path) -> None:
    """Raises ValueError for lists in `folder` that name what `source` does not hold."""
    for split, images in found.items():
        missing = [path for path, _ in images if not source.holds(path)]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(
                f"{folder / split}.txt names images that are not in {source.root}: {', '.join(missing[:5])}{more}. Put "
                "them there, or remove the lists to draw anew"
            )
