"""Sizes of an encoder's output, measured by encoding one image: its width, cells of its last map, and small views."""

import contextlib

import torch
from torch import nn

from model_params import EncoderAndDataParams, ModelParams
from self_supervised.catalogue import SMALL_CNN
from self_supervised.networks import modules


def measured_width(encoder: nn.Module, image: torch.Tensor, name: str) -> int:
    """Return the width E of the embeddings, by encoding `image` [1, C, H, W] in eval mode, on the encoder's device.

    An encoder that returns [N, E, 1, 1], such as `nn.Sequential(*list(resnet.children())[:-1])`, returns [N, E]
    afterwards.

    Raises:
        ValueError: the encoder does not accept the image, or does not return [N, E]. `name` is for the message.
    """
    weight = next(encoder.parameters(), image)
    try:
        with torch.no_grad(), modules.in_eval_mode(encoder):
            output = encoder(image.to(weight.device))
    except (RuntimeError, AssertionError, ValueError) as error:
        kind, frames = ("clips", "num_frames, ") if image.dim() == 5 else ("images", "")
        shape = f"{tuple(image.shape)} ({frames}transform_crop_size, in_channels)"
        raise ValueError(f"{name} cannot encode {kind} of shape {shape}: {error}") from error
    if getattr(output, "dtype", image.dtype) != image.dtype:
        raise ValueError(f"{name} returns {output.dtype} for images of {image.dtype}: convert its output")
    is_map = isinstance(output, torch.Tensor) and output.dim() > 2 and output.shape[1] == output.numel()
    if is_map and not isinstance(encoder, torch.jit.ScriptModule):
        encoder._forward_hooks["flattened"] = flattened  # a handle's number would not be unique after unpickling
        return output.shape[1]
    if not isinstance(output, torch.Tensor) or output.dim() != 2 or len(output) != 1:
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(f"{name} must map {tuple(image.shape)} to [N, E], got {shape}: flatten or pool its output")
    return output.shape[1]


def flattened(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.flatten(1)


def pool_cells(encoder: nn.Module, params: EncoderAndDataParams) -> int:
    """Let the last pooling layer average `pooling_size` x `pooling_size` cells of the map; return the new width.

    As in Goyal et al. 2019 (arXiv 1905.01235), whose linear classifiers read several cells of each map.

    Raises:
        ValueError: there is no such layer before the embeddings, or the map has fewer pixels than cells.
    """
    name, size, widths = params.encoder_arch, params.pooling_size, []
    pool = last_pooling(encoder)
    if pool is not None:
        check_map(encoder, params, params.crop_size)
        before = pool.output_size
        for cells in (1, size):
            pool.output_size = cells
            with contextlib.suppress(ValueError):  # layers after it, such as VGG's, accept one size only
                widths.append(measured_width(encoder, torch.zeros(1, *params.input_shape), name))
    if len(widths) < 2 or widths[1] != widths[0] * size**2:
        if pool is not None:
            pool.output_size = before  # of the user's own module
        raise ValueError(
            f"pooling_size={size} needs an encoder whose last layer is AdaptiveAvgPool2d, such as a ResNet or "
            f"{SMALL_CNN}, unlike {name}: leave it out"
        )
    return widths[1]


def last_pooling(encoder: nn.Module) -> nn.AdaptiveAvgPool2d | None:
    return next((x for x in reversed(list(encoder.modules())) if isinstance(x, nn.AdaptiveAvgPool2d)), None)


def check_map(encoder: nn.Module, params: EncoderAndDataParams, image_size: int) -> None:
    """Raise ValueError if the last map of images of this size has fewer pixels than cells."""
    shape, maps = (*params.input_shape[:-2], image_size, image_size), []
    hook = last_pooling(encoder).register_forward_pre_hook(lambda _, inputs: maps.append(min(inputs[0].shape[-2:])))
    try:
        measured_width(encoder, torch.zeros(1, *shape), params.encoder_arch)
    finally:
        hook.remove()
    if maps[-1] < params.pooling_size:
        raise ValueError(
            f"pooling_size={params.pooling_size}: the last map of {params.encoder_arch} has {maps[-1]} x {maps[-1]} "
            f"pixels for images of {image_size}. Choose a larger size of images, or leave pooling_size out."
        )


def check_small_views(encoder: nn.Module, width: int, params: ModelParams) -> None:
    """Raise ValueError unless the encoder returns embeddings of the same width for views of all sizes."""
    *shape, crop_size = params.input_shape[:-1]
    for size in {view.crop_size for view in params.views} - {crop_size}:
        name = f"transform_small_crop_size={size} needs an encoder for several sizes (a ResNet) or the size {crop_size}"
        small_width = measured_width(encoder, torch.zeros(1, *shape, size, size), f"{name}: this one")
        if small_width != width:
            raise ValueError(
                f"{name}: this one returns {small_width} features for small views, but {width} for large ones"
            )
        if params.pooling_size > 1:
            check_map(encoder, params, size)
