"""What is evaluated: an encoder with a data set."""

import copy
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import numpy as np
import torch
from attrs import frozen
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model_params import CUSTOM_DATA, DATASET_DEFAULTS, TRAINING_ONLY, VIDEO, EncoderAndDataParams
from self_supervised import catalogue
from self_supervised.catalogue import OWN_MODULE
from self_supervised.data import loading
from self_supervised.data.files import name_skipped, readable_rows
from self_supervised.data.packed import PackedImages, already_a_batch
from self_supervised.networks.encoders import embeddings_of
from self_supervised.networks.pretrained import Encoder
from self_supervised.numerics import able, finite
from self_supervised.safe_files import atomic_folder
from self_supervised.views import augmentations

ENCODER_STAGES = ("layer1", "layer2", "layer3", "layer4")
HASHED_AT_ONCE = 2**14  # images hashed at once
# Settings on which features do not depend. Any other, and one added later, is part of a folder's name.
UNUSED = (
    "encoder_weights", "embedding_dim", "zero_init_residual",  # of the encoder, whose tensors are hashed
    "transform_crop_size", "image_mean", "image_std", "in_channels", "compute_statistics",  # `settings_for_features`
    "data_path", "splits_path", "video_path_prefix",  # places: the files found there are hashed
    "batch_size", "global_batch_size", "num_data_workers", "decoding_threads", "pin_data_memory", "data_on_device",
    "torch_compile", "seed", "drop_last_batch", "lr_scaling", "lr_batch_size", *TRAINING_ONLY,
)  # fmt: skip


@frozen
class Features:
    x: Tensor  # float32 [N, E]
    y: Tensor  # int64: classes [N], or presences [N, K]
    stages: dict[str, Tensor] = attrs.field(factory=dict)  # of a ResNet: [N, C] of each stage, averaged over the image


