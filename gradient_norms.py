"""Norms of the gradients, logged part by part on request."""

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer


class GradientNorms(pl.Callback):
    """grad_norm_PART at every optimizer step, of each part of the method that is trained: model, projection_model, ...

    Euclidean, over all parameters of the part, before any clipping; nothing waits for the device.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        norms = {}
        for name, part in pl_module.named_children():
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            if gradients:
                norms[f"grad_norm_{name}"] = torch.stack(torch._foreach_norm(gradients)).norm()
        pl_module.log_dict(norms)
