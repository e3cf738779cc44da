"""Augmentations of clips: one draw for all frames, equal to torchvision's v2 operations frame by frame."""

import attrs
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from model_params import ModelParams
from self_supervised.catalogue import ViewSettings
from self_supervised.views import augmentations, tensor_ops
from self_supervised.views.augmentations import ImageDraws, draw_crops, draw_operations

MEAN, STD = (0.45, 0.4, 0.5), (0.225, 0.25, 0.2)
STRONG = ViewSettings(crop_size=32, jitter_probability=1.0, brightness=0.8, contrast=0.8, saturation=0.4, hue=0.2,
              grayscale_probability=0.3, blur_probability=0.7, solarize_probability=0.4)  # fmt: skip


def clips(n: int, n_frames: int = 5, channels: int = 3, height: int = 40, width: int = 48) -> torch.Tensor:
    """Return clips, uint8 [N, C, T, H, W], whose frames all differ."""
    return torch.randint(256, (n, channels, n_frames, height, width), dtype=torch.uint8)


def by_torchvision(frame: torch.Tensor, box: list[int] | None, d: dict, view: ViewSettings, mean, std) -> torch.Tensor:
    """Return the view of one uint8 frame [C, H, W], with the parameters d of its clip."""
    x = tv.to_dtype(frame, torch.float32, scale=True)
    x = x if box is None else tv.resized_crop(x, *box, [view.crop_size] * 2, antialias=True)
    x = tv.horizontal_flip(x) if d["flip"] else x
    operations = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    names = ["brightness", "contrast", "saturation", "hue"]
    for which in d["order"]:
        if d["jitter"] and (len(x) == 3 or which < 2):
            x = operations[which](x, float(d[names[which]]))
    x = tv.rgb_to_grayscale(x, 3) if d["grayscale"] and len(x) == 3 else x
    x = tv.gaussian_blur(x, [13, 13], [float(d["sigma"])] * 2) if d["blur"] else x
    x = tv.solarize(x, view.solarize_threshold) if d["solarize"] else x
    return tv.normalize(x, mean, std)


def on_tensors(x, draws, boxes, view, mean, std):
    frames, n_frames = tensor_ops.frames_of(x)
    matrix = torch.from_numpy(tensor_ops.to_matrix({**boxes, **draws})).repeat_interleave(n_frames, 0)
    made = augmentations.make_normalized_view(frames, matrix, view, "top" not in boxes, mean, std)
    return tensor_ops.clips_of(made, n_frames)


@pytest.mark.parametrize("where", ["loops", "tensors"])
@pytest.mark.parametrize("cropped", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_frame_equals_torchvision_with_the_draw_of_its_clip(where, cropped, channels):
    view, mean, std = STRONG, MEAN[:channels], STD[:channels]
    x = clips(6, channels=channels, **({"height": 32, "width": 32} if cropped else {}))
    rng = ImageDraws(11, np.arange(6))  # as augment(x, 11) draws
    boxes = {} if cropped else draw_crops(rng, 6, *x.shape[3:], view)
    draws = draw_operations(rng, 6, view)
    if where == "loops":
        (ours,) = augmentations.augment([x] if cropped else x, 11, [view], mean, std)
    else:
        ours = on_tensors(x, draws, boxes, view, mean, std)
    assert ours.shape == (6, channels, 5, 32, 32) and ours.is_contiguous(memory_format=torch.channels_last_3d)
    for i in range(6):
        d = {name: values[i] for name, values in draws.items()}
        box = None if cropped else [int(boxes[name][i]) for name in ("top", "left", "height", "width")]
        for t in range(5):
            theirs = by_torchvision(x[i, :, t], box, d, view, mean, std)
            difference = (ours[i, :, t] - theirs).abs()
            # at the threshold of solarization, a difference of 1e-7 decides
            assert (difference < 5e-5).float().mean() >= (0.999 if d["solarize"] else 1), difference.max()


def test_equal_frames_stay_equal_and_other_clips_get_another_draw():
    still = clips(1, 1).expand(8, 3, 4, 40, 48)
    first, second = augmentations.augment(still, 3, [STRONG, STRONG], MEAN, STD)
    for view in (first, second):
        assert torch.equal(view[:, :, 0], view[:, :, 1]) and torch.equal(view[:, :, 0], view[:, :, 3])
        assert len({round(float(clip.mean()), 4) for clip in view}) == 8
    assert not torch.equal(first, second)


def test_a_clip_of_one_frame_is_an_image():
    images = torch.randint(256, (8, 3, 40, 48), dtype=torch.uint8)
    expected = augmentations.augment(images, 5, [STRONG], MEAN, STD)[0]
    assert torch.equal(augmentations.augment(images[:, :, None], 5, [STRONG], MEAN, STD)[0][:, :, 0], expected)


def test_kinetics_crops_and_the_asymmetric_views_of_sce():
    params = ModelParams(
        dataset_name="kinetics", transform_blur_probability=[1.0, 0.1], transform_solarize_probability=[0.0, 0.2],
        transform_time_difference_probability=0.2, transform_s=1.0,
    )  # fmt: skip
    first, second = params.views
    assert (first.crop_scale, first.crop_ratio, first.crop_size) == ((0.2, 0.766), (0.75, 1.3333), 224)
    assert (first.brightness, first.contrast, first.hue, first.flip_probability) == (0.8, 0.8, 0.2, 0.5)
    assert (first.blur_probability, second.blur_probability) == (1.0, 0.1)
    assert (first.solarize_probability, second.solarize_probability) == (0.0, 0.2)
    assert first.time_difference_probability == second.time_difference_probability == 0.2
    assert params.mean == (0.45,) * 3 and params.std == (0.225,) * 3 and params.input_shape == (3, 8, 224, 224)


def test_evaluation_of_clips_is_that_of_their_frames():
    params = ModelParams(dataset_name="kinetics", transform_crop_size=32)
    for height in (32, 40):
        x = clips(3, height=height, width=height)
        ours = augmentations.for_evaluation(x, params)
        assert ours.shape == (3, 3, 5, 32, 32)
        for t in range(5):
            assert torch.equal(ours[:, :, t], augmentations.evaluation_view(x[:, :, t], params))
    pairs = torch.stack([x, x.flip(0)], 1)  # [N, K, C, T, H, W]
    assert torch.equal(augmentations.for_evaluation(pairs, params)[:, 0], ours)


def test_float_clips_are_used_as_they_come():
    params = attrs.evolve(ModelParams(dataset_name="kinetics", transform_crop_size=32), seed=0)
    one, two = torch.rand(2, 4, 3, 5, 32, 32)
    for batch in ([one, two], torch.stack([one, two], 1)):
        views = augmentations.for_training(batch, None, (0,))
        assert len(views) == 2 and torch.equal(views[0], one) and torch.equal(views[1], two)
        assert torch.equal(augmentations.for_evaluation(batch, params), one)
    assert torch.equal(augmentations.for_evaluation(one, params), one)
    assert [view is one for view in augmentations.for_training(one, None, (0,), of_videos=True)] == [True]