def data_params(encoder: Encoder, dataset_name: str | None = None, **changes: Any) -> EncoderAndDataParams:
    """Settings to read a data set (default: the encoder's own) in the encoder's size and normalization.

    Raises:
        ValueError: the set has colors and the encoder takes gray images.
    """
    p = encoder.params
    if (dataset_name or p.dataset_name) not in catalogue.DATASETS:
        raise ValueError(f"dataset={dataset_name!r} is unknown: choose one of {', '.join(catalogue.DATASETS)}")
    if dataset_name not in (None, p.dataset_name):
        changes = DATASET_DEFAULTS | changes
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
    if not found.dataset.is_custom and found.dataset.channels > found.channels:
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
    dataset = loading.get_dataset(params, splits)
    names = stages_of(encoder) if stages else []
    what = f"features of {'+'.join(splits)}"
    folder = cache / fingerprint(encoder, params, dataset, {"whole images": names})
    if not folder.is_dir():

        def rows() -> Iterator[dict[str, Tensor]]:
            with ActivationRecorder(encoder, names) as recorder:
                for images, labels in feature_batches(dataset, params):
                    yield {"x": finite(encoder.embed(images), what), "y": labels, **recorder.averages(len(images))}

        write_features(folder, len(dataset), rows(), n_batches(dataset, params), what)
        name_skipped(dataset)
    arrays = read_features(folder)
    if left_out := len(dataset) - len(arrays["x"]):
        print(f"{what}: without {left_out:,} images that could not be read", flush=True)
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
    are the training views of the data set (data/loading.py), so that all encoders are compared on the same."""
    view = attrs.evolve(params.dataset.view, crop_size=params.crop_size)
    params = attrs.evolve(params, seed=seed, clip_speeds=[1.0], clip_jitter=0.0)
    dataset = loading.get_dataset(params, splits, [view] * n_views)
    chosen = np.sort(augmentations.generator(seed).permutation(len(dataset))[:n])
    settings = {"views": n_views, "images": len(chosen), "seed": seed, "view": attrs.asdict(view)}
    folder = cache / fingerprint(encoder, params, dataset, settings)
    if not folder.is_dir():
        device = device_of(encoder)
        subset = dataset.subset(chosen)
        subset.evaluated = True

        def rows() -> Iterator[dict[str, Tensor]]:
            for i, (images, labels) in enumerate(feature_batches(subset, params)):
                on_device = [x.to(device) for x in images] if isinstance(images, list) else images.to(device)
                views = augmentations.augment(on_device, (seed, i), [view] * n_views, params.mean, params.std)
                with torch.no_grad():
                    found = torch.stack([encoder(x.to(device)).float() for x in views], 1)
                    yield {"x": finite(found, f"views of {'+'.join(splits)}"), "y": labels}

        write_features(
            folder, len(subset), rows(), n_batches(subset, params), f"{n_views} views of {len(subset)} images"
        )
        name_skipped(subset)
    return read_features(folder)["x"]


def stages_of(encoder: Encoder) -> list[str]:
    """layer1 to layer4 of a ResNet; [] of others."""
    return [name for name in ENCODER_STAGES if hasattr(encoder.model, name)]


def device_of(encoder: Encoder) -> torch.device:
    return next(encoder.model.parameters()).device


def feature_batches(dataset: Dataset, params: EncoderAndDataParams) -> DataLoader:
    """(uint8 images, labels), in order. In a batch there are no more clips than there would be images."""
    packed = isinstance(dataset, PackedImages)
    return DataLoader(
        dataset,
        batch_size=max(1, params.batch_size // params.clips_of_a_video),
        num_workers=0 if packed else params.num_data_workers,
        collate_fn=already_a_batch if packed else None,
    )


def n_batches(dataset: Dataset, params: EncoderAndDataParams) -> int:
    return len(feature_batches(dataset, params))


class ActivationRecorder:
    """Within it, every forward pass leaves the averages over the image of what comes out of the named modules."""

    def __init__(self, encoder: Encoder, names: list[str]):
        self.modules = {name: getattr(encoder.model, name) for name in names}
        self.found = {}

    def __enter__(self) -> "ActivationRecorder":
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
    found = hashlib.sha256(repr((encoder_hash(encoder), settings_for_features(params), wanted)).encode())
    for piece in contents(dataset):
        found.update(piece)
    return found.hexdigest()[:32]


def settings_for_features(params: EncoderAndDataParams) -> dict[str, Any]:
    """All that may decide what the encoder sees."""
    names = dict.fromkeys([*VIDEO, *CUSTOM_DATA, *(field.name for field in attrs.fields(type(params)))])
    names = [name for name in names if name not in UNUSED]  # in this order, which is part of the folders' names
    resolved = {"size": params.crop_size, "channels": params.channels, "mean": params.mean, "std": params.std}
    return {name: getattr(params, name) for name in names} | resolved


def encoder_hash(encoder: Encoder) -> str:
    """Of its structure (which says what tensors do not: strides, paddings), its tensors, and what a module of the
    user's makes of them."""
    found = hashlib.sha256(repr(encoder.model).encode())
    if encoder.params.encoder_arch == OWN_MODULE:  # what `forward` does is neither in the structure nor in the tensors
        found.update(outputs(encoder).tobytes())
    for name, tensor in sorted(encoder.model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def outputs(encoder: Encoder) -> np.ndarray:
    """Embeddings of two fixed random images, in six digits. In float64 on the CPU, so that they are the same on every
    device; in float32 where the module insists on that."""
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *encoder.params.input_shape)))
    with torch.no_grad():
        try:
            found = embeddings_of(copy.deepcopy(encoder.model).to("cpu", torch.float64), images)
        except (RuntimeError, TypeError):  # another dtype within, or a module that cannot be copied
            found = encoder(images.to(device_of(encoder), torch.float32)).cpu().double()
    return (found / found.abs().max().clamp(min=1e-30)).round(decimals=6).add(0.0).numpy()


def contents(dataset: Dataset) -> Iterator[bytes | np.ndarray]:
    if isinstance(dataset, PackedImages):
        for images in dataset.images:
            yield repr(images.shape).encode()
            yield from (
                np.ascontiguousarray(images[i : i + HASHED_AT_ONCE]) for i in range(0, len(images), HASHED_AT_ONCE)
            )
        yield dataset.labels
        return
    for path, signature, label in dataset.signatures():
        yield repr((os.path.relpath(path, loading.data_path()), *signature, label)).encode()


