"""Classify the images of a directory, after training a classifier on a few labeled ones.

    self-supervised classify runs/photos --labeled labeled --apply photos --out predictions.csv
    self-supervised classify predictions.classifier.pt --apply others --out others.csv

LABELED holds one directory of images per class. CHECKPOINT is anything that load_encoder reads (docs/weights.md); its
encoder stays frozen. The classifier is a logistic regression on embeddings, whose L2 is chosen by cross-validation on
the labeled images. It is written together with the encoder to --classifier, by default predictions.classifier.pt for
--out predictions.csv. Without --labeled, CHECKPOINT is such a file, or a checkpoint of LinearClassifierMethod.
docs/photos.md is an example.
"""

import argparse
import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from self_supervised.data.custom import is_stored
from self_supervised.distributed import usable_device
from self_supervised.embeddings.batches import add_embedding_options, batches_of, parted, selected_paths
from self_supervised.embeddings.sources import ImageSource, Stored, open_source
from self_supervised.evaluation.classifier import Fit, ImageClassifier, classifier_of, fit_few
from self_supervised.fields import as_path
from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.networks.layouts import checkpoint_of
from self_supervised.networks.pretrained import encoder_of
from self_supervised.numerics import finite
from self_supervised.program import one_line_errors
from self_supervised.runs.command_line import CHECKPOINT, parser_of
from self_supervised.safe_files import atomic_file, check_file

COLUMNS_OF_CSV = ("file", "class", "probability")
FEW = 3  # images per class: with fewer, the cross-validation says little
Batch = tuple[list[str], Tensor | None, dict[str, str]]  # paths, a row for each, {unreadable path: reason}


def classify(
    checkpoint: str | Path | Encoder,
    apply: str | Path,
    out: str | Path,
    *,
    labeled: str | Path | None = None,
    classifier: str | Path | None = None,
    batch_size: int = 128,
    num_workers: int | None = None,
    device: str = "auto",
    **overrides: Any,
) -> Path:
    """Classify all images of a directory, or of a built-in data set by name, and return the path of the CSV file `out`.

    Its columns are file (relative to the directory, sorted), class, probability, and the probability of each class, in
    a column with the name of the class. For an image that cannot be read, all columns but the first are empty.

    Args:
        checkpoint: an encoder; without `labeled`, a checkpoint that also holds a classifier.
        labeled: directory with one directory of images per class, or any other labeled source of `embed`.
        classifier: file of the trained classifier and its encoder; default: `out` with .classifier.pt in place of .csv.
        num_workers, device, overrides: as in `embed`.

    Raises:
        ValueError: there are no images, or fewer than two classes; `checkpoint` holds no classifier.
    """
    out = as_path(out)
    saved = as_path(classifier) if classifier else out.with_name(f"{out.stem}.classifier.pt")
    read_files = [] if isinstance(checkpoint, Encoder) else [checkpoint_of(checkpoint)]
    check_file("out", out, ".csv", read=read_files)
    if labeled is not None:
        check_file("classifier", saved, read=read_files)
    if classifier and labeled is None:
        raise ValueError(
            f"classifier={str(classifier)!r} is written only if a classifier is trained. Pass labeled, too."
        )
    overrides, columns, patterns = parted(overrides)
    encoder = encoder_of(checkpoint, overrides)
    without_labels = columns | {"label_key": None, "labels_from": None}
    source = open_source(apply, encoder.params.dataset.kind, without_labels, encoder.params.image_key)
    examples = None if labeled is None else labeled_source(labeled, encoder, columns)
    refuse_unused(columns, source, examples)
    paths = selected_paths(source, encoder.params, patterns)
    print(f"{source.name}: {len(paths):,} {source.kind}s{source.passed_over}")
    read_all = partial(read, encoder, batch_size=batch_size, num_workers=num_workers)
    if examples is None:
        image_classifier = classifier_of(encoder)
        if image_classifier is None:
            raise ValueError(
                f"labeled=None: {encoder.report.source} holds no classifier. Pass a directory with one directory of "
                "images per class."
            )
        refuse_names_of_columns(image_classifier.class_names)
    else:
        encoder.to(usable_device(device))
        image_classifier = learned(encoder, examples, examples.paths(), read_all)
        image_classifier.save(saved)
        print(f"{saved}: encoder and classifier")
    write_predictions(image_classifier.to(usable_device(device)), source, paths, out, read_all)
    return out


