"""MoCo v2's recipe with blur as the peers write it: image or batch -> view. Each within its own idioms."""

from collections.abc import Callable

import torch
import torchvision.transforms as classic
import torchvision.transforms.v2 as v2

from self_supervised.catalogue import ViewSettings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE = ViewSettings()  # the numbers have their home there


def blur_kernel(size: int) -> int:
    """A tenth of the view, odd, as SimCLR says; at least 3 pixels."""
    return max(3, size // 10 | 1)


def pil(size: int) -> Callable:
    """torchvision's classical pipeline on one PIL image, as in the original and in most of the field's code."""
    r = RECIPE
    jitter = classic.ColorJitter(r.brightness, r.contrast, r.saturation, r.hue)
    return classic.Compose(
        [
            classic.RandomResizedCrop(size, r.crop_scale, r.crop_ratio),
            classic.RandomApply([jitter], r.jitter_probability),
            classic.RandomGrayscale(r.grayscale_probability),
            classic.RandomApply([PilBlur()], r.blur_probability),
            classic.RandomHorizontalFlip(r.flip_probability),
            classic.ToTensor(),
            classic.Normalize(MEAN, STD),
        ]
    )


class PilBlur:
    """Gaussian blur by PIL, as in the official MoCo code."""

    def __call__(self, image):
        from PIL import ImageFilter

        sigma = torch.empty(1).uniform_(*RECIPE.blur_sigma).item()
        return image.filter(ImageFilter.GaussianBlur(radius=sigma))


def torchvision_v2(size: int) -> Callable:
    """torchvision v2 on one uint8 tensor [C, H, W]: its batches share one draw, so images go one by one."""
    r = RECIPE
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, r.crop_scale, r.crop_ratio, antialias=True),
            v2.RandomApply([v2.ColorJitter(r.brightness, r.contrast, r.saturation, r.hue)], r.jitter_probability),
            v2.RandomGrayscale(r.grayscale_probability),
            v2.RandomApply([v2.GaussianBlur(blur_kernel(size), r.blur_sigma)], r.blur_probability),
            v2.RandomHorizontalFlip(r.flip_probability),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def lightly(size: int) -> Callable:
    """lightly's MoCoV2Transform, its first view, on one PIL image."""
    from lightly.transforms import MoCoV2Transform

    return MoCoV2Transform(input_size=size, normalize={"mean": MEAN, "std": STD}).transforms[0]


def kornia(size: int) -> Callable:
    """kornia on a batch of floats [N, C, H, W], each image its own draw."""
    import kornia.augmentation as K

    r = RECIPE
    return torch.nn.Sequential(
        K.RandomResizedCrop((size, size), r.crop_scale, r.crop_ratio),
        K.ColorJitter(r.brightness, r.contrast, r.saturation, r.hue, p=r.jitter_probability),
        K.RandomGrayscale(p=r.grayscale_probability),
        K.RandomGaussianBlur((blur_kernel(size),) * 2, r.blur_sigma, p=r.blur_probability),
        K.RandomHorizontalFlip(p=r.flip_probability),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )


def torchaug(size: int) -> Callable:
    """torchaug on a batch of floats [N, C, H, W], each image its own draw (num_chunks=-1)."""
    import torchaug.transforms as T

    r = RECIPE
    jitter = (r.brightness, r.contrast, r.saturation, r.hue)
    return T.SequentialTransform(
        [
            T.RandomResizedCrop(size, r.crop_scale, r.crop_ratio, num_chunks=-1, batch_transform=True),
            T.RandomColorJitter(*jitter, p=r.jitter_probability, num_chunks=-1, batch_transform=True),
            T.RandomGrayscale(r.grayscale_probability, batch_transform=True),
            T.RandomGaussianBlur([blur_kernel(size)] * 2, r.blur_sigma, p=r.blur_probability, batch_transform=True),
            T.RandomHorizontalFlip(r.flip_probability, batch_transform=True),
            T.Normalize(MEAN, STD),
        ]
    )
