"""Embed a directory of images or videos: a Parquet file with path, embedding and label of each.

    self-supervised embed runs/simclr photos/ --out features.parquet

If the command is interrupted, repeat it: it resumes and ends with the same file. If it is repeated later, it embeds the
images that were added since. CHECKPOINT is anything that load_encoder reads (docs/weights.md).
"""

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from torch.utils.data import DataLoader

from self_supervised.data.image_files import preprocessing
from self_supervised.data.packed import already_a_batch
from self_supervised.distributed import usable
from self_supervised.embeddings.job import EmbeddingJob
from self_supervised.embeddings.sources import Batches, ImageSource, open_source
from self_supervised.evaluation.features import encoder_hash
from self_supervised.fields import as_path
from self_supervised.networks.pretrained import Encoder, load_encoder
from self_supervised.program import one_line_errors
from self_supervised.runs.command_line import add_fields, parser_of
from self_supervised.safe_files import check_file

MOST_EMBED_WORKERS = 8
CLIPS = ("num_frames", "clip_duration", "evaluation_clips", "evaluation_crops")  # only for encoders of videos
OVERRIDES = ("encoder_arch", "dataset_name", "transform_crop_size", "in_channels", "low_resolution_stem", "image_mean",
             "image_std", "exif_orientation", *CLIPS)  # fmt: skip


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
    """Embed all images of a directory, or of a packed data set by name, and return the path of the Parquet file `out`.

    The columns are path (relative to the directory, sorted), embedding (float32 [E]) and label (the name of the class
    directory if all images lie in class directories, else null). The encoder does not see the labels. An encoder of
    clips embeds the video files of the directory: each embedding is the mean over evaluation_clips x evaluation_crops
    clips.

    Args:
        num_workers: processes that decode images; None: one per core, at most MOST_EMBED_WORKERS.
        device: "auto", "cpu", "cuda", ...
        skip_unreadable: count and list images that cannot be read instead of stopping at the first.
        overwrite: embed all images again, even if `out` was created with another checkpoint or directory.
        overrides: fields of EncoderAndDataParams that the checkpoint lacks, or has wrong.

    Raises:
        ValueError: there are no images; an image cannot be read; `out` has features of another checkpoint or directory.
    """
    out = Path(out).expanduser()
    check_file("out", out)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    device = usable(device)
    encoder = checkpoint if isinstance(checkpoint, Encoder) else load_encoder(checkpoint, **overrides)
    source = open_source(folder, "video" if encoder.params.dataset.of_videos else "image")
    with EmbeddingJob(out, description(encoder, source, overrides), overwrite) as work:
        paths = source.paths()
        print(f"{source.name}: {len(paths):,} {source.kind}s{source.passed_over}")
        if todo := work.left(paths, skip_unreadable):
            loader = todo_batches(source, encoder, todo, batch_size, num_workers)
            work.add(encoder.to(device), loader, len(paths), skip_unreadable)
        work.finish(paths, source)
    return out


def description(encoder: Encoder, source: ImageSource, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of the file: how the features are computed."""
    p = encoder.params
    file = Path(encoder.report.source)
    packages = {"torch": torch, "torchvision": torchvision, "pillow": PIL, "numpy": np}
    return {
        "checkpoint": str(file.resolve()) if file.is_file() else encoder.report.source,
        "sha256": digest(encoder),
        "encoder": encoder_hash(encoder),
        "encoder_arch": p.encoder_arch,
        "preprocessing": {
            **preprocessing(p),
            **({name: getattr(p, name) for name in CLIPS} if p.dataset.of_videos else {}),
        },
        "images": source.name,
        "overrides": overrides,
        "versions": {name: package.__version__ for name, package in packages.items()},
    }


def digest(encoder: Encoder) -> str:
    """Return the SHA-256 of the checkpoint file; of the tensors if there is no file (published weights by name)."""
    if (path := Path(encoder.report.source)).is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    tensors = hashlib.sha256()
    for name, tensor in encoder.model.state_dict().items():
        tensors.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return tensors.hexdigest()


def todo_batches(
    source: ImageSource, encoder: Encoder, todo: list[str], batch_size: int, num_workers: int | None
) -> DataLoader:
    """Return a loader of the paths in `todo`. A batch of videos holds at most `batch_size` clips."""
    workers = min(os.cpu_count() or 1, MOST_EMBED_WORKERS) if num_workers is None else num_workers
    batch_size = max(1, batch_size // encoder.params.clips_of_a_video)
    return DataLoader(
        Batches(source, encoder.params),
        batch_size=batch_size,
        sampler=todo,
        num_workers=min(workers, len(todo) // batch_size),  # at least one full batch per worker
        collate_fn=already_a_batch,
        pin_memory=torch.cuda.is_available(),
    )


def embed_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("embed", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="directory of images or videos, flat or nested; shards; a Hugging Face data set; a packed data set by "
        "name: cifar10, digits/test",
    )
    parser.add_argument("--out", type=as_path, required=True, metavar="FILE.parquet")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument(
        "--num_workers", type=int, metavar="N", help=f"default: one per core, at most {MOST_EMBED_WORKERS}"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; default: the best available")
    parser.add_argument("--skip_unreadable", action="store_true", help="list unreadable images instead of stopping")
    parser.add_argument("--overwrite", action="store_true", help="embed everything again and replace --out")
    fields = parser.add_argument_group("settings that the checkpoint lacks, or has wrong (see model_params.py)")
    add_fields(fields, OVERRIDES)
    return parser.parse_args(arguments)


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    embed(**vars(embed_options(arguments)))
