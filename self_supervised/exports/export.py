"""Export an encoder to the format of another program, and verify the file in a new process.

    self-supervised export runs/demo --format torchvision onnx
    self-supervised export runs/demo --count

The file is written next to CHECKPOINT, or to --out. Existing files are never overwritten. docs/export.md and the note
"load" in each file show how to load it.
"""

import argparse
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.console import Console
from torch import nn

from model_params import EncoderAndDataParams
from self_supervised.data.image_files import preprocessing
from self_supervised.evaluation.classifier import classifier_of
from self_supervised.exports import count
from self_supervised.exports.formats import FORMATS, RUN_CLASSIFIER, Classifying, Normalized
from self_supervised.exports.verify import sample_images, verified
from self_supervised.fields import as_path
from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.networks.layouts import checkpoint_of
from self_supervised.networks.pretrained import load_encoder
from self_supervised.program import message_of, one_line_errors
from self_supervised.runs.command_line import CHECKPOINT, LAGGING, add_fields, parser_of
from self_supervised.runs.values import ListOption, items
from self_supervised.safe_files import check_folder, file_hash, sync, temporary_path
from self_supervised.setting_groups import EXPORT_OPTIONS


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
    """Export the encoder of a checkpoint, verify the file in a new process, and return its path.

    If the checkpoint also has a classifier, an ONNX file holds both.

    Args:
        checkpoint, encoder, overrides: arguments of `load_encoder`.
        format: a key of `FORMATS` (exports/formats.py).
        out: file or directory; default: next to the checkpoint, as NAME.FORMAT.EXTENSION (NAME.onnx, NAME.safetensors).
        publish: append the first digits of the file's SHA-256 to its name; `torch.hub` compares them.
        normalize: the program takes values from 0 to 1 and normalizes them itself (torchscript, onnx, torch_export).

    Raises:
        ValueError: the format cannot hold this encoder, or a package is missing.
        FileExistsError: the file already exists.
        RuntimeError: the file does not give the same embeddings; nothing is written.
    """
    checkpoint = checkpoint_of(checkpoint)
    (target,) = targets(checkpoint, [format], out, publish, normalize, overrides.get("lagging", False))
    loaded = load_encoder(checkpoint, encoder=encoder, **overrides)
    return write_checked(loaded, format, target, publish, normalize).path


# ---- where files are written ----


def targets(
    checkpoint: str | Path, formats: list[str], out: str | Path | None, publish: bool, normalize: bool, lagging: bool
) -> list[Path]:
    """Return the paths of the files, without the hash. Formats and paths that cannot be written are refused here,
    before any work."""
    for name in formats:
        check_format(name, normalize)
    source = as_path(checkpoint)
    is_folder = out is None or str(out).endswith("/")
    out = None if out is None else as_path(out)
    if not is_folder and out.suffix and not out.suffix[1:].isdigit() and not out.is_dir():  # digits: exports/v1.2
        if len(formats) > 1:
            raise ValueError(f"out={str(out)!r} is a file, but there are {len(formats)} formats. Pass a directory.")
        own = FORMATS[formats[0]].extension
        if out.suffix != own and out.suffix in {row.extension for row in FORMATS.values()}:
            raise ValueError(
                f"out={str(out)!r}: has the extension of another format. Files of {formats[0]} end in {own}"
            )
        paths = [out]
    else:
        folder = out or (source.parent if source.is_file() else Path())
        stem = source.stem if source.is_file() else re.sub(r"[^\w.-]", "_", str(checkpoint))  # a published name
        stem += "_lagging" if lagging else ""
        paths = [folder / f"{stem}{extension_of(name)}" for name in formats]
    for path in paths:
        check_folder("out", path.parent)
        if not publish:
            refuse_existing(path)
    return paths


def extension_of(name: str) -> str:
    extension = FORMATS[name].extension
    return extension if extension == f".{name}" else f".{name}{extension}"


def check_format(name: str, normalize: bool) -> None:
    if name not in FORMATS:
        raise ValueError(f"format={name!r} is unknown: choose one of {', '.join(FORMATS)}")
    if missing := [package for package in FORMATS[name].needs if importlib.util.find_spec(package) is None]:
        packages = " ".join(missing)
        raise ValueError(f"format={name!r} needs packages that are not installed. Run pip install {packages}.")
    if normalize and not FORMATS[name].is_program:
        programs = ", ".join(name for name, row in FORMATS.items() if row.is_program)
        raise ValueError(f"normalize=True: format={name!r} holds only weights. Choose one of {programs}.")


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} already exists. Move it away, or choose another --out.")


# ---- writing and verifying a file ----


@attrs.frozen
class Exported:
    path: Path
    difference: float  # largest difference of embeddings, relative to their largest absolute value


