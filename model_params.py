"""Settings of pretraining, with their checks, and the presets. A method is a row of settings, not a class.

The comment behind a field, or directly above it, is its help text. A line of comment after an empty line is the heading
of the fields that follow (`runs.command_line.field_comments`).
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from string import Formatter
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
    PerView,
    Preset,
    Presets,
    WholePerView,
    as_path,
    betas,
    check_parameter_options,
    check_types,
    choice,
    defaults,
    distance,
    fraction,
    non_negative,
    number,
    numbers,
    own_lists,
    path,
    per_view,
    plain,
    positive,
    readable,
)
from self_supervised.setting_groups import CUSTOM_DATA, SUBSET, VIDEO, VIDEO_READING

DROP_LAST = "drop_last_batch=True (drop_last=True of your own loader)"  # a way out of a last batch of one image
LARGEST_IMAGE = 2**28  # elements of one image or clip, 1 GiB in float32
LARGEST_QUEUE = 2**34  # elements of the queue, 64 GiB in float32
LARGEST_WIDTH = 2**17  # units of a layer of the heads
COMPILE_MODES = (False, True, "reduce-overhead", "max-autotune")
HEADS = ("projection", "prediction")
LAST_NORMALIZATIONS = (None, "same", *NORMALIZATIONS)
WARMUPS = ("linear", "cosine")
LR_SCHEDULES = ("cosine", "linear", "steps", "constant")


# ---- Losses ----

# families of methods
PAIRS = "contrastive: recognize the positive key among keys of other images"
PREDICTIONS = "without negatives: predict the key of another view"
BATCHES = "redundancy reduction and regularization: make views agree, and keep the projections of a batch apart"
PROTOTYPES = "clustering: assign the views of an image to the same prototypes"
STUDENTS = "distillation: learn from a frozen teacher (--teacher)"


@frozen
class Loss:
    """Facts about a loss. Its function is in `losses.get_loss` or `multi_view_losses.get_loss_of_views`."""

    family: str  # heading of the methods with this loss, as the programs' help lists it
    text: str  # the loss with its settings, in words; {name} is a setting that it reads
    negatives: str = "none"  # "required", "optional" (compared if there are any) or "none"
    by_rows: bool = False  # a mean over queries, each compared with all others: can be computed in parts
    all_views: bool = False  # of all views of an image at once, not of pairs
    keys: bool = True  # whether it reads keys
    labels: bool = False  # whether it reads the labels of training images

    @property
    def reads(self) -> set[str]:
        """Names of the settings in its text."""
        return {name for _, name, *_ in Formatter().parse(self.text) if name}


LOSSES = {
    "ce": Loss(PAIRS, "cross-entropy (InfoNCE), temperature {T:g}", negatives="required", by_rows=True),
    "dcl": Loss(PAIRS, "DCL (decoupled contrastive), temperature {T:g}, sigma of the weights {dcl_sigma}",
                negatives="required"),
    "bce": Loss(PAIRS, "binary cross-entropy, temperature {T:g}", negatives="optional", by_rows=True),
    "ip": Loss(PREDICTIONS, "inner product", negatives="optional", by_rows=True),
    "sce": Loss(PAIRS, "SCE, temperature {T:g}, of the target {sce_target_T:g}, coefficient {sce_coefficient:g}",
                negatives="required", by_rows=True),
    "vic": Loss(BATCHES, "VICReg, weights of invariance {invariance_loss_weight:g}, variance {variance_loss_weight:g}, "
                "covariance {covariance_loss_weight:g}"),
    "barlow": Loss(BATCHES, "Barlow Twins, weight of the redundancy {redundancy_loss_weight:g}"),
    "supcon": Loss(PAIRS, "supervised contrastive (SupCon), temperature {T:g}", negatives="required", labels=True),
    "swav": Loss(PROTOTYPES, "SwAV, {n_prototypes} prototypes, temperature {T:g}, of the assignments {sce_target_T:g}"),
    "dino": Loss(PROTOTYPES, "DINO, {n_prototypes} prototypes, temperature {T:g}, of the target {sce_target_T:g}"),
    "fastsiam": Loss(PREDICTIONS, "FastSiam, cosine with the mean of the other views' keys", all_views=True),
    "lejepa": Loss(BATCHES, "LeJEPA, weight of SIGReg {sigreg_weight:g}", all_views=True, keys=False),
    "visreg": Loss(BATCHES, "VISReg, weight of its regularizer {sigreg_weight:g}", all_views=True, keys=False),
    "emp": Loss(BATCHES, "EMP-SSL, weight of the invariance {invariance_loss_weight:g}", all_views=True, keys=False),
    "frossl": Loss(BATCHES, "FroSSL, weight of the invariance {invariance_loss_weight:g}", all_views=True, keys=False),
    "mmcr": Loss(BATCHES, "MMCR, weight of the single images {invariance_loss_weight:g}", all_views=True),
    "seed": Loss(STUDENTS, "SEED, temperature {T:g}, of the target {sce_target_T:g}", negatives="required",
                 by_rows=True),
}  # fmt: skip


def losses_with(condition: Callable[[Loss], Any]) -> tuple[str, ...]:
    return tuple(name for name, loss in LOSSES.items() if condition(loss))


def losses_that_read(setting: str) -> tuple[str, ...]:
    return losses_with(lambda loss: setting in loss.reads)


PROTOTYPE_LOSSES = losses_with(lambda loss: loss.family == PROTOTYPES)
ALL_VIEW_LOSSES = losses_with(lambda loss: loss.all_views)
STATISTIC_LOSSES = losses_with(lambda loss: loss.family == BATCHES)
LABEL_LOSSES = losses_with(lambda loss: loss.labels)
TWO_DISTRIBUTIONS = ("sce", "seed")  # losses that compare two distributions over keys
NOT_FOR_TEACHERS = (*LABEL_LOSSES, *PROTOTYPE_LOSSES, *ALL_VIEW_LOSSES)
NEED_NEGATIVES = losses_with(lambda loss: loss.negatives == "required")
COMPARE_NEGATIVES = losses_with(lambda loss: loss.negatives != "none")
SCHEDULED = {name: losses_that_read(name) for name in ("sce_coefficient", "sce_target_T")}  # have a schedule


# ---- Settings of both stages ----


def class_to_idx_entries(value: Any) -> Any:
    """Return class numbers as a list like ["cat=0", "dog=1"], which a checkpoint can hold.

    Args:
        value: such a list, a dictionary {"cat": 0}, or the path of a JSON file that holds one.

    Raises:
        ValueError: a single string is neither an entry nor a JSON file that can be read.
    """
    value = [value] if isinstance(value, str | Path) else value
    if isinstance(value, list | tuple) and len(value) == 1 and not re.search(r"=-?\d+$", str(value[0])):
        try:
            file = as_path(str(value[0]))
            if not file.is_file():  # reading a device or a pipe may never end
                raise OSError("it is not a regular file")
            value = json.loads(file.read_text())
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~somebody has no home directory
            raise ValueError(f"class_to_idx={str(value[0])!r} could not be read as a JSON file: {error}") from error
    if isinstance(value, dict):
        value = [f"{name}={number}" for name, number in value.items()]
    return plain(value)


@readable
@frozen(kw_only=True)
class EncoderAndDataParams:
    """Settings of encoder and data, shared by both stages."""

    # encoder
    # torchvision's name, ws_resnet18, ..., small_cnn, timm:NAME; in Python only: "module", your own
    encoder_arch: str = "resnet18"
    embedding_dim: int | None = positive(None)  # width of the embeddings; None: inferred from the encoder
    # initial weights: a file, the directory of a run, or the name of published ones, such as "DEFAULT"; None: random
    encoder_weights: str | None = path()
    low_resolution_stem: bool | None = None  # use a 3 x 3 stem without pooling; None: for ResNets up to 32 pixels
    zero_init_residual: bool = False  # start each residual block of a ResNet as the identity (last norm weight 0)
    # stochastic depth of a timm encoder in training: probability of skipping the last residual branch for an image,
    # lower in earlier ones of most models; None: timm's default (0.1 for Swin, 0 for most)
    drop_path_rate: float | None = number(None, at_most=0.99)
    stem_variant: str = choice("standard", STEM_VARIANTS)  # variant of the 3 x 3 stem, to fit weights of other systems
    in_channels: int | None = positive(None)  # number of input channels; None: the data set's
    pooling_size: int = positive(1)  # cells per side of the last feature map, each averaged; 2: embeddings 4x as wide

    # data
    dataset_name: str = choice("stl10", DATASETS)  # data set, read from $DATA_PATH
    batch_size: int = positive(256)  # images per process in a batch
    global_batch_size: int | None = positive(None)  # images of all processes in an optimizer step; replaces batch_size
    transform_crop_size: int | None = number(None, above=BLUR_RADIUS)  # side of a view in pixels; None: the data set's
    image_mean: list[float] | None = None  # mean of each channel, for pixel values from 0 to 1; None: the data set's
    image_std: list[float] | None = None  # standard deviation of each channel; None: the data set's
    compute_statistics: bool = False  # compute image_mean and image_std from the training images, where they are None
    # seed of all random choices; None: that of pl.seed_everything, otherwise drawn
    seed: int | None = non_negative(None, at_most=2**63 - 1)

    # data loader
    # processes that decode files; not used for digits, CIFAR, STL-10
    num_data_workers: int = non_negative(4, at_most=MOST_WORKERS)
    # leave out the last images of an epoch if they do not fill an optimizer step; None: only if they fill less than
    # half of it, and the epoch has other steps
    drop_last_batch: bool | None = True
    pin_data_memory: bool = True  # use pinned memory, for faster copies to a GPU
    # keep a built-in data set (digits, CIFAR, STL-10) on the device as uint8; None: on a GPU, if it fits
    data_on_device: bool | None = None
    # decode image files once, reduce them to 8/7 of the view's size, and read them from $DATA_PATH/packed from then on
    pack_images: bool = False
    # reaction to a broken file; skip: train on the next one, leave it out of evaluations, and count it
    unreadable_images: str = choice("stop", ("stop", "skip"))
    # turn image files upright by their EXIF orientation; False: leave them as stored, as earlier versions did and
    # their checkpoints still do
    exif_orientation: bool = True

    # activation checkpointing
    # recompute activations of the encoder's blocks in the backward pass: less memory, more time
    activation_checkpointing: bool = False

    # torch.compile (reduce-overhead: CUDA graphs)
    torch_compile: bool | str = choice(False, COMPILE_MODES)  # compile encoder and heads, and the views on a GPU

    # Winograd's convolutions: in float32 on a CPU, in training only
    winograd: bool | str = choice(False, (False, True, "auto"))  # fewer multiplications; auto: where measured faster

    # learning rate by batch size
    lr_scaling: str | None = choice(None, (None, "linear", "sqrt"))  # scaling of all lr with the batch size; None: none
    lr_batch_size: int = positive(256)  # images per optimizer step for which lr is meant, if lr_scaling is set

    # your images
    data_path: str | None = path()  # directory, or path or URL/train-{000..099}.tar; None: $DATA_PATH/<dataset_name>
    # column of a Hugging Face set, or file extensions in shards ("jpg;png"); None: any image
    image_key: str | None = None
    # column of a Hugging Face set, or key of the .json files in shards; None: label or cls
    label_key: str | None = None
    include_patterns: list[str] = field(factory=list)  # globs ("*.png", "cats/*"): use only paths or names that match
    exclude_patterns: list[str] = field(factory=list)  # globs ("*_mask.png"): leave out paths and names that match
    # which directory of an image's path is its label; None: no labels
    labels_from: str | None = choice("first_folder", ("first_folder", "last_folder", None))
    # class numbers: a dictionary, a JSON file, or ["cat=0"]; None: alphabetical order
    class_to_idx: list[str] | None = field(default=None, converter=class_to_idx_entries)
    val_size: float = number(0.1, at_most=0.9)  # fraction of every class for validation, if the data has no such split
    test_size: float = number(0.1, at_most=0.9)  # fraction of every class for the test, if the data has no such split
    data_fraction: float = number(1.0, above=0, by=1e-9, at_most=1)  # fraction of every class to train on
    data_seed: int = non_negative(0, at_most=2**63 - 1)  # seed of splits and fraction, independent of `seed`
    splits_path: str | None = path()  # directory of train.txt, val.txt and test.txt: written once, then reused
    # pixel values of black and white in .npy, TIFF and other 16-bit files; None: the limits of their type
    pixel_range: list[float] | None = field(default=None, converter=plain)

    # videos
    num_frames: int = positive(8, at_most=1024)  # frames of a clip, evenly spaced among all of its frames
    clip_duration: float = positive(2.56, by=1e-3)  # seconds of a clip; each view is a clip of its own
    clip_speeds: list[float] = numbers((1.0,), 0.01, 100)  # playback speeds, one drawn per clip; 2: twice the duration
    clip_jitter: float = number(0.0, at_most=0.99)  # random change of the speed; 0.2: factors 0.8 to 1.2
    video_decoder: str = choice("file", ("file", "frames"))  # format of a video: a file, or a directory of frames
    frames_per_second: float = positive(30.0, by=1e-3)  # frame rate of videos that are directories of frames
    decoding_threads: int = positive(1, at_most=MOST_WORKERS)  # decoder threads per worker
    video_path_prefix: str | None = path()  # directory before the paths in train.csv, val.csv; None: train, val
    evaluation_clips: int = positive(1, at_most=1024)  # clips per video whose outputs evaluations average
    # crops per evaluation clip; 1: the center, else spread along the longer side
    evaluation_crops: int = positive(1, at_most=1024)

    def __attrs_post_init__(self):
        check_types(self)
        own_lists(self)
        refuse(contradictions_of_data(self))
        catalogue.check_name(self.encoder_arch)
        refuse(contradictions_of_encoder(self))
        check_statistics("image_mean", self.image_mean, self.channels, lowest=0)
        check_statistics("image_std", self.image_std, self.channels, lowest=1e-6)

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
        """Shape of one input of the encoder: (C, H, W), or (C, T, H, W) for clips."""
        frames = (self.num_frames,) if self.dataset.of_videos else ()
        return (self.channels, *frames, self.crop_size, self.crop_size)

    @property
    def clips_of_a_video(self) -> int:
        """Number of clips per video whose outputs an evaluation averages; 1 for images."""
        return self.evaluation_clips * self.evaluation_crops

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each input channel. An encoder for color images takes gray ones repeated three times."""
        return self.per_channel(self.image_mean or self.dataset.mean)

    @property
    def std(self) -> tuple[float, ...]:
        return self.per_channel(self.image_std or self.dataset.std)

    def per_channel(self, values: Sequence[float]) -> tuple[float, ...]:
        """Return one number per input channel."""
        if len(values) not in (1, self.channels):  # those of color images do not fit other channels
            return (round(sum(values) / len(values), 3),) * self.channels
        repeats = 3 if len(values) == 1 and self.channels == 3 else 1
        return tuple(values) * repeats

    @property
    def low_resolution(self) -> bool:
        if self.low_resolution_stem is None:
            return catalogue.has_low_resolution_stem(self.encoder_arch) and self.crop_size <= 32
        return self.low_resolution_stem


