"""An encoder with frozen weights, the settings that prepare its input, and the origin of its weights."""

from typing import Any

import attrs
import torch
from attrs import fields, frozen
from torch import Tensor, nn

from model_params import DATASET_DEFAULTS, EncoderAndDataParams
from self_supervised import catalogue
from self_supervised.networks import encoders, layouts, modules
from self_supervised.views import augmentations, input_checks

SHARED_FIELDS = {field.name for field in fields(EncoderAndDataParams)}


@frozen
class Report:
    """Origin of an encoder's tensors. As a string: one line for the log."""

    source: str  # path or name
    layout: str  # name of the system that wrote the file, or "published"
    architecture: str
    matched: int  # number of the encoder's tensors, all of which were loaded
    left_out: tuple[str, ...]  # keys of the file that are not part of the encoder: heads, queues, the lagging model
    assumed: str = ""  # facts that the file does not contain
    started_from: str | None = None  # weights from which the pretraining started, for load_encoder
    started_from_hash: str | None = None  # of their file at that time

    def __str__(self) -> str:
        left_out = f"; left out: {layouts.grouped(self.left_out)}" if self.left_out else ""
        assumed = f"; assumed: {self.assumed}" if self.assumed else ""
        return (
            f"{self.source}: {self.layout}, all {self.matched} tensors of {self.architecture} loaded{left_out}{assumed}"
        )


class Encoder(nn.Module):
    """Frozen encoder in eval mode, with the settings that prepare its input.

    `params` holds its architecture, image size and normalization constants, and `report` the origin of its weights. A
    method that is built with it may train it (`set_modes`); `embed` is in eval mode then, too.
    """

    def __init__(self, model: nn.Module, params: EncoderAndDataParams, report: Report):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.is_trained = False  # True: a method trains it, or has a lagging copy of it
        self.params = params
        self.report = report
        self.eval()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters(), torch.empty(0)).device

    @property
    def started_from(self) -> str | None:
        """Weights from which the pretraining started, for load_encoder; None if they were random or are not known."""
        return self.report.started_from

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in eval mode unless a method trains it."""
        return super().train(mode and (self.is_trained or modules.requires_gradient(self)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings [N, E] of normalized images [N, C, H, W]. Raises ValueError for integers."""
        if not x.is_floating_point():
            raise ValueError(f"images={x.dtype}: forward() takes normalized floats. Pass uint8 images to embed().")
        return encoders.embeddings_of(self.model, x)

    def prepare(self, images: Tensor) -> Tensor:
        """Return uint8 images [N, C, H, W] of any size as normalized floats of the encoder's size: full images.

        Raises:
            ValueError: the images have another type or shape.
        """
        return augmentations.evaluation_view(images, self.params)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Return the embeddings [N, E], float32 on the encoder's device, of uint8 images [N, C, H, W] of any size.

        Raises:
            ValueError: the images have another type or shape.
        """
        input_checks.check_pixels(images, self.params.channels)
        weight = next(self.model.parameters(), torch.empty(0))  # an encoder may have none
        with modules.in_eval_mode(self):
            return self(self.prepare(images.to(weight.device)).to(weight.dtype)).float()


def with_overrides(settings: dict[str, Any], overrides: dict[str, Any]) -> EncoderAndDataParams:
    """Return settings that hold the size, channels and normalization of the encoder's images explicitly, so that
    another data set does not change them."""
    own = {key: value for key, value in overrides.items() if key != "dataset_name"}
    of_dataset = {key: value for key, value in own.items() if key in DATASET_DEFAULTS}
    if overrides.get("dataset_name", settings["dataset_name"]) != settings["dataset_name"]:
        settings = {key: value for key, value in settings.items() if key not in DATASET_DEFAULTS}
        own = {key: value for key, value in own.items() if key not in of_dataset}
        of_dataset = DATASET_DEFAULTS | of_dataset
    if "pooling_size" in own:
        settings = {**settings, "embedding_dim": None}
    params = EncoderAndDataParams(**{**settings, **own})
    in_own_size = {**settings, **{name: value for name, value in own.items() if name != "transform_crop_size"}}
    explicit = {
        "low_resolution_stem": EncoderAndDataParams(**in_own_size).low_resolution,  # another size is not another stem
        "in_channels": params.channels,
        "transform_crop_size": params.crop_size,
    }
    if len(params.mean) == params.channels:  # they differ if the user's loader yields images unlike the data set
        explicit |= {"image_mean": list(params.mean), "image_std": list(params.std)}
    other = catalogue.DATASETS.get(overrides.get("dataset_name"))
    if other is not None and not other.feeds(params.channels):
        raise ValueError(
            f"dataset_name={overrides['dataset_name']!r} has images of {other.channels} channels, the encoder takes "
            f"{params.channels}. Choose another data set."
        )
    explicit["dataset_name"] = overrides.get("dataset_name", params.dataset_name)
    return attrs.evolve(params, **explicit, **of_dataset)