def write_checked(encoder: Encoder, format: str, target: Path, publish: bool, normalize: bool) -> Exported:
    """Write and verify the file in a hidden directory next to `target`, then move it there."""
    if encoder.params.dataset.of_videos:
        raise ValueError(
            f"encoder_arch={encoder.params.encoder_arch!r} encodes clips, which no format holds. Use load_encoder, or "
            "embed the videos."
        )
    row = FORMATS[format]
    converted = row.convert(encoder)
    images, embeddings = sample_images(encoder)
    expected = {"embeddings": embeddings}
    mean = encoder.params.mean
    std = encoder.params.std
    record = preprocessing(encoder.params)
    if normalize:
        images = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        converted = attrs.evolve(converted, content=Normalized(converted.content, mean, std).eval())
        mean = (0.0,) * len(mean)  # the program's users need not normalize
        std = (1.0,) * len(std)
        del record["mean"], record["std"]
    read = row.read
    notes = {}
    if format == "onnx" and (classifier := classifier_of(encoder)) is not None:
        converted = attrs.evolve(converted, content=Classifying(converted.content, classifier.head).eval())
        expected["probabilities"] = classifier.head(embeddings).softmax(1)
        read = RUN_CLASSIFIER
        notes["class_names"] = classifier.class_names
    code = "\n\n".join(filter(None, [converted.code, read, converted.use])) + "\n"
    facts = export_facts(encoder.params, converted.arch, embeddings.shape[1], mean, std)
    notes |= {"self_supervised": facts, "preprocessing": record, "load": code}
    with temporary_path(target) as folder, Console(stderr=True).status(f"{format}: writing") as status:
        folder.mkdir()
        file = folder / f"encoder{row.extension}"
        row.write(converted.content, file, notes, images[:2])
        status.update(f"{format}: verifying in a new process")
        difference = verified(file, code, images, expected)
        return Exported(place(file, target, publish), difference)


def export_facts(
    p: EncoderAndDataParams, arch: str, width: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """Return EXPORT_OPTIONS, with every value explicit: what prepares the encoder's input, and what `load_encoder`
    needs for a file without settings."""
    explicit = attrs.evolve(
        p,
        encoder_arch=arch,
        embedding_dim=width,
        in_channels=p.channels,
        low_resolution_stem=p.low_resolution and not arch.startswith("timm:"),
        transform_crop_size=p.crop_size,
        image_mean=list(mean),
        image_std=list(std),
    )
    return {name: getattr(explicit, name) for name in EXPORT_OPTIONS}


def place(file: Path, target: Path, publish: bool) -> Path:
    """Flush the file to disk and move it to `target`; with `publish`, to NAME-HASH.EXTENSION, where HASH is the first 8
    digits of its SHA-256."""
    if publish:
        # torch.hub reads the text between the first hyphen and the next dot as the hash: NAME must not have dots
        target = target.with_name(f"{target.stem.replace('.', '_')}-{file_hash(file)[:8]}{target.suffix}")
    refuse_existing(target)
    sync(file)
    os.replace(file, target)
    sync(target.parent)
    return target


# ---- the command ----


def export_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("export", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    parser.add_argument(
        "--format",
        action=ListOption,
        type=items(),
        default=[],
        metavar="FORMAT",
        help=f"required unless --count is passed: one or more of {', '.join(FORMATS)}",
    )
    parser.add_argument(
        "--out", metavar="DIR_OR_FILE", help="directory, or file with an extension; default: next to the checkpoint"
    )
    publish = "append the first digits of the file's SHA-256 to its name"
    parser.add_argument("--publish", action="store_true", help=publish)
    normalize = "include the normalization in the program: its input is then 0 to 1 (torchscript, onnx, torch_export)"
    parser.add_argument("--normalize", action="store_true", help=normalize)
    parser.add_argument("--lagging", action="store_true", help=LAGGING)
    parser.add_argument("--count", action="store_true", help="print parameters and FLOPs of each part")
    fields = parser.add_argument_group("settings that the checkpoint lacks, or has wrong (see docs/options.md)")
    add_fields(fields, EXPORT_OPTIONS)
    args = parser.parse_args(arguments)
    if not args.format and not args.count:
        parser.error("pass --format or --count")
    return args


@one_line_errors(RuntimeError)  # exporters raise it for layers that they cannot convert
def main(arguments: Sequence[str] | None = None) -> None:
    args = vars(export_options(arguments))
    checkpoint = checkpoint_of(args.pop("checkpoint"))
    formats = list(dict.fromkeys(args.pop("format")))
    count_parts = args.pop("count")
    out = args.pop("out")
    publish = args.pop("publish")
    normalize = args.pop("normalize")
    paths = targets(checkpoint, formats, out, publish, normalize, args["lagging"])
    encoder = load_encoder(checkpoint, **args)
    print(encoder.report)
    if count_parts:
        Console().print(count.cost_table(encoder, checkpoint))
    refused = []
    for format, target in zip(formats, paths, strict=True):
        try:
            done = write_checked(encoder, format, target, publish, normalize)
        except (ValueError, RuntimeError, FileExistsError) as error:  # this format cannot hold the encoder; others may
            refused.append(f"format={format}: not written. {message_of(error)}")
            cause = error
            continue
        size = done.path.stat().st_size / 1e6
        also = "; the classifier is in it, too" if format == "onnx" and classifier_of(encoder) is not None else ""
        print(f"{format}: {done.path} ({size:.1f} MB), embeddings differ by {done.difference:.0e} of the largest{also}")
    if refused:
        raise RuntimeError("; ".join(refused)) from cause