DATASET_DEFAULTS = defaults(EncoderAndDataParams, (*CUSTOM_DATA, *VIDEO))  # to start from with another data set


# ---- Checks of encoder and data ----


Contradictions = Iterable[tuple[bool, str]]  # (whether settings contradict each other, message with the way out)


def refuse(contradictions: Contradictions) -> None:
    """Raise ValueError with the first message that applies."""
    for applies, message in contradictions:
        if applies:
            raise ValueError(message)


def contradictions_of_data(params: EncoderAndDataParams) -> Contradictions:
    """Contradictions of data set, splits and pixel values."""
    p = params
    yield (
        p.val_size + p.test_size > 0.95,
        f"val_size={p.val_size} and test_size={p.test_size} leave too few images for training. Choose smaller values.",
    )
    yield (
        p.pixel_range is not None and not is_range(p.pixel_range),
        f"pixel_range={p.pixel_range} must be two finite numbers: the values of black and of white",
    )
    parts = [entry.rpartition("=") for entry in p.class_to_idx or []]
    yield (
        not all(name and number.isdecimal() for name, _, number in parts),
        f"class_to_idx={p.class_to_idx} must give each class a whole number, such as {{'cat': 0, 'dog': 1}}",
    )
    allowed = CUSTOM_DATA if p.dataset.is_custom else SUBSET if p.dataset.is_packed else ()
    for name in (name for name in CUSTOM_DATA if name not in allowed):
        yield (
            getattr(p, name) != DATASET_DEFAULTS[name],
            f"{name}={getattr(p, name)!r} is for your own images, not for dataset_name={p.dataset_name!r}. Remove it, "
            "or set dataset_name='folder'.",
        )
    for name in () if p.dataset.of_videos else VIDEO:
        is_set = getattr(p, name) != DATASET_DEFAULTS[name] and name not in VIDEO_READING
        yield (
            is_set,
            f"{name}={getattr(p, name)!r} is for videos, not for dataset_name={p.dataset_name!r}. Remove it, or set "
            "dataset_name='kinetics'.",
        )


