"""What results depend on, as hashes: the features of an encoder, and the images that an evaluation sees."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from torch.utils.data import Dataset

from model_params import EncoderAndDataParams
from self_supervised.catalogue import ViewSettings
from self_supervised.data import data_sets, subsets
from self_supervised.data.file_search import data_path
from self_supervised.data.packed import PackedImages
from self_supervised.fields import plain
from self_supervised.networks.encoder_hash import encoder_hash
from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.setting_groups import CUSTOM_DATA, NOT_OF_FEATURES, NOT_OF_PROTOCOLS, PATH_FIELDS, VIDEO

ADDED_TO_VIEWS = ("vertical_flip_probability", "rotation_probability")
HASHED_AT_ONCE = 2**14  # images


# ---- features: the names of the cache's directories ----


def fingerprint(encoder: Encoder, params: EncoderAndDataParams, dataset: Dataset, extracted: dict) -> str:
    """Return a hash of everything that the features depend on."""
    digest = hashlib.sha256(repr((encoder_hash(encoder), settings_for_features(params), extracted)).encode())
    for piece in contents(dataset):
        digest.update(piece)
    return digest.hexdigest()[:32]


def settings_for_features(params: EncoderAndDataParams) -> dict[str, Any]:
    """Return all settings that may change the encoder's input."""
    names = dict.fromkeys([*VIDEO, *CUSTOM_DATA, *(field.name for field in attrs.fields(type(params)))])
    names = [name for name in names if name not in NOT_OF_FEATURES]  # this order is hashed, too
    resolved = {"size": params.crop_size, "channels": params.channels, "mean": params.mean, "std": params.std}
    reads_image_files = not params.dataset.is_packed and not (
        params.dataset.of_videos and params.video_decoder == "file"
    )
    if params.exif_orientation and reads_image_files:  # earlier keys are of images that were not turned upright
        resolved["exif_orientation"] = True
    return {name: getattr(params, name) for name in names} | resolved


def contents(dataset: Dataset, root: str | Path | None = None) -> Iterator[bytes | np.ndarray]:
    """Yield what identifies the images: pixels and labels of a packed set; path, signature and label of each file; with
    `root`, their directory, only what copies of files share: path below it, and label.
    """
    if isinstance(dataset, PackedImages):
        for images in dataset.images:
            yield repr(images.shape).encode()
            for i in range(0, len(images), HASHED_AT_ONCE):
                yield np.ascontiguousarray(images[i : i + HASHED_AT_ONCE])
        yield dataset.labels
        return
    for path, signature, label in dataset.signatures():
        path, base = os.path.abspath(path), os.path.abspath(root or data_path())
        below = os.path.relpath(path, base) if path.startswith(f"{base}/") else path  # whatever the current directory
        yield repr((below, label) if root else (below, *signature, label)).encode()


def view_settings(view: ViewSettings) -> dict[str, Any]:
    """Return the settings of a view, without later ones that have no effect: they would change earlier hashes."""
    return {k: v for k, v in attrs.asdict(view).items() if v or k not in ADDED_TO_VIEWS}


# ---- runs: part of their keys in results.json ----


def seen(params: EncoderAndDataParams) -> dict[str, Any]:
    """Return what decides which images, or clips of videos, are seen; {} for packed data sets, which are fixed.

    Instead of `data_path` and `splits_path`, the listed images are hashed: a path has several spellings, and each run
    has its own copy of the same lists. Of built-in data sets, only names and labels are, which copies share.
    """
    info = params.dataset
    names = VIDEO if info.of_videos else CUSTOM_DATA if info.is_custom else ()
    unused = (*NOT_OF_PROTOCOLS, *PATH_FIELDS)
    settings = {name: plain(getattr(params, name)) for name in names if name not in unused}
    if info.is_packed:
        return settings
    if not params.exif_orientation:  # as in checkpoints of earlier versions
        settings["exif_orientation"] = False
    digest = hashlib.sha256()
    root = None if info.is_custom else params.video_path_prefix or data_path()
    for splits, dataset in training_and_test(params):
        for piece in (repr(splits).encode(), *contents(dataset, root)):
            digest.update(piece)
    return settings | {"images": digest.hexdigest()[:16]}


def training_and_test(params: EncoderAndDataParams) -> list[tuple[tuple[str, ...], Dataset]]:
    """Return (splits, data set) of the training and test images. Only label-free protocols run without test images."""
    info = params.dataset
    found = [(info.train_splits, data_sets.get_dataset(params, info.train_splits))]
    with suppress(subsets.EmptySplit):
        found.append((info.test_splits, data_sets.get_dataset(params, info.test_splits)))
    return found
