"""Features of an encoder on a labeled data set: extracted once, and cached under a hash of all that they depend on."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from attrs import frozen
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model_params import DATASET_DEFAULTS, EncoderAndDataParams
from self_supervised import catalogue
from self_supervised.data import custom, data_sets
from self_supervised.data.files import name_skipped
from self_supervised.data.image_files import ImageFiles
from self_supervised.data.packed import PackedImages, already_a_batch
from self_supervised.data.packed_files import use_packed
from self_supervised.evaluation.feature_files import has_features, read_features, write_features
from self_supervised.evaluation.fingerprints import fingerprint, view_settings
from self_supervised.evaluation.inner_layers import ActivationRecorder, inner_layers
from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.numerics import finite, generator, on_scoring_device
from self_supervised.views import augmentations

LABEL_FREE_IMAGES = 25_600  # training images for label-free measures (as in https://arxiv.org/abs/2210.02885)


# ---- evaluation data: an encoder and a data set ----


@frozen
class Features:
    x: Tensor  # embeddings, float32 [N, E]
    y: Tensor  # int64: classes [N], or multi-label [N, K]
    inner: dict[str, Tensor] = attrs.field(factory=dict)  # outputs [N, C] of inner layers


@frozen
class SampledViews:
    """Random views of images: the training views of the data set (catalogue.py), the same for all encoders."""

    n_views: int  # of an image
    seed: int  # of images and views
    n_images: int | None = None  # None: all
    area: float | None = None  # of an image; None: those of the training views
    averaged: bool = False  # whether their features are averaged


VIEWS = SampledViews(n_views=10, seed=0, n_images=1000)
PATCHES = SampledViews(n_views=16, seed=0, area=0.25, averaged=True)


class EvaluationData:
    """An encoder, and the data set on which it is evaluated. Features are extracted when they are first used.

    Args:
        params: settings for reading the data set; see `data_params`.
        cache: directory of the extracted features.
        inner: whether to also extract the outputs of inner layers, in the same pass.
        training: fields of LinearClassifierMethodParams that override those of the protocols that train.
    """

    def __init__(
        self,
        encoder: Encoder,
        params: EncoderAndDataParams,
        cache: Path,
        inner: bool = False,
        training: dict | None = None,
    ):
        self.encoder = encoder
        self.params = params
        self.cache = cache
        self.inner = inner
        self.training = training or {}

    @cached_property
    def train(self) -> Features:
        return extract(self.encoder, self.params, self.params.dataset.train_splits, self.cache, self.inner)

    @cached_property
    def test(self) -> Features:
        return extract(self.encoder, self.params, self.params.dataset.test_splits, self.cache, self.inner)

    @property
    def sets(self) -> tuple[Tensor, ...]:
        """(training features, training labels, test features, test labels)"""
        return self.on_device(self.train.x, self.train.y, self.test.x, self.test.y)

    @property
    def label_free_features(self) -> Tensor:
        """Features of at most LABEL_FREE_IMAGES training images, always the same ones."""
        chosen = np.random.default_rng(0).permutation(len(self.train.x))[:LABEL_FREE_IMAGES]
        return self.on_device(self.train.x[np.sort(chosen)])[0]

    @cached_property
    def views(self) -> Tensor:
        """Features [N, V, E] of random views of some training images."""
        splits = self.params.dataset.train_splits
        return self.on_device(extract_views(self.encoder, self.params, splits, self.cache, VIEWS).x)[0]

    @cached_property
    def patches(self) -> tuple[Tensor, ...]:
        """As `sets`, with the means over random patches of each image in place of the features of whole images."""
        splits = self.params.dataset.train_splits, self.params.dataset.test_splits
        train, test = (extract_views(self.encoder, self.params, names, self.cache, PATCHES) for names in splits)
        return self.on_device(train.x, train.y, test.x, test.y)

    def on_device(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors on the encoder's device, or on the CPU if that device cannot score them."""
        return tuple(on_scoring_device(part.to(self.encoder.device)) for part in parts)


# ---- settings ----


