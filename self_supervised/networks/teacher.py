"""A frozen encoder whose embeddings are the keys: `params.teacher`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_params import ModelParams
from self_supervised.data.foreign_paths import refuse_foreign
from self_supervised.networks.encoders import measured_width
from self_supervised.networks.pretrained import load_encoder
from self_supervised.views.tensor_ops import normalize


class Teacher(nn.Module):
    """Embeddings [N, E] of the student's normalized views [N, C, H, W] by the encoder `params.teacher`.

    A view is resized to the teacher's input and normalized with its constants. The teacher sees the channels
    `params.teacher_channels`, by default all of them; a single one is repeated.

    Raises:
        ValueError: the teacher takes another number of channels, or only one of both takes clips.
    """

    def __init__(self, params: ModelParams):
        super().__init__()
        refuse_foreign("teacher", params.teacher)
        self.encoder = load_encoder(params.teacher)
        self.channels = params.teacher_channels or list(range(params.channels))
        theirs, name = self.encoder.params, f"teacher={params.teacher!r}"
        if theirs.dataset.of_videos or params.dataset.of_videos:
            raise ValueError(f"{name} with dataset_name={params.dataset_name!r}: only images can have a teacher")
        if len(self.channels) not in (1, theirs.channels) or max(self.channels) >= params.channels:
            raise ValueError(
                f"{name} takes {theirs.channels} channels, and these images have {params.channels}. Set "
                "teacher_channels to those that it sees, such as [0, 1, 2]"
            )
        self.width = measured_width(self.encoder, torch.zeros(1, *theirs.input_shape), name)
        self.size = theirs.crop_size
        student = [(params.mean[channel], params.std[channel]) for channel in self.channels * theirs.channels]
        constants = list(zip(student, theirs.mean, theirs.std, strict=False))
        self.mean = tuple((mean - own) / own_std for (own, own_std), mean, _ in constants)
        self.std = tuple(std / own_std for (_, own_std), _, std in constants)

    @torch.no_grad()
    def forward(self, view: Tensor) -> Tensor:
        x = view[:, self.channels].expand(-1, len(self.mean), -1, -1)
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.encoder.to(x.device)(normalize(x, self.mean, self.std))
