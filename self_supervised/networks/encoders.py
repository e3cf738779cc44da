"""Encoders by name, without their classifiers, adapted to the data set's images.

Encoders map images [N, C, H, W] to [N, E]; those of videos map clips [N, C, T, H, W].
"""

import os
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from model_params import EncoderAndDataParams
from self_supervised.catalogue import INCEPTIONS, OWN_MODULE, SMALL_CNNS, video_models
from self_supervised.convolutions import PointConv2d, exchange_convolutions
from self_supervised.fields import as_path
from self_supervised.networks import builders, layouts, modules
from self_supervised.networks.output_sizes import measured_width, pool_cells
from self_supervised.networks.recomputation import recompute_activations
from self_supervised.numerics import in_parts
from self_supervised.safe_files import file_hash

FASTEST_LAYOUT = {4: torch.channels_last, 5: torch.channels_last_3d}  # by dimensions of a convolution's weight


def get_encoder(params: EncoderAndDataParams, own: nn.Module | None = None) -> tuple[nn.Module, int]:
    """Return the encoder `encoder_arch` and the width E of its output.

    Args:
        params: settings.
        own: the user's module, if encoder_arch is "module".

    Raises:
        ValueError: the settings, the images and the encoder do not fit together.
    """
    require_one_source(params, own)
    encoder, name = (by_name(params), f"encoder_arch={params.encoder_arch!r}") if own is None else (own, "the encoder")
    width = measured_width(encoder, torch.zeros(1, *params.input_shape), name)  # from here on it flattens [N, E, 1, 1]
    if params.pooling_size > 1:
        width = pool_cells(encoder, params)
    for weight in encoder.parameters():
        if layout := FASTEST_LAYOUT.get(weight.dim()):
            weight.data = weight.data.to(weight.dtype, memory_format=layout)
    if own is not None and not encodes_in_fastest_layout(encoder, params.input_shape):
        make_contiguous(encoder)
    if params.embedding_dim not in (None, width):
        raise ValueError(
            f"embedding_dim={params.embedding_dim} in the settings or the checkpoint, but {params.encoder_arch} gives "
            f"{width}: pass the encoder of the checkpoint, or leave embedding_dim out"
        )
    if params.activation_checkpointing:
        recompute_activations(encoder)
    return encoder, width


def encodes_in_fastest_layout(encoder: nn.Module, input_shape: tuple[int, ...]) -> bool:
    """Return whether a user's module encodes images [N, *input_shape] in the layout in which views and weights are
    stored. `x.view(len(x), -1)`, for example, needs contiguous ones."""
    weight = next(encoder.parameters(), torch.empty(0))
    images = torch.zeros(2, *input_shape, device=weight.device).to(memory_format=FASTEST_LAYOUT[1 + len(input_shape)])
    try:
        with torch.no_grad(), isolate_rng(torch.cuda.is_initialized()), modules.in_eval_mode(encoder):
            encoder(images)
    except RuntimeError:
        return False
    return True


def make_contiguous(encoder: nn.Module) -> None:
    """Store the weights contiguously, and let the module get contiguous images."""
    for weight in encoder.parameters():
        weight.data = weight.data.contiguous()
    encoder._forward_pre_hooks["contiguous"] = with_contiguous_images  # as in `measured_width`


def with_contiguous_images(module: nn.Module, inputs: tuple) -> tuple:
    return tuple(x.contiguous() if isinstance(x, torch.Tensor) else x for x in inputs)


def require_one_source(p: EncoderAndDataParams, own: nn.Module | None) -> None:
    """Raise ValueError if there is both a name and a module of the user, or neither."""
    if own is None and p.encoder_arch == OWN_MODULE:
        raise ValueError(f"encoder_arch={OWN_MODULE!r} needs encoder=your_module")
    if own is not None and p.encoder_arch != OWN_MODULE:
        raise ValueError(
            f"encoder_arch={p.encoder_arch!r} needs no encoder. Pass encoder_arch={OWN_MODULE!r} to use your module."
        )


