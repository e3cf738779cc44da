"""Prepare a method's networks for the machine that trains them: in place, so that checkpoints keep their keys."""

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.hooks import RemovableHandle

from self_supervised import distributed
from self_supervised.data.loading import images_per_batch
from self_supervised.training import precision
from self_supervised.training.fit_checks import refuse_frozen


def prepare(method: pl.LightningModule, stage: str) -> Sequence[RemovableHandle]:
    """Change and compile the networks before a stage of the Trainer. Return hooks to remove after it."""
    trainer, compiled, hooks = method.trainer, method.params.torch_compile, ()
    if trainer.strategy.root_device.type == "cpu":
        # 64 images of 224 pixels in a ResNet-50: 6.9 GB with 2**26, 8.6 GB with 2**30
        distributed.keep_freed_memory(2**26 if method.params.activation_checkpointing else 2**30)
    if stage != "fit":
        return hooks
    precision.refuse_another_type(method)
    refuse_frozen(method)
    for name, network in method.named_children():
        if name.startswith("lagging_"):
            network.requires_grad_(False)  # Lightning's `unfreeze` changes all
    if trainer.strategy.root_device.type == "cpu" and trainer.precision in precision.BFLOAT16_ON_CPU:
        hooks = precision.keep_exact(method)
    if method.params.winograd:
        exchange_convolutions_of(method)
    for module in method.children() if compiled else []:
        if module._compiled_call_impl is None:
            module.compile(mode="default" if compiled is True else compiled)
    return hooks


def exchange_convolutions_of(method: pl.LightningModule) -> None:
    """Change convolutions of the encoder, and of the lagging encoder, to Winograd's method, or say why not."""
    from self_supervised.networks import winograd  # imports Numba, which is slow

    p, trainer, lagging = method.params, method.trainer, getattr(method, "lagging_model", None)
    if (device_and_precision := (trainer.strategy.root_device.type, trainer.precision)) != ("cpu", "32-true"):
        rank_zero_info(
            f"winograd={p.winograd!r}: no effect on {' in '.join(device_and_precision)}, only on cpu in 32-true"
        )
        return
    image, size = torch.zeros(1, *p.input_shape), images_per_batch(p, trainer.accumulate_grad_batches)
    for encoder in [method.model] if lagging is None else [method.model, lagging]:  # of one kind: n is that of both
        n = winograd.use_winograd(encoder, image, min(size, p.micro_batch_size or size), p.winograd == "auto")
    rank_zero_info(f"winograd={p.winograd!r}: {n} convolutions of the encoder use Winograd's method")
