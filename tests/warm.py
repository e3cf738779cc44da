"""Imported by the fork server, whose processes then find the compiled loops of views/compiled_ops.py loaded."""

import torch

from self_supervised import catalogue
from self_supervised.views import augmentations

augmentations.augment(
    torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 0, [catalogue.ViewSettings(crop_size=8)], (0,) * 3, (1,) * 3
)