def by_name(p: EncoderAndDataParams) -> nn.Module:
    """Return an encoder of this library, torchvision or timm, with its stem, and its weights from a file."""
    check_kind(p.encoder_arch, p.dataset_name, p.dataset.of_videos)
    file = file_of_weights(p)
    published = None if file else p.encoder_weights
    if p.encoder_arch.startswith("timm:"):
        encoder = encoder_of_timm(p, published)
    elif p.encoder_arch in SMALL_CNNS:
        builders.refuse_published(p.encoder_arch, published)
        encoder = builders.small_cnn(p.channels, SMALL_CNNS[p.encoder_arch])
    else:
        encoder = encoder_of_torchvision(p, published)
    if file:
        load_file(encoder, file, p)
    return encoder


def encoder_of_timm(p: EncoderAndDataParams, published: str | None) -> nn.Module:
    if published not in (None, "DEFAULT"):
        raise ValueError(f"encoder_weights={published!r} is not a file; timm's weights are called 'DEFAULT'")
    name, image = p.encoder_arch.removeprefix("timm:"), torch.zeros(1, *p.input_shape)
    of_all_sizes = getattr(p, "n_small_views", 0) > 0  # settings of the linear stage have no views
    encoder = builders.build_timm(name, published is not None, image, of_all_sizes, p.drop_path_rate)
    report_other_pixels(encoder, p, published)
    return encoder


def encoder_of_torchvision(p: EncoderAndDataParams, published: str | None) -> nn.Module:
    """Return an encoder of torchvision or ws_resnet."""
    refuse_other_pixels(p, published)
    sizes = (p.crop_size, p.num_frames)
    try:
        classifier = builders.build_classifier(p.encoder_arch, published, *sizes, p.zero_init_residual)
    except AssertionError as error:  # a ViT whose patches do not fit
        raise ValueError(
            f"transform_crop_size={p.crop_size} does not fit {p.encoder_arch}: {error} Choose a multiple of the patch "
            "size, which is in its name"
        ) from error
    encoder = builders.without_last_layer(classifier, p.encoder_arch)
    builders.adapt_stem(encoder, p.channels, p.low_resolution, p.stem_variant, published)
    if published and p.low_resolution:
        refuse_frozen_new_stem(p)
    exchange_convolutions(encoder, PointConv2d)
    return encoder


def load_file(encoder: nn.Module, file: Path, p: EncoderAndDataParams) -> None:
    """Load the weights from which a training starts."""
    try:
        weights = layouts.read_weights(file)
        if p.low_resolution:
            check_stem(weights, p.stem_variant)
        if not weights.settings:  # of a checkpoint of ours, which has other constants
            refuse_other_pixels(p, p.encoder_weights)
            layouts.refuse_other_heads(weights, p.encoder_arch)
        layouts.load_into(encoder, weights, p)
    except ValueError as error:
        raise ValueError(f"encoder_weights={p.encoder_weights!r} for {p.encoder_arch}: {error}") from error


def check_stem(weights: layouts.WeightsFile, chosen: str) -> None:
    """Raise ValueError if weights are of another variant of the stem for small images than the chosen one; warn if that
    is only a guess."""
    stem = weights.settings.get("stem_variant", weights.stem_variant)
    is_known = "stem_variant" in weights.settings or stem != "standard"
    if stem == chosen or not is_known:
        return
    if not weights.has_guessed_stem:
        raise ValueError(f"its first layers are those of stem_variant={stem!r}. Set it (is {chosen!r}).")
    rank_zero_warn(
        f"{weights.source} is read with stem_variant={chosen!r}. If it is solo-learn's, whose first convolution pads 2 "
        f"pixels, set stem_variant={stem!r}."
    )


def check_kind(name: str, dataset_name: str, of_videos: bool) -> None:
    """Raise ValueError if an encoder of clips gets images, or the other way round."""
    if (name in video_models()) != of_videos:
        takes, has = ("images", "clips") if of_videos else ("clips", "images")
        others = f"encoder_arch={', '.join(video_models())}"
        way_out = others if of_videos else "another encoder_arch, a data set of videos"
        raise ValueError(
            f"encoder_arch={name!r} encodes {takes}, and dataset_name={dataset_name!r} has {has}. Choose {way_out}, or "
            "pass encoder=your_module."
        )


