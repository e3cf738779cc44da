"""PASCAL VOC 2007, as its archives unpack: `$DATA_PATH/voc07/VOCdevkit/VOC2007/` with JPEGImages and ImageSets/Main."""

from pathlib import Path

import numpy as np

from file_search import PassedOver, tell

CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]


def lists(split: Path) -> list[Path]:
    """Of `$DATA_PATH/voc07/trainval` (a name, no folder) the files with the labels of each class."""
    main = split.parent / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    return [main / f"{name}_{split.name}.txt" for name in CLASSES]


def is_there(split: Path) -> bool:
    return all(path.is_file() for path in lists(split))


def samples(split: Path) -> list[tuple[str, np.ndarray]]:
    """Images, and of each class whether it is there: 1, not: -1, or only in a way that is hard to see: 0.

    Raises:
        ValueError: the lists of the classes are not of the same images, or hold something else.
    """
    names = None
    columns = []
    for path in lists(split):
        rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
        if not rows or any(len(row) != 2 or row[1] not in ("-1", "0", "1") for row in rows):
            raise ValueError(f"{path} must hold the name of an image and -1, 0 or 1 in each line")
        names = names or [name for name, _ in rows]
        if names != [name for name, _ in rows]:
            raise ValueError(f"{path} lists other images than {lists(split)[0].name}")
        columns.append([int(label) for _, label in rows])
    images = split.parent / "VOCdevkit" / "VOC2007" / "JPEGImages"
    tell(lists(split)[0].parent, len(names), f"images of {split.name}", PassedOver())
    return [(str(images / f"{name}.jpg"), row) for name, row in zip(names, np.array(columns).T, strict=True)]
