"""Names that settings may have as values, with their facts: data sets, encoders, normalizations, evaluations.

There are only names and facts here. The code of a name is in the package's folders, in tables with the same names
(tests compare them). Importing this module reads no data and builds no network.
"""

import difflib
import importlib.util
from functools import cache, partial

from attrs import field, frozen

# ---- Views ----

BLUR_RADIUS = 6  # pixels: 3 sigma of the strongest blur, whose kernel has 13 pixels


@frozen
class ViewSettings:
    """Augmentation of one view. The defaults are MoCo v2's (https://arxiv.org/abs/2003.04297)."""

    crop_size: int = 224  # pixels
    crop_scale: tuple[float, float] = (0.2, 1.0)  # interval of the crop's area, as a fraction of the image
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # interval of width / height
    jitter_probability: float = 0.8
    brightness: float = 0.4  # factors from 1 - 0.4 to 1 + 0.4
    contrast: float = 0.4  # factors from 1 - 0.4 to 1 + 0.4
    saturation: float = 0.4  # factors from 1 - 0.4 to 1 + 0.4
    hue: float = 0.1  # turn of the color wheel from -0.1 to 0.1
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # interval of the standard deviation in pixels
    solarize_probability: float = 0.0
    solarize_threshold: float = 0.5  # pixel value, where white is 1
    flip_probability: float = 0.5
    vertical_flip_probability: float = 0.0
    rotation_probability: float = 0.0  # by 90 degrees
    time_difference_probability: float = 0.0  # clips only; applied by the decoder, which has the neighboring frames


# ---- Data sets ----

MOST_WORKERS = 1024  # processes of a loader, or threads of a decoder


@frozen
class DatasetInfo:
    """Facts about a data set. Its splits are directories (or lists) in `$DATA_PATH/<name>`."""

    crop_size: int  # pixels
    n_classes: int
    mean: tuple[float, ...]  # mean of each channel, for pixel values from 0 to 1
    std: tuple[float, ...]  # standard deviation of each channel
    storage: str = "packed"  # arrays; folders (of classes), voc (lists), videos, or custom (images)
    pretraining_splits: tuple[str, ...] = ("train",)
    train_splits: tuple[str, ...] = ("train",)  # labeled
    test_splits: tuple[str, ...] = ("test",)
    validation_splits: tuple[str, ...] | None = None  # for pretraining; None: test_splits
    multi_label: bool = False  # multi-label: an image has one entry 1, -1 or 0 per class, [classes]
    view: ViewSettings = field(factory=ViewSettings)  # training views, unless settings change them
    class_names: str = ""  # names of a packed set's classes in the order of their numbers; "": the numbers

    @property
    def splits(self) -> list[str]:
        """All splits, in alphabetical order."""
        return sorted({*self.pretraining_splits, *self.train_splits, *self.test_splits})

    @property
    def scored_splits(self) -> tuple[str, ...]:
        """Splits that a validation during pretraining scores."""
        return self.validation_splits or self.test_splits

    @property
    def channels(self) -> int:
        return len(self.mean)

    def feeds(self, channels: int) -> bool:
        """Return whether an encoder with this number of channels accepts the images: gray is repeated for RGB."""
        return self.is_custom or self.channels == channels or (self.channels, channels) == (1, 3)

    @property
    def is_packed(self) -> bool:
        return self.storage == "packed"

    @property
    def is_custom(self) -> bool:
        return self.storage == "custom"

    @property
    def of_videos(self) -> bool:
        return self.storage == "videos"

    @property
    def kind(self) -> str:
        return "video" if self.of_videos else "image"


DIGIT_VIEW = ViewSettings(  # digits have no color, a mirrored one is no digit, and a blur would erase 8 x 8 pixels
    crop_scale=(0.4, 1.0), jitter_probability=0.0, grayscale_probability=0.0, flip_probability=0.0, blur_probability=0.0
)
CLIP_VIEW = ViewSettings(crop_scale=(0.2, 0.766), crop_ratio=(0.75, 1.3333))  # of SlowFast's MoCo, as in SCE for videos
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TRAINVAL = ("trainval",)
OfFiles = partial(DatasetInfo, 224, mean=IMAGENET_MEAN, std=IMAGENET_STD, storage="folders")

