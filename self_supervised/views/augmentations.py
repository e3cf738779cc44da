"""Views of a batch of uint8 images: every random operation is batched on the images' device, and drawn for each image.

Parameters are drawn from torchvision's distributions by a counter-based generator on the host. They follow from the
seed and the image's place in the epoch, so that views are the same on every device and any number of processes. The
operations are in tensor_ops.py and, for the CPU, in compiled_ops.py. At the end: batches of any loader, whether uint8
images or float views that are ready.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from model_params import EncoderAndDataParams, ModelParams
from self_supervised.catalogue import ViewSettings
from self_supervised.distributed import to_device
from self_supervised.views.input_checks import check_cropped, check_pixels
from self_supervised.views.tensor_ops import (
    Draws,
    blur,
    clips_of,
    color_jitter,
    frames_of,
    from_matrix,
    gray,
    normalize,
    resized_crop,
    solarize,
    to_column,
    to_matrix,
)

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the step of SplitMix64

# ---- drawing ----


class ImageDraws:
    """Uniform random numbers of N images, row n for the image at positions[n], with the methods of NumPy's Generator.

    Each number follows from the seed, the position, and how many were drawn for this image before. It is element
    position x 2^16 + column of SplitMix64's sequence (Steele et al., https://doi.org/10.1145/2660193.2660195, figure
    17), which is computed for all images at once. NumPy's generators have to be moved to each image in turn.
    """

    BLOCK = 64  # numbers of an image that are computed at once: those of one or two views

    def __init__(self, seed: int | tuple[int, ...], positions: np.ndarray):
        (start,) = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        first = positions.astype(np.uint64) << np.uint64(16)
        self.first, self.drawn, self.block = first * GOLDEN + start, 0, np.empty((0, len(first)))

    def random(self, shape: int | tuple[int, ...]) -> np.ndarray:
        """Return numbers from 0 to 1, of a shape whose first axis is N."""
        n, *others = (shape,) if isinstance(shape, int) else shape
        columns = math.prod(others)
        while len(self.block) < columns:
            self.block = np.concatenate([self.block, self.next_block()])
        numbers, self.block = self.block[:columns], self.block[columns:]
        return numbers.T.reshape(n, *others)

    def next_block(self) -> np.ndarray:
        """Return more numbers [BLOCK, N]. Products of uint64 are modulo 2^64."""
        self.drawn += self.BLOCK
        columns = np.arange(self.drawn - self.BLOCK + 1, self.drawn + 1, dtype=np.uint64)
        z = self.first + (columns * GOLDEN)[:, None]
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53

    def uniform(self, low: float, high: float, shape: int | tuple[int, ...]) -> np.ndarray:
        return low + (high - low) * self.random(shape)


def draw_crops(rng: np.random.Generator | ImageDraws, n: int, height: int, width: int, view: ViewSettings) -> Draws:
    """Return n boxes, drawn as by torchvision's `RandomResizedCrop`.

    A box is the first of ten tries that fits into the image, else the largest central box of an allowed ratio.
    """
    area = height * width * rng.uniform(*view.crop_scale, (n, 10))
    ratio = np.exp(rng.uniform(*np.log(view.crop_ratio), (n, 10)))
    w = np.round(np.sqrt(area * ratio)).astype(int)
    h = np.round(np.sqrt(area / ratio)).astype(int)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(1)[:, None]
    central = np.clip(width / height, *view.crop_ratio)
    largest_h = min(height, round(width / central))
    largest_w = min(width, round(height * central))
    h = np.where(fits.any(1), np.take_along_axis(h, first, 1)[:, 0], largest_h)
    w = np.where(fits.any(1), np.take_along_axis(w, first, 1)[:, 0], largest_w)
    top, left = (rng.random((n, 2)).T * [height - h + 1, width - w + 1]).astype(int)
    centered = ~fits.any(1)
    top[centered] = (height - largest_h) // 2
    left[centered] = (width - largest_w) // 2
    return {"top": top, "left": left, "height": h, "width": w}


def draw_operations(rng: np.random.Generator | ImageDraws, n: int, view: ViewSettings) -> Draws:
    """Return the random parameters of all operations except the crop, for n images."""

    def factor(strength: float) -> np.ndarray:
        return rng.uniform(max(0.0, 1 - strength), 1 + strength, n)

    return {
        "jitter": rng.random(n) < view.jitter_probability,
        "order": rng.random((n, 4)).argsort(1),  # of brightness, contrast, saturation, hue
        "brightness": factor(view.brightness),
        "contrast": factor(view.contrast),
        "saturation": factor(view.saturation),
        "hue": rng.uniform(-view.hue, view.hue, n),
        "grayscale": rng.random(n) < view.grayscale_probability,
        "blur": rng.random(n) < view.blur_probability,
        "sigma": rng.uniform(*view.blur_sigma, n),
        "solarize": rng.random(n) < view.solarize_probability,
        "flip": rng.random(n) < view.flip_probability,
    }


# ---- views ----


def make_view(x: Tensor, draws: Draws, view: ViewSettings, cropped: bool) -> Tensor:
    """Return one view of float images [N, C, H, W], with the parameters in `draws`; without crop if `cropped`."""

    def drawn(name: str) -> Tensor:
        return to_column(draws[name], x) > 0

    x = torch.where(drawn("flip"), x.flip(3), x) if cropped else resized_crop(x, draws, view.crop_size, draws["flip"])
    if view.jitter_probability > 0:
        x = color_jitter(x, draws)
    if view.grayscale_probability > 0 and x.shape[1] == 3:
        x = torch.where(drawn("grayscale"), gray(x), x)
    if view.blur_probability > 0:
        x = torch.where(drawn("blur"), blur(x, to_column(draws["sigma"], x)), x)
    if view.solarize_probability > 0:
        x = torch.where(drawn("solarize"), solarize(x, view.solarize_threshold), x)
    return x


def augment(
    images: Tensor | list[Tensor],
    seed: int | tuple[int, ...],
    views: list[ViewSettings],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    torch_compile: bool = False,
    positions: np.ndarray | None = None,
) -> list[Tensor]:
    """Return normalized float views of a batch. The same seed and position of an image give the same views.

    Args:
        images: uint8 [N, C, H, W], or a list with one batch per view, already cropped. All frames of a clip
            [N, C, T, H, W] get the same parameters.
        torch_compile: fuse the operations of a view on a GPU; on the CPU they are always compiled.
        positions: whole numbers [N], which differ between the images of one seed; default: 0, 1, 2, ...
    """
    cropped = isinstance(images, list)
    batches = images if cropped else [images] * len(views)
    n = len(batches[0])
    rng = ImageDraws(seed, np.arange(n) if positions is None else positions)
    result = []
    for batch, view in zip(batches, views, strict=False):  # a list may have more views than are used, or fewer
        x, n_frames = frames_of(batch)
        if cropped:
            check_cropped(x, view)
        x = with_channels(x, len(mean))
        full = {"top": 0, "left": 0, "height": x.shape[2], "width": x.shape[3]}
        boxes = full if cropped else draw_crops(rng, n, *x.shape[2:], view)
        matrix = to_matrix({**boxes, **draw_operations(rng, n, view)}).repeat(n_frames or 1, axis=0)
        if x.device.type == "cpu":
            from self_supervised.views.compiled_ops import compiled_view  # imports Numba, which is slow

            size = x.shape[2] if cropped else view.crop_size
            made = compiled_view(x, matrix, size, view.solarize_threshold, mean, std)
        else:
            on_device = fused() if torch_compile else make_normalized_view
            on_host = torch.from_numpy(matrix)
            made = on_device(x.contiguous() if cropped else x, to_device(on_host, x.device), view, cropped, mean, std)
        result.append(clips_of(turned(made, rng, n, view), n_frames))
    return result


def rotated(x: Tensor) -> Tensor:
    return x.rot90(1, (2, 3)).contiguous(memory_format=torch.channels_last)


def turned(x: Tensor, rng: ImageDraws, n: int, view: ViewSettings) -> Tensor:
    """Return a view [N, C, H, H] of n images, or [N T, C, H, H] of n clips, some of them upside down or rotated by 90
    degrees counterclockwise. The other operations give the same pixels in any orientation, so these may come last.

    Numbers are drawn only if they are used: without these operations, all draws are those of earlier versions.
    """
    operations = (view.vertical_flip_probability, lambda x: x.flip(2)), (view.rotation_probability, rotated)
    for probability, operation in operations:
        if probability > 0:
            chosen = np.repeat(rng.random(n) < probability, len(x) // n)
            x = torch.where(to_column(chosen, x) > 0, operation(x), x)
    return x


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Return images for an encoder of that many channels: gray ones are repeated for RGB, others are unchanged."""
    return images.expand(-1, channels, -1, -1) if (images.shape[1], channels) == (1, 3) else images


