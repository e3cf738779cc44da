"""The features of a data set, extracted once: kept as arrays under the hash of all that they depend on.

A folder of the cache is named by SHA-256 of the encoder (its structure and tensors), the preprocessing (size and
constants), the images and what was extracted. Packed sets are hashed by their bytes, sets of files by relative path,
size and time of change, of a folder of frames those of its files. A folder appears under its name only when it is
complete, and is memory-mapped when read.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from attrs import frozen
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import augmentations
import data
from files import name_skipped, readable_rows
from packed_images import PackedImages
from shared_params import OF_ONE_KIND, EncoderAndDataParams
from weights import Encoder

STAGES = ("layer1", "layer2", "layer3", "layer4")
PIECE = 2**14  # images hashed at once
EVALUATED_CLIPS = ("num_frames", "clip_duration", "frames_per_second", "evaluation_clips", "evaluation_crops")


@frozen
class Features:
    x: Tensor  # float32 [N, E]
    y: Tensor  # int64: classes [N], or presences [N, K]
    stages: dict[str, Tensor] = attrs.field(factory=dict)  # of a ResNet: [N, C] of each stage, averaged over the image


def data_params(encoder: Encoder, dataset_name: str | None = None, **changes: Any) -> EncoderAndDataParams:
    """Settings to read a data set (default: the encoder's own) in the encoder's size and normalization.

    Raises:
        ValueError: the set has colours and the encoder takes gray images.
    """
    p = encoder.params
    if (dataset_name or p.dataset_name) not in data.DATASETS:
        raise ValueError(f"dataset={dataset_name!r} is unknown: choose one of {', '.join(data.DATASETS)}")
    if dataset_name not in (None, p.dataset_name):
        changes = OF_ONE_KIND | changes
    found = attrs.evolve(
        p,
        dataset_name=dataset_name or p.dataset_name,
        encoder_weights=None,
        transform_crop_size=p.crop_size,
        in_channels=p.channels,
        image_mean=list(p.mean),
        image_std=list(p.std),
        low_resolution_stem=p.low_resolution,
        **changes,
    )
    if found.dataset.own is None and found.dataset.channels > found.channels:
        raise ValueError(
            f"dataset={found.dataset_name!r} has {found.dataset.channels} channels and the encoder takes "
            f"{found.channels}: choose a gray data set"
        )
    return found


# ---- extraction ----


def extract(
    encoder: Encoder, params: EncoderAndDataParams, splits: tuple[str, ...], cache: Path, stages: bool = False
) -> Features:
    """Embeddings and labels of whole images, in the order of the set; with `stages` also what comes out of each. Of
    videos: the means over their evaluation_clips x evaluation_crops clips. Unreadable files are left out, and named."""
    dataset = data.get_dataset(params, splits)
    names = stages_of(encoder) if stages else []
    folder = cache / fingerprint(encoder, params, dataset, {"whole images": names})
    if not folder.is_dir():

        def rows() -> Iterator[dict[str, Tensor]]:
            with Tap(encoder, names) as tap:
                for images, labels in batches(dataset, params):
                    yield {"x": encoder.embed(images), "y": labels, **tap.averages(len(images))}

        write(folder, len(dataset), rows(), n_batches(dataset, params), f"features of {'+'.join(splits)}")
        name_skipped(dataset)
    arrays = read(folder)
    if left_out := len(dataset) - len(arrays["x"]):
        print(f"features of {'+'.join(splits)}: without {left_out:,} images that could not be read", flush=True)
    return Features(arrays.pop("x"), arrays.pop("y"), arrays)


def extract_views(
    encoder: Encoder,
    params: EncoderAndDataParams,
    splits: tuple[str, ...],
    cache: Path,
    n: int,
    n_views: int,
    seed: int,
) -> Tensor:
    """Embeddings [n, V, E] of `n_views` random views of each of n images (at most all), drawn from `seed`. The views
    are the training views of the data set (data.py), so that all encoders are compared on the same."""
    view = attrs.evolve(params.dataset.view, crop_size=params.crop_size)
    params = attrs.evolve(params, seed=seed, clip_speeds=[1.0], clip_jitter=0.0)
    dataset = data.get_dataset(params, splits, [view] * n_views)
    chosen = np.sort(augmentations.generator(seed).permutation(len(dataset))[:n])
    settings = {"views": n_views, "images": len(chosen), "seed": seed, "view": attrs.asdict(view)}
    folder = cache / fingerprint(encoder, params, dataset, settings)
    if not folder.is_dir():
        device = device_of(encoder)
        subset = dataset.subset(chosen)
        subset.evaluated = True

        def rows() -> Iterator[dict[str, Tensor]]:
            for i, (images, labels) in enumerate(batches(subset, params)):
                on_device = [x.to(device) for x in images] if isinstance(images, list) else images.to(device)
                views = augmentations.augment(on_device, (seed, i), [view] * n_views, params.mean, params.std)
                with torch.no_grad():
                    yield {"x": torch.stack([encoder(x.to(device)).float() for x in views], 1), "y": labels}

        write(folder, len(subset), rows(), n_batches(subset, params), f"{n_views} views of {len(subset)} images")
        name_skipped(subset)
    return read(folder)["x"]


def stages_of(encoder: Encoder) -> list[str]:
    """layer1 to layer4 of a ResNet; [] of others."""
    return [name for name in STAGES if hasattr(encoder.model, name)]


def device_of(encoder: Encoder) -> torch.device:
    return next(encoder.model.parameters()).device


def batches(dataset: Dataset, params: EncoderAndDataParams) -> DataLoader:
    """(uint8 images, labels), in order. In a batch there are no more clips than there would be images."""
    packed = isinstance(dataset, PackedImages)
    return DataLoader(
        dataset,
        batch_size=max(1, params.batch_size // params.clips_of_a_video),
        num_workers=0 if packed else params.num_data_workers,
        collate_fn=data.already_a_batch if packed else None,
    )


def n_batches(dataset: Dataset, params: EncoderAndDataParams) -> int:
    return len(batches(dataset, params))


class Tap:
    """Within it, every forward pass leaves the averages over the image of what comes out of the named modules."""

    def __init__(self, encoder: Encoder, names: list[str]):
        self.modules, self.found = {name: getattr(encoder.model, name) for name in names}, {}

    def __enter__(self) -> "Tap":
        self.hooks = [module.register_forward_hook(self.keeper(name)) for name, module in self.modules.items()]
        return self

    def keeper(self, name: str) -> Callable:
        def keep(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
            self.found[name] = output.flatten(2).mean(2)

        return keep

    def averages(self, n: int) -> dict[str, Tensor]:
        """Of each of n images, or videos: over their clips too."""
        return {name: self.found[name].float().unflatten(0, (n, -1)).mean(1) for name in self.modules}

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


# ---- the cache ----


def fingerprint(encoder: Encoder, params: EncoderAndDataParams, dataset: Dataset, wanted: dict) -> str:
    """A hash of everything that the features depend on."""
    preprocessing = {"size": params.crop_size, "mean": params.mean, "std": params.std}
    if params.dataset.of_videos:
        preprocessing |= {name: getattr(params, name) for name in EVALUATED_CLIPS}
    if params.unreadable_images == "skip":
        preprocessing["unreadable"] = "left out"  # in earlier versions, a neighbor was counted in its place
    found = hashlib.sha256(repr((encoder_hash(encoder), preprocessing, wanted)).encode())
    for piece in contents(dataset):
        found.update(piece)
    return found.hexdigest()[:32]


def encoder_hash(encoder: Encoder) -> str:
    """Of its structure (which says what tensors do not: strides, paddings) and its tensors."""
    found = hashlib.sha256(repr(encoder.model).encode())
    for name, tensor in sorted(encoder.model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def contents(dataset: Dataset) -> Iterator[bytes | np.ndarray]:
    if isinstance(dataset, PackedImages):
        for images in dataset.images:
            yield repr(images.shape).encode()
            yield from (np.ascontiguousarray(images[i : i + PIECE]) for i in range(0, len(images), PIECE))
        yield dataset.labels
        return
    for path, stamp, label in dataset.stamps():
        yield repr((os.path.relpath(path, data.data_path()), *stamp, label)).encode()


def write(folder: Path, n: int, rows: Iterator[dict[str, Tensor]], n_batches: int, what: str) -> None:
    """Batches of rows of each array -> one .npy an array, in constant memory, complete or not at all. Rows whose label
    `y` says that they stand in for unreadable files are left out: the arrays then have less than n rows."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)
    arrays, done = {}, 0
    for batch in track(rows, what, total=n_batches):
        *parts, labels = readable_rows(batch["y"].cpu(), *(part.cpu() for part in batch.values()))
        for name, part in zip(batch, parts, strict=True):
            part = part.numpy()
            if name not in arrays:
                path, shape = unfinished / f"{name}.npy", (n, *part.shape[1:])
                arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=part.dtype, shape=shape)
            arrays[name][done : done + len(part)] = part
        done += len(labels)
    for name, array in arrays.items():
        array.flush()
        if done < n:
            np.save(unfinished / f"{name}.part.npy", array[:done])
            os.replace(unfinished / f"{name}.part.npy", unfinished / f"{name}.npy")
    unfinished.rename(folder)


def read(folder: Path) -> dict[str, Tensor]:
    """Memory-mapped; what is written into them stays in memory."""
    return {path.stem: torch.from_numpy(np.load(path, mmap_mode="c")) for path in sorted(folder.glob("*.npy"))}
