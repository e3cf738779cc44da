"""Encoders by name, without their classifiers, adapted to the data set's images.

Encoders map images [N, C, H, W] to [N, E]; those of videos map clips [N, C, T, H, W].
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
import torchvision
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

import ws_resnet
from model_params import EncoderAndDataParams
from self_supervised.catalogue import INCEPTIONS, OWN_MODULE, SMALL_CNNS, video_models
from self_supervised.convolutions import PointConv2d, exchange_convolutions
from self_supervised.networks import layouts, modules
from self_supervised.networks.output_sizes import measured_width, pool_cells
from self_supervised.networks.recomputation import recompute_activations
from self_supervised.numerics import in_parts
from self_supervised.safe_files import data_only, file_hash

FASTEST_LAYOUT = {4: torch.channels_last, 5: torch.channels_last_3d}  # by dimensions of a convolution's weight
LAST_LAYERS = {"squeezenet": nn.Conv2d, "s3d": nn.Conv3d}  # type of the classifier, if it is not linear


def get_encoder(params: EncoderAndDataParams, own: nn.Module | None = None) -> tuple[nn.Module, int]:
    """Return the encoder `encoder_arch` and the width E of its output.

    Args:
        params: settings.
        own: the user's module, if encoder_arch is "module".

    Raises:
        ValueError: the settings, the images and the encoder do not fit together.
    """
    refuse_source(params, own)
    encoder, name = (by_name(params), f"encoder_arch={params.encoder_arch!r}") if own is None else (own, "the encoder")
    width = measured_width(encoder, torch.zeros(1, *params.input_shape), name)
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
        with torch.no_grad(), isolate_rng(), modules.in_eval_mode(encoder):
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


def refuse_source(p: EncoderAndDataParams, own: nn.Module | None) -> None:
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
        if published not in (None, "DEFAULT"):
            raise ValueError(f"encoder_weights={published!r} is not a file; timm's weights are called 'DEFAULT'")
        name, small_views = p.encoder_arch.removeprefix("timm:"), getattr(p, "n_small_views", 0)
        image = torch.zeros(1, *p.input_shape)
        encoder = build_timm(name, published is not None, image, of_all_sizes=small_views > 0)
        report_other_pixels(encoder, p, published)
    elif p.encoder_arch in SMALL_CNNS:
        refuse_published(p.encoder_arch, published)
        encoder = small_cnn(p.channels, SMALL_CNNS[p.encoder_arch])
    else:
        refuse_other_pixels(p, published)
        try:
            classifier = build_classifier(p.encoder_arch, published, p.crop_size, p.num_frames, p.zero_init_residual)
        except AssertionError as error:  # a ViT whose patches do not fit
            raise ValueError(
                f"transform_crop_size={p.crop_size} does not fit {p.encoder_arch}: {error} Choose a multiple of the "
                "patch size, which is in its name"
            ) from error
        encoder = without_last_layer(classifier, p.encoder_arch)
        adapt_stem(encoder, p.channels, p.low_resolution, p.stem_variant)
        if published and has_new_stem(p):
            report_new_stem(p)
        exchange_convolutions(encoder, PointConv2d)
    if file:
        load_file(encoder, file, p)
    return encoder


def load_file(encoder: nn.Module, file: Path, p: EncoderAndDataParams) -> None:
    try:
        weights = layouts.read_weights(file)
        stem = weights.settings.get("stem_variant", weights.stem_variant)
        if p.low_resolution and stem != p.stem_variant and ("stem_variant" in weights.settings or stem != "standard"):
            if not weights.has_guessed_stem:
                raise ValueError(
                    f"its first layers are those of stem_variant={stem!r}. Set it (is {p.stem_variant!r})."
                )
            rank_zero_warn(
                f"{file} is read with stem_variant={p.stem_variant!r}. If it is solo-learn's, whose first convolution "
                f"pads 2 pixels, set stem_variant={stem!r}."
            )
        if not weights.settings:  # of a checkpoint of ours, which has other constants
            refuse_other_pixels(p, p.encoder_weights)
            layouts.refuse_other_heads(weights, p.encoder_arch)
        layouts.load_into(encoder, weights, p.encoder_arch)
    except ValueError as error:
        raise ValueError(f"encoder_weights={p.encoder_weights!r} for {p.encoder_arch}: {error}") from error


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
    file = Path(layouts.checkpoint_of(params.encoder_weights)).expanduser()
    return file if os.path.isfile(file) else None  # Path.is_file raises OSError if the name is too long


def source_of_weights(params: EncoderAndDataParams) -> tuple[str | None, str | None]:
    """Return the weights from which the encoder starts, as `load_encoder` accepts them (None: random), and the hash of
    their file (None: published)."""
    if (weights := params.encoder_weights) is None:
        return None, None
    if file := file_of_weights(params):
        return os.path.abspath(file), file_hash(file)
    of_timm = params.encoder_arch.startswith("timm:")
    return params.encoder_arch if of_timm else f"{params.encoder_arch}:{weights}", None


def build_classifier(
    name: str, weights: str | None, image_size: int, num_frames: int = 16, zero_init_residual: bool = False
) -> nn.Module:
    """Return a classifier of torchvision or ws_resnet as the library builds it. Only S3D gets another pooling, if its
    own does not fit small clips.

    Args:
        name: name of the encoder.
        weights: name of published weights, or None.
        image_size: height and width of the images in pixels.
        num_frames: frames per clip.
        zero_init_residual: whether residual branches of a ResNet start at zero.

    Raises:
        ValueError: there are no such weights, or the encoder cannot have this size.
    """
    kwargs = {"zero_init_residual": True} if zero_init_residual else {}
    if name in ws_resnet.WS_RESNETS:
        refuse_published(name, weights)
        return ws_resnet.WS_RESNETS[name](**kwargs)
    if name.startswith("vit_") and weights is None:
        kwargs["image_size"] = image_size  # sets the number of position embeddings
    if name in INCEPTIONS and weights is None:
        kwargs["init_weights"] = True
    choices = torchvision.models.get_model_weights(name).__members__
    if weights not in (None, *choices):
        raise ValueError(f"encoder_weights={weights!r} is not a file, and {name} has only {', '.join(choices)}")
    if name.startswith("mvit_") and (image_size, num_frames) != (224, 16):
        raise ValueError(
            f"encoder_arch={name!r} only has positions for clips of 16 frames of 224 pixels. Choose num_frames=16 (is "
            f"{num_frames}) and transform_crop_size=224 (is {image_size}), or another encoder."
        )
    with data_only(f"the published weights of {name}"):
        model = torchvision.models.get_model(name, weights=weights, **kwargs)
    if name in INCEPTIONS:
        model.transform_input = False  # a checkpoint would not hold it; `refuse_other_pixels` instead
    if name == "s3d" and (image_size < 224 or num_frames < 14):  # too small for its window of 2 x 7 x 7
        model.avgpool = nn.AdaptiveAvgPool3d(1)
    return model


def refuse_published(name: str, weights: str | None) -> None:
    """Raise ValueError if weights are named for an encoder that has no published ones."""
    if weights is not None:
        raise ValueError(
            f"encoder_weights={weights!r} is not a file, and there are no published weights of {name}. Leave it out."
        )


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


def small_cnn(channels: int = 1, width: int | None = None) -> nn.Sequential:
    """Return a convolutional network [N, channels, H, W] -> [N, 256] for small images, such as scans of digits.

    With `width`, a 1 x 1 convolution to as many channels follows: [N, width].
    """

    def block(inputs: int, outputs: int, stride: int, size: int = 3) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    rows = [(channels, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
    rows += [(256, width, 1, 1)] if width else []
    return nn.Sequential(*(layer for row in rows for layer in block(*row)), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build_timm(name: str, pretrained: bool, image: torch.Tensor, of_all_sizes: bool = False) -> nn.Module:
    """Return timm's model without its classifier.

    If it does not accept `image` [1, C, H, W], and timm can build it for another size (ViTs, Swin, ...), it is built
    for the size of `image`. Its attribute `built_for` then holds that option of timm.create_model. With `of_all_sizes`,
    a ViT also accepts images of other sizes, for which it interpolates its position embeddings.
    """
    import timm  # optional, and slow to import

    def created(**more: Any) -> nn.Module:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=image.shape[1], **more)

    with data_only(f"the published weights of {name}"):
        encoder, of_size = created(), {}
        try:
            measured_width(encoder, image, name)
        except ValueError:
            with contextlib.suppress(TypeError, ValueError, RuntimeError, AssertionError):  # it has a single size
                encoder, of_size = created(img_size=image.shape[-1]), {"img_size": image.shape[-1]}
        if of_all_sizes:
            with contextlib.suppress(TypeError):  # no ViT
                encoder = created(**of_size, dynamic_img_size=True)
    if of_size:
        encoder.built_for = of_size
    warn_of_cut_border(encoder, name, image.shape[-1])
    return encoder


def warn_of_cut_border(encoder: nn.Module, name: str, size: int) -> None:
    """Warn if timm's encoder cuts off the pixels that do not fill a patch. Runs of earlier versions have such sizes."""
    from timm.layers import PatchEmbed

    first = next((part for part in encoder.modules() if isinstance(part, PatchEmbed | nn.Conv2d)), None)
    if isinstance(first, PatchEmbed) and not first.dynamic_img_pad and size % first.patch_size[0]:
        rank_zero_warn(
            f"transform_crop_size={size}: {name} ignores the border of images. Choose a multiple of the patch size, "
            f"{first.patch_size[0]} (of a teacher: teacher_crop_size)"
        )


