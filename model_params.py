"""Every setting once, what cannot go together, and the presets. A method is a row of settings, not a class."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attrs import evolve, field, fields, fields_dict, frozen

from self_supervised import catalogue
from self_supervised.catalogue import (
    BLUR_RADIUS,
    CURVES,
    DATASETS,
    EVALUATIONS,
    GROUPS,
    MOST_WORKERS,
    NORMALIZATIONS,
    NORMS_AND_BIASES,
    PROBE_SOLVERS,
    STEM_VARIANTS,
    DatasetInfo,
    ViewSettings,
)
from self_supervised.fields import (
    check_parameter_options,
    check_types,
    choice,
    defaults,
    fraction,
    list_of_numbers,
    non_negative,
    number,
    numbers,
    path,
    per_view,
    plain,
    positive,
)

LARGEST_IMAGE = 2**28  # numbers; a GiB
LARGEST_QUEUE = 2**34  # numbers, 64 GiB
LARGEST_WIDTH = 2**17
MOST_LAYERS = 20
MOST_FRAMES = 1024
MOST_VIEWS = 100
LARGEST_CROP = 2**14
STRONGEST = 5
COMPILE_MODES = (False, True, "reduce-overhead", "max-autotune")
LOSSES = ("ce", "bce", "ip", "sce", "vic", "barlow")
NEED_NEGATIVES = ("ce", "sce")
HEADS = ("projection", "prediction")
LAST_NORMALIZATIONS = (None, "same", *NORMALIZATIONS)
SCHEDULED = ("sce_coefficient", "sce_target_T")
WARMUPS = ("linear", "cosine")
PerView = float | list[float] | None

CUSTOM_DATA = (
    "data_path",
    "image_key",
    "label_key",
    "include_patterns",
    "exclude_patterns",
    "labels_from",
    "class_to_idx",
    "val_size",
    "test_size",
    "data_fraction",
    "data_seed",
    "splits_path",
    "pixel_range",
)  # fields of the user's own images; other data sets refuse them
VIDEO = (
    "num_frames",
    "clip_duration",
    "clip_speeds",
    "clip_jitter",
    "video_decoder",
    "frames_per_second",
    "decoding_threads",
    "video_path_prefix",
    "evaluation_clips",
    "evaluation_crops",
)  # fields of videos
TRAINING_ONLY = ("clip_speeds", "clip_jitter")  # drawn at random for its views; an evaluation has neither
VIDEO_READING = ("video_decoder", "decoding_threads")  # sce_video sets them, and a preset may be tried on images


# ---- what pretraining and the linear stage share ----


def class_to_idx_entries(value: Any) -> Any:
    """{"cat": 0}, the path of a JSON file with such an object, or ["cat=0"] -> ["cat=0"], which a checkpoint can hold.

    Raises:
        ValueError: it is none of them.
    """
    value = [value] if isinstance(value, str | Path) else value
    if isinstance(value, list | tuple) and len(value) == 1 and not re.search(r"=-?\d+$", str(value[0])):
        try:
            file = Path(str(value[0])).expanduser()
            if not file.is_file():  # a device or a pipe may never end
                raise OSError("it is not a regular file")
            value = json.loads(file.read_text())
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: there is no home of ~somebody
            raise ValueError(f"class_to_idx={str(value[0])!r} could not be read as a file of JSON: {error}") from error
    if isinstance(value, dict):
        value = [f"{name}={number}" for name, number in value.items()]
    return plain(value)


def is_range(value: Any) -> bool:
    """Two finite numbers, the first below the second."""
    numbers = isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
    return numbers and -math.inf < value[0] < value[1] < math.inf


@frozen(kw_only=True)
class EncoderAndDataParams:
    """Encoder, data and seed."""

    # encoder model selection
    encoder_arch: str = "resnet18"  # a torchvision model, ws_resnet18...152, timm:NAME, or "module": your own
    embedding_dim: int | None = positive(None)  # inferred; checked if given
    encoder_weights: str | None = path()  # to start from: torchvision's name ("DEFAULT", ...), or a file
    low_resolution_stem: bool | None = None  # 3 x 3 stem without pooling; None: for ResNets on 32 pixels or fewer
    zero_init_residual: bool = False  # ResNets: each block begins as the identity (its last normalization at weight 0)
    stem_variant: str = choice("standard", STEM_VARIANTS)  # of the 3 x 3 stem; others: for others' weights
    in_channels: int | None = positive(None)  # None: the data set's

    # data-related parameters
    dataset_name: str = choice("stl10", DATASETS)  # data/loading.py; $DATA_PATH says where they are
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

    # images of one's own
    data_path: str | None = path()  # a folder, or shards/train-{000..099}.tar; None: $DATA_PATH/<dataset_name>
    image_key: str | None = None  # column of a Hugging Face set, or endings in shards: "jpg;png"; None: any image
    label_key: str | None = None  # likewise, or entry of the .json in shards; None: label, cls
    include_patterns: list[str] = field(factory=list)  # "*.png", "cats/*": only paths, or file names, like one of them
    exclude_patterns: list[str] = field(factory=list)  # and like none of these: "*_mask.png", "*/thumbnails/*"
    labels_from: str | None = choice("first_folder", ("first_folder", "last_folder", None))  # of a path; None: none
    class_to_idx: list[str] | None = field(default=None, converter=class_to_idx_entries)  # dict, JSON file or ["cat=0"]
    val_size: float = number(0.1, at_most=0.9)  # share of every class, where the data has no val and no test
    test_size: float = number(0.1, at_most=0.9)  # likewise
    data_fraction: float = number(1.0, above=0, by=1e-9, at_most=1)  # of every class of the training images
    data_seed: int = non_negative(0, at_most=2**63 - 1)  # draws the splits and the fraction, whatever `seed` is
    splits_path: str | None = path()  # folder of the lists train.txt, val.txt, test.txt: written once, then reused
    # what is black and white in .npy, TIFF and other 16-bit files; None: that of their type
    pixel_range: list[float] | None = field(default=None, converter=plain)

    # video: data sets of videos only. Each view is a clip of its own
    num_frames: int = positive(8, at_most=MOST_FRAMES)  # of a clip, evenly taken from its duration
    clip_duration: float = positive(2.56, by=1e-3)  # seconds
    clip_speeds: list[float] = numbers((1.0,), 0.01, 100)  # one is drawn for each clip; 2: of twice the duration
    clip_jitter: float = number(0.0, at_most=0.99)  # of the speed, at random: 0.2 is 0.8 to 1.2 times it
    video_decoder: str = choice("file", ("file", "frames"))  # frames: each video is a folder of image files
    frames_per_second: float = positive(30.0, by=1e-3)  # of folders of frames; a video file knows its own
    decoding_threads: int = positive(1, at_most=MOST_WORKERS)  # of each worker
    video_path_prefix: str | None = path()  # of the paths in train.csv, val.csv; None: the folder train, val
    evaluation_clips: int = positive(1, at_most=MOST_FRAMES)  # of each video, averaged; training: one for each view
    evaluation_crops: int = positive(1, at_most=MOST_FRAMES)  # of each of them: the middle; else along the longer side

    def __attrs_post_init__(self):
        check_types(self)
        refuse(contradictions_of_data(self))
        catalogue.check_name(self.encoder_arch)
        refuse(contradictions_of_encoder(self))
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
        """Of each channel; gray images are repeated for an encoder of colors."""
        return self.of_each_channel(self.image_mean or self.dataset.mean)

    @property
    def std(self) -> tuple[float, ...]:
        return self.of_each_channel(self.image_std or self.dataset.std)

    def of_each_channel(self, values: Sequence[float]) -> tuple[float, ...]:
        if self.dataset.is_custom and len(values) not in (1, self.channels):  # ImageNet's, of other channels
            return (round(sum(values) / len(values), 3),) * self.channels
        return tuple(values) * (3 if len(values) == 1 and self.channels == 3 else 1)

    @property
    def low_resolution(self) -> bool:
        if self.low_resolution_stem is None:
            return catalogue.has_low_resolution_stem(self.encoder_arch) and self.crop_size <= 32
        return self.low_resolution_stem


def refuse(contradictions: Iterable[tuple[bool, str]]) -> None:
    """Raise ValueError with the first message of a list of (whether it applies, message)."""
    for applies, message in contradictions:
        if applies:
            raise ValueError(message)


DATASET_DEFAULTS = defaults(EncoderAndDataParams, (*CUSTOM_DATA, *VIDEO))  # of data sets: another one begins with these


def contradictions_of_data(params: EncoderAndDataParams) -> Iterator[tuple[bool, str]]:
    """Yield (whether the settings contradict each other, how, and the way out)."""
    p = params
    yield (
        p.val_size + p.test_size > 0.95,
        f"val_size={p.val_size} and test_size={p.test_size} leave too little to train on: choose smaller ones",
    )
    yield (
        p.pixel_range is not None and not is_range(p.pixel_range),
        f"pixel_range={p.pixel_range} must be two finite numbers: the value of black, and that of white",
    )
    parts = [entry.rpartition("=") for entry in p.class_to_idx or []]
    yield (
        not all(name and number.isdecimal() for name, _, number in parts),
        f"class_to_idx={p.class_to_idx} must give each class a whole number: {{'cat': 0, 'dog': 1}}",
    )
    for name in () if p.dataset.is_custom else CUSTOM_DATA:
        yield (
            getattr(p, name) != DATASET_DEFAULTS[name],
            f"{name}={getattr(p, name)!r} is for data of your own, not for dataset_name={p.dataset_name!r}: leave it "
            "out, or set dataset_name='folder'",
        )
    for name in () if p.dataset.of_videos else VIDEO:
        is_set = getattr(p, name) != DATASET_DEFAULTS[name] and name not in VIDEO_READING
        yield is_set, only_for_videos(name, getattr(p, name), p.dataset_name)


def contradictions_of_encoder(params: EncoderAndDataParams) -> list[tuple[bool, str]]:
    """Return (whether the settings contradict each other, how, and the way out)."""
    p = params
    catalogue.check_name(p.encoder_arch)
    made = f"clips of num_frames={p.num_frames}" if p.dataset.of_videos else "images"
    # fmt: off
    return [
        (bool(p.low_resolution_stem) and not catalogue.has_low_resolution_stem(p.encoder_arch),
         f"low_resolution_stem=True does not fit encoder_arch={p.encoder_arch!r}: it is for torchvision's ResNets and "
         "ws_resnets; choose one of them, or low_resolution_stem=False"),
        (p.zero_init_residual and not catalogue.is_resnet(p.encoder_arch),
         f"zero_init_residual=True does not fit encoder_arch={p.encoder_arch!r}: it is for torchvision's ResNets and "
         "ResNeXts and for ws_resnets; choose one of them, or zero_init_residual=False"),
        (p.encoder_weights is not None and p.encoder_arch == catalogue.OWN_MODULE,
         f"encoder_weights={p.encoder_weights!r} is for encoders that encoder_arch names: load those of your own "
         "module into it, and leave encoder_weights out"),
        (math.prod(p.input_shape) > LARGEST_IMAGE,
         f"transform_crop_size={p.crop_size} with in_channels={p.channels} makes {made} of more than {LARGEST_IMAGE} "
         "numbers: choose smaller ones"),
    ]
    # fmt: on


def only_for_videos(name: str, value: Any, dataset_name: str) -> str:
    way_out = "leave it out, or set dataset_name='kinetics'"
    return f"{name}={value!r} is for videos, not for dataset_name={dataset_name!r}: {way_out}"


def check_statistics(name: str, values: Any, channels: int) -> None:
    lowest = 1e-6 if name == "image_std" else 0
    if values is None:
        return
    numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values)
    if not numbers or len(values) != channels or not all(lowest <= v <= 1 for v in values):
        wanted = f"{channels} numbers, one a channel, from {lowest:g} to 1"
        raise ValueError(f"{name}={values!r} must be a list of {wanted}")


# ---- pretraining ----


@frozen(kw_only=True)
class ModelParams(EncoderAndDataParams):
    """Settings of SelfSupervisedMethod. The defaults are MoCo v2."""

    # batch statistics of the keys
    shuffle_batch_norm: bool = False  # keys share batch statistics with other images than their queries do
    n_virtual_devices: int = positive(8)  # for shuffle_batch_norm on one process: parts of the shuffled keys' batch

    # MoCo parameters
    K: int = non_negative(65536)  # number of examples in queue
    dim: int = positive(128, at_most=LARGEST_WIDTH)  # width of the projections
    m: float = fraction(0.996)  # share of itself that the lagging model keeps in a step
    T: float = positive(0.2, by=1e-4)  # temperature

    # eqco parameters
    eqco_alpha: float = positive(65536)  # as many negatives as the loss behaves like
    use_eqco_margin: bool = False  # the margin that eqco_alpha makes
    use_negative_examples_from_batch: bool = False  # the other images' keys
    use_negative_examples_from_same_view: bool = False  # the other images' queries, as in SimCLR

    # Change these to make more like BYOL
    use_momentum_schedule: bool = False  # m rises to 1 along half a cosine
    loss_constant_factor: float = positive(1, at_most=1e6)  # the loss is multiplied by it
    loss_type: str = choice("ce", LOSSES)  # ce: InfoNCE, ip: BYOL, vic: VICReg; losses.py
    use_negative_examples_from_queue: bool = True  # keys of earlier batches
    use_both_augmentations_as_queries: bool = False  # the loss in both directions
    stop_gradient_of_keys: bool = False  # for SimSiam; keys of a lagging model have no gradient anyway

    # Change these to make more like VICReg
    use_vicreg_loss: bool = False  # another way to say loss_type="vic"
    use_lagging_model: bool = True  # keys come from a slow copy of the network
    use_unit_sphere_projection: bool = True  # projections have length 1
    invariance_loss_weight: float = non_negative(25.0, at_most=1e6)  # VICReg's lambda
    variance_loss_weight: float = non_negative(25.0, at_most=1e6)  # VICReg's mu
    covariance_loss_weight: float = non_negative(1.0, at_most=1e6)  # VICReg's nu
    variance_loss_epsilon: float = positive(1e-4)  # within the root of the variance
    redundancy_loss_weight: float = non_negative(0.0051, at_most=1e6)  # Barlow Twins' lambda

    # several processes
    gather_keys_for_queue: bool | None = None  # into every queue; None: where there are several

    # evaluation during training
    evaluations: list[str] = field(factory=lambda: list(EVALUATIONS))  # [] for none
    evaluate_every_n_epochs: int = positive(1)  # the other epochs are not evaluated
    probe_solver: str = choice("sklearn", PROBE_SOLVERS)  # of linear_probe; torch: on the features' device
    online_classifier: bool = False  # a linear one, trained beside the method on the batches' labels (-1: none)
    n_classes: int | None = positive(None)  # of the online classifier; None: the data set's
    online_classifier_lr: float = positive(0.1, at_most=1000)  # follows lr_schedule; momentum as all, no decay
    probe_on_training_set: bool = False  # fit on the labeled training set instead of half of the validation set

    # sce parameters
    sce_coefficient: float = fraction(0.5)  # fraction of the target on the own key. 1: InfoNCE, 0: ReSSL
    sce_target_T: float = positive(0.05, by=1e-4)  # sharper than T

    # sce: the coefficient's schedule, in optimizer steps of the Trainer
    sce_coefficient_warmup_epochs: float = non_negative(0)  # in which it goes from its start to sce_coefficient
    sce_coefficient_warmup_start: float = fraction(1.0)  # as if it were InfoNCE
    sce_coefficient_warmup: str = choice("linear", WARMUPS)  # how it goes there
    sce_coefficient_schedule: str = choice("constant", CURVES)  # after the warm-up
    sce_coefficient_final: float = fraction(0.0)  # linear, cosine: what it goes to, reached at the end

    # sce: the target temperature's schedule, likewise
    sce_target_T_warmup_epochs: float = non_negative(0)  # in which it goes from its start to sce_target_T
    sce_target_T_warmup_start: float | None = positive(None, by=1e-4)  # to be set where there is a warm-up
    sce_target_T_warmup: str = choice("cosine", WARMUPS)  # how it goes there
    sce_target_T_schedule: str = choice("constant", CURVES)  # after the warm-up
    sce_target_T_final: float | None = positive(None, by=1e-4)  # linear, cosine: what it goes to, reached at the end

    # MLP parameters
    projection_mlp_layers: int = non_negative(2, at_most=MOST_LAYERS)  # 0: none
    prediction_mlp_layers: int = non_negative(0, at_most=MOST_LAYERS)  # 0: none; 2 in BYOL
    mlp_hidden_dim: int = positive(512, at_most=LARGEST_WIDTH)  # of both
    projection_mlp_hidden_dims: list[int] = list_of_numbers(1, LARGEST_WIDTH)  # one a hidden layer; []: mlp_hidden_dim
    prediction_mlp_hidden_dims: list[int] = list_of_numbers(1, LARGEST_WIDTH)  # likewise
    mlp_normalization: str | None = choice(None, (None, *NORMALIZATIONS))  # of hidden layers
    prediction_mlp_normalization: str | None = choice("same", (None, "same", *NORMALIZATIONS))  # of hidden layers
    use_mlp_weight_standardization: bool = False  # of their linear layers
    mlp_bias: bool = True  # of the linear layers before hidden ones, of both; a normalization makes it superfluous

    # the last layer of each MLP
    projection_mlp_last_bias: bool = True  # of the linear layer
    prediction_mlp_last_bias: bool = True  # likewise
    projection_mlp_last_normalization: str | None = choice(None, LAST_NORMALIZATIONS)  # same: as hidden layers
    prediction_mlp_last_normalization: str | None = choice(None, LAST_NORMALIZATIONS)  # likewise
    mlp_last_affine: bool = True  # whether these two normalizations have weights and biases

    # how many views
    n_large_views: int = number(2, at_least=2, at_most=MOST_VIEWS)  # of each image; keys are of large views only
    n_small_views: int = number(0, at_most=MOST_VIEWS)  # of each image; queries for the keys of all large views
    transform_small_crop_size: PerView = per_view(None, BLUR_RADIUS + 1, LARGEST_CROP, whole=True)  # None: 3/7 of large
    transform_small_crop_scale_min: PerView = per_view(0.05)  # smallest share of the image's area
    transform_small_crop_scale_max: PerView = per_view(0.14)  # largest share of the image's area

    # how each view is made: PerView; None: the data set's
    transform_crop_scale_min: PerView = per_view(None)  # smallest share of the image's area; of large views
    transform_crop_scale_max: PerView = per_view(None)  # largest share of the image's area; of large views
    transform_crop_ratio_min: PerView = per_view(None, 0.01, 100)  # narrowest crop, width / height
    transform_crop_ratio_max: PerView = per_view(None, 0.01, 100)  # widest crop, width / height
    transform_s: PerView = per_view(0.5, 0, STRONGEST)  # strength of the color jitter
    transform_brightness: PerView = per_view(None, 0, STRONGEST)  # 0.4: factors 0.6 to 1.4; None: 0.8 transform_s
    transform_contrast: PerView = per_view(None, 0, STRONGEST)  # by factors, as brightness; None: 0.8 transform_s
    transform_saturation: PerView = per_view(None, 0, STRONGEST)  # by factors, as brightness; None: 0.8 transform_s
    transform_hue: PerView = per_view(None, 0, 0.5)  # share of the color wheel, both ways; None: 0.2 transform_s
    transform_jitter_probability: PerView = per_view(None)  # of brightness, contrast, saturation and hue together
    transform_grayscale_probability: PerView = per_view(None)  # of losing the colors
    transform_apply_blur: bool = True  # False: no blur, whatever its probability
    transform_blur_probability: PerView = per_view(None)  # of a Gaussian blur
    transform_blur_sigma_min: PerView = per_view(None, 0.01, BLUR_RADIUS / 2)  # pixels
    transform_blur_sigma_max: PerView = per_view(None, 0.01, BLUR_RADIUS / 2)  # pixels; the kernel has 13
    transform_solarize_probability: PerView = per_view(None)  # of inverting bright values
    transform_solarize_threshold: PerView = per_view(None)  # from which on they are inverted; white is 1
    transform_flip_probability: PerView = per_view(None)  # of mirroring
    transform_time_difference_probability: PerView = per_view(None)  # of clips: what changes, instead of colors

    # optimization parameters
    optimizer_name: str = choice("sgd", ("sgd", "lars", "adamw", "adam"))  # lars: for large batches
    lr: float = positive(0.5, at_most=1000)  # learning rate: the highest, after the warm-up
    momentum: float = fraction(0.9)  # of sgd and lars
    weight_decay: float = non_negative(1e-4, at_most=1000)  # not of parameters that are excluded below
    max_epochs: int = positive(320)  # for the programs that make the Trainer; schedules follow the Trainer
    lars_eta: float = positive(1e-3, at_most=1000)  # trust coefficient of lars
    grad_clip_lars: bool = False  # lars: no parameter's rate above lr
    exclude_matching_parameters_from_lars: list[str] = field(factory=list)  # [".bias", ".bn"]: every bias and norm

    # schedules, in optimizer steps of the Trainer
    lr_schedule: str = choice("cosine", ("cosine", "linear", "steps", "constant"))  # after the warm-up
    final_lr_schedule_value: float = non_negative(0.0, at_most=1000)  # a learning rate; steps: the lowest
    lr_decay_steps: list[float] = list_of_numbers()  # steps: epochs from the beginning, as [60, 80]
    lr_decay_factor: float = positive(0.1, at_most=1)  # steps: of the rate, at each of them
    warmup_epochs: float | None = non_negative(None)  # None: lars_warmup_epochs, else 0
    lars_warmup_epochs: float = non_negative(1)  # with lars, where warmup_epochs is None
    warmup_start_lr: float = non_negative(0.0, at_most=1000)  # the warm-up's line rises from here
    final_weight_decay: float | None = non_negative(None, at_most=1000)  # None: constant; else along half a cosine

    # single parameters
    layer_decay: float = positive(1.0, at_most=1)  # stages of the encoder: each has the next one's rate times this
    # [{"pattern": "projection", "lr_mult": 10}, ...]: by regular expression of the name; parameter_groups.py
    parameter_options: list[dict[str, Any]] = field(factory=list, converter=plain, validator=check_parameter_options)

    def __attrs_post_init__(self):
        super().__attrs_post_init__()
        if self.use_vicreg_loss and self.loss_type == "ce":  # the default, hence nobody's wish
            object.__setattr__(self, "loss_type", "vic")
        refuse(contradictions_of_method(self))
        refuse(contradictions_of_heads(self))
        refuse(contradictions_of_numbers(self))
        refuse(contradictions_of_optimizer(self))
        refuse(contradictions_of_sce(self))
        refuse(contradictions_of_views(self))
        _ = self.views  # refuses lists of the wrong length

    @property
    def is_evaluated(self) -> bool:
        return bool(self.evaluations) or self.online_classifier

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(query view, key view) of every term of the loss.

        Of large views every ordered pair with use_both_augmentations_as_queries, else the first view with each other.
        A small view is a query for the key of every large view, and never a key itself (SwAV's multi-crop,
        https://arxiv.org/abs/2006.09882, section 3.2). `vic` and `barlow` compare the batches of z of the same pairs,
        as VICRegL does (https://arxiv.org/abs/2210.01571).
        """
        large, small = range(self.n_large_views), range(self.n_large_views, self.n_views)
        queries = large if self.use_both_augmentations_as_queries else large[:1]
        return [(i, j) for i in [*queries, *small] for j in large if i != j]

    @property
    def loss_factor(self) -> float:
        """Of the mean over pairs. With two views the loss is the sum over pairs times loss_constant_factor, as in BYOL
        and SimCLR; more views do not change its size (as in SwAV and DINO), so that the same lr fits."""
        return (2 if self.use_both_augmentations_as_queries else 1) * self.loss_constant_factor

    @property
    def n_views(self) -> int:
        return self.n_large_views + self.n_small_views

    @property
    def views(self) -> list[ViewSettings]:
        """One row of settings a view: the data set's, changed by the transform_... fields.

        Raises:
            ValueError: a list has too few or too many values, or a smallest value is above the largest.
        """
        return [view_of(self, i) for i in range(self.n_views)]

    def head(self, name: str) -> dict[str, Any]:
        """Of "projection" or "prediction": the arguments of heads.MLP, beside the widths of its input and output."""
        n_layers, normalization = getattr(self, f"{name}_mlp_layers"), self.mlp_normalization
        if name == "prediction" and self.prediction_mlp_normalization != "same":
            normalization = self.prediction_mlp_normalization
        last = getattr(self, f"{name}_mlp_last_normalization")
        return {
            "hidden_dim": getattr(self, f"{name}_mlp_hidden_dims") or [self.mlp_hidden_dim] * max(0, n_layers - 1),
            "n_layers": n_layers,
            "normalization": normalization,
            "weight_standardization": self.use_mlp_weight_standardization,
            "bias": self.mlp_bias,
            "last_bias": getattr(self, f"{name}_mlp_last_bias"),
            "last_normalization": normalization if last == "same" else last,
            "last_affine": self.mlp_last_affine,
        }


