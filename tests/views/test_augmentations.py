"""Operations against torchvision's v2 operations with the same parameters; draws against its distributions."""

import random

import attrs
import numpy as np
import pytest
import torch
import torchvision.transforms as classic
import torchvision.transforms.v2.functional as tv

from model_params import ModelParams
from self_supervised.catalogue import ViewSettings
from self_supervised.numerics import generator
from self_supervised.views import augmentations, compiled_ops, tensor_ops
from self_supervised.views.augmentations import draw_crops, draw_operations

SIZES = [(32, 32), (96, 96), (256, 224), (32, 14), (8, 7)]  # (image, view) in pixels; blurring needs at least 7


def images(n: int, size: int, channels: int = 3) -> torch.Tensor:
    """Return images with smooth colors, sharp edges, the full range and some exactly gray pixels."""
    x = torch.rand(n, channels, size, size)
    x = torch.where(torch.rand(n, 1, size, size) < 0.2, x[:, :1].expand_as(x), x)
    return (x * 255).round() / 255


def each(operation, x, *parameters):
    """Return operation(image, its parameters) of each image, stacked."""
    return torch.stack([operation(image, *map(float, p)) for image, *p in zip(x, *parameters, strict=True)])


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("source, size", SIZES)
def test_resized_crop_with_flip(source, size):
    x, rng = images(6, source), generator(source)
    boxes, flip = draw_crops(rng, 6, source, source, ViewSettings()), rng.random(6) < 0.5
    ours = tensor_ops.resized_crop(x, boxes, size, flip)
    for i in range(6):
        box = [int(boxes[name][i]) for name in ("top", "left", "height", "width")]
        crop = tv.resized_crop(x[i], *box, [size, size], antialias=True)
        assert_close(ours[i], tv.horizontal_flip(crop) if flip[i] else crop)


@pytest.mark.parametrize("source, size", SIZES)
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_color_adjustments(source, size, name):
    x, draws = (
        images(6, size),
        draw_operations(generator(1), 6, ViewSettings(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)),
    )
    ours = getattr(tensor_ops, f"adjust_{name}")(x, tensor_ops.to_column(draws[name], x))
    assert_close(ours, each(getattr(tv, f"adjust_{name}"), x, draws[name]))


@pytest.mark.parametrize("source, size", SIZES)
def test_blur_and_solarize(source, size):
    x, sigma = images(4, size), np.array([0.1, 0.7, 1.3, 2.0])
    blurred = tensor_ops.blur(x, tensor_ops.to_column(sigma, x))
    assert_close(blurred, each(lambda image, s: tv.gaussian_blur(image, [13, 13], [s, s]), x, sigma))
    assert_close(tensor_ops.solarize(x, 0.5), tv.solarize(x, 0.5))


def make_view_by_loops(x, draws, boxes, view, mean, std):
    matrix = tensor_ops.to_matrix({**boxes, **draws})
    return compiled_ops.compiled_view(
        (x * 255).round().byte(), matrix, view.crop_size, view.solarize_threshold, mean, std
    )


def make_view_by_tensors(x, draws, boxes, view, mean, std):
    matrix = torch.from_numpy(tensor_ops.to_matrix({**boxes, **draws}))  # float32, as copied to a GPU
    return augmentations.make_normalized_view((x * 255).round().byte(), matrix, view, False, mean, std)


@pytest.mark.parametrize("make_view", [make_view_by_loops, make_view_by_tensors])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("source, size", SIZES)
def test_whole_view_equals_torchvision_image_by_image(source, size, channels, make_view):
    view = ViewSettings(crop_size=size, solarize_probability=0.3)
    x, rng, n = images(8, source, channels), generator(7), 8
    boxes, draws = draw_crops(rng, n, source, source, view), draw_operations(rng, n, view)
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels]
    ours = make_view(x, draws, boxes, view, mean, std)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    names = ["brightness", "contrast", "saturation", "hue"]
    for i in range(n):
        box = [int(boxes[name][i]) for name in ("top", "left", "height", "width")]
        image = tv.resized_crop(x[i], *box, [size, size], antialias=True)
        for j in draws["order"][i] if draws["jitter"][i] else []:
            image = getattr(tv, f"adjust_{names[j]}")(image, float(draws[names[j]][i]))
        if draws["grayscale"][i] and channels == 3:
            image = tv.rgb_to_grayscale(image, num_output_channels=3)
        if draws["blur"][i]:
            image = tv.gaussian_blur(image, [13, 13], [float(draws["sigma"][i])] * 2)
        if draws["solarize"][i]:
            image = tv.solarize(image, 0.5)
        if draws["flip"][i]:
            image = tv.horizontal_flip(image)
        assert (ours[i] - tv.normalize(image, mean, std)).abs().max() < 1e-5 / min(std)


def same_distribution(ours, theirs) -> bool:
    from scipy.stats import ks_2samp

    return ks_2samp(ours, theirs).pvalue > 0.001


@pytest.mark.parametrize("height, width", [(32, 32), (48, 100), (300, 30)])
def test_crops_are_distributed_as_torchvisions(height, width):
    """At 300 x 30 hardly a box fits, so the fallback is tested, too."""
    random.seed(0)
    n, blank, view = 3000, torch.zeros(3, height, width), ViewSettings()
    ours = draw_crops(generator(3), n, height, width, view)
    theirs = [classic.RandomResizedCrop.get_params(blank, view.crop_scale, view.crop_ratio) for _ in range(n)]
    for name, values in zip(("top", "left", "height", "width"), np.array(theirs).T, strict=True):
        assert same_distribution(ours[name], values), name
    assert (ours["top"] >= 0).all() and (ours["top"] + ours["height"] <= height).all()
    assert (ours["left"] >= 0).all() and (ours["left"] + ours["width"] <= width).all()