def file_of_weights(params: EncoderAndDataParams) -> Path | None:
    """Return the file from which the encoder starts, that of a run if encoder_weights is its directory; None if
    encoder_weights is None or a name."""
    if params.encoder_weights is None:
        return None
    file = as_path(layouts.checkpoint_of(params.encoder_weights))
    return file if os.path.isfile(file) else None  # Path.is_file raises OSError if the name is too long


def source_of_weights(params: EncoderAndDataParams) -> tuple[str | None, str | None]:
    """Return the weights from which the encoder starts, as `load_encoder` accepts them (None: random), and the hash of
    their file (None: published)."""
    if (weights := params.encoder_weights) is None:
        return None, None
    if file := file_of_weights(params):
        return os.path.abspath(file), file_hash(file)
    of_timm = params.encoder_arch.startswith("timm:")
    return (params.encoder_arch if of_timm else f"{params.encoder_arch}:{weights}"), None


def refuse_other_pixels(p: EncoderAndDataParams, weights: str | None) -> None:
    """Raise ValueError if an Inception network has published weights, which are for pixels from -1 to 1, and other
    constants of normalization."""
    half = [0.5] * p.channels
    if p.encoder_arch in INCEPTIONS and weights is not None and (list(p.mean), list(p.std)) != (half, half):
        raise ValueError(
            f"encoder_weights={weights!r} of {p.encoder_arch} are for pixels from -1 to 1. Set image_mean={half} and "
            f"image_std={half}."
        )


def report_other_pixels(encoder: nn.Module, p: EncoderAndDataParams, weights: str | None) -> None:
    """Warn if published weights of timm are for pixels that are normalized quite differently, as -1 to 1 is."""
    about = getattr(encoder, "pretrained_cfg", {})
    if weights is None or p.channels != 3 or not about.get("mean"):
        return
    differences = [abs(mean - own) / spread for mean, own, spread in zip(about["mean"], p.mean, p.std, strict=True)]
    factors = [max(std, own) / min(std, own) for std, own in zip(about["std"], p.std, strict=True)]
    if max(differences) > 0.5 or max(factors) > 1.5:
        rank_zero_info(
            f"warning: encoder_weights={weights!r} of {p.encoder_arch} are for image_mean={list(about['mean'])} and "
            f"image_std={list(about['std'])}, but images get {list(p.mean)} and {list(p.std)}. Set both"
        )


def refuse_frozen_new_stem(p: EncoderAndDataParams) -> None:
    """Raise ValueError if the encoder stays frozen with a first layer that was replaced, and is random; otherwise warn
    of that layer."""
    weights = f"encoder_weights={p.encoder_weights!r}"
    what = f"{weights}: the first layer starts from random weights, because low_resolution_stem=True"
    way_out = "Set low_resolution_stem=False to start from the published ones"
    if getattr(p, "encoder_lr", 0) is None:  # 0: settings of pretraining, which have no such field
        raise ValueError(f"{what}, and stays so in a frozen encoder. {way_out}, or set encoder_lr.")
    rank_zero_info(f"warning: {what}. {way_out}")


def embeddings_of(encoder: nn.Module, x: torch.Tensor, at_once: int | None = None) -> torch.Tensor:
    """Return the embeddings [N, E] of images or clips; of multiple clips per video, [N, clips, C, T, H, W], their
    means.

    Args:
        at_once: the largest number of images or videos that are encoded at once; None: all.

    Raises:
        ValueError: the encoder takes floats, and the images are integers.
    """
    if at_once is not None and len(x) > at_once:
        return torch.cat([embeddings_of(encoder, part) for part in in_parts(x, at_once)])
    try:
        return encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1) if x.dim() == 6 else encoder(x)
    except RuntimeError as error:
        if x.is_floating_point():
            raise
        raise ValueError(
            f"images of {x.dtype} are not normalized. Your on_after_batch_transfer replaces ours, which normalizes "
            "them. Convert batches in on_before_batch_transfer."
        ) from error
