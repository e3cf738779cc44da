"""A frozen encoder whose embeddings are the keys: `params.teacher`."""

import os

import attrs
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from model_params import DROP_LAST, ModelParams
from self_supervised import distributed
from self_supervised.data.foreign_paths import refuse_foreign
from self_supervised.networks.encoder_hash import encoder_hash
from self_supervised.networks.output_sizes import measured_width
from self_supervised.networks.pretrained import load_encoder
from self_supervised.numerics import at_least_float32, in_parts
from self_supervised.views.tensor_ops import normalize

EPSILON = 1e-4  # added to standard deviations, for dimensions that are constant


class Teacher:
    """Embeddings [N, E] of the student's normalized views [N, C, H, W] by the encoder `params.teacher`.

    A view is resized to the teacher's input and normalized with its constants. The teacher sees the channels
    `params.teacher_channels`, by default all of them; a single one is repeated. Each dimension of the embeddings is
    standardized over the images of all processes, because those of ReLU networks point in similar directions (PHI-S,
    https://arxiv.org/abs/2410.01680, standardizes teachers, too).

    Raises:
        ValueError: the teacher takes another number of channels, or one of both takes clips.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, params: ModelParams):
        refuse_foreign("teacher", params.teacher)
        name = f"teacher={params.teacher!r}"
        try:
            own_size = {"transform_crop_size": params.teacher_crop_size} if params.teacher_crop_size else {}
            self.encoder = load_encoder(params.teacher, **own_size)
        except FileNotFoundError as error:
            reason = str(error).removesuffix(".")
            raise FileNotFoundError(
                f"{name}: {reason}. Pass teacher=PATH, or teacher=None to load the student alone."
            ) from error
        except ValueError as error:
            if "encoder_arch=NAME" not in str(error):
                raise
            raise ValueError(
                f"{name}: {error} A teacher has no such options. Name the architecture once and pass the file that is "
                f"written: self-supervised export {params.teacher} --encoder_arch NAME --format safetensors"
            ) from error
        is_name = self.encoder.report.layout == "published"
        self.name = params.teacher if is_name else os.path.abspath(params.teacher)
        self.channels = params.teacher_channels or list(range(params.channels))
        theirs = self.encoder.params
        if theirs.dataset.of_videos or params.dataset.of_videos:
            raise ValueError(
                f"{name}, dataset_name={params.dataset_name!r}: a teacher sees images only. Set teacher=None."
            )
        if len(self.channels) not in (1, theirs.channels) or max(self.channels) >= params.channels:
            raise ValueError(
                f"{name} takes {theirs.channels} channels, and these images have {params.channels}, from 0 to "
                f"{params.channels - 1}. Set teacher_channels to those that it sees (is {params.teacher_channels})."
            )
        self.width = measured_width(self.encoder, torch.zeros(1, *theirs.input_shape), name)
        if params.dim not in (self.width, attrs.fields(ModelParams).dim.default):
            rank_zero_info(f"dim={params.dim} is replaced by {self.width}, the width of the embeddings of {name}")
        self.size = theirs.crop_size
        self.hash = encoder_hash(self.encoder)
        self.most_at_once = params.micro_batch_size
        student = [(params.mean[channel], params.std[channel]) for channel in self.channels * theirs.channels]
        constants = list(zip(student, theirs.mean, theirs.std, strict=False))
        self.mean = tuple((mean - own) / own_std for (own, own_std), mean, _ in constants)
        self.std = tuple(std / own_std for (_, own_std), _, std in constants)

    def refuse_another(self, hash_of_checkpoint: str | None) -> None:
        """Raise ValueError if a checkpoint was made with a teacher of other weights."""
        if hash_of_checkpoint != self.hash:
            raise ValueError(
                f"teacher={self.name!r}: its weights are not those of the checkpoint's teacher. Pass that one."
            )

    @torch.no_grad()
    def __call__(self, view: Tensor) -> Tensor:
        embeddings = torch.cat([self.encoded(part) for part in in_parts(view, self.most_at_once)])
        embeddings = embeddings.to(at_least_float32(view).dtype)
        of_all = distributed.gather(embeddings)
        if len(of_all) < 2:
            raise ValueError(f"a teacher needs two images, but a batch has one. Set {DROP_LAST}.")
        return (embeddings - of_all.mean(0)) / (of_all.std(0, correction=0) + EPSILON)

    def encoded(self, view: Tensor) -> Tensor:
        x = view[:, self.channels].float().expand(-1, len(self.mean), -1, -1)
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.encoder.to(x.device)(normalize(x, self.mean, self.std))
