"""LinearClassifierMethod: a linear classifier on a frozen encoder, the standard protocol of MoCo.

It meets the pretraining in a checkpoint: `hyper_parameters`, and the keys that start with `model.`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from attrs import frozen
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

import augmentations
import checkpoints
import data
import ddp
import optimizers
from encoders import embed, get_encoder
from fields import fraction, non_negative, plain, positive
from shared_params import EncoderAndDataParams, resolve
from stage import Stage

SCORES = ("loss", "acc1", "acc5")

LINEAR_VIEW = augmentations.View(
    crop_scale=(0.08, 1.0), jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0
)

FROM_PRETRAINING = (  # what the linear stage takes over from the checkpoint's settings
    "encoder_arch",
    "embedding_dim",
    "low_resolution_stem",
    "in_channels",
    "dataset_name",
    "transform_crop_size",
    "num_data_workers",
    "pin_data_memory",
    "data_on_device",
    "unreadable_images",
    "num_frames",
    "clip_duration",
    "video_decoder",
    "frames_per_second",
    "decoding_threads",
    "video_path_prefix",
)


@frozen(kw_only=True)
class LinearClassifierMethodParams(EncoderAndDataParams):
    """Settings of LinearClassifierMethod; the defaults are MoCo's."""

    n_classes: int | None = positive(None)  # None: the data set's

    # optimization parameters
    lr: float = positive(30.0)
    momentum: float = fraction(0.9)
    weight_decay: float = non_negative(0.0)
    max_epochs: int = positive(100)  # for the programs that make the Trainer; the schedule follows the Trainer


class LinearClassifierMethod(Stage):
    """embedding of the frozen `model` -> `classifier` -> logits.

    Training images get a random resized crop and, where the data set's images may be mirrored, a flip. They are
    normalized as in pretraining. The learning rate falls to a tenth at 60 % and at 80 % of the training.

    Args:
        params: settings, as LinearClassifierMethodParams or dict.
        encoder: your own module, if the encoder was one.
        fields: single settings that change `params`.
    """

    def __init__(
        self,
        params: LinearClassifierMethodParams | dict | None = None,
        *,
        encoder: nn.Module | None = None,
        **fields: Any,
    ):
        super().__init__()
        self.params = p = resolve(LinearClassifierMethodParams, params, encoder, fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(p.seed)
            self.model, width = get_encoder(p, encoder)
            self.classifier = nn.Linear(width, p.n_classes or p.dataset.n_classes)
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)
        self.model.requires_grad_(False)
        self.save_hyperparameters({**plain(attrs.asdict(p)), "embedding_dim": width, "encoder_weights": None})

        flips = p.dataset.view.flip_probability
        self.view = attrs.evolve(LINEAR_VIEW, crop_size=p.crop_size, flip_probability=flips)
        if not flips:  # as with scans of digits, where a small crop would cut off what tells the classes apart
            self.view = attrs.evolve(self.view, crop_scale=p.dataset.view.crop_scale)
        self.validation_scores: list[Tensor] = []
        self.augment = partial(augmentations.augment, views=[self.view], mean=p.mean, std=p.std)

    @classmethod
    def from_moco_checkpoint(
        cls, path: str | Path, encoder: nn.Module | None = None, **overrides: Any
    ) -> "LinearClassifierMethod":
        """The encoder of a checkpoint of SelfSupervisedMethod (ours or the original's), frozen, with a new classifier.

        Args:
            path: the checkpoint.
            encoder: your own module, if the encoder was one.
            overrides: fields of LinearClassifierMethodParams.

        Raises:
            ValueError: the checkpoint does not hold exactly the parameters of the encoder; says which differ.
        """
        checkpoint = checkpoints.read(path)
        settings = {k: v for k, v in checkpoint["hyper_parameters"].items() if k in FROM_PRETRAINING}
        method = cls(LinearClassifierMethodParams(**{**settings, **overrides}), encoder=encoder)
        state = {
            key.replace("_orig_mod.", "").removeprefix("module."): v for key, v in checkpoint["state_dict"].items()
        }
        state = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
        try:
            method.model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold a {method.params.encoder_arch}: {error}") from error
        rank_zero_info(f"{path}: all {len(state)} tensors of {method.params.encoder_arch} loaded")
        return method

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images [N, C, H, W] -> logits [N, classes]."""
        with torch.no_grad():
            h = embed(self.model, x)
        return self.classifier(h)

    def train(self, mode: bool = True) -> "LinearClassifierMethod":
        """The encoder stays in eval mode: in train mode its batch statistics would drift though its weights do not."""
        super().train(mode)
        self.model.eval()
        return self

    def on_train_start(self) -> None:
        self.train()  # Lightning takes modules in the mode in which it finds them

    def training_step(self, batch: tuple[list[Tensor], Tensor], batch_idx: int) -> Tensor:
        views, labels = batch
        means = self.scores((views[0], labels)).mean(0)
        self.log_dict({f"step_train_{name}": value for name, value in zip(SCORES, means.detach(), strict=True)})
        return means[0]

    def on_validation_epoch_start(self) -> None:
        self.validation_scores.clear()  # of one that was interrupted

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        with self.eagerly():
            self.validation_scores.append(self.scores(batch))

    def on_validation_epoch_end(self) -> None:
        """Means over the whole set, each image once, however many processes there are."""
        scores = ddp.gather_evaluated(torch.cat(self.validation_scores), self.trainer.val_dataloaders)
        self.validation_scores.clear()
        means = {f"valid_{name}": value for name, value in zip(SCORES, scores.mean(0), strict=True)}
        self.log_dict(means, prog_bar=True, sync_dist=True)

    def scores(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Of each image: cross entropy, and 100 where its class is the first, or among the first five: [N, 3]."""
        images, labels = batch
        logits = self(images).float()
        own = logits.gather(1, labels.unsqueeze(1))
        rank = (~(logits < own)).sum(1) - 1  # 0: the right class alone has the highest logit (never so with NaN)
        accuracies = [100.0 * (rank < k) for k in (1, 5)]
        return torch.stack([F.cross_entropy(logits, labels, reduction="none"), *accuracies], dim=1)

    def configure_optimizers(self) -> dict:
        self.plan = optimizers.get_plan(self.params, self.trainer)
        return optimizers.for_linear_stage(self.params, self.plan, self.classifier)

    def train_dataloader(self):
        p = self.params
        return self.loader(data.get_dataset(p, p.dataset.train_splits, [self.view]), training=True)

    def val_dataloader(self):
        return self.loader(data.get_dataset(self.params, self.params.dataset.test_splits), training=False)