def contradictions_of_method(params: ModelParams) -> list[tuple[bool, str]]:
    """Return (whether the settings contradict each other, how, and the way out)."""
    p = params
    negatives = p.use_negative_examples_from_batch or p.use_negative_examples_from_queue
    one_network = not p.use_lagging_model and p.prediction_mlp_layers == 0
    unknown = sorted(set(p.evaluations) - set(EVALUATIONS))
    time_difference = "transform_time_difference_probability"
    of_preset = SCEVideoParams.keywords[time_difference]  # which may be tried on images
    # fmt: off
    return [
        (p.use_vicreg_loss and p.loss_type != "vic",
         f"use_vicreg_loss=True contradicts loss_type={p.loss_type!r}: set only one of them"),
        (p.loss_type in NEED_NEGATIVES and not negatives,
         f"loss_type={p.loss_type!r} compares an image with negatives and has none: set "
         "use_negative_examples_from_queue=True or use_negative_examples_from_batch=True"),
        (p.use_negative_examples_from_same_view and not one_network,
         "use_negative_examples_from_same_view=True needs queries and keys of one network: set "
         f"use_lagging_model=False (is {p.use_lagging_model}), "
         f"prediction_mlp_layers=0 (is {p.prediction_mlp_layers})"),
        (p.shuffle_batch_norm and not p.use_lagging_model,
         "shuffle_batch_norm=True shuffles the images of the lagging model: set use_lagging_model=True"),
        (p.use_eqco_margin and p.loss_type != "ce",
         f"use_eqco_margin=True is a part of loss_type='ce', not of {p.loss_type!r}: set one or the other"),
        (not p.dataset.of_videos and p.transform_time_difference_probability not in (None, 0, of_preset),
         only_for_videos(time_difference, p.transform_time_difference_probability, p.dataset_name)),
        (bool(unknown), f"evaluations={unknown} unknown: choose from {', '.join(EVALUATIONS)}"),
    ]
    # fmt: on