def data_params(encoder: Encoder, dataset_name: str | None = None, **changes: Any) -> EncoderAndDataParams:
    """Return settings that read a data set (default: the encoder's own) in the encoder's size and normalization.

    Another `data_path` that is read with other settings, such as labels_from, is not split by the pretraining's lists.

    Raises:
        ValueError: the data set is unknown, or has colors while the encoder takes gray images.
    """
    p = encoder.params
    if (dataset_name or p.dataset_name) not in catalogue.DATASETS:
        raise ValueError(f"dataset={dataset_name!r} is unknown: choose one of {', '.join(catalogue.DATASETS)}")
    if dataset_name not in (None, p.dataset_name):
        changes = DATASET_DEFAULTS | changes
    params = attrs.evolve(
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
    if "data_path" in changes and custom.list_settings(params) != custom.list_settings(p):
        params = attrs.evolve(params, splits_path=changes.get("splits_path"))
    if not params.dataset.is_custom and params.dataset.channels > params.channels:
        raise ValueError(
            f"dataset={params.dataset_name!r} has {params.dataset.channels} channels, but the encoder takes "
            f"{params.channels}. Choose a gray data set."
        )
    return params


# ---- extraction ----


def extract(
    encoder: Encoder, params: EncoderAndDataParams, splits: tuple[str, ...], cache: Path, inner: bool = False
) -> Features:
    """Return embeddings and labels of full images, in the order of the data set; with `inner`, also the
    outputs of the encoder's inner layers.

    The features of a video are the means over its evaluation_clips x evaluation_crops clips. Unreadable files are left
    out and listed.
    """
    dataset = data_sets.get_dataset(params, splits)
    layers = inner_layers(encoder) if inner else {}
    what = f"features of {'+'.join(splits)}"
    folder = cache / fingerprint(encoder, params, dataset, {"whole images": list(layers)})
    if not has_features(folder):
        if params.pack_images and isinstance(dataset, ImageFiles):
            use_packed(dataset)
        batches = feature_batches(dataset, params)

        def rows() -> Iterator[dict[str, Tensor]]:
            with ActivationRecorder(layers) as recorder:
                for images, labels in batches:
                    yield {"x": finite(encoder.embed(images), what), "y": labels, **recorder.averages(len(images))}

        write_features(folder, len(dataset), rows(), len(batches), what)
        name_skipped(dataset)
    arrays = read_features(folder)
    if left_out := len(dataset) - len(arrays["x"]):
        print(f"{what}: {left_out:,} unreadable images left out", flush=True)
    return Features(arrays.pop("x"), arrays.pop("y"), arrays)


def extract_views(
    encoder: Encoder, params: EncoderAndDataParams, splits: tuple[str, ...], cache: Path, sampled: SampledViews
) -> Features:
    """Return the embeddings [n, V, E] of views of the images, or their means [n, E], and the labels."""
    crop = {} if sampled.area is None else {"crop_scale": (sampled.area, sampled.area)}
    view = attrs.evolve(params.dataset.view, crop_size=params.crop_size, **crop)
    views = [view] * sampled.n_views
    params = attrs.evolve(params, seed=sampled.seed, clip_speeds=[1.0], clip_jitter=0.0)
    dataset = data_sets.get_dataset(params, splits, views)
    chosen = np.sort(generator(sampled.seed).permutation(len(dataset))[: sampled.n_images])
    settings = {"views": len(views), "images": len(chosen), "seed": sampled.seed, "view": view_settings(view)}
    what = f"{len(views)} views of {len(chosen)} images"
    folder = cache / fingerprint(encoder, params, dataset, settings | ({"averaged": True} if sampled.averaged else {}))
    if not has_features(folder):
        device = encoder.device
        subset = dataset.subset(chosen)
        subset.evaluated = True
        batches = feature_batches(subset, params)

        def rows() -> Iterator[dict[str, Tensor]]:
            n_before = 0
            for images, labels in batches:
                on_device = [x.to(device) for x in images] if isinstance(images, list) else images.to(device)
                positions, n_before = n_before + np.arange(len(labels)), n_before + len(labels)
                made = augmentations.augment(
                    on_device, params.seed, views, params.mean, params.std, positions=positions
                )
                with torch.no_grad():
                    x = torch.stack([encoder(view.to(device)).float() for view in made], 1)
                x = x.mean(1) if sampled.averaged else x
                yield {"x": finite(x, f"views of {'+'.join(splits)}"), "y": labels}

        write_features(folder, len(subset), rows(), len(batches), what)
        name_skipped(subset)
    arrays = read_features(folder)
    return Features(arrays["x"], arrays["y"])


def feature_batches(dataset: Dataset, params: EncoderAndDataParams) -> DataLoader:
    """Return a loader of (uint8 images, labels) in the order of the data set. A batch of videos holds at most
    `batch_size` clips."""
    packed = isinstance(dataset, PackedImages)
    return DataLoader(
        dataset,
        batch_size=max(1, params.batch_size // params.clips_of_a_video),
        num_workers=0 if packed else params.num_data_workers,
        collate_fn=already_a_batch if packed else None,
    )