def without_last_layer(model: nn.Module, name: str) -> nn.Module:
    """Return a classifier whose last layer, and dropout before it, have become the identity."""
    for auxiliary in ("aux1", "aux2", "AuxLogits"):  # auxiliary classifiers of GoogLeNet and Inception
        if name in INCEPTIONS and getattr(model, auxiliary, None) is not None:
            setattr(model, auxiliary, None)
            model.aux_logits = False
    last_type = next((kind for start, kind in LAST_LAYERS.items() if name.startswith(start)), nn.Linear)
    path = [path for path, layer in model.named_modules() if isinstance(layer, last_type)][-1]
    parent, _, leaf = path.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, leaf, nn.Identity())
    before = list(parent.named_children())[-2:-1] if isinstance(parent, nn.Sequential) else []
    for sibling, layer in before:
        if isinstance(layer, nn.Dropout):
            setattr(parent, sibling, nn.Identity())
    return model


def has_new_stem(p: EncoderAndDataParams) -> bool:
    """Return whether `adapt_stem` replaces the first layer of torchvision's encoders, which is for three channels."""
    return p.channels != 3 or p.low_resolution


def report_new_stem(p: EncoderAndDataParams) -> None:
    """Warn that published weights lack the first layer, which was replaced. It would stay random if the encoder is
    frozen, so that a linear classifier is refused."""
    what = (
        f"encoder_weights={p.encoder_weights!r}: the first layer starts from random weights, because "
        f"in_channels={p.channels} and low_resolution_stem={p.low_resolution}"
    )
    way_out = "Set in_channels=3 and low_resolution_stem=False to start from the published ones"
    if getattr(p, "encoder_lr", 0) is None:
        raise ValueError(f"{what}, and stays so in a frozen encoder. {way_out}, or set encoder_lr.")
    rank_zero_info(f"warning: {what}. {way_out}")