def refuse_unused(columns: dict[str, Any], source: ImageSource, examples: ImageSource | None) -> None:
    """Raise ValueError for settings of COLUMNS that neither the images nor the labeled images take."""
    taken = {*getattr(examples, "columns", {}), *(["image_key"] if isinstance(source, Stored) else [])}
    if unused := [name for name in columns if name not in taken]:
        raise ValueError(
            f"{', '.join(unused)}: no effect. Leave it out: image_key and label_key are for shards and Hugging Face "
            "data sets, label_key and labels_from for labeled images."
        )


def refuse_names_of_columns(names: list[str]) -> None:
    if taken := [name for name in names if name in COLUMNS_OF_CSV]:
        raise ValueError(f"class {taken[0]!r}: a column of the CSV file has this name. Rename the class.")


def read(
    encoder: Encoder,
    compute: Callable[[Tensor], Tensor],
    source: ImageSource,
    paths: list[str],
    batch_size: int,
    num_workers: int | None,
) -> Iterator[Batch]:
    """Yield the batches of `paths`, with what `compute` returns for their images, on the CPU. Unreadable images are
    named."""
    loader = batches_of(source, encoder.params, paths, batch_size, num_workers)
    for readable, images, unreadable in track(loader, f"{len(paths):,} {source.kind}s"):
        for path, reason in unreadable.items():
            print(f"unreadable: {path} ({reason})")
        yield readable, finite(compute(images), "embeddings", readable).cpu() if readable else None, unreadable


# ---- labeled images ----


def labeled_source(labeled: str | Path, encoder: Encoder, columns: dict[str, Any]) -> ImageSource:
    """Return the source of the labeled images. The label of an image file is its first directory below `labeled`, or
    the one in a list (docs/own_data.md)."""
    kind = encoder.params.dataset.kind
    is_folder = kind == "image" and as_path(labeled).is_dir()
    if is_folder and not is_stored(str(labeled)):
        columns = {name: value for name, value in columns.items() if name == "labels_from"}
    if kind == "image" and as_path(labeled).is_file() and not is_stored(str(labeled)):
        raise ValueError(
            f"labeled={str(labeled)!r} is a file. Pass its directory, with the images of each class in a directory of "
            "its name, or with lines PATH,CLASS in a train.txt."
        )
    opened = Stored if is_folder else partial(open_source, kind=kind)
    source = opened(str(labeled), columns=columns, preferred=encoder.params.image_key)
    if is_folder and source.outside_splits:
        raise ValueError(
            f"labeled={str(labeled)!r} has splits, and images outside them, such as {source.outside_splits[0][0]}. "
            "Move them into a split. If a class has the name of a split, put all class folders into a directory train."
        )
    return source


def learned(encoder: Encoder, source: ImageSource, paths: list[str], read_all: Callable) -> ImageClassifier:
    """Return a classifier that is fitted to the labeled images, and print how well it recognizes held-out ones."""
    label_of = {path: label for path, label in zip(paths, source.labels(paths), strict=True) if label is not None}
    if bare := [path for path in paths if path not in label_of]:
        source.passed_over.add("without a label", bare[0], len(bare))
    print(f"{source.name}: {len(label_of):,} labeled {source.kind}s{source.passed_over}")
    refuse_names_of_columns(refuse_one_class(source, list(label_of.values()), ""))
    batches = list(read_all(encoder.embed, source, list(label_of)))
    labels = [label_of[path] for readable, _, _ in batches for path in readable]
    names = refuse_one_class(source, labels, "readable ")
    if lost := sorted(set(label_of.values()).difference(names)):
        print(f"warning: classes without a readable {source.kind}, which are never predicted: {', '.join(lost)}")
    fit = fit_few(
        torch.cat([x for _, x, _ in batches if x is not None]), torch.tensor([names.index(label) for label in labels])
    )
    print(cross_validation_text(fit, labels, names))
    return ImageClassifier(encoder, fit.head, names)


