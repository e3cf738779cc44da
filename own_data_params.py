"""Settings of data sets of one's own: where the images are, which of them are used and how they are read."""

import json
import math
import re
from pathlib import Path
from typing import Any

from attrs import field, fields, frozen

from fields import choice, non_negative, number, path, plain


def class_numbers(value: Any) -> Any:
    """{"cat": 0}, the path of a JSON file with such an object, or ["cat=0"] -> ["cat=0"], which a checkpoint can hold.

    Raises:
        ValueError: it is none of them.
    """
    value = [value] if isinstance(value, str | Path) else value
    if isinstance(value, list | tuple) and len(value) == 1 and not re.search(r"=-?\d+$", str(value[0])):
        try:
            file = Path(str(value[0])).expanduser()
            if not file.is_file():  # a device or a pipe may never end
                raise OSError("it is not a regular file")
            value = json.loads(file.read_text())
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: there is no home of ~somebody
            raise ValueError(f"class_to_idx={str(value[0])!r} could not be read as a file of JSON: {error}") from error
    if isinstance(value, dict):
        value = [f"{name}={number}" for name, number in value.items()]
    return plain(value)


def is_range(value: Any) -> bool:
    """Two finite numbers, the first below the second."""
    numbers = isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
    return numbers and -math.inf < value[0] < value[1] < math.inf


@frozen(kw_only=True, slots=False)  # as ViewParams
class OwnDataParams:
    """Settings of `dataset_name="folder"`; docs/own_data.md shows layouts and examples.

    Fields that other data sets have no use for are refused there.
    """

    # images of one's own
    data_path: str | None = path()  # a folder, or shards/train-{000..099}.tar; None: $DATA_PATH/<dataset_name>
    image_key: str | None = None  # column of a Hugging Face set, or endings in shards: "jpg;png"; None: any image
    label_key: str | None = None  # likewise, or entry of the .json in shards; None: label, cls
    include_patterns: list[str] = field(factory=list)  # "*.png", "cats/*": only paths, or file names, like one of them
    exclude_patterns: list[str] = field(factory=list)  # and like none of these: "*_mask.png", "*/thumbnails/*"
    labels_from: str | None = choice("first_folder", ("first_folder", "last_folder", None))  # of a path; None: none
    class_to_idx: list[str] | None = field(default=None, converter=class_numbers)  # dict, JSON file or ["cat=0"]
    val_size: float = number(0.1, at_most=0.9)  # share of every class, where the data has no val and no test
    test_size: float = number(0.1, at_most=0.9)  # likewise
    data_fraction: float = number(1.0, above=0, by=1e-9, at_most=1)  # of every class of the training images
    data_seed: int = non_negative(0, at_most=2**63 - 1)  # draws the splits and the fraction, whatever `seed` is
    splits_path: str | None = path()  # folder of the lists train.txt, val.txt, test.txt: written once, then reused
    # what is black and white in .npy, TIFF and other 16-bit files; None: that of their type
    pixel_range: list[float] | None = field(default=None, converter=plain)

    def _contradictions_of_own_data(self) -> list[tuple[bool, str]]:
        """(whether a field is wrong, how, and the way out)"""
        p, name_and_number = self, [entry.rpartition("=") for entry in self.class_to_idx or []]
        wrong_range = p.pixel_range is not None and not is_range(p.pixel_range)
        # fmt: off
        return [
            (p.val_size + p.test_size > 0.95,
             f"val_size={p.val_size} and test_size={p.test_size} leave too little to train on: choose smaller ones"),
            (wrong_range,
             f"pixel_range={p.pixel_range} must be two finite numbers: the value of black, and that of white"),
            (not all(name and number.isdecimal() for name, _, number in name_and_number),
             f"class_to_idx={p.class_to_idx} must give each class a whole number: {{'cat': 0, 'dog': 1}}"),
        ]
        # fmt: on

    def check_own_data(self, is_own: bool, dataset_name: str) -> None:
        """Raises ValueError for what is wrong, or set for a data set that has no use for it."""
        for message in (message for is_wrong, message in self._contradictions_of_own_data() if is_wrong):
            raise ValueError(message)
        for attribute in () if is_own else fields(OwnDataParams):
            value, default = getattr(self, attribute.name), DEFAULTS[attribute.name]
            if value != default:
                raise ValueError(
                    f"{attribute.name}={value!r} is for data of your own, not for dataset_name={dataset_name!r}: leave "
                    "it out, or set dataset_name='folder'"
                )


DEFAULTS = {attribute.name: getattr(OwnDataParams(), attribute.name) for attribute in fields(OwnDataParams)}