def is_range(value: Any) -> bool:
    """Return whether this is a list of two finite numbers, the first below the second."""
    is_pair = isinstance(value, list) and len(value) == 2 and all(isinstance(one, int | float) for one in value)
    return is_pair and -math.inf < value[0] < value[1] < math.inf


def contradictions_of_encoder(params: EncoderAndDataParams) -> Contradictions:
    """Contradictions of the encoder and its inputs."""
    p = params
    shape = " x ".join(map(str, p.input_shape))
    # fmt: off
    return [
        (p.activation_checkpointing and bool(p.torch_compile),
         f"activation_checkpointing=True and torch_compile={p.torch_compile!r} exclude each other, since compiled code "
         "chooses itself what it computes again. Set one of them to False."),
        (bool(p.winograd) and bool(p.torch_compile),
         f"winograd={p.winograd!r} and torch_compile={p.torch_compile!r} exclude each other. Set one to False."),
        (bool(p.low_resolution_stem) and not catalogue.has_low_resolution_stem(p.encoder_arch),
         f"low_resolution_stem=True does not fit encoder_arch={p.encoder_arch!r}. Only torchvision's ResNets and "
         "ws_resnets have such a stem. Choose one of them, or set low_resolution_stem=False."),
        (p.zero_init_residual and not catalogue.is_resnet(p.encoder_arch),
         f"zero_init_residual=True does not fit encoder_arch={p.encoder_arch!r}. It needs a ResNet or ResNeXt of "
         "torchvision, or a ws_resnet. Choose one of them, or set zero_init_residual=False."),
        (p.drop_path_rate is not None and not p.encoder_arch.startswith("timm:"),
         f"drop_path_rate={p.drop_path_rate} does not fit encoder_arch={p.encoder_arch!r}. It is for timm's encoders. "
         "Choose one of them (timm:NAME), build your own module with it, or leave it out."),
        (p.encoder_weights is not None and p.encoder_arch == catalogue.OWN_MODULE,
         f"encoder_weights={p.encoder_weights!r} cannot be loaded into your own module. Load them before you pass the "
         "module, and remove encoder_weights."),
        (math.prod(p.input_shape) > LARGEST_IMAGE,
         f"transform_crop_size={p.crop_size} and in_channels={p.channels} make inputs of {shape}, which are more than "
         f"{LARGEST_IMAGE} numbers. Choose smaller ones."),
    ]
    # fmt: on


def check_statistics(name: str, values: Any, channels: int, lowest: float) -> None:
    """Raise ValueError unless these are None or a list of one number per channel, from `lowest` to 1."""
    if values is None:
        return
    are_numbers = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
    if not are_numbers or len(values) != channels or not all(lowest <= value <= 1 for value in values):
        wanted = f"a list of {channels} numbers from {lowest:g} to 1, one per channel"
        raise ValueError(f"{name}={values!r} must be {wanted}")


# ---- Settings of pretraining ----


