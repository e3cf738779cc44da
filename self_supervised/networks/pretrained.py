"""Encoders from checkpoints, runs and weights files, or from published weights by name."""

from pathlib import Path
from typing import Any

import attrs
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn

from model_params import EncoderAndDataParams
from self_supervised import catalogue
from self_supervised.data.foreign_paths import vetted, vetted_start
from self_supervised.fields import as_path
from self_supervised.networks import architectures, encoders, layouts, modules
from self_supervised.networks.frozen_encoder import SHARED_FIELDS, Encoder, Report, with_overrides
from self_supervised.networks.published import is_published, published, video_settings
from self_supervised.setting_groups import MEAN_AND_STD, NOT_TAKEN_OVER

GRAY = {"image_mean": [0.449], "image_std": [0.226]}  # means of ImageNet's constants over the three channels


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
    weights = layouts.read_weights(as_path(name), lagging)
    if encoder is not None:
        overrides = {"low_resolution_stem": False, **overrides, "encoder_arch": catalogue.OWN_MODULE}
    settings, assumed = settings_of(weights, overrides)
    params = with_overrides(settings, overrides)
    if weights.settings and params.low_resolution and params.stem_variant != settings["stem_variant"]:
        raise ValueError(
            f"stem_variant={params.stem_variant!r}, but {weights.source} has {settings['stem_variant']!r}: leave it out"
        )
    model, _ = encoders.get_encoder(params, encoder)
    left_out = layouts.load_into(model, weights, params)
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
        taken_over = SHARED_FIELDS.difference(NOT_TAKEN_OVER)
        settings = {key: value for key, value in weights.settings.items() if key in taken_over}
        if str(weights.started_from).partition(":")[0] in catalogue.INCEPTIONS:
            settings |= without_transform_input(settings)
        return {"stem_variant": weights.stem_variant, **vetted(settings, weights.source, overrides)}, ""
    settings: dict[str, Any] = {"dataset_name": "imagenet"}
    arch = overrides.get("encoder_arch")
    if arch != catalogue.OWN_MODULE:
        if arch is not None:
            catalogue.check_name(arch)
        settings |= attrs.asdict(architectures.matching_architecture(weights, arch))
        settings |= video_settings(settings["encoder_arch"])
        layouts.refuse_other_heads(weights, settings["encoder_arch"])
    if settings.get("low_resolution_stem"):
        settings |= {"dataset_name": "cifar10", "stem_variant": weights.stem_variant}
    channels = overrides.get("in_channels", settings.get("in_channels"))
    if settings.get("encoder_arch") in catalogue.INCEPTIONS:
        settings |= dict.fromkeys(MEAN_AND_STD, catalogue.OF_INCEPTIONS[:1] * (channels or 3))
    elif channels == 1:
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

    In earlier versions, the network itself turned ImageNet's constants into OF_INCEPTIONS, if it had three channels.
    Its pixels are the same with the returned constants, which are OF_INCEPTIONS for ImageNet's.
    """
    names = ("dataset_name", "in_channels", *MEAN_AND_STD)
    params = EncoderAndDataParams(**{name: settings[name] for name in names if name in settings})
    if params.channels != 3:
        return {}
    given, of_imagenet = ((params.mean, params.std), catalogue.DATASETS["imagenet"])
    if [*map(list, given)] == [catalogue.OF_INCEPTIONS] * 2:
        return {}
    parts = [*zip(*given, of_imagenet.mean, of_imagenet.std, strict=True)]
    means = [mean - std * (2 * theirs - 1) / (2 * spread) for mean, std, theirs, spread in parts]
    return dict(zip(MEAN_AND_STD, (means, [std / (2 * spread) for _, std, _, spread in parts]), strict=True))