def adapt_stem(encoder: nn.Module, channels: int, low_resolution: bool, variant: str = "standard") -> None:
    """Replace the first convolution if images do not have its number of channels, or if they are small.

    The new convolution starts from random weights and keeps its type (weight standardization stays).

    Args:
        encoder: changed in place.
        channels: channels of the images.
        low_resolution: whether to use the stem for small images (SimCLR, B.9): 3 x 3, stride 1, no max-pool after it.
        variant: variants of that stem, for weights of other systems. "padding_2" is a plain convolution with padding 2
            (the original, solo-learn); "no_relu" has no ReLU after it (lightly's ResNets, numbered by nn.Sequential).
    """
    path, old = first_convolution(encoder)
    if old.in_channels == channels and not low_resolution:
        return
    wide = low_resolution and variant == "padding_2"
    kernel, stride, padding = (3, 1, 1 + wide) if low_resolution else (old.kernel_size, old.stride, old.padding)
    kind = nn.Conv2d if wide else type(old)
    new = kind(channels, old.out_channels, kernel, stride, padding, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    parent, _, leaf = path.rpartition(".")
    setattr(encoder.get_submodule(parent), leaf, new)
    if low_resolution:
        encoder.maxpool = nn.Identity()
        if variant == "no_relu":
            encoder.relu = nn.Identity()


def first_convolution(encoder: nn.Module) -> tuple[str, nn.Conv2d | nn.Conv3d]:
    """Return the name of the first convolution, and the convolution."""
    return next((path, layer) for path, layer in encoder.named_modules() if isinstance(layer, nn.Conv2d | nn.Conv3d))


def embeddings_of(encoder: nn.Module, x: torch.Tensor, at_once: int | None = None) -> torch.Tensor:
    """Return the embeddings [N, E] of images or clips; of K clips per video, [N, K, C, T, H, W], the means over K.

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
