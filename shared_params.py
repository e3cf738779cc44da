"""The settings that pretraining and the linear stage share, and how both get theirs."""

import math
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, TypeVar

import attrs
import torch
from attrs import frozen
from pytorch_lightning.utilities import rank_zero_info
from torch import nn

import channel_statistics
import data
import encoders
import own_data_params
import video_params
from data import DATASETS, DatasetInfo
from fields import check_types, choice, non_negative, number, path, positive
from files import MOST_WORKERS, class_numbers
from image_ops import BLUR_RADIUS
from own_data_params import OwnDataParams
from video_params import VideoParams

LARGEST_IMAGE = 2**28  # numbers; a GiB
COMPILE_MODES = (False, True, "reduce-overhead", "max-autotune")
OF_ONE_KIND = own_data_params.DEFAULTS | video_params.DEFAULTS  # of data sets: another one begins with these


@frozen(kw_only=True)
class EncoderAndDataParams(OwnDataParams, VideoParams):
    """Encoder, data and seed."""

    # encoder model selection
    encoder_arch: str = "resnet18"  # a torchvision model, ws_resnet18...152, timm:NAME, or "module": your own
    embedding_dim: int | None = positive(None)  # inferred; checked if given
    encoder_weights: str | None = path()  # to start from: torchvision's name ("DEFAULT", ...), or a file
    low_resolution_stem: bool | None = None  # 3 x 3 stem without pooling; None: for ResNets on 32 pixels or fewer
    zero_init_residual: bool = False  # ResNets: each block begins as the identity (its last normalization at weight 0)
    stem_variant: str = choice("standard", encoders.STEM_VARIANTS)  # of the 3 x 3 stem; others: for others' weights
    in_channels: int | None = positive(None)  # None: the data set's

    # data-related parameters
    dataset_name: str = choice("stl10", DATASETS)  # data.py; $DATA_PATH says where they are
    batch_size: int = positive(256)  # of each process
    global_batch_size: int | None = positive(None)  # instead: images of one optimizer step, over all processes
    transform_crop_size: int | None = number(None, above=BLUR_RADIUS)  # None: the data set's
    image_mean: list[float] | None = None  # of each channel, of values from 0 to 1; None: the data set's
    image_std: list[float] | None = None  # likewise
    compute_statistics: bool = False  # image_mean and image_std from the training images, where they are None
    seed: int | None = non_negative(None, at_most=2**63 - 1)  # of every random draw; None: that of pl.seed_everything

    # data loader parameters
    num_data_workers: int = non_negative(4, at_most=MOST_WORKERS)  # decode image files; packed sets need none
    drop_last_batch: bool | None = True  # in training only; None: if it is less than half a batch, and not the only one
    pin_data_memory: bool = True  # for faster copies to a GPU
    data_on_device: bool | None = None  # packed sets as uint8; None: on a GPU, where they fit
    unreadable_images: str = choice("stop", ("stop", "skip"))  # skip: train on the next one, evaluate without; count

    # torch.compile of encoder, heads and, on a GPU, views
    torch_compile: bool | str = choice(False, COMPILE_MODES)  # reduce-overhead: CUDA graphs

    # learning rate by batch size: lr is meant for lr_batch_size images in one optimizer step
    lr_scaling: str | None = choice(None, (None, "linear", "sqrt"))  # None: lr is meant as it is
    lr_batch_size: int = positive(256)  # images

    def __attrs_post_init__(self):
        check_types(self)
        self.check_own_data(self.dataset.own is not None, self.dataset_name)
        self.check_videos(self.dataset.of_videos, self.dataset_name)
        encoders.check_name(self.encoder_arch)
        if self.low_resolution_stem and not encoders.has_low_resolution_stem(self.encoder_arch):
            raise ValueError(
                f"low_resolution_stem=True does not fit encoder_arch={self.encoder_arch!r}: it is for torchvision's "
                "ResNets and ws_resnets; choose one of them, or low_resolution_stem=False"
            )
        if self.zero_init_residual and not encoders.is_resnet(self.encoder_arch):
            raise ValueError(
                f"zero_init_residual=True does not fit encoder_arch={self.encoder_arch!r}: it is for torchvision's "
                "ResNets and ResNeXts and for ws_resnets; choose one of them, or zero_init_residual=False"
            )
        if self.encoder_weights is not None and self.encoder_arch == encoders.OWN_MODULE:
            raise ValueError(
                f"encoder_weights={self.encoder_weights!r} is for encoders that encoder_arch names: load those of your "
                "own module into it, and leave encoder_weights out"
            )
        if math.prod(self.input_shape) > LARGEST_IMAGE:
            made = f"clips of num_frames={self.num_frames}" if self.dataset.of_videos else "images"
            raise ValueError(
                f"transform_crop_size={self.crop_size} with in_channels={self.channels} makes {made} of more than "
                f"{LARGEST_IMAGE} numbers: choose smaller ones"
            )

        for name in ("image_mean", "image_std"):
            check_statistics(name, getattr(self, name), self.channels)

    @property
    def dataset(self) -> DatasetInfo:
        return DATASETS[self.dataset_name]

    @property
    def crop_size(self) -> int:
        return self.transform_crop_size or self.dataset.crop_size

    @property
    def channels(self) -> int:
        return self.in_channels or self.dataset.channels

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of what an encoder gets: (C, H, W), or of clips (C, T, H, W)."""
        frames = (self.num_frames,) if self.dataset.of_videos else ()
        return (self.channels, *frames, self.crop_size, self.crop_size)

    @property
    def clips_of_a_video(self) -> int:
        """How many an evaluation averages; 1 of images."""
        return self.evaluation_clips * self.evaluation_crops

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel; gray images are repeated for an encoder of colours."""
        return self.of_each_channel(self.image_mean or self.dataset.mean)

    @property
    def std(self) -> tuple[float, ...]:
        return self.of_each_channel(self.image_std or self.dataset.std)

    def of_each_channel(self, values: Sequence[float]) -> tuple[float, ...]:
        if self.dataset.own is not None and len(values) not in (1, self.channels):  # ImageNet's, of other channels
            return (round(sum(values) / len(values), 3),) * self.channels
        return tuple(values) * (3 if len(values) == 1 and self.channels == 3 else 1)

    @property
    def low_resolution(self) -> bool:
        if self.low_resolution_stem is None:
            return encoders.has_low_resolution_stem(self.encoder_arch) and self.crop_size <= 32
        return self.low_resolution_stem


