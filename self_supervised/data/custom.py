"""Custom data sets: where the images are (folders.py, tar_shards.py, arrow.py), which are used, and in which split.

If there is neither a val nor a test split, both are drawn from train, with the same fraction of every class. Splits can
be kept as lists in `splits_path`.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.utilities import rank_zero_warn

from model_params import EncoderAndDataParams
from self_supervised import distributed
from self_supervised.catalogue import ViewSettings
from self_supervised.data import arrow, subsets
from self_supervised.data.arrow import ArrowImages
from self_supervised.data.class_labels import UNLABELED, class_names_of, class_numbers_of, first_names, labels_text
from self_supervised.data.file_search import PassedOver, log_counts, log_once
from self_supervised.data.files import Sample
from self_supervised.data.folders import (
    ImageFolder,
    ImageList,
    check_settings,
    labeled_lists,
    listed_in,
    read_lists,
    refuse_no_directory,
    settings_of_lists,
    write_lists,
)
from self_supervised.data.foreign_paths import ForeignPath, refuse_foreign
from self_supervised.data.image_files import ImageFiles
from self_supervised.data.list_checks import Numbered, class_name_in, compare_with_lists
from self_supervised.data.shard_names import is_pattern, shards_are_there
from self_supervised.data.tar_shards import TarShards
from self_supervised.fields import as_path
from self_supervised.folder_lock import locked
from self_supervised.safe_files import local_path
from self_supervised.setting_groups import CUSTOM_DATA, NOT_IN_LISTS, PATTERNS

CustomSource = ImageFolder | TarShards | ArrowImages
MOST_CLASSES = 10**6  # labels from this number on are ids or dates
CLASS_NAMES_KEY = "classes"  # key in folders.SETTINGS: names of the classes, in the order of their numbers
DRAWN_KEY = "drawn"  # likewise: whether val and test were drawn, or the images have splits of their own
NOT_CLASSES = "labels_from=None (--labels_from none) if these are not classes"
TEMPORARY = "unnamed-lists-"  # start of the name of a directory that is deleted soon, which no line names
WAIT_FOR_LISTS = 60  # seconds to wait for another process that writes lists
INSTEAD = {"val": "test", "test": "val"}  # split -> the one that replaces it if it has no images


def get_images(folder: Path, params: EncoderAndDataParams, split: str, views: list[ViewSettings]) -> ImageFiles:
    """Return the images of a split, from `data_path` or, by default, from `folder`/<dataset_name>."""
    refuse_foreign("data_path", params.data_path)
    p = params
    source = get_source(params, params.data_path or str(folder / params.dataset_name))
    samples_of, class_names = splits(source, params)
    skip = p.unreadable_images == "skip"
    samples = custom_samples(source.root, samples_of, params, split)
    seed = p.seed or 0
    reading = {"pixel_range": p.pixel_range, "source": source, "exif_orientation": p.exif_orientation}
    images = ImageFiles(source.root, samples, p.channels, p.crop_size, views, seed, skip, **reading)
    are_numbers = class_names == [str(i) for i in range(len(class_names))]
    has_others = p.class_to_idx or getattr(source, "classes", None)  # which class_labels.class_names would take
    images.class_names = [] if are_numbers and not has_others else class_names
    stored_in = "class_to_idx" if p.class_to_idx else "lists" if isinstance(source, ImageFolder) else "the data set"
    text = labels_text(samples_of, dict(enumerate(class_names)), str(p.labels_from).replace("_", " "), stored_in)
    images.about_labels = text if text == "none" else f"{text}; {NOT_CLASSES}"
    return images


def custom_samples(root: Path, samples_of: Numbered, params: EncoderAndDataParams, split: str) -> list[Sample]:
    """Return (path, class number or -1) of the images of a split.

    An empty val is replaced by test, and the other way round. Of train, only `data_fraction` is returned.

    Raises:
        subsets.EmptySplit: there are no images.
    """
    chosen = samples_of.get(split) or samples_of.get(INSTEAD.get(split, ""))
    if not chosen:
        remedy = "Set val_size or test_size above 0, or evaluations=[]."
        raise subsets.EmptySplit(f"{root} has no images for {split}. {remedy}")
    if split == "train" and params.data_fraction < 1:
        labels = as_classes([label for _, label in chosen])
        chosen = [chosen[i] for i in subsets.stratified(labels, fraction=params.data_fraction, seed=params.data_seed)]
    return [(str(root / path), label) for path, label in chosen]


def splits(source: CustomSource, params: EncoderAndDataParams) -> tuple[Numbered, list[str]]:
    """Return the images and class numbers of every split, and the names of the classes.

    They come from the lists in `splits_path`, which the user wrote or which were written when the splits were drawn;
    without lists, from `source`.

    Raises:
        ValueError: a listed image is missing, or a split has classes that train lacks.
    """
    kept = folder_of_lists(params)
    if has_written(params):
        samples_of, names = as_written(read_lists(kept, source), kept)
        if not kept.name.startswith(TEMPORARY):  # else whoever drew the splits has reported them
            report_lists(source, samples_of, f", by the lists in {kept}")
            patterns = params.include_patterns, params.exclude_patterns
            of_source = names if params.class_to_idx is None and params.labels_from else []
            compare_with_lists(source, kept, samples_of, of_source, lambda path: is_selected(path, *patterns))
        return samples_of, names
    by_hand = kept is not None and bool(listed_in(kept)) and settings_of_lists(kept) is None
    images = labeled_lists(kept, source) if by_hand else found_lists(source, params)
    chosen = wanted(images, source.root, params, source.passed_over)
    samples_of, names = with_numbers(chosen, params.class_to_idx, source.root)
    names = [class_name_in(source, name) for name in names]
    if are_drawn := not samples_of.get("val") and not samples_of.get("test"):
        samples_of = drawn(samples_of["train"], params.val_size, params.test_size, params.data_seed)
    if kept and not by_hand and distributed.rank() == 0:
        with locked(kept, wait=WAIT_FOR_LISTS):  # another process may draw splits, too, perhaps with other settings
            if not (written := has_written(params)):
                write_lists(kept, samples_of, {**list_settings(params), CLASS_NAMES_KEY: names, DRAWN_KEY: are_drawn})
        if written:  # reading needs no lock, and may take long
            return as_written(read_lists(kept, source), kept)
    report_lists(source, samples_of, f", by the lists in {kept}" if by_hand else "")
    return samples_of, names


def as_written(images_of: ImageList, folder: Path) -> tuple[Numbered, list[str]]:
    """Return the images and class numbers in lists that `splits` wrote to `folder`, and the names of the classes.

    Lists of earlier versions have no class names, and their numbers may have gaps. They are kept, since classifiers
    were trained on them, unless they are ids or dates, on which no classifier can have been trained.
    """
    names = (settings_of_lists(folder) or {}).get(CLASS_NAMES_KEY, [])
    labels = {split: {label for _, label in images} for split, images in images_of.items()}
    every = set().union(*labels.values()) - {None}
    if any(isinstance(label, str) or label >= MOST_CLASSES for label in every):
        return with_numbers(images_of, None, folder)
    class_numbers_of(labels.get("train", ()), labels, folder)  # raises for classes that train lacks
    in_numbers = {
        split: [(path, UNLABELED if label is None else label) for path, label in images]
        for split, images in images_of.items()
    }
    return in_numbers, names


def report_lists(source: CustomSource, samples_of: Numbered, how: str) -> None:
    """Log how many images there are, what was passed over in the search for them, and which split stands for one that
    is missing."""
    log_counts(source.root, sum(map(len, samples_of.values())), f"images{how}", source.passed_over)
    for split, other in INSTEAD.items():
        if samples_of.get(other) and not samples_of.get(split):
            log_once(f"{source.root}: no images for {split}; those for {other} are used instead")


# ---- lists in splits_path ----


def folder_of_lists(params: EncoderAndDataParams) -> Path | None:
    """Return the directory of the lists, which may not exist yet; None if no lists are kept.

    Raises:
        ValueError: `splits_path` is a file, or comes from a checkpoint and was not requested.
    """
    if params.splits_path is None:
        return None
    folder = local_path("splits_path", params.splits_path)
    if isinstance(params.splits_path, ForeignPath) and not folder.exists():
        rank_zero_warn(
            f"splits_path={str(folder)!r}: the checkpoint names these lists, but they do not exist. val and test are "
            "drawn again and not written; if images were added or removed, they differ from those of the checkpoint. "
            "Pass splits_path if you have the lists."
        )
        return None
    refuse_foreign("splits_path", params.splits_path)
    if any(path.is_file() for path in (folder, *folder.parents)):
        raise ValueError(f"splits_path={params.splits_path!r} is a file. Pass the directory for the lists.")
    return folder


def has_written(params: EncoderAndDataParams) -> bool:
    """Return whether `splits_path` has lists that `splits` wrote.

    Raises:
        ValueError: they were written with other settings.
    """
    folder = folder_of_lists(params)
    if folder is None or "train" not in dict(listed_in(folder)) or (made_by := settings_of_lists(folder)) is None:
        return False
    check_settings(folder, made_by, list_settings(params))
    return True


def list_settings(params: EncoderAndDataParams) -> dict[str, Any]:
    """Return the settings that decide which images are in the lists, and their labels."""
    names = [name for name in CUSTOM_DATA if name not in NOT_IN_LISTS]
    return {name: getattr(params, name) for name in names}


# ---- sources and patterns ----


def get_source(params: EncoderAndDataParams, root: str, names: bool = False) -> CustomSource:
    """Return the source of the images in `root`: a directory of image files, tar shards, or Arrow files.

    Args:
        names: take class names as labels, not class numbers, if an Arrow column has both.

    Raises:
        ValueError: a setting does not apply to this kind of source.
    """
    p = params
    folder = as_path(root)
    if arrow.arrow_is_there(folder):
        if p.include_patterns or p.exclude_patterns:
            raise ValueError(
                f"include_patterns={p.include_patterns}, exclude_patterns={p.exclude_patterns}: patterns match file "
                f"names, which the rows of {folder} do not have. Use `Dataset.filter`, and save the data set again."
            )
        names = names or p.class_to_idx is not None
        return ArrowImages(folder, p.image_key, p.label_key, p.labels_from is not None, names)
    if is_pattern(root) or shards_are_there(folder):
        kept = folder_of_lists(p)
        return TarShards(root, p.image_key, p.label_key, p.labels_from, kept and kept / "shards.json")
    if p.image_key or p.label_key:
        raise ValueError(
            f"image_key={p.image_key!r}, label_key={p.label_key!r}: {folder} holds neither a Hugging Face data set "
            "nor shards, to which these fields apply. Leave them out."
        )
    refuse_no_directory(folder, p.data_path)
    return ImageFolder(folder, p.labels_from)


def is_stored(root: str) -> bool:
    """Return whether the images are in shards or Arrow files, instead of in one file each."""
    folder = as_path(root)
    return arrow.arrow_is_there(folder) or is_pattern(root) or shards_are_there(folder)


def found_lists(source: CustomSource, params: EncoderAndDataParams) -> ImageList:
    """Return all images of `source`, by split.

    Raises:
        ValueError: a pattern matches none of them, or splits are directories inside of shards.
    """
    if isinstance(source, TarShards) and (inside := source.splits_inside()):
        raise ValueError(
            f"data_path={params.data_path or str(source.root)!r}: its shards hold the directories {', '.join(inside)}, "
            "and all images would be for training. Write a shard of each split (tar cf train.tar -C train .), or name "
            "the shard train.tar if these are not splits."
        )
    images_of = source.find()
    paths = [path for images in images_of.values() for path, _ in images]
    refuse_lost_patterns({name: getattr(params, name) for name in PATTERNS}, paths, source.root)
    return images_of


def refuse_lost_patterns(patterns: dict[str, list[str]], paths: list[str], where: object) -> None:
    """Raise ValueError for a pattern that matches none of the paths, if there are any."""
    for name, globs in patterns.items() if paths else ():
        for pattern in globs:
            if not any(matches(path, pattern) for path in paths):
                raise ValueError(
                    f"{name}={pattern!r} matches none of the {len(paths)} images in {where}, such as {paths[0]}. "
                    "Fix it (a pattern with a slash is compared with the whole path; case matters), or leave it out."
                )


def wanted(images_of: ImageList, root: Path, params: EncoderAndDataParams, passed_over: PassedOver) -> ImageList:
    """Return the images that the patterns select, without labels if labels_from=None.

    Raises:
        ValueError: there are no images for training, some are outside all splits, or only some of a split have labels.
    """
    chosen: ImageList = {split: [] for split in images_of}
    for split, images in images_of.items():
        for image in images:
            if is_selected(image[0], params.include_patterns, params.exclude_patterns):
                chosen[split].append(image)
            else:
                passed_over.add("by include_patterns and exclude_patterns", image[0])
    outside = chosen.pop("", [])
    if not chosen.get("train"):
        raise ValueError(f"{root} holds {without_training(images_of, params, passed_over)}")
    if outside:
        raise ValueError(
            f"{root} has {' and '.join(chosen)}, and {len(outside)} images outside them, such as {outside[0][0]}. "
            "Move them into a split, or exclude them with exclude_patterns. If a class has the name of a split, put "
            "all class folders into a directory train."
        )
    if params.labels_from is None:
        return {split: [(path, None) for path, _ in images] for split, images in chosen.items()}
    for split, images in chosen.items():
        bare = [path for path, label in images if label is None]
        if 0 < len(bare) < len(images):
            raise ValueError(
                f"{len(bare)} of the {len(images)} images for {split} in {root} have no label, such as {bare[0]}. Move "
                "them into a class folder or remove them, or set labels_from=None to use no labels."
            )
    return chosen


def without_training(images_of: ImageList, params: EncoderAndDataParams, passed_over: PassedOver) -> str:
    """Return the part of a message that says why there are no training images, and what to do."""
    n = len(images_of.get("train", []))
    others = [split for split, images in images_of.items() if split and images]
    if n:
        patterns = f"include_patterns={params.include_patterns}, exclude_patterns={params.exclude_patterns}"
        return f"{n} images for training, and {patterns} select none of them{passed_over}. Choose other patterns."
    if others:
        return (
            f"0 images for training, but some for {' and '.join(others)}{passed_over}. Name a directory or shards "
            "train; if these are classes, put all class folders into a directory train."
        )
    return f"0 images for training{passed_over}. Choose another data_path."


def is_selected(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether a path matches one of the patterns to include (if there are any), and none to exclude."""
    included = not include or any(matches(path, pattern) for pattern in include)
    return included and not any(matches(path, pattern) for pattern in exclude)


