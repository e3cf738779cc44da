"""Images of one's own: what holds them (image_folders.py, tar_shards.py, arrow_images.py), which of them are used, and
who is in train, val and test. Where there is neither val nor test, both are drawn from train, the same share of every
class.
"""

from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import arrow_images
import ddp
import subsets
import tar_shards
from arrow_images import ArrowImages
from augmentations import View
from files import Sample
from image_files import ImageFiles
from image_folders import Found, ImageFolder, check_that_all_are_there, lists
from shard_names import is_pattern
from tar_shards import TarShards
from whole_files import write_whole

if TYPE_CHECKING:
    from model_params import EncoderAndDataParams

Source = ImageFolder | TarShards | ArrowImages
INSTEAD = {"val": "test", "test": "val"}  # where the one has no images


def get_images(folder: Path, params: "EncoderAndDataParams", split: str, views: list[View]) -> ImageFiles:
    """The images of a split: of `data_path`, or of the data set's name below `folder`."""
    p, source = params, get_source(params, params.data_path or str(folder / params.dataset_name))
    skip, find = p.unreadable_images == "skip", partial(samples, source=source, params=p, split=split)
    return ImageFiles(source.root, p.channels, p.crop_size, views, p.seed or 0, skip, find, p.pixel_range, source)


def samples(root: Path, source: Source, params: "EncoderAndDataParams", split: str) -> list[Sample]:
    """(path, class) of the images of a split, -1 where there are no labels. Without images for val it is test, and the
    other way round; of train it is `data_fraction`.

    Raises:
        ValueError: there are no images, or what the lists name is not there. Names the path.
    """
    found = splits(source, params)
    chosen = found.get(split) or found.get(INSTEAD.get(split, ""))
    if not chosen:
        raise ValueError(f"{root} has no images for {split}: set val_size or test_size above 0, or evaluations=[]")
    if split == "train" and params.data_fraction < 1:
        labels = as_classes([label for _, label in chosen])
        chosen = [chosen[i] for i in subsets.stratified(labels, fraction=params.data_fraction, seed=params.data_seed)]
    return [(str(root / path), label) for path, label in chosen]


def splits(source: Source, params: "EncoderAndDataParams") -> dict[str, list[tuple[str, int]]]:
    """split -> (path below the root, class). Written into `splits_path`, and taken from there if they are there."""
    kept = Path(params.splits_path).expanduser() if params.splits_path else None
    if kept and (kept / "train.txt").is_file():
        found = lists(kept)
        check_that_all_are_there(source, found, kept)
        return {split: [(path, int(label)) for path, label in images] for split, images in found.items()}
    found = numbered(find(source, params), params.class_to_idx)
    if not found.get("val") and not found.get("test"):
        found = drawn(found["train"], params.val_size, params.test_size, params.data_seed)
    if kept and ddp.rank() == 0:
        write(kept, found)
    return found


# ---- what is there ----


def get_source(params: "EncoderAndDataParams", root: str, names: bool = False) -> Source:
    """What holds the images: files, shards of them, or Arrow files. `names`: of classes, where they have both."""
    p, folder = params, Path(root).expanduser()
    if arrow_images.is_there(folder):
        if p.include_patterns or p.exclude_patterns:
            raise ValueError(
                f"include_patterns={p.include_patterns}, exclude_patterns={p.exclude_patterns} are for names, which "
                f"rows of {folder} lack: use `filter` of datasets, and save the set again"
            )
        labelled, names = p.labels_from is not None, names or p.class_to_idx is not None
        return ArrowImages(folder, p.image_key, p.label_key, labelled, names)
    if is_pattern(root) or tar_shards.are_there(folder):
        index = Path(p.splits_path).expanduser() / "shards.json" if p.splits_path else None
        return TarShards(root, p.image_key, p.label_key, p.labels_from, index)
    if p.image_key or p.label_key:
        raise ValueError(
            f"image_key={p.image_key!r}, label_key={p.label_key!r} are for Hugging Face data sets and shards, which "
            f"{folder} does not hold: leave them out"
        )
    return ImageFolder(folder, p.labels_from)


def is_stored(root: str) -> bool:
    """Whether the images are not files of their own."""
    folder = Path(root).expanduser()
    return arrow_images.is_there(folder) or is_pattern(root) or tar_shards.are_there(folder)


def find(source: Source, params: "EncoderAndDataParams") -> Found:
    """Raises ValueError if there are no images, or labels of some only."""
    found, root = source.find(), source.root
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


def is_wanted(path: str, params: "EncoderAndDataParams") -> bool:
    """A pattern without a slash is for the file's name, one with a slash for its path; `*` is any text, slashes too."""

    def matches(pattern: str) -> bool:
        return fnmatchcase(path if "/" in pattern else path.rsplit("/", 1)[-1], pattern)

    included = not params.include_patterns or any(map(matches, params.include_patterns))
    return included and not any(map(matches, params.exclude_patterns))


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
        numbers = numbers_of(class_to_idx)
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


def numbers_of(class_to_idx: list[str]) -> dict[str, int]:
    """["cat=0", "dog=1"] -> name -> number."""
    return {name: int(number) for name, _, number in (entry.rpartition("=") for entry in class_to_idx)}


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
