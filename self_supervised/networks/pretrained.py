"""Encoders to compare a trained one with: a random one of the same architecture, and what it started from."""

from collections.abc import Iterator
from contextlib import contextmanager
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
from self_supervised.catalogue import DATASETS, OWN_MODULE
from self_supervised.data.foreign_paths import ForeignPath, vetted, vetted_start
from self_supervised.networks import architectures, encoders, layouts
from self_supervised.networks.encoders import get_encoder
from self_supervised.views import augmentations

SHARED = {field.name for field in fields(EncoderAndDataParams)}
OF_PRETRAINING = {"data_fraction"}  # not of the encoder: evaluations and linear stages take all labeled images
GRAY = {"image_mean": [0.449], "image_std": [0.226]}  # ImageNet's constants, their means over the three channels


@frozen
class Report:
    """Where an encoder's tensors came from. As a string: one line for people."""

    source: str  # path or name
    layout: str  # whose way of keeping it, or "published"
    architecture: str
    matched: int  # tensors of the encoder, all of them
    left_out: tuple[str, ...]  # keys of the file that are no part of the encoder: heads, queues, the other network
    assumed: str = ""  # what the file does not say
    started_from: str | None = None  # weights that the pretraining started from, for load_encoder

    def __str__(self) -> str:
        left_out = f"; left out: {layouts.grouped(self.left_out)}" if self.left_out else ""
        assumed = f"; assumed: {self.assumed}" if self.assumed else ""
        return (
            f"{self.source}: {self.layout}, all {self.matched} tensors of {self.architecture} loaded{left_out}{assumed}"
        )


