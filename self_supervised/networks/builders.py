"""Building encoders: networks of torchvision, timm and this library, without classifiers, for the images' channels."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import nn

import ws_resnet
from self_supervised.catalogue import INCEPTIONS
from self_supervised.networks.output_sizes import measured_width
from self_supervised.torch_files import data_only

LAST_LAYERS = {"squeezenet": nn.Conv2d, "s3d": nn.Conv3d}  # type of the classifier, if it is not linear


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


def build_timm(
    name: str, pretrained: bool, image: torch.Tensor, of_all_sizes: bool = False, drop_path_rate: float | None = None
) -> nn.Module:
    """Return timm's model without its classifier.

    If it does not accept `image` [1, C, H, W], and timm can build it for another size (ViTs, Swin, ...), it is built
    for the size of `image`. Its attribute `built_for` then holds that option of timm.create_model. With `of_all_sizes`,
    a ViT also accepts images of other sizes, for which it interpolates its position embeddings.

    Raises:
        ValueError: timm's model has no stochastic depth, for which `drop_path_rate` is passed.
    """
    import timm  # optional, and slow to import

    def created(**more: Any) -> nn.Module:
        more |= {"num_classes": 0, "in_chans": image.shape[1], "drop_path_rate": drop_path_rate}  # None: not passed on
        return timm.create_model(name, pretrained=pretrained, **more)

    with data_only(f"the published weights of {name}"):
        with explain_missing_drop_path(name, drop_path_rate):
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


@contextlib.contextmanager
def explain_missing_drop_path(name: str, rate: float | None) -> Iterator[None]:
    """Say in one line that timm's model does not take a `drop_path_rate`."""
    try:
        yield
    except TypeError as error:
        if rate is None or "drop_path_rate" not in str(error):
            raise
        raise ValueError(
            f"drop_path_rate={rate}: timm's {name} has no stochastic depth. Choose another encoder_arch, such as "
            "timm:vit_small_patch16_224, or leave it out."
        ) from error


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


def adapt_stem(
    encoder: nn.Module, channels: int, low_resolution: bool, variant: str = "standard", published: str | None = None
) -> None:
    """Replace the first convolution if images do not have its number of channels, or if they are small.

    The new convolution starts from random weights and keeps its type (weight standardization stays). With published
    weights and without the stem for small images, the weights are adapted instead.

    Args:
        encoder: changed in place.
        channels: channels of the images.
        low_resolution: whether to use the stem for small images (SimCLR, B.9): 3 x 3, stride 1, no max-pool after it.
        variant: variants of that stem, for weights of other systems. "padding_2" is a plain convolution with padding 2
            (the original, solo-learn); "no_relu" has no ReLU after it (lightly's ResNets, numbered by nn.Sequential).
        published: name of the weights that the encoder has, or None.
    """
    path, old = first_convolution(encoder)
    if old.in_channels == channels and not low_resolution:
        return
    if published and not low_resolution:
        old.weight.data = adapted_to_channels(old.weight.data, channels, f"encoder_weights={published!r}")
        old.in_channels = channels
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


def adapted_to_channels(weight: torch.Tensor, channels: int, source: str) -> torch.Tensor:
    """Return a convolution's weight [O, 3, ...] from `source` for another number of channels, as timm adapts it: the
    sum over the three for one channel, otherwise the three in turn, times 3 / channels."""
    rank_zero_info(f"{source}: the first layer, of 3 channels, is adapted to in_channels={channels}")
    return weight.sum(1, keepdim=True) if channels == 1 else weight[:, torch.arange(channels) % 3] * (3 / channels)


def first_convolution(encoder: nn.Module) -> tuple[str, nn.Conv2d | nn.Conv3d]:
    """Return the name of the first convolution, and the convolution."""
    return next((path, layer) for path, layer in encoder.named_modules() if isinstance(layer, nn.Conv2d | nn.Conv3d))
