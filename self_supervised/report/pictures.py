"""Pictures of a report: views, nearest neighbors and the map, from a run's checkpoint and its images."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from attrs import frozen
from PIL import Image
from torch import Tensor, nn

from model_params import EncoderAndDataParams, ModelParams
from self_supervised.data import data_sets
from self_supervised.data.class_labels import class_names
from self_supervised.data.file_search import data_path
from self_supervised.data.files import readable_rows
from self_supervised.data.foreign_paths import kept_lists
from self_supervised.data.packed import packed_is_there
from self_supervised.distributed import usable_device
from self_supervised.embeddings import map_page as map_pages
from self_supervised.embeddings.nearest import best_of
from self_supervised.embeddings.projection import TITLES, clustering, examples, kinds, project
from self_supervised.evaluation import features
from self_supervised.networks.pretrained import load_encoder
from self_supervised.numerics import generator
from self_supervised.program import bar, is_out_of_memory
from self_supervised.runs import preview
from self_supervised.setting_groups import EARLIER_DEFAULTS
from self_supervised.training import checkpoints, run_folder

QUERIES = 8
NEIGHBORS = 6  # per query
ROWS_OF_VIEWS = 6
PIXELS = 64  # longest side of pictures that are stored losslessly; larger ones are JPEGs
LARGEST_PICTURE = 128  # longest side of a picture on the page, in pixels
MAP_BUDGET = 6_000_000  # most characters of the pictures of all maps


@frozen
class Embedded:
    """Test images as the encoder sees them, with their embeddings. It is also the map's source of pictures."""

    images: Tensor  # uint8 [N, C, H, W]; clips are strips of frames
    x: np.ndarray  # float32 [N, E]
    labels: list[str | None]
    paths: list[str]
    about: str

    def picture(self, path: str, side: int | None = None) -> Image.Image:
        return preview.magnified(self.images[self.paths.index(path)], 1)


def picture_parts(
    folder: Path, settings: dict[str, Any], n: int, budget: int, encoder: nn.Module | None
) -> Iterator[tuple[str, Any]]:
    """Yield (name of the part, its content or {"missing": reason})."""
    lists = kept_lists(folder.resolve()) or run_folder.settings_of_run(folder).get("splits_path")
    settings = settings | {"splits_path": lists if lists and Path(lists).is_dir() else None}
    yield "views", content_or_reason(lambda: views(settings))
    if n == 0:
        reason = {"missing": "--images 0: no images were embedded"}
        yield from (("neighbors", reason), ("map", reason))
        return
    sample_or_reason = content_or_reason(lambda: embedded(checkpoint(folder), n, encoder))
    if isinstance(sample_or_reason, Embedded):
        yield "neighbors", content_or_reason(lambda: neighbors(sample_or_reason))
        yield "map", content_or_reason(lambda: map_page(sample_or_reason, budget))
    else:
        yield from (("neighbors", sample_or_reason), ("map", sample_or_reason))


def content_or_reason(make: Callable[[], Any]) -> Any:
    """Return the result of `make`, or {"missing": reason} if the run lacks what it needs."""
    try:
        return make()
    except (ValueError, TypeError, OSError, ImportError) as error:  # TypeError: settings of another version
        return {"missing": str(error) or type(error).__name__}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"missing": "out of memory on this device"}


# ---- views ----


