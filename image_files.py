"""Class folders of image files, decoded and cropped in the loader's workers, because their sizes differ."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from torchvision.datasets import ImageFolder

from augmentations import View, draw_crops, generator


class ImageFiles(Dataset):
    """Class folders of image files. With views: one random resized crop a view, drawn from (seed, epoch, image).
    Without: the central square, after the shorter side was resized to 8/7 of `size`."""

    def __init__(self, folder: Path, channels: int, size: int, views: list[View], seed: int):
        self.files = ImageFolder(str(folder)).samples
        self.mode = "L" if channels == 1 else "RGB"
        self.size, self.views, self.seed = size, views, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor | list[Tensor], int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        path, label = self.files[index]
        with Image.open(path) as file:
            image = file.convert(self.mode)
        if not self.views:
            side = min(image.size) * 7 / 8
            left, top = (image.width - side) / 2, (image.height - side) / 2
            return self.resized(image, (left, top, left + side, top + side), self.size), label
        rng = generator((self.seed, epoch, index))
        crops = []
        for view in self.views:
            box = {name: int(value[0]) for name, value in draw_crops(rng, 1, image.height, image.width, view).items()}
            corners = (box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"])
            crops.append(self.resized(image, corners, view.crop_size))
        return crops, label

    @staticmethod
    def resized(image: Image.Image, box: tuple[float, ...], size: int) -> Tensor:
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
        return torch.from_numpy(pixels.copy()).view(size, size, -1).permute(2, 0, 1)


class EpochSampler(DistributedSampler):
    """DistributedSampler (whose order follows from seed and epoch) that tells the data set the epoch too."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())
