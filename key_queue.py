"""First-in first-out memory of keys (MoCo, https://arxiv.org/abs/1911.05722)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyQueue(nn.Module):
    """`keys` [K, dim]: random unit vectors at first, later the newest K keys. Saved with the model.

    The slots wrap around, so a batch of any size fits, and no host synchronization is needed to write.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))  # the slot that is written next

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Overwrite the oldest slots with `keys` [n, dim]."""
        size = len(self.keys)
        if (skipped := len(keys) - size) > 0:  # more than fit: only the last ones stay
            self.position.add_(skipped)
            keys = keys[skipped:]
        slots = (self.position + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, slots, keys.to(self.keys.dtype))
        self.position.add_(len(keys)).remainder_(size)