def refuse_one_class(source: ImageSource, labels: list[str], which: str) -> list[str]:
    """Return the sorted names of the classes. Raises ValueError if there are fewer than two."""
    names = sorted(set(labels))
    if len(names) < 2:
        is_folder = isinstance(source, Stored) and not is_stored(source.name)
        by_list = f", or write a line PATH,CLASS for each into {source.name}/train.txt" if is_folder else ""
        raise ValueError(
            f"labeled={source.name}: {len(labels):,} {which}{source.kind}s have a label, of "
            f"{f'1 class ({names[0]})' if names else '0 classes'}. Put the {source.kind}s of each class into a "
            f"directory of its name{by_list}."
        )
    return names


def cross_validation_text(fit: Fit, labels: list[str], names: list[str]) -> str:
    """Return the cross-validated accuracy, in all and of each class with its number of images, and a hint if a class
    has very few."""
    counts = Counter(labels)
    is_right = [p >= 0 and names[p] == label for p, label in zip(fit.predicted.tolist(), labels, strict=True)]
    right = Counter(label for label, correct in zip(labels, is_right, strict=True) if correct)
    n = int((fit.predicted >= 0).sum())
    width = max(map(len, [*names, "class"]))
    rows = [f"{'class':{width}}  labeled  recognized when held out"]
    rows += [f"{name:{width}}  {counts[name]:7,}  {right[name]:,}" for name in names]
    most = max(counts.values())
    if n:
        rows.append(
            f"cross-validation: {100 * right.total() / n:.1f} % of {n:,} held-out images are recognized (always the "
            f"largest class: {100 * most / len(labels):.1f} %); l2 {fit.decay:g}"
        )
    if few := [f"{name} ({counts[name]})" for name in names if counts[name] < FEW]:
        rows.append(
            f"hint: classes with fewer than {FEW} images: {', '.join(few)}. Label more of them; the only image of a "
            "class is never held out."
        )
    return "\n".join(rows)


# ---- predictions ----


def write_predictions(
    classifier: ImageClassifier, source: ImageSource, paths: list[str], out: Path, read_all: Callable
) -> None:
    """Write the CSV file, and print how many images each class has."""
    names = classifier.class_names
    counts: Counter[str] = Counter()
    with atomic_file(out) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS_OF_CSV, *names])
        for readable, probabilities, unreadable in read_all(classifier.probabilities, source, paths):
            rows = {path: [""] * (2 + len(names)) for path in unreadable}
            for path, p in zip(readable, [] if probabilities is None else probabilities.tolist(), strict=True):
                best = max(range(len(names)), key=p.__getitem__)
                rows[path] = [names[best], *(f"{one:.6f}" for one in (p[best], *p))]
                counts[names[best]] += 1
            writer.writerows([path, *rows[path]] for path in sorted(rows))
    named = ", ".join(f"{name} {n:,}" for name, n in counts.most_common())
    left_out = len(paths) - counts.total()
    unreadable = f"; {left_out:,} could not be read" if left_out else ""
    print(f"{out}: {counts.total():,} {source.kind}s{': ' if named else ''}{named}{unreadable}")


# ---- the command ----


def classify_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("classify", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=f"{CHECKPOINT}; or a classifier")
    parser.add_argument("--labeled", metavar="FOLDER", help="one directory of images per class")
    parser.add_argument(
        "--apply", required=True, metavar="FOLDER", help="images to classify: a directory, shards, a data set by name"
    )
    parser.add_argument("--out", type=as_path, required=True, metavar="FILE.csv", help="file of the predictions")
    parser.add_argument(
        "--classifier",
        type=as_path,
        metavar="FILE.pt",
        help="file of the classifier; default: --out with .classifier.pt",
    )
    add_embedding_options(parser)
    return parser.parse_args(arguments)


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    classify(**vars(classify_options(arguments)))
