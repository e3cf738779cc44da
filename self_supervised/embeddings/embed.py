"""Embed a directory of images or videos: a Parquet file with path, embedding and label of each.

    self-supervised embed runs/simclr photos/ --out features.parquet

If the command is interrupted, repeat it: it resumes and ends with the same file. If it is repeated later, it embeds the
images that were added since.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision

from self_supervised.data.image_files import preprocessing
from self_supervised.distributed import usable_device
from self_supervised.embeddings.batches import (
    add_embedding_options,
    batches_of,
    parted,
    refuse_without_effect,
    selected_paths,
)
from self_supervised.embeddings.job import EmbeddingJob
from self_supervised.embeddings.sources import ImageSource, Stored, as_absolute, open_source
from self_supervised.fields import as_path
from self_supervised.networks.encoder_hash import checkpoint_hash, encoder_hash
from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.networks.pretrained import encoder_of
from self_supervised.program import one_line_errors
from self_supervised.runs.command_line import CHECKPOINT, parser_of
from self_supervised.safe_files import check_file
from self_supervised.setting_groups import CLIPS


def embed(
    checkpoint: str | Path | Encoder,
    folder: str | Path,
    out: str | Path,
    *,
    batch_size: int = 128,
    num_workers: int | None = None,
    device: str = "auto",
    skip_unreadable: bool = False,
    overwrite: bool = False,
    **overrides: Any,
) -> Path:
    """Embed all images of a directory, or of a built-in data set by name. Return the path of the Parquet file `out`.

    The columns are path (relative to the directory, sorted), embedding (float32 [E]) and label (the directory that
    `labels_from` names; by default, the class folder if all images lie in class folders, else null). The encoder
    does not see the labels. An encoder of clips embeds the video files of the directory: each embedding is the mean
    over evaluation_clips x evaluation_crops clips.

    Args:
        num_workers: processes that decode images; None: one per core, at most MOST_EMBED_WORKERS (batches.py).
        device: "auto", "cpu", "cuda", ...
        skip_unreadable: count and list images that cannot be read instead of stopping at the first.
        overwrite: embed all images again, even if `out` was created with another checkpoint or directory.
        overrides: fields of EncoderAndDataParams that the checkpoint lacks, or has wrong.

    Raises:
        ValueError: there are no images; an image cannot be read; `out` has features of another checkpoint or directory.
    """
    out = as_path(out)
    check_file("out", out, ".parquet")
    device = usable_device(device)
    overrides, columns, patterns = parted(overrides)
    encoder = encoder_of(checkpoint, overrides)
    source = open_source(folder, encoder.params.dataset.kind, columns, encoder.params.image_key)
    refuse_without_effect(columns, source)
    with EmbeddingJob(out, description(encoder, source, overrides), overwrite) as work:
        paths = selected_paths(source, encoder.params, patterns)
        print(f"{source.name}: {len(paths):,} {source.kind}s{source.passed_over}")
        if todo := work.left(paths, skip_unreadable):
            loader = batches_of(source, encoder.params, todo, batch_size, num_workers)
            work.add(encoder.to(device), loader, len(paths), skip_unreadable)
        work.finish(paths, source)
    return out


def description(encoder: Encoder, source: ImageSource, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of the file: how the features are computed."""
    p = encoder.params
    file = Path(encoder.report.source)
    packages = {"torch": torch, "torchvision": torchvision, "pillow": PIL, "numpy": np}
    return {
        "checkpoint": os.path.abspath(file) if file.is_file() else encoder.report.source,
        "sha256": checkpoint_hash(encoder),
        "encoder": encoder_hash(encoder),
        "encoder_arch": p.encoder_arch,
        "preprocessing": {
            **preprocessing(p),
            **({name: getattr(p, name) for name in CLIPS} if p.dataset.of_videos else {}),
        },
        "images": as_absolute(source.name) if isinstance(source, Stored) else source.name,
        "columns": getattr(source, "columns", {}),
        "contents": source.contents() if isinstance(source, Stored) else {},
        "overrides": overrides,
        "versions": {name: package.__version__ for name, package in packages.items()},
    }


def embed_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("embed", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    parser.add_argument(
        "folder",
        nargs="?",
        metavar="FOLDER",
        help="directory of images or videos, flat or nested; shards; a Hugging Face data set; a built-in "
        "data set (digits, CIFAR, STL-10) by name: cifar10, digits/test; default: --dataset_name",
    )
    parser.add_argument("--out", type=as_path, required=True, metavar="FILE.parquet", help="file of the embeddings")
    parser.add_argument("--skip_unreadable", action="store_true", help="list unreadable images instead of stopping")
    parser.add_argument("--overwrite", action="store_true", help="embed everything again and replace --out")
    add_embedding_options(parser)
    args = parser.parse_args(arguments)
    args.folder = args.folder or vars(args).pop("dataset_name", None)  # which is then no setting of the encoder
    if args.folder is None:
        parser.error("FOLDER is missing. Pass the directory of the images, or --dataset_name.")
    return args


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    embed(**vars(embed_options(arguments)))
