"""Mean and deviation of each channel, from a data set's images."""

import numpy as np
from torch.utils.data import Dataset

from augmentations import generator
from files import UNREADABLE

MOST_IMAGES = 2000
SMALLEST_STD = 1 / 255  # of a channel that is the same everywhere


def of_images(dataset: Dataset, seed: int) -> tuple[list[float], list[float]]:
    """(means, deviations) of the values, from 0 to 1, of at most MOST_IMAGES whole images, drawn from `seed`. Images
    are as an evaluation sees them, in the data set's size: the central squares of files."""
    chosen = np.sort(generator(seed).permutation(len(dataset))[:MOST_IMAGES])
    n, total, squares = 0, 0.0, 0.0
    for index in chosen.tolist():
        image, label = dataset[index]
        if np.any(np.asarray(label) == UNREADABLE):
            continue
        pixels = image.numpy().astype(np.float64) / 255  # [C, H, W]
        n += pixels[0].size
        total = total + pixels.sum((1, 2))
        squares = squares + (pixels**2).sum((1, 2))
    mean = total / n
    std = np.sqrt(np.maximum(squares / n - mean**2, 0))
    return mean.tolist(), np.maximum(std, SMALLEST_STD).tolist()
