"""Encoders with weights that torchvision or timm publishes, by name."""

from pathlib import Path
from typing import Any

import attrs
import torchvision
from attrs import fields

from model_params import EncoderAndDataParams
from self_supervised import catalogue
from self_supervised.networks import encoders
from self_supervised.networks.frozen_encoder import Encoder, Report, with_overrides
from self_supervised.setting_groups import MEAN_AND_STD


def is_name(name: str) -> bool:
    """Return whether it looks like the name of an encoder, not of a file."""
    return name.startswith("timm:") or not any(sign in name for sign in "/\\.~")


def is_published(name: str) -> bool:
    return is_name(name) and not Path(name).is_file()


def published(name: str, overrides: dict[str, Any], new_stem: bool = False) -> Encoder:
    """Load an encoder with published weights of torchvision or timm, which are downloaded unless they are cached.

    With `new_stem`, the stem for small images starts from random weights, as in a training.
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
        **video_settings(arch),
        **facts_of_weights(arch, weights),
    }
    if overrides.get("in_channels") == 1:
        settings |= {name: [sum(settings[name]) / 3] for name in MEAN_AND_STD if name in settings}
    params = with_overrides(settings, overrides)
    if not new_stem and arch in catalogue.torchvision_models() and params.low_resolution:
        raise ValueError(
            f"low_resolution_stem=True would leave the first layer of {name} without its published weights. Leave it "
            "out."
        )
    try:
        model, _ = encoders.get_encoder(params)
    except OSError as error:
        raise OSError(
            f"the weights of {name} could not be downloaded ({error}). Get the file elsewhere, and pass its path."
        ) from error
    report = Report(name, "published", arch, len(model.state_dict()), ())
    return Encoder(model, attrs.evolve(params, encoder_weights=None), report)


def video_settings(arch: str) -> dict[str, Any]:
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