def make_normalized_view(
    images: Tensor, matrix: Tensor, view: ViewSettings, cropped: bool, mean: tuple, std: tuple
) -> Tensor:
    """Return one normalized view of uint8 images. `matrix` holds the drawn parameters, on the same device."""
    return normalize(make_view(images.float() / 255, from_matrix(matrix), view, cropped), mean, std)


@cache
def fused() -> Callable[..., Tensor]:
    """Return `make_normalized_view`, compiled."""
    return torch.compile(make_normalized_view, fullgraph=True)


def training_views(params: ModelParams) -> Callable[..., list[Tensor]]:
    """Return augment(images, seed, positions=None) -> list of float views, with the settings of `params`."""
    statistics = {"mean": params.mean, "std": params.std}
    return partial(augment, views=params.views, **statistics, torch_compile=bool(params.torch_compile))


def evaluation_view(images: Tensor, params: EncoderAndDataParams) -> Tensor:
    """Return the full images, normalized and, if their size differs from `crop_size`, resized.

    Args:
        images: uint8 images [N, C, H, W], clips [N, C, T, H, W], or multiple clips per video [N, clips, C, T, H, W].

    Raises:
        ValueError: `images` have another type or shape. Floats from 0 to 1 would be divided by 255 again.
    """
    check_pixels(images, params.channels)
    if images.dim() == 6:
        return evaluation_view(images.flatten(0, 1), params).unflatten(0, images.shape[:2])
    x, n_frames = frames_of(images)
    x = with_channels(x, params.channels).float() / 255
    size = params.crop_size
    if len(x) == 0:
        x = x.new_empty(0, x.shape[1], size, size)
    elif x.shape[2:] != (size, size):
        full = {"top": 0, "left": 0, "height": x.shape[2], "width": x.shape[3]}
        x = resized_crop(x, {name: np.full(len(x), value) for name, value in full.items()}, size)
    return clips_of(normalize(x, params.mean, params.std), n_frames)