def views(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the original and each view, with captions and images as data URIs, all reduced by the same factor, and how
    many images fit side by side: fewer strips of frames than single images."""
    known = {attribute.name for attribute in attrs.fields(ModelParams)}
    params = ModelParams(**EARLIER_DEFAULTS | {name: value for name, value in settings.items() if name in known})
    check_data(params, params.dataset.pretraining_splits)
    columns = preview.first_columns(params, rows=ROWS_OF_VIEWS)
    factor = min(1.0, LARGEST_PICTURE / max(images.shape[2] for _, images in columns))
    widest = max(images.shape[3] / images.shape[2] for _, images in columns)
    shown = [{"caption": lines, "pictures": [uri(image, factor) for image in images]} for lines, images in columns]
    return {"abreast": max(1, int(ROWS_OF_VIEWS / widest)), "columns": shown}


def check_data(params: ModelParams, splits: tuple[str, ...]) -> None:
    """Raise FileNotFoundError if a packed data set is not on this machine: a report downloads nothing."""
    folders = [data_path() / params.dataset_name / split for split in splits]
    if params.dataset.is_packed and not all(map(packed_is_there, folders)):
        raise FileNotFoundError(
            f"{params.dataset_name} is not in {data_path().resolve()}. Set DATA_PATH to the directory that holds it."
        )


def uri(image: Tensor, factor: float = 1.0) -> str:
    """Return a data URI of an image [C, H, W], reduced in size if the factor is below 1."""
    picture = preview.magnified(image, 1)
    if factor < 1:
        picture = picture.resize([max(1, round(edge * factor)) for edge in picture.size], Image.Resampling.LANCZOS)
    if max(picture.size) <= PIXELS:
        return map_pages.data_uri(picture, "PNG")
    return map_pages.data_uri(picture, "JPEG", quality=85)


# ---- embeddings ----


def checkpoint(folder: Path) -> Path:
    """Return the path of pretrained.ckpt, or of a newer checkpoint of a run that is unfinished or trained further; else
    of the newest that Lightning has saved."""
    end = folder / "pretrained.ckpt"
    saved = run_folder.file_of(folder, "pretraining/checkpoints")
    later = [path for path in saved.glob("step_*.ckpt") if end.is_file() and path.stat().st_mtime > end.stat().st_mtime]
    newest = end if end.is_file() and not later else checkpoints.newest(saved)
    newest = newest or max(saved.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise FileNotFoundError(f"{folder.name} has no checkpoint")
    return newest


def embedded(file: Path, n: int, own_encoder: nn.Module | None) -> Embedded:
    """Embed at most n random test images, always the same ones."""
    encoder = load_encoder(file, encoder=own_encoder).to(usable_device("auto"))
    params = features.data_params(encoder)
    splits = params.dataset.test_splits
    check_data(params, splits)
    dataset = data_sets.get_dataset(params, splits)
    chosen = np.sort(generator((0,)).permutation(len(dataset))[:n])
    subset = dataset.subset(chosen)
    images, x, y = [], [], []
    with bar() as progress:
        for batch, labels in progress.track(features.feature_batches(subset, params), description="embeddings"):
            images.append(preview.as_strips(batch))
            x.append(encoder.embed(batch).cpu())
            y.append(labels)
    images, x, rows, labels = readable_rows(torch.cat(y), torch.cat(images), torch.cat(x), torch.from_numpy(chosen))
    note = f"{len(rows):,} of {len(dataset):,} images of {params.dataset_name}/{'+'.join(splits)}"
    labels = names(params, dataset, labels)
    paths = places(dataset, splits, rows.numpy())
    return Embedded(images, x.numpy(), labels, paths, f"{note}, embedded by {file.name}")


def places(dataset: Any, splits: tuple[str, ...], chosen: np.ndarray) -> list[str]:
    """Return a name for each image: SPLIT/NUMBER in a packed data set, else the end of its path."""
    files = getattr(dataset, "files", None)
    if files is None:
        return [f"{'+'.join(splits)}/{i}" for i in chosen.tolist()]
    return [f"{i}: {'/'.join(Path(files[i][0]).parts[-2:])}" for i in chosen.tolist()]


def names(params: EncoderAndDataParams, dataset: Any, y: Tensor) -> list[str | None]:
    """Return the name of each image's class, or its number if the name is not known; None for unlabeled and multi-label
    images."""
    if y.dim() > 1:
        return [None] * len(y)
    known = class_names(params, dataset)
    return [known.get(label, str(label)) if label >= 0 else None for label in y.tolist()]


# ---- neighbors and map ----


def queries(sample: Embedded) -> list[int]:
    """Return the rows of the queries: the first image of each class, then the first of the other images. If an image
    has no label, just the first images."""
    rows = {label: i for i, label in reversed(list(enumerate(sample.labels)))}
    chosen = sorted(rows.values()) if None not in rows else []
    return [*chosen, *(i for i in range(len(sample.x)) if i not in chosen)][:QUERIES]


def neighbors(sample: Embedded) -> dict[str, Any]:
    rows = queries(sample)
    best = best_of(
        [(sample.paths, sample.x, sample.labels)], sample.x[rows], NEIGHBORS, [sample.paths[i] for i in rows]
    )
    index = {path: i for i, path in enumerate(sample.paths)}

    def shown(i: int) -> dict[str, Any]:
        reduced = min(1.0, LARGEST_PICTURE / max(sample.images.shape[-2:]))
        return {"picture": uri(sample.images[i], reduced), "label": sample.labels[i], "path": sample.paths[i]}

    lists = [
        {"query": shown(i), "found": [shown(index[n.path]) | {"cosine": round(n.cosine, 3)} for n in near]}
        for i, near in zip(rows, best, strict=True)
    ]
    return {"about": sample.about, "rows": lists}


def map_page(sample: Embedded, budget: int) -> dict[str, str]:
    """Return the complete page of `self-supervised map`, which the report shows in a frame."""
    points = project(sample.x, "tsne", seed=0)
    has_labels = any(label is not None for label in sample.labels)
    kind, kind_names, meaning = kinds(sample.labels, None if has_labels else clustering(sample.x, None, 0).labels_)
    title = f"{TITLES['tsne']} of the embeddings"
    near_means = examples(sample.x, kind)
    drawn = map_pages.Map(title, f"{sample.about}; {meaning}", sample.paths, points, kind, kind_names, near_means)
    return {"page": map_pages.as_html(drawn, sample, budget)}
