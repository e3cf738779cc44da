"""Batches of images by path, and the options of the programs that read them: `embed` and `classify`."""

import argparse
import os
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model_params import EncoderAndDataParams
from self_supervised.data import video_files
from self_supervised.data.custom import is_selected, refuse_lost_patterns
from self_supervised.data.image_files import central_square, part_kept
from self_supervised.data.packed import already_a_batch
from self_supervised.data.shard_urls import UnreachableShard
from self_supervised.embeddings.sources import ImageSource
from self_supervised.runs.command_line import DEVICE, LAGGING, add_fields
from self_supervised.setting_groups import COLUMNS, EMBED_OPTIONS, PATTERNS

MOST_EMBED_WORKERS = 8


def parted(overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the settings of the encoder, those of COLUMNS, and those of PATTERNS, among those that were passed."""
    columns, patterns = (
        {name: overrides[name] for name in names if name in overrides} for names in (COLUMNS, PATTERNS)
    )
    of_encoder = {name: value for name, value in overrides.items() if name not in columns | patterns}
    return of_encoder, columns, patterns


def refuse_without_effect(columns: dict[str, Any], source: ImageSource) -> None:
    if unused := [name for name in columns if name not in getattr(source, "columns", {})]:
        others = "a directory, shards" if "labels_from" in unused else "shards"
        raise ValueError(
            f"{', '.join(unused)}: no effect, because {source.name} is neither {others} nor a Hugging Face data set. "
            "Leave it out."
        )


def selected_paths(source: ImageSource, params: EncoderAndDataParams, patterns: dict[str, Any]) -> list[str]:
    """Return the paths that the patterns select, by default those of the encoder's pretraining.

    Raises:
        ValueError: there are none; `patterns` has one that matches none, is no list of strings, or the images are rows
            of a packed or a Hugging Face data set, which have no names; or see `paths` of the source.
    """
    paths = source.paths()
    if any(patterns.values()) and not source.has_file_names:
        raise ValueError(f"{', '.join(patterns)}: images in {source.name} have no names to match. Leave it out.")
    passed = EncoderAndDataParams(dataset_name="folder", **{name: globs or [] for name, globs in patterns.items()})
    refuse_lost_patterns({name: getattr(passed, name) for name in patterns}, paths, source.name)
    globs = {name: getattr(passed if name in patterns else params, name) for name in PATTERNS}
    if not source.has_file_names or not any(globs.values()):
        return paths
    selected = [path for path in paths if is_selected(path, *globs.values())]
    given = ", ".join(f"{name}={values}" for name, values in globs.items() if values)
    if not selected:
        raise ValueError(
            f"{given}: none of the {len(paths):,} {source.kind}s in {source.name}, such as {paths[0]}, is selected. "
            "Pass other patterns, or none."
        )
    if left_out := sorted(set(paths).difference(selected)):
        source.passed_over.add(f"by {given}", left_out[0], len(left_out))
    return selected


class Batches(Dataset):
    """Batches by path: paths -> (readable paths, images uint8 [n, C, size, size] or clips of videos, {unreadable path:
    reason}).

    If the sampler is a list of paths, PyTorch's loader calls `__getitems__` with the paths of a batch.
    """

    def __init__(self, source: ImageSource, params: EncoderAndDataParams):
        self.source = source
        self.params = params
        self.videos = None
        if params.dataset.of_videos:
            self.videos = video_files.dataset_of_videos(attrs.evolve(params, video_decoder="file"), [], [])

    def prepared(self, path: str) -> Tensor:
        """Return the central square of an image [C, size, size], or the evaluation clips of a video, as uint8."""
        if self.videos is not None:
            return self.videos.even_clips(str(self.source.root / path))
        return central_square(self.source.image(path, self.params), self.params.crop_size, part_kept(self.params))

    def __getitems__(self, paths: list[str]) -> tuple[list[str], Tensor | None, dict[str, str]]:
        images, unreadable = {}, {}
        for path in paths:
            try:
                images[path] = self.prepared(path)
            except UnreachableShard:  # as in LabeledFiles
                raise
            except Exception as error:  # Pillow raises many kinds of errors on corrupt files
                unreadable[path] = f"{type(error).__name__}: {error}"
        return list(images), torch.stack(list(images.values())) if images else None, unreadable


def batches_of(
    source: ImageSource, params: EncoderAndDataParams, paths: list[str], batch_size: int, num_workers: int | None
) -> DataLoader:
    """Return a loader of what `Batches` returns for the paths. A batch of videos holds at most `batch_size` clips.

    Args:
        num_workers: processes that decode images; None: one per core, at most MOST_EMBED_WORKERS.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    workers = min(os.cpu_count() or 1, MOST_EMBED_WORKERS) if num_workers is None else num_workers
    batch_size = max(1, batch_size // params.clips_of_a_video)
    return DataLoader(
        Batches(source, params),
        batch_size=batch_size,
        sampler=paths,
        num_workers=min(workers, len(paths) // batch_size),  # at least one full batch per worker
        collate_fn=already_a_batch,
        pin_memory=torch.cuda.is_available(),
    )


def add_embedding_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of programs that embed images: of the loader, and settings of the encoder."""
    parser.add_argument(
        "--batch_size", type=int, default=128, metavar="N", help="images, or clips, per batch (default: 128)"
    )
    parser.add_argument(
        "--num_data_workers",
        "--num_workers",
        type=int,
        metavar="N",
        dest="num_workers",
        help=f"processes that decode files; default: one per core, at most {MOST_EMBED_WORKERS}",
    )
    parser.add_argument("--device", default="auto", help=DEVICE)
    parser.add_argument("--lagging", action="store_true", default=argparse.SUPPRESS, help=LAGGING)
    fields = parser.add_argument_group("settings that the checkpoint lacks, or has wrong (see docs/options.md)")
    add_fields(fields, EMBED_OPTIONS)