def check_statistics(name: str, values: Any, channels: int) -> None:
    lowest = 1e-6 if name == "image_std" else 0
    if values is None:
        return
    numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values)
    if not numbers or len(values) != channels or not all(lowest <= v <= 1 for v in values):
        wanted = f"{channels} numbers, one a channel, from {lowest:g} to 1"
        raise ValueError(f"{name}={values!r} must be a list of {wanted}")


Params = TypeVar("Params", bound=EncoderAndDataParams)


def resolve(
    kind: type[Params], params: Params | dict | None, encoder: nn.Module | None, fields: dict[str, Any]
) -> tuple[Params, bool]:
    """`params` (settings, a dict of them, or None for the defaults), changed by `fields`; whether the seed was None.

    A module of the user's own as encoder says so in encoder_arch; seed=None becomes that of `pl.seed_everything`. The
    argument `hparams`, as the original named it, is another name of `params`.
    """
    if (hparams := fields.pop("hparams", None)) is not None:
        if params is not None:
            raise ValueError("hparams and params are two names of one argument: pass one of them")
        params = dict(vars(hparams)) if isinstance(hparams, Namespace) else hparams
    if encoder is not None:
        fields = {**fields, "encoder_arch": encoders.OWN_MODULE}
    params = kind(**params) if isinstance(params, dict) else params or kind()
    params = attrs.evolve(params, **fields)
    seed_is_drawn = params.seed is None
    if seed_is_drawn:
        params = attrs.evolve(params, seed=torch.initial_seed() % 2**32)
    return with_statistics(params) if params.compute_statistics else params, seed_is_drawn


def with_statistics(params: Params) -> Params:
    """image_mean and image_std, where they are None, are those of the training images."""
    if params.image_mean is not None and params.image_std is not None:
        return params
    dataset = data.get_dataset(params, params.dataset.pretraining_splits)
    found = channel_statistics.of_images(dataset, params.data_seed)
    mean, std = (list(params.of_each_channel(values)) for values in found)
    params = attrs.evolve(params, image_mean=params.image_mean or mean, image_std=params.image_std or std)
    rank_zero_info(f"{params.dataset_name}: image_mean={params.image_mean}, image_std={params.image_std}")
    return params


def n_classes(params: EncoderAndDataParams) -> int:
    """Number of classes in the training images: other splits have no others. 0 where they have no labels.

    Counted in images of the user's, in videos and in class folders, since there are sets of other sizes under one name
    (ImageNet-100, Kinetics-200, ...). The table of data.py says how many there are where they are not on disk.
    """
    info, (split,) = params.dataset, params.dataset.train_splits
    folder = data.data_path() / params.dataset_name / split
    if info.counts_folders and folder.is_dir():
        return len(set(class_numbers(folder).values()))
    if info.own is None and not (info.of_videos and info.files.are_there(folder)):
        return info.n_classes
    return 1 + int(data.get_dataset(params, (split,)).labels.max())


def labelled(classes: int, params: EncoderAndDataParams) -> int:
    """Refuses images without labels, and those with several."""
    if params.dataset.many_labels:
        raise ValueError(
            f"dataset_name={params.dataset_name!r}: its images have several labels each, and a classifier needs one. "
            "Choose another data set, or leave the classifier out."
        )
    if classes < 1:
        raise ValueError(
            f"the images of dataset_name={params.dataset_name!r}, data_path={params.data_path!r} have no labels, which "
            "a classifier needs: put them into class folders, or list labels in train.txt (docs/own_data.md)"
        )
    return classes
