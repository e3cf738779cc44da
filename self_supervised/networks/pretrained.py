"""Pretrained encoders: from files, from published weights by name, and the baselines to compare them with."""

from pathlib import Path
from typing import Any

import attrs
import torch
import torchvision
from attrs import fields, frozen
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from model_params import DATASET_DEFAULTS, EncoderAndDataParams
from self_supervised import catalogue
from self_supervised.data.foreign_paths import ForeignPath, refuse_changed, vetted, vetted_start
from self_supervised.networks import architectures, encoders, layouts, modules
from self_supervised.views import augmentations, input_checks

ENCODER_FACTS = (  # settings of an encoder and of its input, which files of other systems lack
    "encoder_arch", "in_channels", "low_resolution_stem", "stem_variant", "pooling_size", "transform_crop_size",
    "image_mean", "image_std",
)  # fmt: skip
SAME_IN_STARTING = (  # settings that the encoder of the starting weights shares with the trained one
    "dataset_name", "encoder_arch", "in_channels", "transform_crop_size", "image_mean", "image_std", "pooling_size",
    "exif_orientation", "unreadable_images",
)  # fmt: skip
SHARED = {field.name for field in fields(EncoderAndDataParams)}
# not taken over: evaluations and linear stages use all labeled images, and have room for activations
OF_PRETRAINING = {"data_fraction", "activation_checkpointing"}
MEAN_AND_STD = ("image_mean", "image_std")
GRAY = {"image_mean": [0.449], "image_std": [0.226]}  # means of ImageNet's constants over the three channels


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
    method that is built with it may train it (`prepare_training`); `embed` is in eval mode then, too.
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
        return next(self.model.parameters()).device

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
        weight = next(self.model.parameters())
        with modules.in_eval_mode(self):
            return self(self.prepare(images.to(weight.device)).to(weight.dtype)).float()


def load_encoder(
    path_or_name: str | Path, *, encoder: nn.Module | None = None, lagging: bool = False, **overrides: Any
) -> Encoder:
    """Load the encoder of a checkpoint or weights file, of a run, or published weights by name.

    Files may be those of this library, of the systems in docs/weights.md, state dicts of torchvision and timm, and
    .safetensors. Names are "resnet50" (torchvision's newest weights), "resnet50:IMAGENET1K_V1" and "timm:NAME". The
    report of the encoder says what was loaded, left out and assumed. Of a run, pretrained.ckpt is loaded.

    Args:
        path_or_name: a file, the directory of a run, or the name of an encoder with published weights.
        encoder: your own module, if the encoder was one.
        lagging: load the lagging encoder of a checkpoint of this library, with which DINO's authors evaluate.
        overrides: fields of EncoderAndDataParams, such as encoder_arch, that the file lacks or has wrong. With another
            dataset_name, images keep the size and the normalization constants of the pretraining. Paths in the file
            are used only as data/foreign_paths.py allows; pass data_path, splits_path, ... to use others.

    Raises:
        FileNotFoundError: there is no such file, and it is not a name; or the run has no pretrained.ckpt yet.
        OSError: published weights could not be downloaded.
        ValueError: the name is unknown, or the file does not hold exactly the parameters of the encoder; the message
            names them. Or it has no lagging encoder.
    """
    modules.require_module(encoder)
    name = str(layouts.checkpoint_of(path_or_name))
    if encoder is None and is_published(name):
        if lagging:
            raise ValueError(f"lagging=True: {name} has no lagging encoder. Leave it out.")
        return published(name, overrides)
    weights = layouts.read_weights(Path(name).expanduser(), lagging)
    if encoder is not None:
        overrides = {"low_resolution_stem": False, **overrides, "encoder_arch": catalogue.OWN_MODULE}
    settings, assumed = settings_of(weights, overrides)
    params = with_overrides(settings, overrides)
    if weights.settings and params.low_resolution and params.stem_variant != settings["stem_variant"]:
        raise ValueError(
            f"stem_variant={params.stem_variant!r}, but {weights.source} has {settings['stem_variant']!r}: leave it out"
        )
    model, _ = encoders.get_encoder(params, encoder)
    left_out = layouts.load_into(model, weights, params.encoder_arch)
    report = Report(
        source=weights.source,
        layout=weights.layout,
        architecture=params.encoder_arch,
        matched=len(model.state_dict()),
        left_out=left_out,
        assumed=assumed,
        started_from=vetted_start(weights.started_from, weights.source),
        started_from_hash=weights.started_from_hash,
    )
    return Encoder(model, params, report)


def encoder_of(checkpoint: str | Path | Encoder, overrides: dict[str, Any]) -> Encoder:
    """Return `load_encoder(checkpoint, **overrides)`, or the Encoder that was passed instead of a checkpoint."""
    if not isinstance(checkpoint, Encoder):
        return load_encoder(checkpoint, **overrides)
    if overrides:
        raise ValueError(f"{', '.join(overrides)}: an Encoder keeps its own settings. Pass these to load_encoder.")
    return checkpoint


