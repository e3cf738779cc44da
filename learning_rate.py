"""The learning rate, logged at every step."""

from typing import Any

import pytorch_lightning as pl
import torch

from parameter_options import ONLINE


class LearningRate(pl.Callback):
    """`lr`, with which this step will be taken: the highest of all groups of parameters but the online classifier's.

    It is filled in on the device: nothing waits for a copy.
    """

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
        rate = max(group["lr"] for group in groups if not group.get("name", "").startswith(ONLINE))
        pl_module.log("lr", torch.full((), rate, device=pl_module.device))