def contradictions_of_numbers(params: ModelParams) -> list[tuple[bool, str]]:
    """Return the same for numbers that do not fit together."""
    p = params
    which = "batch_size" if p.global_batch_size is None else "global_batch_size"
    one_image = getattr(p, which) == 1
    size = f"{which}={getattr(p, which)}"
    in_batch = p.use_negative_examples_from_batch and not p.use_negative_examples_from_queue
    layers = normalized_layers(p)
    ungrouped = [f"{field}={width}" for kind, width, field in layers if kind == "gn" and width % GROUPS]
    of_one = any(kind == "bn" or (kind == "gn" and width == GROUPS) for kind, width, _ in layers)
    # fmt: off
    return [
        (p.use_negative_examples_from_queue and p.K == 0,
         "K=0 is no queue: choose K above 0, or use_negative_examples_from_queue=False"),
        (p.use_negative_examples_from_queue and p.K * p.dim > LARGEST_QUEUE,
         f"K={p.K} keys of dim={p.dim} are a queue of more than {LARGEST_QUEUE} numbers: choose fewer"),
        (bool(ungrouped),
         f"{', '.join(ungrouped[:1])} does not fit group norm: choose a multiple of {GROUPS}"),
        (one_image and (in_batch or p.loss_type in ("vic", "barlow")),
         f"{size} leaves loss_type={p.loss_type!r} nothing to compare with: choose a larger one, or a queue"),
        (one_image and of_one,
         f"{size} leaves mlp_normalization={p.mlp_normalization!r}, "
         f"prediction_mlp_normalization={p.prediction_mlp_normalization!r} no mean to take: choose a larger one"),
    ]
    # fmt: on