# ---- batches of any loader ----


def for_training(
    images: Tensor | list[Tensor],
    augment: Callable[..., list[Tensor]],
    seed: tuple[int, ...],
    positions: np.ndarray | None = None,
    of_videos: bool = False,
) -> list[Tensor]:
    """Return a list of float views: augmented from uint8 images or clips, or the float views of the loader.

    Float views come as a list, or stacked, [N, V, C, H, W] or, of clips, [N, V, C, T, H, W].

    Args:
        of_videos: a float tensor [N, C, T, H, W] is one view of clips.

    Raises:
        ValueError: the tensors of a list have different numbers of channels, such as images and masks.
    """
    if isinstance(images, list) and len({view.shape[1] for view in images}) > 1:
        raise ValueError(
            f"images={[list(view.shape) for view in images]}: views of the same images have the same number of "
            "channels. Yield (images, labels) without masks, or a list of views."
        )
    if (images if isinstance(images, Tensor) else images[0]).dtype == torch.uint8:
        return augment(images, seed, positions=positions)
    if isinstance(images, Tensor):
        return list(images.unbind(1)) if images.dim() > (5 if of_videos else 4) else [images]
    return images


def for_evaluation(images: Tensor | list[Tensor], params: EncoderAndDataParams) -> Tensor:
    """Return normalized images or clips: from uint8, or the loader's floats unchanged, and of float views the first."""
    images = images if isinstance(images, Tensor) else images[0]
    if images.dtype == torch.uint8:
        return evaluation_view(images, params)
    return images[:, 0] if images.dim() == (6 if params.dataset.of_videos else 5) else images
