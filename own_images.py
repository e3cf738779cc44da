"""Images of one's own in a folder: which there are, their labels, and who is in train, val and test.

The first of these that the folder holds:
1. train.txt, and val.txt, test.txt if there are: a relative path in each line, and behind a comma or a space the
   label, if wanted; without one the folder says it.
2. folders train, and val, test if there are, with class folders or images in them.
3. class folders, or images, directly.
Where there is neither val nor test, both are drawn from train, the same share of every class.
"""

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

import ddp
import subsets
from array_files import ARRAY_SUFFIX
from augmentations import View
from files import Sample
from image_files import ImageFiles
from whole_files import write_whole

if TYPE_CHECKING:
    from model_params import EncoderAndDataParams

SUFFIXES = (*IMG_EXTENSIONS, ARRAY_SUFFIX)
FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # split -> its folder's names
INSTEAD = {"val": "test", "test": "val"}  # where the one has no images
Label = str | int | None  # name or number of a class
Found = dict[str, list[tuple[str, Label]]]  # split -> (path below the root, label)


def get_images(folder: Path, params: "EncoderAndDataParams", split: str, views: list[View]) -> ImageFiles:
    """The images of a split: of `data_path`, or of the data set's name below `folder`."""
    root = Path(params.data_path).expanduser() if params.data_path else folder / params.dataset_name
    skip, find = params.unreadable_images == "skip", partial(samples, params=params, split=split)
    size, seed = params.crop_size, params.seed or 0
    return ImageFiles(root, params.channels, size, views, seed, skip, find, params.pixel_range)


def samples(root: Path, params: "EncoderAndDataParams", split: str) -> list[Sample]:
    """(path, class) of the images of a split, -1 where there are no labels. Without images for val it is test, and the
    other way round; of train it is `data_fraction`.

    Raises:
        ValueError: there are no images, or what the lists name is not there. Names the path.
    """
    found = splits(root, params)
    chosen = found.get(split) or found.get(INSTEAD.get(split, ""))
    if not chosen:
        raise ValueError(f"{root} has no images for {split}: set val_size or test_size above 0, or evaluations=[]")
    if split == "train" and params.data_fraction < 1:
        labels = as_classes([label for _, label in chosen])
        chosen = [chosen[i] for i in subsets.stratified(labels, fraction=params.data_fraction, seed=params.data_seed)]
    return [(str(root / path), label) for path, label in chosen]


def splits(root: Path, params: "EncoderAndDataParams") -> dict[str, list[tuple[str, int]]]:
    """split -> (path below the root, class). Written into `splits_path`, and taken from there if they are there."""
    kept = Path(params.splits_path).expanduser() if params.splits_path else None
    if kept and (kept / "train.txt").is_file():
        found = lists(kept)
        check_that_all_are_there(root, found, kept)
        return {split: [(path, int(label)) for path, label in images] for split, images in found.items()}
    found = numbered(find(root, params), params.class_to_idx)
    if not found.get("val") and not found.get("test"):
        found = drawn(found["train"], params.val_size, params.test_size, params.data_seed)
    if kept and ddp.rank() == 0:
        write(kept, found)
    return found


# ---- what is there ----


def find(root: Path, params: "EncoderAndDataParams") -> Found:
    """Raises ValueError if there are no images, or labels of some only."""
    if not root.is_dir():
        raise ValueError(f"data_path={str(root)!r} is no folder: give that of your images, or set DATA_PATH")
    if (root / "train.txt").is_file():
        found = lists(root)
        check_that_all_are_there(root, found, root)
        by_folder = {
            split: [(path, of_folder(path, params.labels_from)) for path, _ in found[split]] for split in found
        }
        listed = {split: any(label is not None for _, label in found[split]) for split in found}
        found = {split: found[split] if listed[split] else by_folder[split] for split in found}
    elif (root / "train").is_dir():
        there = {split: [root / name for name in names if (root / name).is_dir()] for split, names in FOLDERS.items()}
        found = {s: below(folders[0], root, params.labels_from) for s, folders in there.items() if folders}
    else:
        found = {"train": below(root, root, params.labels_from)}
    wanted = {split: [one for one in images if is_wanted(one[0], params)] for split, images in found.items()}
    if not wanted["train"]:
        n = len(found["train"])
        patterns = f", of which include_patterns={params.include_patterns}, exclude_patterns={params.exclude_patterns} "
        raise ValueError(f"{root} holds {n} images for training{patterns + 'leave none' if n else ''}: choose another")
    for split, images in wanted.items():
        bare = [path for path, label in images if label is None]
        if 0 < len(bare) < len(images):
            raise ValueError(
                f"{len(bare)} of the {len(images)} images for {split} in {root} have no label, such as {bare[0]}: move "
                "them into a class folder, or away, or set labels_from=None to use none"
            )
    return wanted