def contradictions_of_views(params: ModelParams) -> list[tuple[bool, str]]:
    """Return (whether the settings contradict each other, how, and the way out)."""
    small = [a.name for a in fields(ModelParams) if a.name.startswith("transform_small_")]
    changed = [name for name in small if getattr(params, name) != fields_dict(ModelParams)[name].default]
    without = bool(changed) and params.n_small_views == 0
    return [
        (without, f"{', '.join(changed)} set, but there are no small views: set n_small_views above 0, or leave it out")
    ]


def view_of(params: ModelParams, i: int) -> ViewSettings:
    """Row i. Every field of View has fields in ModelParams: one of its name, or for an interval two."""
    size = params.crop_size if i < params.n_large_views else small_crop_size(params.crop_size)
    s = number_of_view(params, "transform_s", i)
    strengths = {"brightness": 0.8 * s, "contrast": 0.8 * s, "saturation": 0.8 * s, "hue": 0.2 * s}
    view = evolve(params.dataset.view, crop_size=size, **strengths)
    found = {field.name: setting(params, field.name, getattr(view, field.name), i) for field in fields(ViewSettings)}
    if found["crop_size"] > params.crop_size:
        small = f"transform_small_crop_size={found['crop_size']}"
        raise ValueError(f"{small} is above transform_crop_size={params.crop_size}: choose a smaller one")
    return evolve(view, **found if params.transform_apply_blur else {**found, "blur_probability": 0.0})


