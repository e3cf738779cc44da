"""Recognition of an encoder's architecture by the names and shapes of its tensors."""

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

import ws_resnet
from self_supervised import catalogue
from self_supervised.networks import builders, layouts

VIT_SIZES = {"vit_small": "timm:vit_small_patch16_224", "vit_base": "timm:vit_base_patch16_224"}  # names of moco v3


@frozen
class Architecture:
    """Fields of EncoderAndDataParams with which get_encoder() builds the encoder."""

    encoder_arch: str
    in_channels: int
    low_resolution_stem: bool
    transform_crop_size: int | None  # pixels, if position embeddings determine it


def matching_architecture(weights: layouts.WeightsFile, name: str | None = None) -> Architecture:
    """Return the architecture `name`, or the first that fits.

    Candidates are tried in this order: the name in the file, ResNets, other models of torchvision, models of timm.
    Models of timm may agree in all shapes and still compute something else (with another number of heads, for example).
    The report therefore says which was assumed, and `encoder_arch=` overrides it.

    Raises:
        ValueError: none fits. The message names the nearest one and its differences.
    """
    state = layouts.torchvisions(weights.state)
    nearest: tuple = (math.inf, "", {})  # number of differing names, architecture, differing names
    for candidate in candidates(weights, state) if name is None else [name]:
        architecture, wanted = adapted(candidate, state)
        wrong = layouts.misfits(state, wanted)
        if not wrong:
            return architecture
        nearest = min(nearest, (layouts.n_names(wrong), candidate, wrong), key=lambda item: item[0])
    if name is not None:
        raise ValueError(layouts.mismatch_message(weights, name, nearest[2]))
    if not nearest[1]:
        raise ValueError(
            f"{weights.source} does not hold tensors of a known encoder of torchvision, timm or ws_resnet. Pass "
            "encoder_arch=NAME or encoder=your_module."
        )
    raise ValueError(
        "no encoder of torchvision, timm or ws_resnet fits. The nearest one differs: "
        f"{layouts.mismatch_message(weights, nearest[1], nearest[2])}. Pass encoder_arch=NAME or encoder=your_module."
    )


def candidates(weights: layouts.WeightsFile, state: dict[str, Tensor]) -> Iterator[str]:
    """Yield names of encoders that may fit, the most probable first."""
    in_file = weights.architecture
    with_timm = importlib.util.find_spec("timm") is not None
    if in_file is not None:
        names = (in_file, VIT_SIZES.get(in_file), f"timm:{in_file}")
        yield from (name for name in names if name in buildable(with_timm))
    if any(tensor.dim() == 5 for tensor in state.values()):  # three-dimensional convolutions: an encoder of clips
        yield from catalogue.video_models()
        return
    if "patch_embed.proj.weight" not in state:  # only timm's models have it
        yield from from_torchvision(state)
    if with_timm:
        yield from (f"timm:{name}" for name in alike_in_timm(state))


def from_torchvision(state: dict[str, Tensor]) -> Iterator[str]:
    """Yield names of torchvision's encoders of images that may fit, and those of ws_resnet."""
    resnets = [name for name in catalogue.image_models() if catalogue.is_resnet(name)]
    yield from (*resnets, *ws_resnet.WS_RESNETS)
    if "layer1.0.conv1.weight" in state:  # no others have it
        return
    is_vit = "class_token" in state
    for name in catalogue.image_models():  # no RegNets, which take up to 2.6 GB of memory: users pass their names
        if name not in resnets and not name.startswith("regnet") and name.startswith("vit") == is_vit:
            yield name


def buildable(with_timm: bool) -> set[str]:
    """Return the names of all encoders that can be built here."""
    names = {*catalogue.torchvision_models(), *ws_resnet.WS_RESNETS}
    if with_timm:
        import timm  # optional, and slow to import

        names |= {f"timm:{name}" for name in timm.list_models()}
    return names


def alike_in_timm(state: dict[str, Tensor]) -> list[str]:
    """Return timm's ViTs of the patch and image size, or ResNets of the depth. All of timm would take minutes."""
    import timm

    if (size := timm_image_size(state)) is not None:
        patch = state["patch_embed.proj.weight"].shape[-1]
        of_dino = f"vit_*_patch{patch}_*dino*"  # without their size in the name
        patterns = (f"vit_*_patch{patch}_{size}*", f"*_patch{patch}_*{size}*", f"vit_*_patch{patch}_224", of_dino)
        return list(dict.fromkeys(name for pattern in patterns for name in timm.list_models(pattern)))
    blocks = {tuple(key.split(".")[:2]) for key in state if key.startswith("layer")}
    depth = 2 + len(blocks) * (3 if "layer1.0.conv3.weight" in state else 2)
    return timm.list_models(f"*res*ne*t{depth}*") if blocks else []


def timm_image_size(state: dict[str, Tensor]) -> int | None:
    """Return the image size, in pixels, of the position embeddings of a ViT of timm; None for other encoders."""
    if "patch_embed.proj.weight" not in state or "pos_embed" not in state:
        return None
    return state["patch_embed.proj.weight"].shape[-1] * math.isqrt(state["pos_embed"].shape[1])


def adapted(name: str, state: dict[str, Tensor]) -> tuple[Architecture, dict[str, Tensor]]:
    """Return the architecture with the channels, stem and image size of the state, and the encoder's state dict."""
    encoder, size = without_memory(name, state)
    path, first = builders.first_convolution(encoder)
    weight = state.get(f"{path}.weight")
    channels = first.in_channels
    low_resolution = False
    if weight is not None and weight.dim() in (4, 5):
        channels = weight.shape[1] * first.groups
        low_resolution = weight.shape[2:] == (3, 3) != first.kernel_size and catalogue.has_low_resolution_stem(name)
    if name.startswith("timm:"):
        encoder = without_memory(name, state, channels)[0] if channels != first.in_channels else encoder
    else:
        with torch.device("meta"):
            builders.adapt_stem(encoder, channels, low_resolution)
    return Architecture(name, channels, low_resolution, size), encoder.state_dict()


def without_memory(name: str, state: dict[str, Tensor], channels: int = 3) -> tuple[nn.Module, int | None]:
    """Return the encoder, on the meta device if possible, and its image size, or None if it accepts any."""
    if name in catalogue.SMALL_CNNS:
        with torch.device("meta"):
            return builders.small_cnn(channels, catalogue.SMALL_CNNS[name]), None
    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    if name.startswith("timm:"):
        import timm

        with torch.device("meta"):
            encoder = timm.create_model(name.removeprefix("timm:"), **options)
            size = encoder.default_cfg["input_size"][-1]
            wanted = timm_image_size(state)
            if wanted not in (None, size):
                with contextlib.suppress(TypeError, ValueError, AssertionError):  # it has a single size
                    encoder = timm.create_model(name.removeprefix("timm:"), **options, img_size=wanted)
                    size = wanted
        return encoder, size
    size = None
    positions = state.get("encoder.pos_embedding")
    if positions is not None and "conv_proj.weight" in state:
        size = state["conv_proj.weight"].shape[-1] * math.isqrt(positions.shape[1] - 1)
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = builders.build_classifier(name, None, size or 224)
    return builders.without_last_layer(model, name), size