class Encoder(nn.Module):
    """A frozen encoder in eval mode, and what one must know to feed it.

    `params` holds its architecture, its image size and the constants by which its images were normalized.
    """

    def __init__(self, model: nn.Module, params: EncoderAndDataParams, report: Report):
        super().__init__()
        self.model, self.params, self.report = model.requires_grad_(False), params, report
        self.eval()

    @property
    def started_from(self) -> str | None:
        """What the pretraining started from, for load_encoder; None: random weights, or the file does not say."""
        return self.report.started_from

    def train(self, mode: bool = True) -> "Encoder":
        """It stays in eval mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images [N, C, H, W] -> embeddings [N, E]. Raises ValueError for integers."""
        if not x.is_floating_point():
            raise ValueError(f"images={x.dtype}: an encoder takes normalized floats. Pass uint8 images to embed()")
        return encoders.embeddings_of(self.model, x)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images [N, C, H, W] of any size -> normalized floats of the encoder's size, whole images. Raises
        ValueError for images of another type or shape."""
        return augmentations.evaluation_view(images, self.params)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """uint8 images [N, C, H, W] of any size -> embeddings [N, E], float32, on the encoder's device. Raises
        ValueError for images of another type or shape."""
        augmentations.check_pixels(images, self.params.channels)
        weight = next(self.model.parameters())
        return self(self.prepare(images.to(weight.device)).to(weight.dtype)).float()


def load_encoder(path_or_name: str | Path, *, encoder: nn.Module | None = None, **overrides: Any) -> Encoder:
    """The encoder of a checkpoint or weights file, or a published one by name.

    Files: of this library, of the systems in docs/weights.md, state dicts of torchvision and timm, .safetensors. Names:
    "resnet50" (torchvision's newest weights), "resnet50:IMAGENET1K_V1", "timm:NAME". The report says what was taken,
    left out and assumed.

    Args:
        path_or_name: a file, or the name of an encoder whose published weights are wanted.
        encoder: your own module, if the encoder was one.
        overrides: fields of EncoderAndDataParams, such as encoder_arch, where the file does not say or says it wrong.
            With another dataset_name, images keep the size and the constants of the pretraining. Paths that the file
            names are used only where data/foreign_paths.py says; pass data_path, splits_path, ... to use others.

    Raises:
        FileNotFoundError: there is no such file, and it is no name.
        OSError: published weights could not be downloaded.
        ValueError: the name is unknown, or the file does not hold exactly the parameters of the encoder; says which.
    """
    name = str(path_or_name)
    if encoder is None and not Path(name).expanduser().is_file() and is_name(name):
        return published(name, overrides)
    found = layouts.read_weights(Path(name).expanduser())
    if encoder is not None:
        overrides = {"low_resolution_stem": False, **overrides, "encoder_arch": catalogue.OWN_MODULE}
    settings, assumed = settings_of(found, overrides)
    params = with_overrides(settings, overrides)
    model, _ = encoders.get_encoder(params, encoder)
    left_out = layouts.load_into(model, found, params.encoder_arch)
    matched, started_from = len(model.state_dict()), vetted_start(found.started_from, found.source)
    report = Report(found.source, found.layout, params.encoder_arch, matched, left_out, assumed, started_from)
    return Encoder(model, params, report)


def settings_of(found: layouts.WeightsFile, overrides: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(settings as the file says them, else found out from its tensors or ImageNet's; in words what is not sure)."""
    if found.settings:
        settings = {key: value for key, value in found.settings.items() if key in SHARED - OF_PRETRAINING}
        return {"stem_variant": found.stem_variant, **vetted(settings, found.source, overrides)}, ""
    settings, arch = {"dataset_name": "imagenet"}, overrides.get("encoder_arch")
    if arch != catalogue.OWN_MODULE:
        settings |= attrs.asdict(architectures.matching_architecture(found, arch))
        settings |= of_videos(settings["encoder_arch"])
        if found.layout == "moco v3" and settings["encoder_arch"].startswith("timm:vit_small"):
            raise ValueError(
                f"{found.source} is moco v3's vit_small, whose 12 heads timm's has not (6): give encoder="
                f"timm.create_model({settings['encoder_arch'].removeprefix('timm:')!r}, num_heads=12, num_classes=0)"
            )
    if settings.get("low_resolution_stem"):
        settings |= {"dataset_name": "cifar10", "stem_variant": found.stem_variant}
    if overrides.get("in_channels", settings.get("in_channels")) == 1:
        settings |= GRAY
    assumed = [] if "dataset_name" in overrides else [f"size and normalization constants of {settings['dataset_name']}"]
    if arch is None and settings["encoder_arch"].startswith("ws_"):
        assumed.append("weight standardization")  # group norm without it has the same names
    if arch is None and settings["encoder_arch"].startswith("timm:"):
        assumed.append(f"{settings['encoder_arch']} of all models of these shapes")
    return settings, ", ".join(assumed)


def with_overrides(settings: dict[str, Any], overrides: dict[str, Any]) -> EncoderAndDataParams:
    """Settings that say everything about the encoder's images themselves, so that another data set changes nothing."""
    own = {key: value for key, value in overrides.items() if key != "dataset_name"}
    of_one_kind = {key: value for key, value in own.items() if key in DATASET_DEFAULTS}
    if overrides.get("dataset_name", settings["dataset_name"]) != settings["dataset_name"]:
        settings = {key: value for key, value in settings.items() if key not in DATASET_DEFAULTS}
        own, of_one_kind = (
            {k: v for k, v in own.items() if k not in of_one_kind},
            DATASET_DEFAULTS | of_one_kind,
        )
    params = EncoderAndDataParams(**{**settings, **own})
    explicit = {
        "low_resolution_stem": params.low_resolution,
        "in_channels": params.channels,
        "transform_crop_size": params.crop_size,
    }
    if len(params.mean) == params.channels:  # not so where a loader of the user's yields other images than the data set
        explicit |= {"image_mean": list(params.mean), "image_std": list(params.std)}
    other = DATASETS.get(overrides.get("dataset_name"))
    if other is not None and not other.feeds(params.channels):
        raise ValueError(
            f"dataset_name={overrides['dataset_name']!r} has images of {other.channels} channels, the encoder takes "
            f"{params.channels}: choose another data set"
        )
    explicit["dataset_name"] = overrides.get("dataset_name", params.dataset_name)
    return attrs.evolve(params, **explicit, **of_one_kind)


# ---- published weights ----


def is_name(name: str) -> bool:
    """Whether it reads like the name of an encoder, not like that of a file."""
    return name.startswith("timm:") or not any(sign in name for sign in "/\\.~")


def published(name: str, overrides: dict[str, Any]) -> Encoder:
    """An encoder with the weights that torchvision or timm publish, downloaded unless they are in the cache."""
    arch, _, weights = (name, "", "DEFAULT") if name.startswith("timm:") else name.partition(":")
    try:
        catalogue.check_name(arch)
    except ValueError as error:
        raise ValueError(f"there is no file {name}, and as a name: {error}") from error
    weights = weights or "DEFAULT"
    settings = {
        "encoder_arch": arch,
        "dataset_name": "imagenet",
        "encoder_weights": weights,
        **of_videos(arch),
        **facts_of_weights(arch, weights),
    }
    params = with_overrides(settings, overrides)
    if arch in catalogue.torchvision_models() and (params.channels != 3 or params.low_resolution):
        raise ValueError(
            f"in_channels={params.channels} with low_resolution_stem={params.low_resolution} would leave the first "
            f"layer of {name} without its published weights: leave them out"
        )
    try:
        model, _ = encoders.get_encoder(params)
    except OSError as error:
        raise OSError(
            f"the weights of {name} could not be downloaded ({error}): get the file elsewhere, and give its path"
        ) from error
    report = Report(name, "published", arch, len(model.state_dict()), ())
    return Encoder(model, attrs.evolve(params, encoder_weights=None), report)


def of_videos(arch: str) -> dict[str, Any]:
    """The data set of torchvision's encoders of clips, and as many frames as they must have; {} for other encoders."""
    if arch not in catalogue.video_models():
        return {}
    fewest = torchvision.models.get_model_weights(arch).DEFAULT.meta.get("min_temporal_size", 1)
    return {"dataset_name": "kinetics", "num_frames": max(fields(EncoderAndDataParams).num_frames.default, fewest)}


def facts_of_weights(arch: str, weights: str) -> dict[str, Any]:
    """Image size and constants of published weights; {} if there are none (the builder then says so)."""
    if arch.startswith("timm:"):
        import timm  # optional, and slow to import

        model, _, tag = arch.removeprefix("timm:").partition(".")
        tags = timm.models.list_pretrained(f"{model}.*")
        if not tags or (tag and f"{model}.{tag}" not in tags):
            has = f"only {', '.join(tags)}" if tags else "none"
            raise ValueError(f"timm publishes no weights {arch.removeprefix('timm:')}: of {model} it has {has}")
        about = timm.get_pretrained_cfg(arch.removeprefix("timm:"))
        size, mean, std = about.input_size[-1], about.mean, about.std
    else:
        enum = torchvision.models.get_model_weights(arch) if arch in catalogue.torchvision_models() else None
        known = {} if enum is None else enum.__members__
        if weights not in known:
            return {}
        about = known[weights].transforms()
        size, mean, std = about.crop_size[0], about.mean, about.std
    return {"transform_crop_size": size, "image_mean": list(mean), "image_std": list(std), "low_resolution_stem": False}


# ---- Encoders to compare a trained one with: a random one of the same architecture, and what it started from ----


def compared(trained: Encoder, starting_weights: str | Path | None) -> dict[str, Encoder]:
    """A random encoder of the same architecture (one's own module has none), and the starting weights, if any."""
    found, p = {}, trained.params
    if p.encoder_arch != OWN_MODULE:
        found["random"] = random_encoder(trained)
    source = starting_weights or trained.started_from
    if isinstance(source, ForeignPath):
        rank_zero_warn(
            f"the checkpoint started from {str(source)!r}, it says. That file is not read unless you ask for it: pass "
            "starting_weights to compare with it"
        )
    elif source is not None:
        same = (
            "dataset_name",
            "encoder_arch",
            "in_channels",
            "transform_crop_size",
            "image_mean",
            "image_std",
            *DATASET_DEFAULTS,
        )
        same = {name: getattr(p, name) for name in same} | {"low_resolution_stem": p.low_resolution}
        with seeded():  # a stem of another kind starts from random weights
            found["starting"] = load_encoder(source, **same)
    return found


def random_encoder(trained: Encoder) -> Encoder:
    """Freshly initialized, otherwise the same."""
    with seeded():
        model, _ = get_encoder(attrs.evolve(trained.params, encoder_weights=None))
    report = attrs.evolve(trained.report, source="no file", layout="random weights of seed 0", left_out=())
    return Encoder(model, trained.params, report)


@contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