def small_crop_size(crop_size: int) -> int:
    """96 for 224, as in SwAV; multiples of 8."""
    return min(crop_size, max(8, 8 * round(crop_size * 3 / 7 / 8)))


def setting(params: ModelParams, name: str, default: float | tuple[float, float], i: int) -> float | tuple:
    """What View's field `name` is for view i: a number, or an interval."""
    is_small_crop = name in ("crop_size", "crop_scale") and i >= params.n_large_views
    field = f"transform_{'small_' * is_small_crop}{name}"
    if not isinstance(default, tuple):
        value = number_of_view(params, field, i)
        return default if value is None else value
    ends = [number_of_view(params, f"{field}_{end}", i) for end in ("min", "max")]
    low, high = (of_data if given is None else given for given, of_data in zip(ends, default, strict=True))
    if low > high:
        raise ValueError(f"{field}_min={low} is above {field}_max={high} in view {i}: lower the one or raise the other")
    return low, high


def number_of_view(params: ModelParams, field: str, i: int) -> float | None:
    value, fewest, most = getattr(params, field), params.n_large_views, params.n_views
    if field.startswith("transform_small"):
        i, fewest, most = i - fewest, 1, params.n_small_views
    elif field.startswith("transform_crop_scale"):
        most = fewest
    if isinstance(value, list | tuple):
        if not fewest <= len(value) <= most:
            at_least = f", and at least {fewest} are needed" if fewest < most else ""
            raise ValueError(f"{field}={value} has {len(value)} values for {most} views{at_least}")
        value = value[min(i, len(value) - 1)]
    return None if value is None else abs(value)  # -0.0 is no width of an interval


