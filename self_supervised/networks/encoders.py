"""Name -> (encoder without its classifier, width of its output).

Encoders map images [N, C, H, W], or those of videos clips [N, C, T, H, W], to [N, E].
"""

import contextlib
import os
from pathlib import Path

import torch
import torchvision
from torch import nn

import ws_resnet
from model_params import ModelParams
from self_supervised.catalogue import OWN_MODULE, video_models
from self_supervised.networks import layers, layouts
from self_supervised.safe_files import data_only

FASTEST_LAYOUT = {4: torch.channels_last, 5: torch.channels_last_3d}  # of convolutions over images, over clips
LAST_LAYERS = {"squeezenet": nn.Conv2d, "s3d": nn.Conv3d}  # whose classifiers are convolutions


def get_encoder(params: ModelParams, own: nn.Module | None = None) -> tuple[nn.Module, int]:
    """(the encoder that `params` names, E). `own` is the user's module where encoder_arch is "module"."""
    encoder, width = _get_encoder(params, own)
    for weight in encoder.parameters():
        if layout := FASTEST_LAYOUT.get(weight.dim()):
            weight.data = weight.data.to(weight.dtype, memory_format=layout)
    if params.embedding_dim not in (None, width):
        raise ValueError(f"embedding_dim={params.embedding_dim}, but {params.encoder_arch} gives {width}: leave it out")
    return encoder, width


def _get_encoder(p: ModelParams, own: nn.Module | None) -> tuple[nn.Module, int]:
    if (own is not None) != (p.encoder_arch == OWN_MODULE):
        raise ValueError(
            f"encoder_arch={p.encoder_arch!r} needs "
            + ("encoder=your_module" if own is None else f"no encoder; for your own say encoder_arch={OWN_MODULE!r}")
        )
    image = torch.zeros(1, *p.input_shape)
    if own is not None:
        return own, measured_width(own, image, "the encoder")
    check_kind(p.encoder_arch, p.dataset_name, p.dataset.of_videos)
    file = None if p.encoder_weights is None else Path(p.encoder_weights).expanduser()
    from_file = file is not None and os.path.isfile(file)  # False, not an error, for a name too long to be one
    published = None if from_file else p.encoder_weights
    if p.encoder_arch.startswith("timm:"):
        encoder = build_timm(p.encoder_arch.removeprefix("timm:"), published is not None, image)
    else:
        model = build(p.encoder_arch, published, p.crop_size, p.num_frames, p.zero_init_residual)
        encoder, _ = without_classifier(model, p.encoder_arch)
        adapt_stem(encoder, p.channels, p.low_resolution, p.stem_variant)
        ws_resnet.exchange_convolutions(encoder, ws_resnet.PointConv2d)
    if from_file:
        try:
            layouts.load_into(encoder, layouts.read_weights(file), p.encoder_arch)
        except ValueError as error:
            raise ValueError(f"encoder_weights={p.encoder_weights!r} for {p.encoder_arch}: {error}") from error
    return encoder, measured_width(encoder, image, f"encoder_arch={p.encoder_arch!r}")


def check_kind(name: str, dataset_name: str, of_videos: bool) -> None:
    """Raise ValueError where an encoder of clips is to encode images, or the other way round."""
    if (name in video_models()) != of_videos:
        takes, has = ("images", "clips") if of_videos else ("clips", "images")
        others = f"encoder_arch={', '.join(video_models())}"
        way_out = others if of_videos else "another encoder_arch, or a set of videos"
        raise ValueError(
            f"encoder_arch={name!r} encodes {takes}, and dataset_name={dataset_name!r} has {has}: choose {way_out}, or "
            "encoder=your_module"
        )


def source_of_weights(params: ModelParams) -> str | None:
    """What an encoder starts from, as weights.load_encoder takes it; None: random weights."""
    weights = params.encoder_weights
    if weights is None:
        return None
    if os.path.isfile(os.path.expanduser(weights)):
        return os.path.abspath(os.path.expanduser(weights))
    return params.encoder_arch + f":{weights}" * (not params.encoder_arch.startswith("timm:"))


def build(
    name: str, weights: str | None, image_size: int, num_frames: int = 16, zero_init_residual: bool = False
) -> nn.Module:
    """A classifier as its library builds it, but for the pooling of S3D where it does not fit small clips."""
    kwargs = {"zero_init_residual": True} if zero_init_residual else {}
    if name in ws_resnet.WS_RESNETS:
        if weights is not None:
            raise ValueError(f"encoder_weights={weights!r} is no file, and there are no published weights of {name}")
        return ws_resnet.WS_RESNETS[name](**kwargs)
    if name.startswith("vit_") and weights is None:
        kwargs["image_size"] = image_size  # sets the number of position embeddings
    if name in ("googlenet", "inception_v3") and weights is None:
        kwargs["init_weights"] = True
    choices = torchvision.models.get_model_weights(name).__members__
    if weights not in (None, *choices):
        raise ValueError(f"encoder_weights={weights!r} is no file, and {name} has only {', '.join(choices)}")
    if name.startswith("mvit_") and (image_size, num_frames) != (224, 16):
        raise ValueError(
            f"encoder_arch={name!r} has positions for clips of 16 frames of 224 pixels only: choose num_frames=16 (is "
            f"{num_frames}) and transform_crop_size=224 (is {image_size}), or another encoder"
        )
    with data_only(f"the published weights of {name}"):
        model = torchvision.models.get_model(name, weights=weights, **kwargs)
    if name == "s3d" and (image_size < 224 or num_frames < 14):  # its window of 2 x 7 x 7 would not fit
        model.avgpool = nn.AdaptiveAvgPool3d(1)
    return model