DATASETS = {
    "digits": DatasetInfo(8, 10, (0.3053,), (0.3760,), view=DIGIT_VIEW),
    "cifar10": DatasetInfo(
        32,
        10,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        class_names="airplane automobile bird cat deer dog frog horse ship truck",
    ),
    "cifar100": DatasetInfo(32, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": DatasetInfo(
        96,
        10,
        (0.4406, 0.4273, 0.3858),
        (0.2603, 0.2566, 0.2713),
        pretraining_splits=("train", "unlabeled"),
        class_names="airplane bird car cat deer dog horse monkey ship truck",
    ),
    "imagenet": OfFiles(n_classes=1000, test_splits=("val",)),
    "voc07": OfFiles(n_classes=20, pretraining_splits=TRAINVAL, train_splits=TRAINVAL, storage="voc", multi_label=True),
    "folder": OfFiles(n_classes=0, storage="custom", validation_splits=("val",)),
    "kinetics": OfFiles(
        n_classes=400, mean=(0.45,) * 3, std=(0.225,) * 3, test_splits=("val",), storage="videos", view=CLIP_VIEW
    ),
}


# ---- Encoders ----

OWN_MODULE = "module"  # encoder_arch of the user's own nn.Module
SMALL_CNN = "small_cnn"  # six convolutions, for images of 8 to 32 pixels
INCEPTIONS = ("googlenet", "inception_v3")
OF_INCEPTIONS = [0.5, 0.5, 0.5]  # mean and standard deviation of pixels for their published weights
SMALL_CNNS = {SMALL_CNN: None, "small_cnn_1024": 1024}  # width of a seventh, 1 x 1 convolution, if there is one
STEM_VARIANTS = ("standard", "padding_2", "no_relu")
WS_RESNET_NAMES = ("ws_resnet18", "ws_resnet34", "ws_resnet50", "ws_resnet101", "ws_resnet152")


@cache
def image_models() -> list[str]:
    """Return the names of torchvision's classification models."""
    import torchvision  # slow to import, and only needed to check a name

    return torchvision.models.list_models(module=torchvision.models)


@cache
def video_models() -> list[str]:
    """Return the names of torchvision's video models, all of which have weights pretrained on Kinetics-400."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models.video)


@cache
def torchvision_models() -> list[str]:
    """Return the names of all torchvision models that encode images or clips."""
    return [*image_models(), *video_models()]


def check_name(name: str) -> None:
    """Raise ValueError, with similar names, unless `name` is an encoder that can be built."""
    if name.startswith("timm:"):
        if importlib.util.find_spec("timm") is None:
            raise ValueError(f"encoder_arch={name!r} needs the package timm, which is not installed: pip install timm")
        import timm  # optional, and slow to import

        known = timm.list_models()
        name = name.removeprefix("timm:").split(".")[0]  # without the tag that names the weights
    else:
        known = [*torchvision_models(), *WS_RESNET_NAMES, *SMALL_CNNS, OWN_MODULE]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["resnet18", "resnet50", "vit_b_16"]
        raise ValueError(
            f"encoder_arch={name!r} is unknown: choose a classification model of torchvision, one of "
            f"{', '.join([*WS_RESNET_NAMES, *SMALL_CNNS])}, or timm:NAME; for clips {', '.join(video_models())}. "
            f"Nearest: {', '.join(near)}."
        )


def has_low_resolution_stem(name: str) -> bool:
    """Return whether the encoder is one of the ResNets whose stem can be replaced for small images."""
    return "resnet" in name and not name.startswith("timm:")


def is_resnet(name: str) -> bool:
    """Return whether the encoder is an instance of torchvision's class ResNet, weight-standardized or not."""
    return ("resnet" in name or "resnext" in name) and not name.startswith("timm:")


# ---- Heads, optimizer, schedules ----

NORMALIZATIONS = ("bn", "ln", "gn", "br")  # in heads: batch norm, layer norm, group norm, batch renormalization
GROUPS = 32  # number of groups of group norm
NORMS_AND_BIASES = [".bias", ".bn"]  # patterns for lars.split_by_patterns: all biases and all normalization layers
CURVES = ("constant", "linear", "cosine")  # shapes of a schedule


# ---- Evaluations during training ----

EVALUATIONS = ("linear_probe", "knn", "rank_me", "embedding_std")
LABEL_FREE = ("rank_me", "embedding_std")
PROBE_SOLVERS = ("sklearn", "torch")