def test_other_draws_are_distributed_as_torchvisions():
    n, view = 4000, ViewSettings(solarize_probability=0.1)
    draws = draw_operations(generator(4), n, view)
    jitter = [classic.ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1)) for _ in range(n)]
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
        assert same_distribution(draws[name], [values[i] for values in jitter]), name
    _, counts = np.unique(draws["order"], axis=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > n / 24 * 0.7
    assert same_distribution(draws["sigma"], np.random.default_rng(0).uniform(0.1, 2, n))
    for name, p in (("jitter", 0.8), ("grayscale", 0.2), ("blur", 0.5), ("solarize", 0.1), ("flip", 0.5)):
        assert abs(draws[name].mean() - p) < 4 * (p * (1 - p) / n) ** 0.5, name


@pytest.mark.parametrize("n_frames", [None, 3])
def test_orientations(n_frames):
    """Views upside down and rotated are those of PyTorch; without them, all draws are as before."""
    shape = (64, 3, 8, 8) if n_frames is None else (64, 3, n_frames, 8, 8)
    x = torch.randint(256, shape, dtype=torch.uint8)
    views, constants = [ViewSettings(crop_size=8, flip_probability=0.0)] * 2, {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    plain = augmentations.augment(x, 3, views, **constants)
    always = [attrs.evolve(view, vertical_flip_probability=1.0, rotation_probability=1.0) for view in views[:1]]
    (both,) = augmentations.augment(x, 3, always, **constants)
    assert torch.equal(both, plain[0].flip(-2).rot90(1, (-2, -1)))
    half = [attrs.evolve(view, vertical_flip_probability=0.5) for view in views]
    first, _ = augmentations.augment(x, 3, half, **constants)
    flipped = (first == plain[0].flip(-2)).flatten(1).all(1)
    assert 15 < flipped.sum() < 49 and torch.equal(first[~flipped], plain[0][~flipped])
    params = ModelParams(dataset_name="cifar10", transform_rotation_probability=[0.5, 0.0])
    assert [view.rotation_probability for view in params.views] == [0.5, 0.0]


def test_same_seed_same_views_and_other_seeds_other_views():
    params = ModelParams(dataset_name="cifar10", seed=0)
    augment, x = augmentations.training_views(params), torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    first, again, other = augment(x, (1, 2)), augment(x, (1, 2)), augment(x, (1, 3))
    assert len(first) == 2 and all(v.shape == (8, 3, 32, 32) and v.dtype == torch.float32 for v in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])
    alike = augment(x[:1].expand(8, -1, -1, -1), 5)[0]
    assert len({image.sum().item() for image in alike}) == 8  # independent draws for each image


def test_settings_per_view_as_in_byol():
    params = ModelParams(
        dataset_name="cifar10",
        transform_blur_probability=[1.0, 0.1],
        transform_solarize_probability=[0.0, 0.2],
        transform_crop_scale_min=0.08,
    )
    first, second = params.views
    assert (first.blur_probability, second.blur_probability) == (1.0, 0.1)
    assert (first.solarize_probability, second.solarize_probability) == (0.0, 0.2)
    assert first.crop_scale == (0.08, 1.0) and first.crop_size == 32 and first.hue == pytest.approx(0.1)
    no_blur = ModelParams(transform_apply_blur=False, transform_s=1.0)
    assert no_blur.views[0].blur_probability == 0
    assert no_blur.views[0].brightness == pytest.approx(0.8)


def test_digits_are_neither_mirrored_nor_colored():
    view = ModelParams(dataset_name="digits").views[0]
    assert view.flip_probability == view.jitter_probability == view.grayscale_probability == 0


def test_views_cropped_by_the_workers_are_not_cropped_again():
    params = ModelParams(dataset_name="imagenet", transform_jitter_probability=0, transform_grayscale_probability=0,
                         transform_apply_blur=False, transform_flip_probability=[0, 1])  # fmt: skip
    crops = [torch.randint(256, (2, 3, 20, 20), dtype=torch.uint8) for _ in range(2)]
    first, second = augmentations.training_views(params)(crops, 0)
    mean, std = params.dataset.mean, params.dataset.std
    assert_close(first, tv.normalize(crops[0] / 255, mean, std))
    assert_close(second, tv.normalize(crops[1].flip(3) / 255, mean, std))


def test_evaluation_view_is_the_whole_image():
    params = ModelParams(dataset_name="cifar10", transform_crop_size=20)
    x = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    resized = tv.resize(x / 255, [20, 20], antialias=True)
    ours = augmentations.evaluation_view(x, params)
    assert_close(ours, tv.normalize(resized, params.dataset.mean, params.dataset.std))


def test_without_a_place_for_its_cache_numba_compiles_all_the_same(monkeypatch):
    """Conditions of a container with read-only code and a user without a home directory."""
    from numba import njit

    def without_place(function, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(function, **options)

    monkeypatch.setattr(compiled_ops, "njit", without_place)
    compiled_ops.warn_uncached.cache_clear()
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR") as said:
        double, triple = (compiled_ops.compiled(function) for function in (lambda x: 2 * x, lambda x: 3 * x))
    assert len(said) == 1 and (double(2), triple(2)) == (4, 6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 3, 32, 24), "must be square, not 32 x 24 pixels"), ((2, 3, 6, 6), "6 pixels are too small to be blurred")],
)
def test_uint8_views_that_cannot_be_augmented_are_refused(shape, message):
    views = [ViewSettings(blur_probability=0.5)]
    with pytest.raises(ValueError, match=message):
        augmentations.augment([torch.zeros(shape, dtype=torch.uint8)], 0, views, (0.0,) * 3, (1.0,) * 3)
