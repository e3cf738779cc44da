"""An encoder for other programs: from a checkpoint to a file of their format, checked in a fresh process.

    self-supervised export runs/demo/pretrained.ckpt --format torchvision onnx
    self-supervised export runs/demo/pretrained.ckpt --count

CHECKPOINT is anything that weights.load_encoder reads. The file lies beside it unless --out says where; a file that is
there already is never overwritten. How each is loaded: docs/export.md, and the note "load" within the file.
"""

import argparse
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.console import Console
from torch import nn

from model_params import EncoderAndDataParams
from self_supervised.exports import count
from self_supervised.exports.formats import FORMATS, Normalized
from self_supervised.exports.verify import sample_images, verified
from self_supervised.networks.pretrained import Encoder, load_encoder
from self_supervised.program import one_line_errors
from self_supervised.runs.command_line import add_fields, parser_of
from self_supervised.safe_files import check_folder, disk_errors_named, sync

FACTS = (
    "encoder_arch",
    "embedding_dim",
    "in_channels",
    "low_resolution_stem",
    "dataset_name",
    "transform_crop_size",
    "image_mean",
    "image_std",
)  # fields of EncoderAndDataParams, without which nobody can feed an encoder


def export(
    checkpoint: str | Path,
    format: str,
    out: str | Path | None = None,
    *,
    publish: bool = False,
    normalize: bool = False,
    encoder: nn.Module | None = None,
    **overrides: Any,
) -> Path:
    """Write the encoder of a checkpoint in a format, check the file in a fresh process, and return its path.

    Args:
        checkpoint, encoder, overrides: as `weights.load_encoder` takes them.
        format: a key of `tools.formats.FORMATS`.
        out: file or folder; default: beside the checkpoint, as NAME.FORMAT.EXTENSION (NAME.onnx, NAME.safetensors).
        publish: append the start of the file's SHA-256 to its name, as `torch.hub` checks it.
        normalize: the program takes values from 0 to 1 and normalizes them itself (torchscript, onnx, torch_export).

    Raises:
        ValueError: the format cannot hold this encoder, or its package is missing.
        FileExistsError: there is such a file already.
        RuntimeError: the file does not give the same embeddings; nothing is written.
    """
    (target,) = targets(checkpoint, [format], out, publish, normalize)
    loaded = load_encoder(checkpoint, encoder=encoder, **overrides)
    return write_checked(loaded, format, target, publish, normalize).path


def targets(
    checkpoint: str | Path, formats: list[str], out: str | Path | None, publish: bool, normalize: bool
) -> list[Path]:
    """Where the files will lie, less the hash; refuses before any work what cannot be written."""
    for name in formats:
        check_format(name, normalize)
    source = Path(checkpoint).expanduser()
    is_folder = out is None or str(out).endswith("/")
    out = None if out is None else Path(out).expanduser()
    if not is_folder and out.suffix and not out.is_dir():
        if len(formats) > 1:
            raise ValueError(f"out={str(out)!r} is one file, but there are {len(formats)} formats: give a folder")
        paths = [out]
    else:
        folder = out or (source.parent if source.is_file() else Path())
        stem = source.stem if source.is_file() else re.sub(r"[^\w.-]", "_", str(checkpoint))  # a published name
        paths = [folder / f"{stem}{ending(name)}" for name in formats]
    for path in paths:
        check_folder("out", path.parent)
        if not publish:
            refuse_existing(path)
    return paths


def ending(name: str) -> str:
    extension = FORMATS[name].extension
    return extension if extension == f".{name}" else f".{name}{extension}"


def check_format(name: str, normalize: bool) -> None:
    if name not in FORMATS:
        raise ValueError(f"format={name!r} is unknown: choose one of {', '.join(FORMATS)}")
    if missing := [package for package in FORMATS[name].needs if importlib.util.find_spec(package) is None]:
        raise ValueError(f"format={name!r} needs what is not installed: pip install {' '.join(missing)}")
    if normalize and not FORMATS[name].is_program:
        programs = ", ".join(name for name, row in FORMATS.items() if row.is_program)
        raise ValueError(f"normalize=True does not fit format={name!r}, which holds weights alone: choose {programs}")


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} is there already: move it away, or choose another --out")


