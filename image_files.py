"""Class folders of image files, decoded and cropped in the loader's workers, because their sizes differ."""

import os
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.datasets import ImageFolder

from augmentations import View, draw_crops, generator

MOST_WORKERS = 1024


class ImageFiles(Dataset):
    """Class folders of image files. With views: one random resized crop a view, drawn from (seed, epoch, image).
    Without: the central square, after the shorter side was resized to 8/7 of `size`.

    Args:
        skip_unreadable: take the next readable image in place of one that cannot be read, instead of stopping.

    Raises:
        ValueError: no images; a class without images; when indexed, an image that cannot be read. Names the path.
    """

    def __init__(
        self, folder: Path, channels: int, size: int, views: list[View], seed: int, skip_unreadable: bool = False
    ):
        try:
            self.files = ImageFolder(str(folder)).samples
        except FileNotFoundError as error:
            raise ValueError(f"{folder} must hold one folder of images per class: {error}") from error
        self.channels, self.size, self.views, self.seed = channels, size, views, seed
        self.epoch = 0
        self.skip_unreadable = skip_unreadable
        # Shared with the workers: which files could not be read, and which one each worker (by process) read last.
        self.unreadable = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()
        self.reading = torch.full((MOST_WORKERS, 2), -1).share_memory_()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | list[Tensor], int]:
        image, index = self.readable(index)
        label = self.files[index][1]
        if not self.views:
            side = min(image.size) * 7 / 8
            left, top = (image.width - side) / 2, (image.height - side) / 2
            return self.resized(image, (left, top, left + side, top + side), self.size), label
        rng = generator((self.seed, self.epoch, index))
        crops = []
        for view in self.views:
            box = {name: int(value[0]) for name, value in draw_crops(rng, 1, image.height, image.width, view).items()}
            corners = (box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"])
            crops.append(self.resized(image, corners, view.crop_size))
        return crops, label

    def readable(self, index: int) -> tuple[Image.Image, int]:
        """The image with this index, or the next one that can be read; and its index."""
        if (worker := get_worker_info()) is not None:
            self.reading[worker.id] = torch.tensor([os.getpid(), index])
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            path = self.files[candidate][0]
            try:
                return read_image(path, self.channels), candidate
            except Exception as error:  # PIL's readers raise many kinds of them on damaged files
                if not self.skip_unreadable:
                    raise ValueError(
                        f"{path} could not be read as an image ({type(error).__name__}: {error}): mend or remove it, "
                        'or set unreadable_images="skip"'
                    ) from error
                self.unreadable[candidate] = True
        raise ValueError(f"none of the {len(self)} images could be read, the last one was {path}")

    def skipped(self) -> list[str]:
        """Paths of the files found unreadable so far, by any worker."""
        return [self.files[i][0] for i in self.unreadable.nonzero().flatten().tolist()]

    def last_read(self, message: str) -> list[str]:
        """Paths of the files read last by those workers whose process a message of PyTorch names."""
        named = set(map(int, re.findall(r"\d+", message)))
        return [self.files[i][0] for process, i in self.reading.tolist() if process > 0 and process in named]

    @staticmethod
    def resized(image: Image.Image, box: tuple[float, ...], size: int) -> Tensor:
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
        return torch.from_numpy(pixels.copy()).view(size, size, -1).permute(2, 0, 1)


def read_image(path: str, channels: int) -> Image.Image:
    """An image of 8 bits, gray or RGB. Deeper ones are scaled down, transparency is dropped, as torchvision does."""
    with warnings.catch_warnings(), Image.open(path) as file:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if file.mode.startswith("I"):  # 16 bits; PIL would clip at 255
            pixels = np.asarray(file)
            if pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError(f"pixels from {pixels.min()} to {pixels.max()} are not 16 bits")
            return Image.fromarray((pixels // 257).astype(np.uint8)).convert("L" if channels == 1 else "RGB")
        if file.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if file.mode == "P" and "transparency" in file.info:
            file = file.convert("RGBA")
        return file.convert("L" if channels == 1 else "RGB")