def contradictions_of_heads(params: ModelParams) -> list[tuple[bool, str]]:
    """Return (whether the settings contradict each other, how, and the way out)."""
    found = []
    for name in HEADS:
        field, n_layers = f"{name}_mlp_hidden_dims", getattr(params, f"{name}_mlp_layers")
        widths, hidden = getattr(params, field), max(0, n_layers - 1)
        message = f"{field}={widths} are {len(widths)} widths, and {name}_mlp_layers={n_layers} has {hidden} hidden "
        found.append((len(widths) not in (0, hidden), f"{message}layers: give one width for each of them, or none"))
    return found


def contradictions_of_optimizer(params: ModelParams) -> list[tuple[bool, str]]:
    """Return (whether the settings contradict each other, how, and the way out)."""
    p = params
    decay = max(p.weight_decay, p.final_weight_decay or 0.0)
    named = "weight_decay" if decay == p.weight_decay else "final_weight_decay"
    is_adam = p.optimizer_name.startswith("adam")
    # fmt: off
    return [
        (p.optimizer_name != "lars" and p.lr_scaling is None and p.lr * decay > 2,
         f"lr={p.lr} times {named}={decay} is above 2, so that every step would enlarge the weights: "
         f"choose a smaller {named}"),
        (p.lr_schedule == "steps" and not p.lr_decay_steps,
         "lr_schedule='steps' needs the epochs of the steps: set lr_decay_steps, for example "
         f"[{0.6 * p.max_epochs:.4g}, {0.8 * p.max_epochs:.4g}]"),
        (p.lr_schedule != "steps" and bool(p.lr_decay_steps),
         f"lr_decay_steps={p.lr_decay_steps} are of lr_schedule='steps', not of {p.lr_schedule!r}: set only one"),
        (p.warmup_start_lr > p.lr,
         f"warmup_start_lr={p.warmup_start_lr} is above lr={p.lr}, to which the warm-up rises: choose a smaller one"),
        (p.lr_schedule != "constant" and p.final_lr_schedule_value > p.lr,
         f"final_lr_schedule_value={p.final_lr_schedule_value} is above lr={p.lr}, from which lr_schedule falls to it: "
         "choose a smaller one, such as 0"),
        (p.final_weight_decay is not None and p.weight_decay == 0,
         f"final_weight_decay={p.final_weight_decay} is reached from weight_decay, in the same proportion for every "
         "parameter: set weight_decay above 0"),
        (p.grad_clip_lars and p.optimizer_name != "lars",
         f"grad_clip_lars=True is a part of optimizer_name='lars', not of {p.optimizer_name!r}: set one or the other"),
        (is_adam and any("momentum" in row for row in p.parameter_options),
         f"parameter_options set momentum, which optimizer_name={p.optimizer_name!r} does not have: leave it out"),
        (p.optimizer_name != "lars" and any("lars_exclude" in row for row in p.parameter_options),
         f"parameter_options set lars_exclude, which is of optimizer_name='lars', not of {p.optimizer_name!r}: "
         "leave it out"),
    ]
    # fmt: on