@readable
@frozen(kw_only=True)
class ModelParams(EncoderAndDataParams):
    """Settings of SelfSupervisedMethod. The defaults are MoCo v2 (https://arxiv.org/abs/2003.04297): InfoNCE with a
    queue of keys from a lagging model."""

    # pairs of views
    # number of large (global) views per image; only these serve as keys, unless there is a teacher
    n_large_views: int = number(2, at_least=1, at_most=100)
    # small views per image: queries for the keys of all large views, or for the teacher's key of the same view
    n_small_views: int = number(0, at_most=100)
    use_both_augmentations_as_queries: bool = False  # compute the loss in both directions

    # where keys come from
    use_lagging_model: bool = True  # compute keys with a lagging model, the moving average of the network
    m: float = fraction(0.996)  # EMA momentum of the lagging model: fraction of itself that it keeps at each step
    use_momentum_schedule: bool = False  # raise m to 1 along half a cosine
    stop_gradient_of_keys: bool = False  # detach keys, as in SimSiam; those of a lagging model always are
    use_nearest_keys: bool = False  # replace keys by the most similar ones of the queue, as in NNCLR
    shuffle_batch_norm: bool = False  # compute batch statistics of keys over images other than their queries'
    n_virtual_devices: int = positive(8)  # number of parts in which a single process encodes shuffled keys

    # teacher
    teacher: str | None = path()  # frozen encoder whose embeddings are the keys, as load_encoder reads it; sets dim
    teacher_channels: list[int] = numbers((), 0, 1023)  # channels of the images that the teacher sees; []: all
    teacher_crop_size: int | None = positive(None)  # pixels to which the teacher's views are resized; None: its own

    # negatives, and the queue of keys
    use_negative_examples_from_queue: bool = True  # use the keys of earlier batches as negatives
    K: int = non_negative(65536)  # number of keys in the queue
    gather_keys_for_queue: bool | None = None  # push the keys of all processes into every queue; None: as True
    use_negative_examples_from_batch: bool = False  # use the keys of other images in the batch as negatives
    use_negative_examples_from_same_view: bool = False  # use the queries of other images as negatives, as in SimCLR

    # heads
    projection_mlp_layers: int = non_negative(2, at_most=20)  # number of layers of the projection head; 0: no head
    prediction_mlp_layers: int = non_negative(0, at_most=20)  # number of layers of the prediction head; 0: no head
    mlp_hidden_dim: int = positive(512, at_most=LARGEST_WIDTH)  # width of the hidden layers of both heads
    # width of each hidden layer of the projection head; []: mlp_hidden_dim
    projection_mlp_hidden_dims: list[int] = numbers((), 1, LARGEST_WIDTH)
    # width of each hidden layer of the prediction head; []: mlp_hidden_dim
    prediction_mlp_hidden_dims: list[int] = numbers((), 1, LARGEST_WIDTH)
    # normalization after the hidden layers of both heads
    mlp_normalization: str | None = choice(None, (None, *NORMALIZATIONS))
    # normalization after the hidden layers of the prediction head; same: mlp_normalization
    prediction_mlp_normalization: str | None = choice("same", (None, "same", *NORMALIZATIONS))
    use_mlp_weight_standardization: bool = False  # standardize weights of both heads' hidden layers
    mlp_activation: str = choice("relu", ("relu", "gelu"))  # activation after the hidden layers of both heads
    mlp_bias: bool = True  # give both heads' hidden layers biases; before batch norm they have no effect

    # last layer of each head
    dim: int = positive(128, at_most=LARGEST_WIDTH)  # width of the projections
    use_unit_sphere_projection: bool = True  # scale projections to length 1
    projection_mlp_last_bias: bool = True  # give the projection head's last linear layer a bias
    prediction_mlp_last_bias: bool = True  # give the prediction head's last linear layer a bias
    # normalization after the projection head; same: as after its hidden layers
    projection_mlp_last_normalization: str | None = choice(None, LAST_NORMALIZATIONS)
    # normalization after the prediction head; same: as after its hidden layers
    prediction_mlp_last_normalization: str | None = choice(None, LAST_NORMALIZATIONS)
    mlp_last_affine: bool = True  # give the normalizations after both heads weights and biases

    # loss
    # loss function. ce (InfoNCE), dcl, sce, supcon (with labels) and seed (with a teacher) need negatives; bce and ip
    # (BYOL's) compare them if there are any. vic (VICReg's), barlow, lejepa, visreg, emp, frossl, mmcr, fastsiam, swav
    # and dino use none
    loss_type: str = choice("ce", LOSSES)
    use_vicreg_loss: bool = False  # the same as loss_type="vic"
    loss_constant_factor: float = positive(1, at_most=1e6)  # factor by which the loss is multiplied
    T: float = positive(0.2, by=1e-4)  # temperature of the softmax over similarities

    # EqCo and DCL
    use_eqco_margin: bool = False  # add EqCo's margin to the logits of the negatives
    eqco_alpha: float = positive(65536)  # number of negatives that the loss emulates, if use_eqco_margin is set
    dcl_sigma: float | None = positive(None, by=1e-4)  # sigma of positive pairs' weights (DCLW); None: no weights (DCL)

    # weights of the terms of VICReg, Barlow Twins and losses of all views
    invariance_loss_weight: float = non_negative(25.0, at_most=1e6)  # weight of the invariance (VICReg's lambda)
    variance_loss_weight: float = non_negative(25.0, at_most=1e6)  # weight of VICReg's variance term, mu
    covariance_loss_weight: float = non_negative(1.0, at_most=1e6)  # weight of VICReg's covariance term, nu
    variance_loss_epsilon: float = positive(1e-4)  # constant added to VICReg's variance before the square root
    redundancy_loss_weight: float = non_negative(0.0051, at_most=1e6)  # weight of Barlow Twins' redundancy, lambda
    sigreg_weight: float = fraction(0.02)  # weight of SIGReg or VISReg's terms; that of the invariance is 1 minus this

    # prototypes of SwAV and DINO
    n_prototypes: int = positive(3000, at_most=2**24)  # number of prototypes of SwAV and DINO
    prototypes_frozen_epochs: float = non_negative(1)  # epochs at the start in which prototypes do not change
    queue_from_epoch: float = non_negative(0)  # epochs at the start in which SwAV's assignments do not use the queue
    center_momentum: float = fraction(0.9)  # EMA momentum of DINO's center: fraction kept at each step

    # SCE, and targets of SEED, SwAV and DINO
    sce_coefficient: float = fraction(0.5)  # weight of the positive key in the target; 1: InfoNCE, 0: ReSSL
    sce_target_T: float = positive(0.05, by=1e-4)  # temperature of the target, also SEED's, SwAV's, DINO's; below T

    # SCE: schedule of the coefficient
    sce_coefficient_warmup_epochs: float = non_negative(0)  # epochs of the warm-up to sce_coefficient
    sce_coefficient_warmup_start: float = fraction(1.0)  # coefficient at the start of its warm-up; 1: InfoNCE
    sce_coefficient_warmup: str = choice("linear", WARMUPS)  # shape of the coefficient's warm-up
    sce_coefficient_schedule: str = choice("constant", CURVES)  # shape of the coefficient after its warm-up
    sce_coefficient_final: float = fraction(0.0)  # coefficient at the end of a linear or cosine schedule

    # SCE: schedule of the target temperature
    sce_target_T_warmup_epochs: float = non_negative(0)  # epochs of the warm-up to sce_target_T
    sce_target_T_warmup_start: float | None = positive(None, by=1e-4)  # target temperature at the start of its warm-up
    sce_target_T_warmup: str = choice("cosine", WARMUPS)  # shape of the target temperature's warm-up
    sce_target_T_schedule: str = choice("constant", CURVES)  # shape of the target temperature after its warm-up
    # target temperature at the end of a linear or cosine schedule
    sce_target_T_final: float | None = positive(None, by=1e-4)

    # small views
    # side of small views in pixels; None: 3/7 of large views
    transform_small_crop_size: WholePerView = per_view(None, BLUR_RADIUS + 1, math.inf)
    transform_small_crop_scale_min: PerView = per_view(0.05)  # smallest area of small views (fraction of the image)
    transform_small_crop_scale_max: PerView = per_view(0.14)  # largest area of small views (fraction of the image)

    # augmentation of each view
    transform_crop_scale_min: PerView = per_view(None)  # smallest area of large views (fraction); None: the data set's
    transform_crop_scale_max: PerView = per_view(None)  # largest area of large views (fraction); None: the data set's
    # width / height of the narrowest crop; None: the data set's
    transform_crop_ratio_min: PerView = per_view(None, 0.01, 100)
    # width / height of the widest crop; None: the data set's
    transform_crop_ratio_max: PerView = per_view(None, 0.01, 100)
    transform_s: PerView = per_view(0.5, 0, 5)  # strength of the color jitter
    transform_brightness: PerView = per_view(None, 0, 5)  # brightness factors of 1 ± value; None: 0.8 transform_s
    transform_contrast: PerView = per_view(None, 0, 5)  # contrast factors of 1 ± value; None: 0.8 transform_s
    transform_saturation: PerView = per_view(None, 0, 5)  # saturation factors of 1 ± value; None: 0.8 transform_s
    # largest turn of the color wheel in either direction (fraction); None: 0.2 transform_s
    transform_hue: PerView = per_view(None, 0, 0.5)
    transform_jitter_probability: PerView = per_view(None)  # probability of the color jitter; None: the data set's
    transform_grayscale_probability: PerView = per_view(None)  # probability of gray views; None: the data set's
    transform_apply_blur: bool = True  # whether views are blurred at all
    transform_blur_probability: PerView = per_view(None)  # probability of a Gaussian blur; None: the data set's
    # smallest standard deviation of the blur in pixels; None: the data set's
    transform_blur_sigma_min: PerView = per_view(None, 0.01, BLUR_RADIUS / 2)
    # largest standard deviation of the blur in pixels (its kernel has 13); None: the data set's
    transform_blur_sigma_max: PerView = per_view(None, 0.01, BLUR_RADIUS / 2)
    # probability of inverting bright pixels (solarization); None: the data set's
    transform_solarize_probability: PerView = per_view(None)
    # pixel value from which pixels are inverted (white is 1); None: the data set's
    transform_solarize_threshold: PerView = per_view(None)
    transform_flip_probability: PerView = per_view(None)  # probability of a horizontal flip; None: the data set's
    # probability of a vertical flip; None: the data set's
    transform_vertical_flip_probability: PerView = per_view(None)
    # probability of a rotation by 90 degrees: with this and both flips at 0.5, all 8 orientations; None: the data set's
    transform_rotation_probability: PerView = per_view(None)
    # clips only: probability of replacing the frames by differences between frames; None: the data set's
    transform_time_difference_probability: PerView = per_view(None)

    # optimizer
    optimizer_name: str = choice("sgd", ("sgd", "lars", "adamw", "adam"))  # optimizer; lars: for large batches
    lr: float = positive(0.5, at_most=1000)  # peak learning rate, reached after the warm-up
    momentum: float = fraction(0.9)  # momentum of sgd and lars
    adam_betas: list[float] = betas()  # decay rates of the means of gradients and of their squares, of adam and adamw
    weight_decay: float = non_negative(1e-4, at_most=1000)  # weight decay; not applied to excluded parameters
    max_epochs: int = positive(320)  # number of epochs (in Python, pass it to the Trainer, which schedules follow)
    lars_eta: float = positive(1e-3, at_most=1000)  # trust coefficient of lars
    grad_clip_lars: bool = False  # lars: limit each parameter's learning rate to lr
    # parts of the names of parameters without weight decay and adaptation by lars; [".bias", ".bn"]: biases and norms
    exclude_matching_parameters_from_lars: list[str] = field(factory=list)

    # schedules of learning rate and weight decay
    lr_schedule: str = choice("cosine", LR_SCHEDULES)  # shape of the learning rate after the warm-up
    # learning rate at the end of training, scaled with the batch size as lr is; lr_schedule=steps: lower bound
    final_lr_schedule_value: float = non_negative(0.0, at_most=1000)
    lr_decay_steps: list[float] = numbers()  # steps: epochs at which the learning rate decays, such as [60, 80]
    lr_decay_factor: float = positive(0.1, at_most=1)  # steps: factor of the learning rate at each of lr_decay_steps
    warmup_epochs: float | None = non_negative(None)  # epochs of warm-up; None: lars_warmup_epochs with lars, else 0
    lars_warmup_epochs: float = non_negative(1)  # epochs of warm-up with lars, if warmup_epochs is None
    warmup_start_lr: float = non_negative(0.0, at_most=1000)  # learning rate at which the warm-up starts
    # weight decay at the end, reached along half a cosine; None: constant
    final_weight_decay: float | None = non_negative(None, at_most=1000)

    # options of single parameters
    layer_decay: float = positive(1.0, at_most=1)  # learning rate of each encoder stage, relative to the next stage's
    # options of parameters whose name matches a regular expression: [{"pattern": "projection", "lr_mult": 10}, ...]
    parameter_options: list[dict[str, Any]] = field(factory=list, converter=plain, validator=check_parameter_options)

    # parts of a batch
    micro_batch_size: int | None = positive(None)  # images encoded at once; the loss is the whole batch's. None: all

    # evaluation during training
    evaluations: list[str] = field(factory=lambda: list(EVALUATIONS))  # validation metrics; [] for none
    evaluate_every_n_epochs: int = positive(1)  # epochs from one evaluation to the next
    probe_solver: str = choice("sklearn", PROBE_SOLVERS)  # solver of linear_probe; torch: on the features' device
    online_classifier: bool = False  # train a linear classifier alongside, on the labels of the batches (-1: no label)
    n_classes: int | None = positive(None)  # number of classes of the online classifier; None: the data set's
    # peak learning rate of the online classifier, which has no weight decay
    online_classifier_lr: float = positive(0.1, at_most=1000)
    # fit probes on the labeled training set of dataset_name, not on half of the validation set; no effect with a
    # loader of your own
    probe_on_training_set: bool = False

    def __attrs_post_init__(self):
        super().__attrs_post_init__()
        if self.use_vicreg_loss and self.loss_type == "ce":  # a "ce" that was passed cannot be told from the default
            object.__setattr__(self, "loss_type", "vic")
        for contradictions in CONTRADICTIONS:
            refuse(contradictions(self))
        _ = self.views  # raises if a list has the wrong length

    @property
    def is_evaluated(self) -> bool:
        return bool(self.evaluations) or self.online_classifier

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(query view, key view) of every term of the loss.

        A teacher sees the very view that the student sees. Without one, use_both_augmentations_as_queries gives all
        ordered pairs of large views, otherwise the first view is paired with each of the others; a single large view is
        its own key. A small view is a query for the key of every large view, and never a key (SwAV's multi-crop,
        https://arxiv.org/abs/2006.09882, section 3.2). `vic` and `barlow` compare the batches of z of the same pairs,
        as VICRegL does (https://arxiv.org/abs/2210.01571). With a loss of all views, each view is paired with one
        other, for the cosines that are logged.
        """
        large, small = range(self.n_large_views), range(self.n_large_views, self.n_views)
        if self.loss_type in ALL_VIEW_LOSSES:
            return [(i, (i + 1) % len(large)) for i in large] + [(i, 0) for i in small]
        queries = large if self.use_both_augmentations_as_queries else large[:1]
        if self.teacher is not None:
            return [(i, i) for i in [*queries, *small]]
        return [(i, j) for i in [*queries, *small] for j in large if i != j or len(large) == 1]

    @property
    def has_negatives_of_batch(self) -> bool:
        """Return whether images of the same batch are negatives."""
        return self.use_negative_examples_from_batch or self.use_negative_examples_from_same_view

    @property
    def has_queue(self) -> bool:
        """Return whether there is a queue of keys."""
        return self.use_negative_examples_from_queue or self.use_nearest_keys

    @property
    def queue_may_hold_negatives(self) -> bool:
        """Return whether use_negative_examples_from_queue=True is accepted."""
        return not self.use_nearest_keys and self.loss_type not in LABEL_LOSSES

    @property
    def assigns_over_queue(self) -> bool:
        """Return whether SwAV assigns the keys of the queue to the prototypes, too."""
        return self.loss_type == "swav" and self.has_queue

    @property
    def loss_factor(self) -> float:
        """Factor by which the mean over pairs is multiplied.

        With two views the loss is the sum over pairs times loss_constant_factor, as in BYOL and SimCLR. More views do
        not change its size (as in SwAV and DINO), so that the same lr fits.
        """
        both = (
            self.use_both_augmentations_as_queries and self.n_large_views > 1 and self.loss_type not in ALL_VIEW_LOSSES
        )
        return (2 if both else 1) * self.loss_constant_factor

    @property
    def n_views(self) -> int:
        return self.n_large_views + self.n_small_views

    @property
    def views(self) -> list[ViewSettings]:
        """Settings of each view: the data set's, changed by the transform_... fields.

        Raises:
            ValueError: a list has too few or too many values, or a lower limit is above the upper one.
        """
        return [view_of(self, i) for i in range(self.n_views)]

    def head(self, name: str) -> dict[str, Any]:
        """Return the arguments of `heads.MLP` for the "projection" or "prediction" head, except input and output."""
        n_layers = getattr(self, f"{name}_mlp_layers")
        normalization = self.mlp_normalization
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
            "activation": self.mlp_activation,
        }


# ---- Checks of method and heads ----


def contradictions_of_method(params: ModelParams) -> Contradictions:
    """Contradictions of loss, negatives, views and evaluations."""
    p = params
    has_negatives = p.has_negatives_of_batch or p.use_negative_examples_from_queue
    has_predictor = p.prediction_mlp_layers > 0 or p.head("prediction")["last_normalization"] is not None
    one_network = not p.use_lagging_model and p.teacher is None and not has_predictor
    unknown = sorted(set(p.evaluations) - set(EVALUATIONS))
    queue = "use_negative_examples_from_queue=True or " if p.queue_may_hold_negatives else ""
    # fmt: off
    return [
        (p.use_vicreg_loss and p.loss_type != "vic",
         f"use_vicreg_loss=True contradicts loss_type={p.loss_type!r}. Set only one of them."),
        (p.loss_type in NEED_NEGATIVES and not has_negatives,
         f"loss_type={p.loss_type!r} needs negatives, but there are none. Set {queue}"
         "use_negative_examples_from_batch=True."),
        (p.use_negative_examples_from_same_view and not one_network,
         "use_negative_examples_from_same_view=True needs queries and keys of one network. Set "
         f"use_lagging_model=False (is {p.use_lagging_model}), teacher=None (is {p.teacher}), "
         f"prediction_mlp_layers=0 (is {p.prediction_mlp_layers}) and prediction_mlp_last_normalization=None "
         f"(is {p.prediction_mlp_last_normalization})."),
        (p.use_negative_examples_from_same_view and p.loss_type in TWO_DISTRIBUTIONS,
         f"use_negative_examples_from_same_view=True: loss_type={p.loss_type!r} compares two distributions over keys. "
         "Set it to False."),
        (p.loss_type in LABEL_LOSSES and p.use_negative_examples_from_queue,
         f"loss_type={p.loss_type!r} knows no labels of the keys in a queue. Set "
         "use_negative_examples_from_queue=False."),
        (p.loss_type in PROTOTYPE_LOSSES and not p.use_unit_sphere_projection,
         f"loss_type={p.loss_type!r} compares prototypes with unit vectors. Set use_unit_sphere_projection=True."),
        (p.n_large_views == 1 and p.teacher is None and p.loss_type != "seed",
         "n_large_views=1 leaves no other view to compare with. Choose at least 2"
         + ("." if p.loss_type in NOT_FOR_TEACHERS else ", or pass a teacher.")),
        (p.shuffle_batch_norm and not p.use_lagging_model,
         "shuffle_batch_norm=True needs a lagging model, whose images it shuffles. Set use_lagging_model=True."),
        (p.use_eqco_margin and p.loss_type != "ce",
         f"use_eqco_margin=True is for loss_type='ce', not for {p.loss_type!r}. Change one of them."),
        (bool(unknown), f"evaluations={unknown} unknown: choose from {', '.join(EVALUATIONS)}"),
    ]
    # fmt: on


def contradictions_of_keys(params: ModelParams) -> Contradictions:
    """Contradictions of the settings that say where keys come from."""
    p = params
    # fmt: off
    return [
        (p.use_nearest_keys and not p.use_unit_sphere_projection,
         "use_nearest_keys=True compares keys of length 1. Set use_unit_sphere_projection=True."),
        (p.use_nearest_keys and p.use_negative_examples_from_queue,
         "use_nearest_keys=True takes positives from the queue, which cannot be negatives, too. Set "
         "use_negative_examples_from_queue=False."),
        (p.use_nearest_keys and p.use_negative_examples_from_same_view,
         "use_nearest_keys=True replaces keys by neighbors, so that queries of the same view cannot be negatives. Set "
         "use_negative_examples_from_same_view=False."),
        (p.use_nearest_keys and p.loss_type in (*PROTOTYPE_LOSSES, *ALL_VIEW_LOSSES),
         f"use_nearest_keys=True is for losses of pairs, not for loss_type={p.loss_type!r}. Change one of them."),
        (p.teacher is not None and p.use_lagging_model,
         "use_lagging_model=True and teacher exclude each other: both are where keys come from. Set one of them."),
        (p.teacher is not None and p.loss_type in NOT_FOR_TEACHERS,
         f"teacher is for losses of pairs, not for loss_type={p.loss_type!r}. Change one of them."),
    ]
    # fmt: on


def contradictions_of_heads(params: ModelParams) -> Contradictions:
    """Contradictions of the numbers of layers and their widths."""
    contradictions = []
    for name in HEADS:
        n_layers = getattr(params, f"{name}_mlp_layers")
        n_hidden = max(0, n_layers - 1)
        widths = getattr(params, f"{name}_mlp_hidden_dims")
        message = (
            f"{name}_mlp_hidden_dims={widths} has {len(widths)} widths, but {name}_mlp_layers={n_layers} has "
            f"{n_hidden} hidden layers. Pass one width for each of them, or none"
        )
        contradictions.append((len(widths) not in (0, n_hidden), message))
    return contradictions


def contradictions_of_sizes(params: ModelParams) -> Contradictions:
    """Contradictions of the sizes of batch, queue and layers."""
    p = params
    which = "batch_size" if p.global_batch_size is None else "global_batch_size"
    one_image = getattr(p, which) == 1
    size = f"{which}={getattr(p, which)}"
    batch_alone = p.has_negatives_of_batch and not p.use_negative_examples_from_queue
    layers = normalized_layers(p)
    ungrouped = [f"{name}={width}" for kind, width, name, _ in layers if kind == "gn" and width % GROUPS]
    across = [field for kind, width, _, field in layers if kind in ("bn", "br") or (kind == "gn" and width == GROUPS)]
    across_batch = ", ".join(f"{field}={getattr(p, field)!r}" for field in dict.fromkeys(across))
    needs_batch = p.teacher is not None or p.loss_type in STATISTIC_LOSSES  # keys of other batches do not help
    queue_helps = p.queue_may_hold_negatives and not needs_batch and not across_batch
    without_queue = f", or {'use_nearest_keys' if p.use_nearest_keys else 'use_negative_examples_from_queue'}=False"
    needs_queue = not p.use_nearest_keys and not p.has_negatives_of_batch and p.loss_type in NEED_NEGATIVES
    # fmt: off
    return [
        (p.has_queue and p.K == 0,
         f"K=0 makes an empty queue. Choose K above 0{'' if needs_queue else without_queue}."),
        (p.has_queue and p.K * p.dim > LARGEST_QUEUE,
         f"K={p.K} keys of dim={p.dim} make a queue of more than {LARGEST_QUEUE} numbers. Choose fewer."),
        (bool(ungrouped),
         f"{', '.join(ungrouped[:1])} does not fit group norm. Choose a multiple of {GROUPS}, at least {2 * GROUPS}."),
        (p.micro_batch_size == 1 and bool(across_batch),
         f"micro_batch_size=1 is too small for {across_batch}: a single image has no statistics. Choose a larger one."),
        (one_image and (batch_alone or needs_batch
                        or (p.loss_type == "swav" and not p.use_negative_examples_from_queue)),
         f"{size} gives loss_type={p.loss_type!r} no other image to compare with. Choose a larger batch"
         f"{', or use_negative_examples_from_queue=True' if queue_helps else ''}."),
        (one_image and bool(across_batch),
         f"{size} is too small for {across_batch}: a single image has no statistics. Choose a larger batch."),
    ]
    # fmt: on


def normalized_layers(params: ModelParams) -> list[tuple[str, int, str, str]]:
    """Return (normalization, width, name of the field that sets the width, and of the one that sets the normalization)
    of all normalized layers of both heads."""
    layers = []
    for name in HEADS:
        head = params.head(name)
        of_width = f"{name}_mlp_hidden_dims" if getattr(params, f"{name}_mlp_hidden_dims") else "mlp_hidden_dim"
        is_same = name == "projection" or params.prediction_mlp_normalization == "same"
        of_kind = "mlp_normalization" if is_same else "prediction_mlp_normalization"
        of_last = f"{name}_mlp_last_normalization"
        layers += [(head["normalization"], width, of_width, of_kind) for width in head["hidden_dim"]]
        of_last = of_kind if getattr(params, of_last) == "same" else of_last
        layers += [(head["last_normalization"], params.dim, "dim", of_last)]
    return [layer for layer in layers if layer[0] is not None]


# ---- Checks of optimizer and schedules ----


def contradictions_of_optimizer(params: ModelParams) -> Contradictions:
    """Contradictions of the optimizer, and of the schedules of learning rate and weight decay."""
    p = params
    decay = max(p.weight_decay, p.final_weight_decay or 0.0)
    named = "weight_decay" if decay == p.weight_decay else "final_weight_decay"
    is_adam = p.optimizer_name.startswith("adam")
    # fmt: off
    return [
        (p.optimizer_name != "lars" and p.lr_scaling is None and p.lr * decay > 2,
         f"lr={p.lr} times {named}={decay} is above 2, so every step would enlarge the weights. "
         f"Choose a smaller {named}."),
        (p.lr_schedule == "steps" and not p.lr_decay_steps,
         "lr_schedule='steps' needs the epochs of the steps. Set lr_decay_steps, for example "
         f"[{0.6 * p.max_epochs:.4g}, {0.8 * p.max_epochs:.4g}]."),
        (p.lr_schedule != "steps" and bool(p.lr_decay_steps),
         f"lr_decay_steps={p.lr_decay_steps} is for lr_schedule='steps', not for {p.lr_schedule!r}. Set only one."),
        (p.warmup_start_lr > p.lr,
         f"warmup_start_lr={p.warmup_start_lr} is above lr={p.lr}, at which the warm-up ends. Choose a smaller one."),
        (p.lr_schedule != "constant" and p.final_lr_schedule_value > p.lr,
         f"final_lr_schedule_value={p.final_lr_schedule_value} is above lr={p.lr}, from which lr_schedule falls. "
         "Choose a smaller one, such as 0."),
        (p.final_weight_decay is not None and p.weight_decay == 0,
         f"final_weight_decay={p.final_weight_decay} needs weight_decay above 0, because the weight decay of every "
         "parameter changes by the same factor. Set weight_decay."),
        (p.grad_clip_lars and p.optimizer_name != "lars",
         f"grad_clip_lars=True is for optimizer_name='lars', not for {p.optimizer_name!r}. Change one of them."),
        (is_adam and any("momentum" in row for row in p.parameter_options),
         f"parameter_options sets momentum, which optimizer_name={p.optimizer_name!r} does not have. Remove it."),
        (p.optimizer_name != "lars" and any("lars_exclude" in row for row in p.parameter_options),
         f"parameter_options sets lars_exclude, which is for optimizer_name='lars', not for {p.optimizer_name!r}. "
         "Remove it."),
    ]
    # fmt: on


def contradictions_of_sce(params: ModelParams) -> Contradictions:
    """Contradictions of the schedules of SCE's coefficient and target temperature."""
    contradictions = []
    for name in SCHEDULED:
        warmup_epochs = getattr(params, f"{name}_warmup_epochs")
        schedule = getattr(params, f"{name}_schedule")
        start, final = f"{name}_warmup_start", f"{name}_final"
        # fmt: off
        contradictions += [
            (has_schedule(params, name) and params.loss_type not in SCHEDULED[name],
             f"{name}_warmup_epochs={warmup_epochs} and {name}_schedule={schedule!r} are for loss_type="
             f"{' and '.join(map(repr, SCHEDULED[name]))}, not for {params.loss_type!r}. Remove them."),
            (warmup_epochs > 0 and getattr(params, start) is None,
             f"{name}_warmup_epochs={warmup_epochs} needs the value at the start of the warm-up. Set {start}."),
            (schedule != "constant" and getattr(params, final) is None,
             f"{name}_schedule={schedule!r} needs the value at the end of the schedule. Set {final}."),
        ]
        # fmt: on
    return contradictions


def has_schedule(params: ModelParams, name: str) -> bool:
    """Return whether a setting of SCHEDULED changes during training."""
    return getattr(params, f"{name}_warmup_epochs") > 0 or getattr(params, f"{name}_schedule") != "constant"


# ---- Views ----


def contradictions_of_views(params: ModelParams) -> Contradictions:
    """Contradictions of small views. Lists of a wrong length are refused by `view_of`."""
    small = [a.name for a in fields(ModelParams) if a.name.startswith("transform_small_")]
    changed = [name for name in small if getattr(params, name) != fields_dict(ModelParams)[name].default]
    message = f"{', '.join(changed)} set, but there are no small views. Set n_small_views above 0, or remove it"
    return [(bool(changed) and params.n_small_views == 0, message)]


CONTRADICTIONS = (
    contradictions_of_method,
    contradictions_of_keys,
    contradictions_of_heads,
    contradictions_of_sizes,
    contradictions_of_optimizer,
    contradictions_of_sce,
    contradictions_of_views,
)


def view_of(params: ModelParams, i: int) -> ViewSettings:
    """Return the settings of view i. A field of ViewSettings is set by one field of ModelParams, an interval by two."""
    size = params.crop_size if i < params.n_large_views else small_crop_size(params.crop_size)
    s = value_for_view(params, "transform_s", i)
    strengths = {"brightness": 0.8 * s, "contrast": 0.8 * s, "saturation": 0.8 * s, "hue": 0.2 * s}
    view = evolve(params.dataset.view, crop_size=size, **strengths)
    settings = {a.name: view_setting(params, a.name, getattr(view, a.name), i) for a in fields(ViewSettings)}
    if settings["crop_size"] > params.crop_size:
        small = f"transform_small_crop_size={settings['crop_size']}"
        raise ValueError(f"{small} is above transform_crop_size={params.crop_size}. Choose a smaller one.")
    if not params.transform_apply_blur:
        settings["blur_probability"] = 0.0
    return evolve(view, **settings)


def small_crop_size(crop_size: int) -> int:
    """Return the default size of small views: a multiple of 8 near 3/7 of large views (96 for 224, as in SwAV)."""
    return min(crop_size, max(8, 8 * round(crop_size * 3 / 7 / 8)))


def view_setting(params: ModelParams, name: str, default: float | tuple[float, float], i: int) -> float | tuple:
    """Return the value of a field of ViewSettings for view i: a number, or an interval."""
    of_small_views = name in ("crop_size", "crop_scale") and i >= params.n_large_views
    name = f"transform_small_{name}" if of_small_views else f"transform_{name}"
    if not isinstance(default, tuple):
        value = value_for_view(params, name, i)
        return default if value is None else value
    low = value_for_view(params, f"{name}_min", i)
    high = value_for_view(params, f"{name}_max", i)
    low = default[0] if low is None else low
    high = default[1] if high is None else high
    if low > high:
        raise ValueError(f"{name}_min={low} is above {name}_max={high} in view {i}. Lower the one or raise the other.")
    return low, high


def value_for_view(params: ModelParams, name: str, i: int) -> float | None:
    """Return the value of a transform_... field for view i, after a check of the list's length."""
    value = getattr(params, name)
    fewest, most = params.n_large_views, params.n_views
    if name.startswith("transform_small"):
        i, fewest, most = i - fewest, 1, params.n_small_views
    elif name.startswith("transform_crop_scale"):
        most = fewest
    if isinstance(value, list | tuple):
        if not fewest <= len(value) <= most:
            at_least = f". At least {fewest} are needed" if fewest < most else ""
            raise ValueError(f"{name}={value} has {len(value)} values for {most} views{at_least}")
        value = value[min(i, len(value) - 1)]
    return None if value is None else abs(value)  # -0.0 would make a negative width of an interval


# ---- Presets: rows of settings, or of differences from another row. PRESETS["byol"](lr=0.3) ----
# fmt: off

MoCoV2Params = ModelParams
MoCoV1Params = Preset(
    ModelParams, "MoCoV1Params", "MoCo v1 (https://arxiv.org/abs/1911.05722): MoCo with a projection of one layer.",
    projection_mlp_layers=1, T=0.07, m=0.999,
    transform_apply_blur=False, transform_jitter_probability=1.0, transform_hue=0.4,
)
EqCoParams = Preset(
    ModelParams, "EqCoParams", "EqCo's SiMo (https://arxiv.org/abs/2010.01929): few negatives that count as many.",
    use_eqco_margin=True, use_negative_examples_from_batch=True, use_negative_examples_from_queue=False,
)
SCEParams = Preset(
    ModelParams, "SCEParams", "SCE (https://arxiv.org/abs/2111.14585): InfoNCE with similar images in the target.",
    loss_type="sce", T=0.1, mlp_normalization="bn", use_negative_examples_from_batch=True,
    use_both_augmentations_as_queries=True, use_momentum_schedule=True,
)
BYOLParams = Preset(
    ModelParams, "BYOLParams", "BYOL (https://arxiv.org/abs/2006.07733): a predictor and no negatives.",
    loss_type="ip", loss_constant_factor=2, prediction_mlp_layers=2, mlp_normalization="bn",
    use_negative_examples_from_queue=False, use_both_augmentations_as_queries=True, use_momentum_schedule=True,
    optimizer_name="lars", exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
)
SimCLRParams = Preset(
    ModelParams, "SimCLRParams", "SimCLR (https://arxiv.org/abs/2002.05709): InfoNCE with negatives of the batch.",
    use_lagging_model=False, use_both_augmentations_as_queries=True,
    use_negative_examples_from_queue=False, use_negative_examples_from_batch=True,
    use_negative_examples_from_same_view=True,
)
DCLParams = Preset(
    SimCLRParams, "DCLParams",
    "DCL (https://arxiv.org/abs/2110.06848): SimCLR without the positive pair in the denominator.",
    loss_type="dcl", T=0.1,
)
# The paper, on ImageNet: max_epochs=1000, lr=1.6, batch_size=2048, weight_decay=1e-6, mlp_hidden_dim=8192, dim=8192.
VICRegParams = Preset(
    ModelParams, "VICRegParams", "VICReg (https://arxiv.org/abs/2105.04906): invariance, variance and covariance.",
    loss_type="vic", use_lagging_model=False, use_unit_sphere_projection=False,
    use_negative_examples_from_queue=False, projection_mlp_layers=3, mlp_normalization="bn",
    optimizer_name="lars", exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
    lars_warmup_epochs=10, final_lr_schedule_value=0.002,
)
BarlowTwinsParams = Preset(
    VICRegParams, "BarlowTwinsParams", "Barlow Twins (https://arxiv.org/abs/2103.03230): less redundant dimensions.",
    loss_type="barlow", loss_constant_factor=0.1, mlp_hidden_dim=2048, dim=2048,
    lr=0.3, weight_decay=1e-6, final_lr_schedule_value=0.0003,
)
MoCoV3Params = Preset(  # loss_constant_factor is 2 T, as in the authors' code
    ModelParams, "MoCoV3Params", "MoCo v3 (https://arxiv.org/abs/2104.02057): MoCo with a predictor, without a queue.",
    use_negative_examples_from_batch=True, use_negative_examples_from_queue=False,
    loss_constant_factor=0.4, prediction_mlp_layers=2, mlp_normalization="bn",
    use_both_augmentations_as_queries=True, m=0.99, use_momentum_schedule=True, optimizer_name="adamw", lr=1.5e-4,
    weight_decay=0.1, warmup_epochs=10, exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
)
SimSiamParams = Preset(
    BYOLParams, "SimSiamParams", "SimSiam (https://arxiv.org/abs/2011.10566): BYOL without the lagging model.",
    use_lagging_model=False, stop_gradient_of_keys=True, use_momentum_schedule=False,
    loss_constant_factor=0.5, optimizer_name="sgd", exclude_matching_parameters_from_lars=[], lr=0.05,
)
ReSSLParams = Preset(
    SCEParams, "ReSSLParams", "ReSSL (https://arxiv.org/abs/2107.09282): similarities alone are the target.",
    sce_coefficient=0.0, sce_target_T=0.04, use_both_augmentations_as_queries=False,
)
# eztorch's configuration. loss_constant_factor=0.5 makes the loss the mean over both directions. Its run:
# --precision 16-mixed --sync_batchnorm --save_every_n_epochs 100
SCEVideoParams = Preset(
    SCEParams, "SCEVideoParams", "SCE for video (https://arxiv.org/abs/2212.11187): R3D-18 on Kinetics200.",
    dataset_name="kinetics", video_decoder="frames", frames_per_second=30, num_frames=8, clip_duration=2.56,
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

SwAVParams = Preset(  # the authors' recipe for 256 images per step
    ModelParams, "SwAVParams", "SwAV (https://arxiv.org/abs/2006.09882): views agree on one of many prototypes.",
    loss_type="swav", use_lagging_model=False, use_both_augmentations_as_queries=True, loss_constant_factor=0.5,
    T=0.1, K=3840, queue_from_epoch=15, mlp_hidden_dim=2048, mlp_normalization="bn", transform_s=1.0,
    transform_crop_scale_min=0.14, optimizer_name="lars", lr=0.6, weight_decay=1e-6, lars_warmup_epochs=0,
    final_lr_schedule_value=0.0006,
)
DINOParams = Preset(
    ModelParams, "DINOParams", "DINO (https://arxiv.org/abs/2104.14294): prototypes of a centered lagging model.",
    loss_type="dino", use_both_augmentations_as_queries=True, loss_constant_factor=0.5, T=0.1, sce_target_T=0.04,
    n_prototypes=4096, use_negative_examples_from_queue=False, use_momentum_schedule=True,
    projection_mlp_layers=3, mlp_hidden_dim=2048, dim=256, mlp_activation="gelu",
    optimizer_name="adamw", lr=5e-4, lr_scaling="linear", weight_decay=0.04, final_weight_decay=0.4, warmup_epochs=10,
    final_lr_schedule_value=1e-6, exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
    transform_saturation=0.2, transform_crop_scale_min=0.14, transform_blur_probability=[1.0, 0.1],
    transform_solarize_probability=[0.0, 0.2],
)
NNCLRParams = Preset(
    SimCLRParams, "NNCLRParams", "NNCLR (https://arxiv.org/abs/2104.14548): keys are neighbors of the other view.",
    use_nearest_keys=True, use_negative_examples_from_same_view=False, loss_constant_factor=0.5, T=0.1, K=98304,
    dim=256, projection_mlp_layers=3, projection_mlp_hidden_dims=[2048, 2048], projection_mlp_last_normalization="same",
    prediction_mlp_layers=2, prediction_mlp_hidden_dims=[4096], mlp_normalization="bn", optimizer_name="lars", lr=0.3,
    lars_warmup_epochs=10, weight_decay=1e-6, exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
)
SupConParams = Preset(
    SimCLRParams, "SupConParams",
    "SupCon (https://arxiv.org/abs/2004.11362): SimCLR with all images of a class as positives.",
    loss_type="supcon", loss_constant_factor=0.5, T=0.1, lr=0.1,
)
DistillParams = Preset(
    ModelParams, "DistillParams", "SEED (https://arxiv.org/abs/2101.04731): a small encoder learns from a teacher.",
    loss_type="seed", use_lagging_model=False, sce_target_T=0.01, lr=0.03, n_large_views=1,
)
FastSiamParams = Preset(
    SimSiamParams, "FastSiamParams", "FastSiam (https://doi.org/10.1007/978-3-031-16788-1_4): SimSiam, keys are means.",
    loss_type="fastsiam", n_large_views=4, use_unit_sphere_projection=False, use_both_augmentations_as_queries=False,
    loss_constant_factor=1,
)
LeJEPAParams = Preset(
    VICRegParams, "LeJEPAParams", "LeJEPA (https://arxiv.org/abs/2511.08544): normally distributed projections.",
    loss_type="lejepa", n_large_views=4, mlp_hidden_dim=2048, dim=16, optimizer_name="adamw", lr=2e-3,
    weight_decay=0.05, exclude_matching_parameters_from_lars=[], warmup_epochs=1, final_lr_schedule_value=1e-3,
    transform_s=1.0, transform_solarize_probability=0.2,
)
VISRegParams = Preset(
    LeJEPAParams, "VISRegParams", "VISReg (https://arxiv.org/abs/2606.02572): LeJEPA with sorted projections.",
    loss_type="visreg", sigreg_weight=0.9, mlp_activation="gelu", dim=256, lr=9e-4,
    final_lr_schedule_value=9e-7,
)
EMPSSLParams = Preset(
    VICRegParams, "EMPSSLParams", "EMP-SSL (https://arxiv.org/abs/2304.03977): many small patches, few epochs.",
    loss_type="emp", n_large_views=20, use_unit_sphere_projection=True, invariance_loss_weight=200, batch_size=100,
    mlp_hidden_dim=4096, dim=1024, lr=0.3, weight_decay=1e-4, lars_eta=0.005, grad_clip_lars=True,
    lars_warmup_epochs=0, final_lr_schedule_value=0, transform_crop_scale_min=0.25, transform_crop_scale_max=0.25,
    transform_crop_ratio_min=1, transform_crop_ratio_max=1, transform_hue=0.2, transform_blur_probability=0.1,
    transform_solarize_probability=0.1,
)
FroSSLParams = Preset(
    VICRegParams, "FroSSLParams", "FroSSL (https://arxiv.org/abs/2310.02903): covariances of a small norm.",
    loss_type="frossl", invariance_loss_weight=1, final_lr_schedule_value=0,
)
MMCRParams = Preset(
    VICRegParams, "MMCRParams", "MMCR (https://arxiv.org/abs/2303.03307): mean views that span many directions.",
    loss_type="mmcr", use_unit_sphere_projection=True, invariance_loss_weight=0, final_lr_schedule_value=0,
)

PRESETS = Presets(ModelParams, {
    "moco_v2": MoCoV2Params, "eqco": EqCoParams, "sce": SCEParams, "byol": BYOLParams, "simclr": SimCLRParams,
    "vicreg": VICRegParams, "barlow_twins": BarlowTwinsParams,
    "moco_v1": MoCoV1Params, "dcl": DCLParams, "moco_v3": MoCoV3Params, "simsiam": SimSiamParams, "ressl": ReSSLParams,
    "sce_video": SCEVideoParams, "swav": SwAVParams, "dino": DINOParams, "nnclr": NNCLRParams, "supcon": SupConParams,
    "distill": DistillParams, "fastsiam": FastSiamParams, "lejepa": LeJEPAParams, "visreg": VISRegParams,
    "emp_ssl": EMPSSLParams, "frossl": FroSSLParams, "mmcr": MMCRParams,
})


def nearest_preset(params: ModelParams) -> str:
    """Return the name of the preset with the same loss that has most of these settings."""
    return min(PRESETS, key=lambda name: distance(params, PRESETS[name]))
