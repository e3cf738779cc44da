"""What is evaluated: an encoder with a data set."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import data
import features
from features import Features
from model_params import OF_TRAINING, OWN_DATA, VIDEO, EncoderAndDataParams
from numerics import able
from weights import Encoder

UNSEEN = (*OF_TRAINING, "decoding_threads")  # by any protocol
MOST_IMAGES = 25_600  # for what needs no labels (as in https://arxiv.org/abs/2210.02885)
VIEWS = {"n": 1000, "n_views": 10, "seed": 0}


class Subject:
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
        return features.extract(self.encoder, self.params, self.params.dataset.train_splits, self.cache, self.stages)

    @cached_property
    def test(self) -> Features:
        return features.extract(self.encoder, self.params, self.params.dataset.test_splits, self.cache, self.stages)

    @property
    def sets(self) -> tuple[Tensor, ...]:
        """(train features, labels, test features, labels)"""
        return self.on_device(self.train.x, self.train.y, self.test.x, self.test.y)

    @property
    def some(self) -> Tensor:
        """Features of at most MOST_IMAGES training images, always the same ones."""
        chosen = np.random.default_rng(0).permutation(len(self.train.x))[:MOST_IMAGES]
        return self.on_device(self.train.x[np.sort(chosen)])[0]

    @cached_property
    def views(self) -> Tensor:
        """Features of random views of some training images, [N, V, E]."""
        splits = self.params.dataset.train_splits
        return self.on_device(features.extract_views(self.encoder, self.params, splits, self.cache, **VIEWS))[0]

    def on_device(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """On the encoder's device, if that is able to score them."""
        return tuple(able(part.to(features.device_of(self.encoder))) for part in parts)


def seen(params: EncoderAndDataParams) -> dict[str, Any]:
    """Settings that decide which clips of videos, or which images of one's own, are seen; {} of other sets."""
    names = VIDEO if params.dataset.of_videos else OWN_DATA if params.dataset.is_custom else ()
    return {name: getattr(params, name) for name in names if name not in UNSEEN}


def image_hash(subject: Subject) -> str:
    """Of the encoder and of all labelled images of the data set, as it sees them."""
    params = subject.params
    sets = (data.get_dataset(params, splits) for splits in (params.dataset.train_splits, params.dataset.test_splits))
    return "".join(features.fingerprint(subject.encoder, params, dataset, {}) for dataset in sets)