def contradictions_of_sce(params: ModelParams) -> list[tuple[bool, str]]:
    """Return (whether the settings contradict each other, how, and the way out)."""
    p, found = params, []
    for name in SCHEDULED:
        warmup, schedule = getattr(p, f"{name}_warmup_epochs"), getattr(p, f"{name}_schedule")
        start, final = f"{name}_warmup_start", f"{name}_final"
        of_other_loss = f"a schedule of {name} is a part of loss_type='sce', not of {p.loss_type!r}: leave "
        found += [
            (changes(p, name) and p.loss_type != "sce", f"{of_other_loss}{name}_warmup_epochs and {name}_schedule out"),
            (warmup > 0 and getattr(p, start) is None,
             f"{name}_warmup_epochs={warmup} needs the value that the warm-up starts with: set {start}"),
            (schedule != "constant" and getattr(p, final) is None,
             f"{name}_schedule={schedule!r} needs the value that it ends with: set {final}"),
        ]  # fmt: skip
    return found


def normalized_layers(params: ModelParams) -> list[tuple[str, int, str]]:
    """(normalization, width, name of the field that sets the width) of every normalized layer of both heads."""
    found = []
    for name in HEADS:
        head, field = params.head(name), f"{name}_mlp_hidden_dims"
        field = field if getattr(params, field) else "mlp_hidden_dim"
        found += [(head["normalization"], width, field) for width in head["hidden_dim"]]
        found += [(head["last_normalization"], params.dim, "dim")]
    return [layer for layer in found if layer[0] is not None]