def below(base: Path, root: Path, labels_from: str | None) -> list[tuple[str, Label]]:
    """Images anywhere below `base`, sorted by path; hidden files and folders are passed over, links are followed."""
    found = []
    for here, folders, files in os.walk(base, followlinks=True):
        real = Path(here).resolve()  # a link to one of the folders around it would never end
        folders[:] = [f for f in folders if not f.startswith(".") and not real.is_relative_to((real / f).resolve())]
        names = (name for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES))
        found += [Path(here, name) for name in names]
    paths = sorted(path.relative_to(base).as_posix() for path in found)
    prefix = base.relative_to(root)
    return [((prefix / path).as_posix(), of_folder(path, labels_from)) for path in paths]


def of_folder(path: str, labels_from: str | None) -> str | None:
    """The class that a relative path says."""
    folders = path.split("/")[:-1]
    return None if labels_from is None or not folders else folders[0 if labels_from == "first_folder" else -1]


def is_wanted(path: str, params: "EncoderAndDataParams") -> bool:
    """A pattern without a slash is for the file's name, one with a slash for its path; `*` is any text, slashes too."""

    def matches(pattern: str) -> bool:
        return fnmatchcase(path if "/" in pattern else path.rsplit("/", 1)[-1], pattern)

    included = not params.include_patterns or any(map(matches, params.include_patterns))
    return included and not any(map(matches, params.exclude_patterns))


# ---- lists ----


def lists(folder: Path) -> Found:
    names = [split for split in FOLDERS if (folder / f"{split}.txt").is_file()]
    return {split: list(entries((folder / f"{split}.txt").read_text())) for split in names}


def entries(text: str) -> Iterator[tuple[str, Label]]:
    """(path, label or None) of each line. A line that ends like an image's name is a path alone, spaces and all."""
    for line in filter(None, map(str.strip, text.splitlines())):
        path, label = line, ""
        if not line.lower().endswith(SUFFIXES):
            path, _, label = line.rpartition(",") if "," in line else line.rpartition(" ")
        whole = label.strip().removeprefix("-").isdecimal()
        yield path.strip(), int(label) if whole else label.strip() or None


def check_that_all_are_there(root: Path, found: Found, folder: Path) -> None:
    for split, images in found.items():
        missing = [path for path, _ in images if not (root / path).is_file()]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(
                f"{folder / split}.txt names images that are not in {root}: {', '.join(missing[:5])}{more}. Put them "
                "there, or remove the lists to draw anew"
            )


def write(folder: Path, found: dict[str, list[tuple[str, int]]]) -> None:
    """train.txt comes last: who sees it finds them all."""
    for split in ("val", "test", "train"):
        lines = "".join(f"{image},{label}\n" for image, label in found.get(split, []))
        write_whole(folder / f"{split}.txt", lines)


# ---- classes and splits ----


def numbered(found: Found, class_to_idx: list[str] | None) -> dict[str, list[tuple[str, int]]]:
    """Labels as numbers: their own, or those of `class_to_idx`, or by the alphabetical order of all; -1 for none."""
    names = {label for images in found.values() for _, label in images} - {None}
    if class_to_idx is not None:
        numbers = {name: int(number) for name, _, number in (entry.rpartition("=") for entry in class_to_idx)}
        known = {name: numbers.get(str(name), -1) for name in names}
        unknown = sorted(str(name) for name in names if known[name] < 0)
        if unknown:
            raise ValueError(f"class_to_idx has no number for {', '.join(unknown)}: add it, or set exclude_patterns")
    elif all(isinstance(name, int) for name in names):
        known = {name: name for name in names}
    else:
        known = {name: number for number, name in enumerate(sorted(names, key=str))}
    known[None] = -1
    return {split: [(path, known[label]) for path, label in images] for split, images in found.items()}


def as_classes(labels: list[int]) -> np.ndarray:
    """For drawing: images without labels are one class."""
    return np.zeros(len(labels), np.int64) if max(labels) < 0 else np.array(labels)


def drawn(images: list[tuple[str, int]], val_size: float, test_size: float, seed: int) -> dict:
    """train, val and test: a share of every class each, at least one image if it is not 0, but never the last one."""
    rest, found = np.arange(len(images)), {}
    for split, size in (("test", test_size), ("val", val_size / (1 - test_size))):
        if size > 0:
            fit, score = subsets.held_out(as_classes([images[i][1] for i in rest]), size, seed)
            rest, found[split] = rest[fit], [images[i] for i in rest[score]]
    return {"train": [images[i] for i in rest], **found}
