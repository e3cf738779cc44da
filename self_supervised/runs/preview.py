"""Contact sheet of the images and views that a model trains on: one row per image, one column per view."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, evolve
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from model_params import PRESETS, ModelParams
from self_supervised.data import data_sets, loading
from self_supervised.data.batches import images_and_labels
from self_supervised.fields import as_path
from self_supervised.safe_files import atomic_file, check_file
from self_supervised.training.hyperparameters import resolve
from self_supervised.views import augmentations, input_checks

TILE = 160  # approximate width in pixels of a magnified large view; factors are whole, so that pixels stay squares
PREVIEW_GAP = 8  # pixels, like all sizes below
PREVIEW_MARGIN = 20
FONT_SIZE = 13
LINE_HEIGHT = 18
SHOWN_FRAMES = 4  # frames of a clip
PAPER = (240, 240, 240)
INK = (24, 24, 24)
PALE_INK = (96, 96, 96)
Column = tuple[list[str], Tensor]  # lines of the caption; uint8 images [rows, C, H, W]


def write_preview(params: ModelParams, path: str | Path, loader: Iterable[Any] | None = None, rows: int = 8) -> Path:
    """Write the first images of the first training batch and their views at the first step to a PNG, and return its
    path.

    Args:
        loader: your own loader, if you train on one; default: the loader of `params.dataset_name`.

    Raises:
        ValueError: the path does not end in .png, or an image cannot be read.
    """
    path = as_path(path)
    check_file("preview", path, ".png")
    sheet = arrange(first_columns(params, loader, rows))
    with atomic_file(path) as unfinished:
        sheet.save(unfinished, "PNG")
    return path


def first_columns(params: ModelParams, loader: Iterable[Any] | None = None, rows: int = 8) -> list[Column]:
    """Return the columns for the first training batch: the originals, if they are known, then every view."""
    params = resolve(PRESETS, params, None, {})[0]  # with the seed of pl.seed_everything
    originals = None
    params = evolve(params, drop_last_batch=False, pack_images=False)  # an incomplete batch is enough
    if loader is None:
        splits = params.dataset.pretraining_splits
        loader = loading.get_loader(params, data_sets.get_dataset(params, splits, params.views), training=True)
        images_alone = data_sets.get_dataset(params, splits)
        originals = torch.stack([images_alone[i][0] for i in islice(loader.sampler, rows)])
    images, _ = images_and_labels(next(iter(loader)))
    if originals is not None:
        originals = originals[: params.batch_size]  # of which there are views
    columns = columns_of(images, params, rows, originals)
    if originals is not None and not params.dataset.is_packed:
        columns[0][0][0] += ", central square"
    return columns


def columns_of(images: Tensor | list[Tensor], params: ModelParams, rows: int, originals: Tensor | None) -> list[Column]:
    """Return the columns for the first rows of a batch: the original, then every view.

    Args:
        images: batch of a loader: uint8 images [N, C, H, W], which are augmented here as at the first step of a
            training with `params.seed`; a list of crops; or float views, which are shown unchanged.
        rows: number of images.
        originals: uint8 [at least `rows`, C, H, W]; default: `images`, if they are uint8, otherwise no such column.
    """
    seed = (params.seed or 0, 0)  # seed, first epoch
    input_checks.check_batch_images(images, params)
    augment, of_videos = augmentations.training_views(params), params.dataset.of_videos
    views = augmentations.for_training(images, augment, seed, of_videos=of_videos)
    columns = [(caption(params, i), pixels(view[:rows], params)) for i, view in enumerate(views[: params.n_views])]
    if originals is None and isinstance(images, Tensor) and images.dtype == torch.uint8:
        originals = images
    if originals is not None:
        lines = ["original", in_pixels(originals.shape[-1], originals.shape[-2], params)]
        columns.insert(0, (lines, as_strips(originals[:rows]).cpu()))
    return columns


def pixels(view: Tensor, params: ModelParams) -> Tensor:
    """Return a normalized view as uint8, as it was before normalization."""
    mean, std = (torch.tensor(values, device=view.device).view(-1, 1, 1) for values in (params.mean, params.std))
    view = as_strips(view)
    return ((view.float() * std + mean) * 255).round().clamp(0, 255).byte().cpu()


def as_strips(images: Tensor) -> Tensor:
    """Return images unchanged, and clips [N, C, T, H, W] as four frames from the first to the last, side by side. If
    there are multiple clips per video [N, clips, C, T, H, W], the first one is used."""
    images = images[:, 0] if images.dim() == 6 else images
    if images.dim() == 4:
        return images
    chosen = torch.linspace(0, images.shape[2] - 1, min(SHOWN_FRAMES, images.shape[2])).long()
    return torch.cat(images[:, :, chosen.to(images.device)].unbind(2), dim=3)


# ---- Captions ----


def caption(params: ModelParams, i: int) -> list[str]:
    """Return the caption of view i, with every setting in which the views differ."""
    views = params.views
    queries, keys = zip(*params.pairs, strict=True)
    roles = [name for name, ends in (("query", queries), ("key", keys)) if i in ends]
    kind = "large" if i < params.n_large_views else "small"
    size = in_pixels(views[i].crop_size, views[i].crop_size, params)
    rows = [asdict(view) for view in views]
    differing = [name for name in rows[0] if name != "crop_size" and len({row[name] for row in rows}) > 1]
    return [
        f"view {i}, {kind}",
        size,
        " and ".join(roles),
        *(operation_text(name, rows[i][name]) for name in differing),
    ]


def in_pixels(width: int, height: int, params: ModelParams) -> str:
    """Return the size, and the channel that is shown if not all are."""
    shown = "" if params.channels in (1, 3) else f", first of {params.channels} channels"
    return f"{width} x {height} px{shown}"


def operation_text(name: str, value: float | tuple[float, float]) -> str:
    if name.endswith("_probability"):
        return f"{name.removesuffix('_probability').replace('_', ' ')} in {100 * value:g} %"
    number = f"{value:g}" if not isinstance(value, tuple) else "{:g} to {:g}".format(*value)
    return f"{name.replace('_', ' ')} {number}"


# ---- Drawing ----


def arrange(columns: list[Column]) -> Image.Image:
    """Return the columns side by side. All views are magnified by the same factor, so that small views look small."""
    font = ImageFont.load_default(FONT_SIZE)
    factor = max(1, round(TILE / max(images.shape[2] for _, images in columns)))
    height = factor * max(images.shape[2] for _, images in columns) + PREVIEW_GAP
    widths = [
        max([factor * images.shape[3], *(round(font.getlength(line)) for line in lines)]) for lines, images in columns
    ]
    top = PREVIEW_MARGIN + LINE_HEIGHT * max(len(lines) for lines, _ in columns) + PREVIEW_GAP
    size = (
        2 * PREVIEW_MARGIN + sum(widths) + 2 * PREVIEW_GAP * (len(widths) - 1),
        top + height * len(columns[0][1]) - PREVIEW_GAP + PREVIEW_MARGIN,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    left = PREVIEW_MARGIN
    for (lines, images), width in zip(columns, widths, strict=True):
        for line, text in enumerate(lines):
            draw.text((left, PREVIEW_MARGIN + LINE_HEIGHT * line), text, INK if line == 0 else PALE_INK, font)
        for row, image in enumerate(images):
            sheet.paste(magnified(image, factor), (left, top + height * row))
        left += width + 2 * PREVIEW_GAP
    return sheet


def magnified(image: Tensor, factor: int) -> Image.Image:
    """Return a uint8 image [C, H, W], of three channels or the first one, with every pixel as a square of `factor`."""
    shown = image if image.shape[0] == 3 else image[:1].expand(3, -1, -1)
    tile = Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy())
    return tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)