def settings_of(weights: layouts.WeightsFile, overrides: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the settings of the encoder in a file, and a text that lists those that were assumed.

    Without settings in the file, the architecture is inferred from the tensors, and images are those of ImageNet.
    """
    if weights.settings:
        settings = {key: value for key, value in weights.settings.items() if key in SHARED - OF_PRETRAINING}
        if str(weights.started_from).partition(":")[0] in catalogue.INCEPTIONS:
            settings |= without_transform_input(settings)
        return {"stem_variant": weights.stem_variant, **vetted(settings, weights.source, overrides)}, ""
    settings: dict[str, Any] = {"dataset_name": "imagenet"}
    arch = overrides.get("encoder_arch")
    if arch != catalogue.OWN_MODULE:
        if arch is not None:
            catalogue.check_name(arch)
        settings |= attrs.asdict(architectures.matching_architecture(weights, arch))
        settings |= of_videos(settings["encoder_arch"])
        layouts.refuse_other_heads(weights, settings["encoder_arch"])
    if settings.get("low_resolution_stem"):
        settings |= {"dataset_name": "cifar10", "stem_variant": weights.stem_variant}
    if settings.get("encoder_arch") in catalogue.INCEPTIONS:
        settings |= dict.fromkeys(MEAN_AND_STD, catalogue.OF_INCEPTIONS)
    if overrides.get("in_channels", settings.get("in_channels")) == 1:
        settings |= GRAY
    assumed = assumed_of_images(settings, overrides)
    if settings.get("stem_variant", "standard") != "standard" and "stem_variant" not in overrides:
        assumed.append(f"stem_variant={settings['stem_variant']!r} of {weights.layout}")
        if weights.has_guessed_stem:
            rank_zero_warn(
                f"{weights.source} is read as solo-learn's, whose first convolution pads 2 pixels. If it is of another "
                "system, pass stem_variant='standard'."
            )
    if arch is None and settings["encoder_arch"].startswith("ws_"):
        assumed.append("weight standardization")  # group norm without it has the same names
    if arch is None and settings["encoder_arch"].startswith("timm:"):
        assumed.append(f"{settings['encoder_arch']} of all models of these shapes")
    return settings, ", ".join(assumed)


def assumed_of_images(settings: dict[str, Any], overrides: dict[str, Any]) -> list[str]:
    """Return what is assumed about the images in settings that were inferred."""
    known = overrides.keys() | {name for name, value in settings.items() if value is not None}
    facts = {"size": {"transform_crop_size"}, "normalization constants": {*MEAN_AND_STD}}
    of_dataset = [fact for fact, names in facts.items() if not names <= known]
    assumed = [f"{' and '.join(of_dataset)} of {settings['dataset_name']}"] if of_dataset else []
    return assumed + [f"{name}={settings[name]}" for name in MEAN_AND_STD if name in settings.keys() - overrides.keys()]


def without_transform_input(settings: dict[str, Any]) -> dict[str, list[float]]:
    """Return the constants of normalization of an encoder that started from an Inception network's published weights.

    In earlier versions, the network itself turned ImageNet's constants into OF_INCEPTIONS. Its pixels are the same with
    the returned constants, which are OF_INCEPTIONS for ImageNet's.
    """
    params = EncoderAndDataParams(
        **{name: settings[name] for name in ("dataset_name", *MEAN_AND_STD) if name in settings}
    )
    given, of_imagenet = ((params.mean, params.std), catalogue.DATASETS["imagenet"])
    if [*map(list, given)] == [catalogue.OF_INCEPTIONS] * 2:
        return {}
    parts = [*zip(*given, of_imagenet.mean, of_imagenet.std, strict=True)]
    means = [mean - std * (2 * theirs - 1) / (2 * spread) for mean, std, theirs, spread in parts]
    return dict(zip(MEAN_AND_STD, (means, [std / (2 * spread) for _, std, _, spread in parts]), strict=True))


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


# ---- Published weights ----


def is_name(name: str) -> bool:
    """Return whether it looks like the name of an encoder, not of a file."""
    return name.startswith("timm:") or not any(sign in name for sign in "/\\.~")


def is_published(name: str) -> bool:
    return is_name(name) and not Path(name).is_file()


def published(name: str, overrides: dict[str, Any], new_stem: bool = False) -> Encoder:
    """Load an encoder with published weights of torchvision or timm, which are downloaded unless they are cached.

    With `new_stem`, a first layer that the weights do not fit starts from random weights, as in a training.
    """
    arch, _, weights = (name, "", "DEFAULT") if name.startswith("timm:") else name.partition(":")
    try:
        catalogue.check_name(arch)
    except ValueError as error:
        raise ValueError(f"there is no file {name}, and as a name: {error}") from error
    weights = weights or "DEFAULT"
    for fact, own in (("encoder_arch", arch), ("encoder_weights", weights)):
        if overrides.get(fact, own) != own:
            raise ValueError(f"{fact}={overrides[fact]!r}: {name} stands for {own!r}. Change it, or leave {fact} out.")
    settings = {
        "encoder_arch": arch,
        "dataset_name": "imagenet",
        "encoder_weights": weights,
        **of_videos(arch),
        **facts_of_weights(arch, weights),
    }
    if overrides.get("in_channels") == 1:
        settings |= {name: [sum(settings[name]) / 3] for name in MEAN_AND_STD if name in settings}
    params = with_overrides(settings, overrides)
    if not new_stem and arch in catalogue.torchvision_models() and encoders.has_new_stem(params):
        raise ValueError(
            f"in_channels={params.channels} with low_resolution_stem={params.low_resolution} would leave the first "
            f"layer of {name} without its published weights. Leave both out."
        )
    try:
        model, _ = encoders.get_encoder(params)
    except OSError as error:
        raise OSError(
            f"the weights of {name} could not be downloaded ({error}). Get the file elsewhere, and pass its path."
        ) from error
    report = Report(name, "published", arch, len(model.state_dict()), ())
    return Encoder(model, attrs.evolve(params, encoder_weights=None), report)


def of_videos(arch: str) -> dict[str, Any]:
    """Return the data set and number of frames of torchvision's encoders of clips; {} for other encoders."""
    if arch not in catalogue.video_models():
        return {}
    fewest = torchvision.models.get_model_weights(arch).DEFAULT.meta.get("min_temporal_size", 1)
    return {"dataset_name": "kinetics", "num_frames": max(fields(EncoderAndDataParams).num_frames.default, fewest)}


def facts_of_weights(arch: str, weights: str) -> dict[str, Any]:
    """Return the image size and normalization constants of published weights; {} if there are none, which is refused
    when the encoder is built."""
    if arch.startswith("timm:"):
        import timm  # optional, and slow to import

        model, _, tag = arch.removeprefix("timm:").partition(".")
        tags = timm.models.list_pretrained(f"{model}.*")
        if not tags or (tag and f"{model}.{tag}" not in tags):
            known = f"It has {', '.join(tags)}" if tags else f"It has none of {model}"
            raise ValueError(f"timm publishes no weights {arch.removeprefix('timm:')}. {known}")
        about = timm.get_pretrained_cfg(arch.removeprefix("timm:"))
        size, mean, std = about.input_size[-1], about.mean, about.std
    else:
        enum = torchvision.models.get_model_weights(arch) if arch in catalogue.torchvision_models() else None
        known = {} if enum is None else enum.__members__
        if weights not in known:
            return {}
        about = known[weights].transforms()
        size, mean, std = about.crop_size[0], about.mean, about.std
        if arch in catalogue.INCEPTIONS:
            mean = std = catalogue.OF_INCEPTIONS
    return {"transform_crop_size": size, "image_mean": list(mean), "image_std": list(std), "low_resolution_stem": False}


# ---- Baselines ----


def compared(trained: Encoder, starting_weights: str | Path | None) -> dict[str, Encoder]:
    """Return the encoders to compare a trained one with, by name.

    "random" has the same architecture; there is none for a user's own module. "starting" has the weights from which
    the pretraining started: `starting_weights`, or those that the checkpoint names.
    """
    baselines = {}
    if trained.params.encoder_arch != catalogue.OWN_MODULE:
        baselines["random"] = random_encoder(trained)
    source = starting_weights or trained.started_from
    if isinstance(source, ForeignPath):
        rank_zero_warn(
            f"the checkpoint started from {str(source)!r}. That file is only read if you pass starting_weights"
        )
    elif source is not None:
        try:
            if not starting_weights:
                refuse_changed(source, trained.report.started_from_hash)
            baselines["starting"] = starting_encoder(trained.params, str(source))
        except OSError as error:
            if starting_weights:
                raise
            rank_zero_warn(f"the weights from which the training started are left out: {error}")
    return baselines


def starting_encoder(p: EncoderAndDataParams, source: str) -> Encoder:
    """Return the encoder before a training with these settings, which started from the file or name `source`."""
    same = {name: getattr(p, name) for name in (*SAME_IN_STARTING, *DATASET_DEFAULTS)}
    same["low_resolution_stem"] = p.low_resolution
    same |= {"stem_variant": p.stem_variant} if p.low_resolution else {}
    same |= dict.fromkeys(MEAN_AND_STD, catalogue.OF_INCEPTIONS) if p.encoder_arch in catalogue.INCEPTIONS else {}
    if source.startswith("timm:") and source.split(".")[0] == p.encoder_arch.split(".")[0]:
        same["encoder_arch"] = source  # the same architecture with other weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return published(source, same, new_stem=True) if is_published(source) else load_encoder(source, **same)


def random_encoder(trained: Encoder) -> Encoder:
    """Return an encoder with random weights of seed 0, otherwise like `trained`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, _ = encoders.get_encoder(attrs.evolve(trained.params, encoder_weights=None))
    report = attrs.evolve(trained.report, source="no file", layout="random weights of seed 0", left_out=())
    return Encoder(model, trained.params, report)