def build_timm(name: str, pretrained: bool, image: torch.Tensor) -> nn.Module:
    """timm's model without its classifier. If it cannot take `image` [1, C, H, W], and timm can build it for another
    size (ViTs, Swin, ...), it is built for that of `image`; `built_for` then holds that option of timm.create_model."""
    import timm  # optional, and slow to import

    options = {"pretrained": pretrained, "num_classes": 0, "in_chans": image.shape[1]}
    with data_only(f"the published weights of {name}"):
        encoder = timm.create_model(name, **options)
        try:
            measured_width(encoder, image, name)
        except ValueError:
            with contextlib.suppress(TypeError, ValueError, RuntimeError, AssertionError):  # only this size after all
                encoder = timm.create_model(name, **options, img_size=image.shape[-1])
                encoder.built_for = {"img_size": image.shape[-1]}
    return encoder


def without_classifier(model: nn.Module, name: str) -> tuple[nn.Module, int]:
    """Replace the last layer (and the dropout before it) by the identity. Returns the width of what comes out."""
    for auxiliary in ("aux1", "aux2", "AuxLogits"):  # GoogLeNet's and Inception's side classifiers
        if name in ("googlenet", "inception_v3") and getattr(model, auxiliary, None) is not None:
            setattr(model, auxiliary, None)
            model.aux_logits = False
    last_type = next((kind for start, kind in LAST_LAYERS.items() if name.startswith(start)), nn.Linear)
    path, last = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, last_type)][-1]
    parent, _, leaf = path.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, leaf, nn.Identity())
    before = list(parent.named_children())[-2:-1] if isinstance(parent, nn.Sequential) else []
    for sibling, layer in before:
        if isinstance(layer, nn.Dropout):
            setattr(parent, sibling, nn.Identity())
    return model, last.in_features if last_type is nn.Linear else last.in_channels


def adapt_stem(encoder: nn.Module, channels: int, low_resolution: bool, variant: str = "standard") -> None:
    """First convolution for `channels`; for small images 3 x 3 with stride 1 and no pooling after it (SimCLR, B.9).

    An exchanged convolution starts from random weights, and keeps its kind (weight standardization stays). Variants of
    the stem for small images, for the weights of other systems: "padding_2" is a plain convolution with padding 2 (the
    original, solo-learn); "no_relu" has no ReLU after it (lightly's ResNets, numbered by nn.Sequential).
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
    return next((path, layer) for path, layer in encoder.named_modules() if isinstance(layer, nn.Conv2d | nn.Conv3d))


def embeddings_of(encoder: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Images or clips -> embeddings [N, E]; of several clips of each video, [N, K, C, T, H, W], their mean."""
    return encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1) if x.dim() == 6 else encoder(x)


def measured_width(encoder: nn.Module, image: torch.Tensor, name: str) -> int:
    """E, by encoding one image in eval mode."""
    try:
        with torch.no_grad(), layers.in_eval_mode(encoder):
            output = encoder(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        kind, frames = ("clips", "num_frames, ") if image.dim() == 5 else ("images", "")
        shape = f"{tuple(image.shape)} ({frames}transform_crop_size, in_channels)"
        raise ValueError(f"{name} cannot encode {kind} of shape {shape}: {error}") from error
    if not isinstance(output, torch.Tensor) or output.dim() != 2:
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(f"{name} must map {tuple(image.shape)} to [N, E], got {shape}: flatten or pool its output")
    return output.shape[1]


def check_small_views(encoder: nn.Module, width: int, input_shape: tuple[int, ...], sizes: set[int]) -> None:
    """Raise ValueError unless the encoder makes E numbers of views of all sizes, and not only of input_shape's."""
    *shape, crop_size = input_shape[:-1]
    for size in sizes - {crop_size}:
        name = f"transform_small_crop_size={size} needs an encoder for several sizes (a ResNet) or the size {crop_size}"
        found = measured_width(encoder, torch.zeros(1, *shape, size, size), f"{name}: this one")
        if found != width:
            raise ValueError(f"{name}: this one makes {found} numbers of small views, but {width} of large ones")
