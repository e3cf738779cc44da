"""Weights in: a checkpoint, anybody's weights file or a published model's name -> a complete encoder, or a refusal."""

from pathlib import Path
from typing import Any

import torch
from attrs import fields, frozen
from torch import Tensor, nn

import augmentations
import checkpoints
from encoders import get_encoder
from shared_params import EncoderAndDataParams

SHARED = {field.name for field in fields(EncoderAndDataParams)}


@frozen
class Report:
    """Where an encoder's tensors came from."""

    source: str  # path or name
    layout: str  # a row of LAYOUTS, or "published"
    matched: int  # tensors of the encoder, all of them
    left_out: tuple[str, ...]  # keys of the file that are no part of the encoder: heads, queues, the other network

    def __str__(self) -> str:
        return f"{self.source}: {self.layout}, all {self.matched} tensors loaded, {len(self.left_out)} left out"


class Encoder(nn.Module):
    """A frozen encoder in eval mode, and what one must know to feed it.

    `params` holds its architecture, its image size and the constants by which its images were normalized.
    """

    def __init__(self, model: nn.Module, params: EncoderAndDataParams, report: Report):
        super().__init__()
        self.model, self.params, self.report = model.requires_grad_(False).eval(), params, report

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images [N, C, H, W] -> embeddings [N, E]."""
        return self.model(x)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images [N, C, H, W] of any size -> normalized floats of the encoder's size, whole images."""
        return augmentations.evaluation_view(images, self.params)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """uint8 images [N, C, H, W] of any size -> embeddings [N, E], float32, on the encoder's device."""
        device = next(self.model.parameters()).device
        return self.model(self.prepare(images.to(device))).float()


def load_encoder(path_or_name: str | Path, *, encoder: nn.Module | None = None, **overrides: Any) -> Encoder:
    """The encoder of a checkpoint or weights file, or a published one by name ("resnet50", "timm:vit_small_...").

    Args:
        path_or_name: a file, or the name of an encoder whose published weights are wanted.
        encoder: your own module, if the encoder was one.
        overrides: fields of EncoderAndDataParams, such as encoder_arch, where the file does not say or says it wrong.

    Raises:
        FileNotFoundError: there is no such file, and no such encoder.
        ValueError: the file does not hold exactly the parameters of the encoder; says which differ.
    """
    path = Path(path_or_name).expanduser()
    checkpoint = checkpoints.read(path)
    settings = {key: value for key, value in checkpoint["hyper_parameters"].items() if key in SHARED}
    params = EncoderAndDataParams(**{**settings, "encoder_weights": None, **overrides})
    model, _ = get_encoder(params, encoder)
    state = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")}
    model.load_state_dict(state)
    left_out = tuple(key for key in checkpoint["state_dict"] if not key.startswith("model."))
    return Encoder(model, params, Report(str(path), "self_supervised", len(state), left_out))