def changes(params: ModelParams, name: str) -> bool:
    """Whether `name` of CHANGING is not the same in all steps."""
    return getattr(params, f"{name}_warmup_epochs") > 0 or getattr(params, f"{name}_schedule") != "constant"


# ---- the presets: rows of settings, and what differs from another row. PRESETS["byol"](lr=0.3) ----
# fmt: off

MoCoV2Params = ModelParams
# Few negatives that count as many, and no queue: SiMo, the paper's own method.
EqCoParams = partial(
    ModelParams, use_eqco_margin=True, use_negative_examples_from_batch=True, use_negative_examples_from_queue=False,
)
SCEParams = partial(
    ModelParams, loss_type="sce", T=0.1, mlp_normalization="bn", use_negative_examples_from_batch=True,
    use_both_augmentations_as_queries=True, use_momentum_schedule=True,
)
BYOLParams = partial(
    ModelParams, loss_type="ip", loss_constant_factor=2, prediction_mlp_layers=2, mlp_normalization="bn",
    use_negative_examples_from_queue=False, use_both_augmentations_as_queries=True, use_momentum_schedule=True,
    optimizer_name="lars", exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
)
SimCLRParams = partial(
    ModelParams, use_lagging_model=False, use_both_augmentations_as_queries=True,
    use_negative_examples_from_queue=False, use_negative_examples_from_batch=True,
    use_negative_examples_from_same_view=True,
)
# The paper, on ImageNet: max_epochs=1000, lr=1.6, batch_size=2048, weight_decay=1e-6, mlp_hidden_dim=8192, dim=8192.
VICRegParams = partial(
    ModelParams, loss_type="vic", use_lagging_model=False, use_unit_sphere_projection=False,
    use_negative_examples_from_queue=False, projection_mlp_layers=3, mlp_normalization="bn",
    optimizer_name="lars", exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
    lars_warmup_epochs=10, final_lr_schedule_value=0.002,
)
BarlowTwinsParams = partial(
    VICRegParams, loss_type="barlow", loss_constant_factor=0.1, mlp_hidden_dim=2048, dim=2048,
    lr=0.3, weight_decay=1e-6, final_lr_schedule_value=0.0003,
)
MoCoV3Params = partial(  # loss_constant_factor is 2 T, as in the paper's code
    EqCoParams, use_eqco_margin=False, loss_constant_factor=0.4, prediction_mlp_layers=2, mlp_normalization="bn",
    use_both_augmentations_as_queries=True, m=0.99, use_momentum_schedule=True, optimizer_name="adamw", lr=1.5e-4,
    weight_decay=0.1, warmup_epochs=10, exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
)
SimSiamParams = partial(
    BYOLParams, use_lagging_model=False, stop_gradient_of_keys=True, use_momentum_schedule=False,
    loss_constant_factor=0.5, optimizer_name="sgd", exclude_matching_parameters_from_lars=[], lr=0.05,
)
ReSSLParams = partial(SCEParams, sce_coefficient=0.0, sce_target_T=0.04, use_both_augmentations_as_queries=False)
# R3D-18 on Kinetics200 (https://arxiv.org/abs/2212.11187, eztorch's configuration). loss_constant_factor: its loss is
# the mean over both directions. Its Trainer: --precision 16-mixed --sync_batchnorm --save_every_n_epochs 100.
SCEVideoParams = partial(
    SCEParams, dataset_name="kinetics", video_decoder="frames", frames_per_second=30, num_frames=8, clip_duration=2.56,
    encoder_arch="r3d_18", global_batch_size=512, num_data_workers=5, decoding_threads=4,
    transform_brightness=0.8, transform_contrast=0.8, transform_saturation=0.4, transform_hue=0.2,
    transform_jitter_probability=0.8, transform_grayscale_probability=0.2, transform_blur_probability=[1.0, 0.1],
    transform_solarize_probability=[0.0, 0.2], transform_time_difference_probability=0.2,
    loss_constant_factor=0.5, use_negative_examples_from_batch=False, K=32768, dim=256, m=0.99,
    projection_mlp_layers=3, prediction_mlp_layers=2, mlp_hidden_dim=1024, mlp_bias=False,
    projection_mlp_last_bias=False, prediction_mlp_last_bias=False, projection_mlp_last_normalization="same",
    mlp_last_affine=False, optimizer_name="lars", exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
    lr=2.4, lr_scaling="linear", weight_decay=1e-6, warmup_epochs=35, max_epochs=200,
)

PRESETS: dict[str, Callable[..., ModelParams]] = {
    "moco_v2": MoCoV2Params, "eqco": EqCoParams, "sce": SCEParams, "byol": BYOLParams, "simclr": SimCLRParams,
    "vicreg": VICRegParams, "barlow_twins": BarlowTwinsParams,
    "moco_v3": MoCoV3Params, "simsiam": SimSiamParams, "ressl": ReSSLParams, "sce_video": SCEVideoParams,
}