def write_features(folder: Path, n: int, rows: Iterator[dict[str, Tensor]], n_batches: int, what: str) -> None:
    """Batches of rows of each array -> one .npy an array, in constant memory, complete or not at all. Rows whose label
    `y` says that they stand in for unreadable files are left out: the arrays then have less than n rows."""
    with atomic_folder(folder) as unfinished, ExitStack() as opened:
        files: dict[str, tuple[BinaryIO, np.ndarray]] = {}  # and a row
        done = 0
        for batch in track(rows, what, total=n_batches):
            *parts, labels = readable_rows(batch["y"].cpu(), *(part.cpu() for part in batch.values()))
            for name, part in zip(batch, parts, strict=True):
                part = part.numpy()
                if name not in files:
                    files[name] = opened.enter_context((unfinished / f"{name}.npy").open("wb")), part[:0]
                    write_header(*files[name], n)
                files[name][0].write(part.tobytes())  # not a memory map, where a full disk kills the process
            done += len(labels)
        if done < n:
            for file, none in files.values():
                write_header(file, none, done)


def write_header(file: BinaryIO, none: np.ndarray, n: int) -> None:
    """Begin a .npy file of n rows like those of `none`. NumPy leaves room for other numbers of rows."""
    file.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(none.dtype), "fortran_order": False, "shape": (n, *none.shape[1:])}
    np.lib.format.write_array_header_1_0(file, header)


def read_features(folder: Path) -> dict[str, Tensor]:
    """Memory-mapped; what is written into them stays in memory."""
    return {path.stem: torch.from_numpy(np.load(path, mmap_mode="c")) for path in sorted(folder.glob("*.npy"))}


# ---- What is evaluated: an encoder with a data set ----


WITHOUT_EFFECT = (*TRAINING_ONLY, "decoding_threads")  # by any protocol
LABEL_FREE_IMAGES = 25_600  # for what needs no labels (as in https://arxiv.org/abs/2210.02885)
VIEWS = {"n": 1000, "n_views": 10, "seed": 0}


class EvaluationData:
    """An encoder, and the data set on which it is evaluated. Features are extracted when they are first asked for.

    Args:
        params: settings to read the data set; see features.data_params.
        cache: folder of the extracted features.
        stages: extract the output of each stage in the same pass.
        training: fields of LinearClassifierMethodParams that change those of the protocols which train.
    """

    def __init__(
        self,
        encoder: Encoder,
        params: EncoderAndDataParams,
        cache: Path,
        stages: bool = False,
        training: dict | None = None,
    ):
        self.encoder, self.params, self.cache = encoder, params, cache
        self.stages, self.training = stages, training or {}

    @cached_property
    def train(self) -> Features:
        return extract(self.encoder, self.params, self.params.dataset.train_splits, self.cache, self.stages)

    @cached_property
    def test(self) -> Features:
        return extract(self.encoder, self.params, self.params.dataset.test_splits, self.cache, self.stages)

    @property
    def sets(self) -> tuple[Tensor, ...]:
        """(train features, labels, test features, labels)"""
        return self.on_device(self.train.x, self.train.y, self.test.x, self.test.y)

    @property
    def some(self) -> Tensor:
        """Features of at most MOST_IMAGES training images, always the same ones."""
        chosen = np.random.default_rng(0).permutation(len(self.train.x))[:LABEL_FREE_IMAGES]
        return self.on_device(self.train.x[np.sort(chosen)])[0]

    @cached_property
    def views(self) -> Tensor:
        """Features of random views of some training images, [N, V, E]."""
        splits = self.params.dataset.train_splits
        return self.on_device(extract_views(self.encoder, self.params, splits, self.cache, **VIEWS))[0]

    def on_device(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """On the encoder's device, if that is able to score them."""
        return tuple(able(part.to(device_of(self.encoder))) for part in parts)


def seen(params: EncoderAndDataParams) -> dict[str, Any]:
    """Settings that decide which clips of videos, or which images of one's own, are seen; {} of other sets."""
    names = VIDEO if params.dataset.of_videos else CUSTOM_DATA if params.dataset.is_custom else ()
    return {name: getattr(params, name) for name in names if name not in WITHOUT_EFFECT}


def image_hash(subject: EvaluationData) -> str:
    """Of the encoder and of all labeled images of the data set, as it sees them."""
    params = subject.params
    sets = (loading.get_dataset(params, splits) for splits in (params.dataset.train_splits, params.dataset.test_splits))
    return "".join(fingerprint(subject.encoder, params, dataset, {}) for dataset in sets)
