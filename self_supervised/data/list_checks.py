"""Lists of splits that were written earlier, compared with the images that are there now."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from self_supervised import distributed
from self_supervised.data.class_labels import Label, composed
from self_supervised.data.file_search import PassedOver, files_below, image_suffixes, log_once
from self_supervised.data.folders import ImageFolder, listed_in
from self_supervised.program import in_one_line

Numbered = dict[str, list[tuple[str, int]]]  # split -> (path below the root, class number or -1) of its images
compared_lists: set[str] = set()  # lists and data sets that this process has compared
MOST_CORRECTED = 0.1  # of the labels of a data set; if more are others, they belong to other images


def compare_with_lists(
    source: Any, lists: Path, images_of: Numbered, names: list[str], is_wanted: Callable[[str], bool]
) -> None:
    """Log how many images of a source are in none of the lists.

    Args:
        source: ImageFolder, TarShards or ArrowImages.
        names: of the classes, by number, as the source has them; []: it has others.
        is_wanted: whether the patterns select a path.

    Raises:
        ValueError: rows or members of a stored data set have other labels than in the lists.
    """
    if isinstance(source, ImageFolder):
        found: Iterable[str] = files_below(source.root, image_suffixes(), PassedOver())
    else:  # another data set has the same rows, and perhaps the same members
        state = getattr(source, "hashes", None) or source.signatures
        key = repr((lists, [file.stat().st_mtime_ns for _, file in listed_in(lists)], names, state))
        if key in compared_lists:  # each data set of a run asks again
            return
        found = dict(image for images in source.find().values() for image in images)
        name_of = {label: class_name_in(source, label) for label in {*found.values()} - {None}}
        stored = {path: name_of[label] for path, label in found.items() if label is not None}
        refuse_other_labels(source.root, lists, images_of, names, stored)
        compared_lists.add(key)
    if distributed.rank() == 0:
        report_unlisted(source.root, lists, images_of, filter(is_wanted, found))


def class_name_in(source: Any, label: Label) -> str:
    """Return the name of a class. The column of an Arrow data set may have names for its numbers."""
    name = str(composed(label))
    of_numbers = [] if getattr(source, "names", False) else getattr(source, "classes", None) or []
    return of_numbers[int(name)] if name.isdecimal() and int(name) < len(of_numbers) else name


def refuse_other_labels(root: Path, lists: Path, images_of: Numbered, names: list[str], stored: dict[str, str]) -> None:
    """Raise ValueError if more than MOST_CORRECTED of the listed labels differ from those in the data set, the names of
    classes `stored` by path. If fewer do, log how many."""
    every = [(path, number) for images in images_of.values() for path, number in images if path in stored]
    pairs = [(path, names[number], stored[path]) for path, number in every if 0 <= number < len(names)]
    others = [pair for pair in pairs if pair[1] != pair[2]]
    if not others:
        return
    path, listed, now = map(in_one_line, others[0])
    text = (
        f"{root}: {len(others):,} of {len(pairs):,} images have other labels than in the lists in {lists}, such as "
        f"{path}: {listed} there, now {now}. "
    )
    if len(others) > MOST_CORRECTED * len(pairs):
        raise ValueError(
            f"{text}These are probably other images. To train on them, start another run (another --out); to evaluate "
            "on them, pass --splits_path none (Python: None)."
        )
    log_once(f"{text}Those in the lists are used")


def report_unlisted(root: Path, lists: Path, images_of: Numbered, found: Iterable[str]) -> None:
    """Log how many of the images found in `root` are in none of the lists, such as those that were added since the
    lists were written. Lists of the user in `root` may leave out images on purpose."""
    if listed_in(root):
        return
    listed = {path for images in images_of.values() for path, _ in images}
    if new := sorted(path for path in found if path not in listed):
        log_once(
            f"{root}: {len(new):,} images are in none of the lists in {lists} and are not used, such as "
            f"{in_one_line(new[0])}. To train on them, start another run, or add lines PATH,CLASS_NUMBER (-1: no "
            "label) to train.txt there. To evaluate on other images than those of the pretraining, pass --splits_path "
            "none (Python: None)."
        )