def matches(path: str, pattern: str) -> bool:
    """Return whether a path matches a glob pattern.

    A pattern without a slash is compared with the file's name, one with a slash with its path. `*` may match slashes.
    """
    return fnmatchcase(path if "/" in pattern else path.rsplit("/", 1)[-1], pattern)


# ---- classes and splits ----


def with_numbers(images_of: ImageList, class_to_idx: list[str] | None, where: object) -> tuple[Numbered, list[str]]:
    """Return images with class numbers (from 0 without gaps, -1 for no label), and the names of the classes.

    The order of the classes is that of `class_to_idx`; without it, the labels of train are sorted.

    Args:
        where: the directory or list, for the message.

    Raises:
        ValueError: val or test has classes that train lacks; or see `class_names_of`.
    """
    names = class_names_of({label for images in images_of.values() for _, label in images} - {None}, class_to_idx)
    of_split = {split: {names.get(label) for _, label in images} for split, images in images_of.items()}
    known = class_numbers_of(of_split.get("train", ()), of_split, where)
    if class_to_idx is not None:
        known = {name: number for number, name in enumerate(first_names(class_to_idx).values())}
    known = {None: UNLABELED, **known}
    in_numbers = {split: [(path, known[names.get(label)]) for path, label in images_of[split]] for split in images_of}
    return in_numbers, [str(name) for name in known if name is not None]


def as_classes(labels: list[int]) -> np.ndarray:
    """Return labels as an array for drawing; unlabeled images (-1) are a class, too."""
    return np.array(labels) - min(0, min(labels))


def drawn(images: list[tuple[str, int]], val_size: float, test_size: float, seed: int) -> Numbered:
    """Return images divided into train, val and test.

    Each of val and test is a fraction of every class: at least one image if the fraction is above 0, but never a
    class's last one.

    Raises:
        ValueError: no class has enough images.
    """
    rest = np.arange(len(images))
    held_out = {}
    for split, given, size in (("test", test_size, test_size), ("val", val_size, val_size / (1 - test_size))):
        if size > 0:
            classes = as_classes([images[i][1] for i in rest])
            if len(np.unique(classes)) == len(rest):
                raise ValueError(
                    f"{split}_size={given:g}: no class of the {len(images)} images has one left for {split} in "
                    f"addition to one for training. Set val_size=0 or test_size=0, add images, or set {NOT_CLASSES}."
                )
            fit, score = subsets.held_out(classes, size, seed)
            held_out[split] = [images[i] for i in rest[score]]
            rest = rest[fit]
    return {"train": [images[i] for i in rest], **held_out}