@attrs.frozen
class Exported:
    path: Path
    difference: float  # largest difference of embeddings, as a share of their largest absolute value


def write_checked(encoder: Encoder, format: str, target: Path, publish: bool, normalize: bool) -> Exported:
    """Written and checked in a hidden folder beside `target`; the name appears when all is well."""
    row = FORMATS[format]
    twin = row.twin(encoder)
    images, expected = sample_images(encoder)
    mean, std = encoder.params.mean, encoder.params.std
    if normalize:
        images = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        twin = attrs.evolve(twin, content=Normalized(twin.content, mean, std).eval())
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)  # what is left to do
    code = "\n\n".join(filter(None, [twin.code, row.read, twin.use])) + "\n"
    notes = {"self_supervised": export_facts(encoder.params, twin.arch, expected.shape[1], mean, std), "load": code}
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        disk_errors_named(target),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder,
        Console(stderr=True).status(f"{format}: writing") as status,
    ):
        file = Path(folder) / f"encoder{row.extension}"
        row.write(twin.content, file, notes, images[:2])
        status.update(f"{format}: checking in a fresh process")
        difference = verified(file, code, images, expected)
        return Exported(place(file, target, publish), difference)


def export_facts(
    p: EncoderAndDataParams, arch: str, width: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """What one must know to feed the encoder, and what `weights.load_encoder` needs: nothing is left to a default."""
    spelled_out = attrs.evolve(
        p,
        encoder_arch=arch,
        embedding_dim=width,
        in_channels=p.channels,
        low_resolution_stem=p.low_resolution and not arch.startswith("timm:"),
        transform_crop_size=p.crop_size,
        image_mean=list(mean),
        image_std=list(std),
    )
    return {name: getattr(spelled_out, name) for name in FACTS}


def place(file: Path, target: Path, publish: bool) -> Path:
    """On the disk, then under its name; published, NAME-HASH.EXTENSION with the first 8 digits of its SHA-256."""
    if publish:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        # torch.hub takes what stands between the first hyphen and a dot for the hash: no other dot may follow one
        target = target.with_name(f"{target.stem.replace('.', '_')}-{digest[:8]}{target.suffix}")
    refuse_existing(target)
    sync(file)
    os.replace(file, target)
    sync(target.parent)
    return target


def export_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("export", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument(
        "--format", nargs="+", default=[], metavar="FORMAT", help=f"one or several of {', '.join(FORMATS)}"
    )
    parser.add_argument("--out", metavar="FOLDER_OR_FILE", help="default: beside the checkpoint")
    parser.add_argument("--publish", action="store_true", help="append the start of the file's SHA-256 to its name")
    parser.add_argument("--normalize", action="store_true", help="programs take values from 0 to 1")
    parser.add_argument("--count", action="store_true", help="print parameters and FLOPs of each part")
    fields = parser.add_argument_group("where the file does not say (fields of EncoderAndDataParams)")
    add_fields(fields, FACTS)
    args = parser.parse_args(arguments)
    if not args.format and not args.count:
        parser.error("say --format, or --count")
    return args


@one_line_errors(RuntimeError)  # of the systems that export: they say what they cannot convert
def main(arguments: Sequence[str] | None = None) -> None:
    args = vars(export_options(arguments))
    checkpoint, formats = args.pop("checkpoint"), list(dict.fromkeys(args.pop("format")))
    count_parts = args.pop("count")
    out, publish, normalize = args.pop("out"), args.pop("publish"), args.pop("normalize")
    paths = targets(checkpoint, formats, out, publish, normalize)
    encoder = load_encoder(checkpoint, **args)
    print(encoder.report)
    if count_parts:
        Console().print(count.cost_table(encoder, checkpoint))
    for format in formats:  # refuse before any of them is written
        FORMATS[format].twin(encoder)
    for format, target in zip(formats, paths, strict=True):
        done = write_checked(encoder, format, target, publish, normalize)
        size = done.path.stat().st_size / 1e6
        print(f"{format}: {done.path} ({size:.1f} MB), embeddings equal to {done.difference:.0e} of the largest")
