"""LinearClassifierMethod: a linear classifier on an encoder, which stays frozen (MoCo's protocol) or is fine-tuned.

It meets the pretraining in a checkpoint: `hyper_parameters`, and the keys that start with `model.`.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from attrs import field, frozen
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from lars import parameter_groups
from model_params import DATASET_DEFAULTS, TRAINING_ONLY, EncoderAndDataParams, refuse
from self_supervised.catalogue import NORMS_AND_BIASES, ViewSettings
from self_supervised.data import loading, subsets
from self_supervised.data.files import UNREADABLE, nan_where_unreadable
from self_supervised.data.loading import n_classes, require_labels, resolve
from self_supervised.fields import choice, fraction, non_negative, number, plain, positive
from self_supervised.networks import layers
from self_supervised.networks.encoders import embeddings_of, get_encoder
from self_supervised.networks.pretrained import SHARED, load_encoder
from self_supervised.numerics import at_least_float32
from self_supervised.training import optimizers
from self_supervised.training.base_method import BaseMethod, one_image_explained
from self_supervised.views import augmentations

# ---- settings ----


@frozen(kw_only=True)
class LinearClassifierMethodParams(EncoderAndDataParams):
    """Settings of LinearClassifierMethod; the defaults are MoCo's."""

    n_classes: int | None = positive(None)  # None: the data set's

    # what is trained beside the classifier, and how
    encoder_lr: float | None = positive(None)  # of its last stage; None: frozen, in eval mode (lr=30 is only for that)
    layer_decay: float = fraction(1.0)  # each stage of the encoder has the rate of the next one times this
    normalize_features: bool = False  # batch norm without parameters before the classifier: one lr fits all encoders

    transform_flip_probability: float | None = fraction(None)  # of mirroring training images; None: the data set's

    # labels
    label_fraction: float | None = number(None, above=0, at_most=1)  # of every class, at least one image
    labels_per_class: int | None = positive(None)  # instead: so many of every class
    validate_on: str = choice("test", ("test", "held_out"))  # held_out: part of the training set, to choose settings by
    held_out_fraction: float = number(0.1, above=0, at_most=0.9)  # of every class; training does without it
    split_seed: int = non_negative(0, at_most=2**63 - 1)  # draws both, whatever `seed` is

    # optimization parameters
    optimizer_name: str = choice("sgd", ("sgd", "lars", "adamw"))
    lr: float = positive(30.0)  # of the classifier
    momentum: float = fraction(0.9)
    nesterov: bool = False
    weight_decay: float = non_negative(0.0)
    max_epochs: int = positive(100)  # for the programs that make the Trainer; the schedule follows the Trainer
    lr_schedule: str = choice("steps", ("steps", "cosine"))  # steps: a tenth from 60 %, again from 80 % of the training
    warmup_epochs: float = non_negative(0.0)
    lars_eta: float = positive(1e-3, at_most=1000)
    exclude_matching_parameters_from_lars: list[str] = field(factory=list)  # and from weight decay, as in ModelParams

    def __attrs_post_init__(self):
        super().__attrs_post_init__()
        refuse(self._contradictions())

    def _contradictions(self) -> list[tuple[bool, str]]:
        """(whether the settings contradict each other, how, and the way out)"""
        p = self
        # fmt: off
        return [
            (p.label_fraction is not None and p.labels_per_class is not None,
             f"label_fraction={p.label_fraction} and labels_per_class={p.labels_per_class} are two ways to say how "
             "many labels are used: set one of them"),
            (p.layer_decay != 1 and p.encoder_lr is None,
             f"layer_decay={p.layer_decay} is for an encoder that is trained: set encoder_lr, or leave it out"),
            (p.layer_decay == 0, "layer_decay=0 would train the encoder's last stage alone: choose more than 0"),
            (p.nesterov and (p.optimizer_name != "sgd" or p.momentum == 0),
             f"nesterov=True is a kind of SGD with momentum: set optimizer_name='sgd' (is {p.optimizer_name!r}) and "
             f"momentum above 0 (is {p.momentum})"),
        ]
        # fmt: on


# ---- the presets: rows of settings. LINEAR_PRESETS["linear_sgd"](dataset_name="cifar10") ----
# fmt: off

# The linear classifier of MoCo (https://arxiv.org/abs/1911.05722, section 4.1). Its rate of 30 is for embeddings like
# MoCo's; set normalize_features=True where it diverges.
LinearMoCoParams = LinearClassifierMethodParams
# SimCLR's (https://arxiv.org/abs/2002.05709, B.6) without Nesterov's momentum, as most libraries have it. MAE's
# (https://arxiv.org/abs/2111.06377, table 10) is this one with normalize_features=True, warmup_epochs=10 and
# optimizer_name="lars", for global_batch_size=16384: with 256 images LARS would hardly move.
LinearSGDParams = partial(
    LinearClassifierMethodParams, lr=0.1, lr_scaling="linear", lr_schedule="cosine", max_epochs=90,
)
# SimCLR's fine-tuning with few labels (B.5): no weight decay, no warm-up. VICReg's (README of its code) differs by
# lr_scaling=None, nesterov=False, max_epochs=20 and the rates: lr=0.08, encoder_lr=0.03 for 1 %, 0.1, 0.01 for 10 %.
SemiSupervised1Params = partial(
    LinearClassifierMethodParams, label_fraction=0.01, drop_last_batch=None, lr=0.05, encoder_lr=0.05,
    lr_scaling="linear", lr_schedule="cosine", nesterov=True, max_epochs=60,
)
SemiSupervised10Params = partial(SemiSupervised1Params, label_fraction=0.1, max_epochs=30)
# MAE's end-to-end fine-tuning (table 9) without its stronger augmentations; layer-wise rates as in BEiT
# (https://arxiv.org/abs/2106.08254), where the encoder's last stage has layer_decay times the classifier's rate.
FineTuneParams = partial(
    LinearClassifierMethodParams, optimizer_name="adamw", lr=1e-3, encoder_lr=0.75e-3, layer_decay=0.75,
    lr_scaling="linear", lr_schedule="cosine", warmup_epochs=5, weight_decay=0.05, max_epochs=100,
    exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
)

LINEAR_PRESETS: dict[str, Callable[..., LinearClassifierMethodParams]] = {
    "linear_moco": LinearMoCoParams, "linear_sgd": LinearSGDParams,
    "semi_supervised_1": SemiSupervised1Params, "semi_supervised_10": SemiSupervised10Params,
    "fine_tune": FineTuneParams,
}
# fmt: on


# ---- the method ----

SCORES = ("loss", "acc1", "acc5")

LINEAR_VIEW = ViewSettings(
    crop_scale=(0.08, 1.0), jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0
)

IMAGE_SETTINGS = (  # settings of how images are read
    "dataset_name",
    "in_channels",
    "transform_crop_size",
    "image_mean",
    "image_std",
    "num_data_workers",
    "pin_data_memory",
    "data_on_device",
    "unreadable_images",
    *(name for name in DATASET_DEFAULTS if name not in TRAINING_ONLY),
)
FROM_PRETRAINING = ("encoder_arch", "embedding_dim", "low_resolution_stem", "stem_variant", *IMAGE_SETTINGS)


class LinearClassifierMethod(BaseMethod):
    """embedding of `model` -> `normalize`, if wanted -> `classifier` -> logits.

    Training images get a random resized crop and, where the data set's images may be mirrored, a flip. They are
    normalized as in pretraining. Without `encoder_lr` the encoder is frozen, with its batch statistics.

    Args:
        params: settings, as LinearClassifierMethodParams or dict.
        encoder: your own module, if the encoder was one.
        fields: single settings that change `params`.
    """

    CLASSIFIER = "classifier"

    def __init__(
        self,
        params: LinearClassifierMethodParams | dict | None = None,
        *,
        encoder: nn.Module | None = None,
        **fields: Any,
    ):
        super().__init__()
        self.params, self.seed_was_drawn = resolve(LinearClassifierMethodParams, params, encoder, fields)
        p = self.params
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(p.seed)
            self.model, width = get_encoder(p, encoder)
            self.normalize = nn.BatchNorm1d(width, eps=1e-6, affine=False) if p.normalize_features else None
            self.classifier = nn.Linear(width, p.n_classes or require_labels(n_classes(p), p))
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)
        self.model.requires_grad_(self.trains_encoder)
        found = {"embedding_dim": width, **self.counted_classes()}
        self.save_hyperparameters({**plain(attrs.asdict(p)), **found, "encoder_weights": None})

        of_data, flips = p.dataset.view, p.transform_flip_probability
        flips = of_data.flip_probability if flips is None else flips
        self.view = attrs.evolve(LINEAR_VIEW, crop_size=p.crop_size, flip_probability=flips)
        if not of_data.flip_probability:  # scans of digits: a small crop would cut off what tells the classes apart
            self.view = attrs.evolve(self.view, crop_scale=of_data.crop_scale)
        self.validation_scores: dict[int, list[tuple[Tensor, Tensor]]] = {}  # and labels
        self.augment = partial(augmentations.augment, views=[self.view], mean=p.mean, std=p.std)

    @classmethod
    def from_moco_checkpoint(
        cls, path: str | Path, encoder: nn.Module | None = None, **overrides: Any
    ) -> "LinearClassifierMethod":
        """The encoder of a checkpoint or of any file or name that `load_encoder` takes, frozen, with a new classifier.

        Args:
            path: the checkpoint.
            encoder: your own module, if the encoder was one.
            overrides: fields of LinearClassifierMethodParams. With another dataset_name, images keep the size and the
                normalization constants of the pretraining.

        Raises:
            ValueError: the checkpoint does not hold exactly the parameters of the encoder; says which differ.
        """
        with layers.modes_kept(encoder) if encoder is not None else nullcontext():
            source = load_encoder(path, encoder=encoder, **{k: v for k, v in overrides.items() if k in SHARED})
        settings = {name: getattr(source.params, name) for name in FROM_PRETRAINING}
        if encoder is None:
            method = cls(LinearClassifierMethodParams(**{**settings, **overrides}))
            method.model.load_state_dict(source.model.state_dict())
        else:
            method = cls(LinearClassifierMethodParams(**{**settings, **overrides}), encoder=encoder)
        rank_zero_info(str(source.report))
        return method

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images [N, C, H, W] or clips [N, C, T, H, W] -> logits [N, classes]. Of several clips of each
        video, [N, K, C, T, H, W], the logarithms of the means of their probabilities, as is usual for videos
        (SlowFast, https://arxiv.org/abs/1812.03982, section 4.1)."""
        if x.dim() == 6:
            each = self(x.flatten(0, 1)).float().log_softmax(1)
            return each.unflatten(0, x.shape[:2]).logsumexp(1) - math.log(x.shape[1])
        with one_image_explained(x):
            with torch.set_grad_enabled(self.trains_encoder and torch.is_grad_enabled()):
                h = embeddings_of(self.model, x)
            return self.classifier(h if self.normalize is None else self.normalize(h))

    @property
    def trains_encoder(self) -> bool:
        return self.params.encoder_lr is not None

    def train(self, mode: bool = True) -> "LinearClassifierMethod":
        """A frozen encoder stays in eval mode: else its batch statistics would drift though its weights do not."""
        super().train(mode)
        self.model.train(mode and self.trains_encoder)
        return self

    needs_labels = True

    @property
    def n_outputs(self) -> int:
        return self.classifier.out_features

    def on_train_start(self) -> None:
        """Lightning takes modules in the mode in which it finds them. Parts of an encoder that are in eval mode stay
        in it; an encoder that is in eval mode as a whole, as `load_encoder` returns it, is trained like any other."""
        super().on_train_start()
        if not self.trains_encoder or not self.model.training:
            self.model.train(self.trains_encoder)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.refuse_callbacks({group["lr"] for group in self.parameter_groups()})

    def training_step(self, batch: tuple[list[Tensor], Tensor], batch_idx: int) -> Tensor:
        views, labels = batch
        means = self.scores((views[0], labels)).mean(0)
        self.log_dict({f"step_train_{name}": value for name, value in zip(SCORES, means.detach(), strict=True)})
        return means[0]

    def on_validation_epoch_start(self) -> None:
        self.validation_scores.clear()  # of one that was interrupted

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        with self.eagerly():
            self.validation_scores.setdefault(dataloader_idx, []).append((self.scores(batch), batch[1]))

    def on_validation_epoch_end(self) -> None:
        self.log_means("valid", self.trainer.val_dataloaders)

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def on_test_epoch_end(self) -> None:
        self.log_means("test", self.trainer.test_dataloaders)

    def log_means(self, prefix: str, loaders: Any) -> None:
        """Means over each whole set, each image once, however many processes there are."""
        for index, (scores, _) in enumerate(self.gathered(self.validation_scores, loaders)):
            suffix = f"_{index}" if index else ""
            means = {f"{prefix}_{name}{suffix}": value for name, value in zip(SCORES, scores.mean(0), strict=True)}
            self.log_dict(means, prog_bar=True, sync_dist=True)

    def predict_step(self, batch: tuple[Tensor, Tensor | None], *_: int) -> Tensor:
        """Logits [N, classes] of a batch's images, in float32 or more; NaN for images that could not be read."""
        with self.eagerly():
            return nan_where_unreadable(at_least_float32(self(batch[0])), batch[1])

    def scores(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Of each image: cross entropy, and 100 where its class is the first, or among the first five: [N, 3]."""
        images, labels = batch
        if labels is None:
            raise ValueError("labels=None: a classifier needs them. Let the loader yield (images, labels)")
        logits = at_least_float32(self(images))
        labels = labels.where(labels != UNREADABLE, 0)  # these are left out in the end
        own = logits.gather(1, labels.unsqueeze(1))
        rank = (~(logits < own)).sum(1) - 1  # 0: the right class alone has the highest logit (never so with NaN)
        accuracies = [100.0 * (rank < k) for k in (1, 5)]
        return torch.stack([F.cross_entropy(logits, labels, reduction="none"), *accuracies], dim=1)

    def configure_optimizers(self) -> dict:
        self.plan = optimizers.get_plan(self.params, self.trainer, self.params.warmup_epochs)
        return for_linear_stage(self.params, self.plan, self.parameter_groups())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, with their names, and their learning rates before `lr_scaling`: the classifier, then
        the stages of an encoder that is trained from the last to the first, each slower than the one before it by
        `layer_decay` (ELECTRA, https://arxiv.org/abs/2003.10555, appendix A; BEiT)."""
        p = self.params
        parts = [("classifier", p.lr, {*self.classifier.parameters()})]
        found = layers.stages(self.model).items() if self.trains_encoder else []
        for depth, (name, stage) in enumerate(reversed(found)):
            parts.append((f"model.{name}", p.encoder_lr * p.layer_decay**depth, {*stage.values()}))
        adapted, excluded = parameter_groups(self, p.exclude_matching_parameters_from_lars)
        return [
            {"name": name, "lr": lr, "params": [*chosen.values()], "param_names": [*chosen], **options}
            for name, lr, part in parts
            for kind, options in ((adapted, {}), (excluded, {"weight_decay": 0.0}))
            if (chosen := {name: parameter for name, parameter in kind.items() if parameter in part})
        ]

    # ---- data ----

    def split(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images of the labeled training set: those to train on, and those to validate on instead of the test set.
        A subset is drawn from what is left: the labels by which settings are chosen come on top of it."""
        p, every = self.params, np.arange(len(labels))
        require_labels(1 + int(labels.min()), p)
        held_out = p.validate_on == "held_out"
        fit, score = subsets.held_out(labels, p.held_out_fraction, p.split_seed) if held_out else (every, every[:0])
        if p.label_fraction is not None or p.labels_per_class is not None:
            number = {"fraction": p.label_fraction, "per_class": p.labels_per_class}
            fit = fit[subsets.stratified(labels[fit], **number, seed=p.split_seed)]
        return fit, score

    def train_dataloader(self):
        p = self.params
        dataset = loading.get_dataset(p, p.dataset.train_splits, [self.view])
        return self.loader(dataset.subset(self.split(dataset.labels)[0]), training=True)

    def val_dataloader(self):
        p = self.params
        if p.validate_on == "test":
            return self.loader(loading.get_dataset(p, p.dataset.test_splits), training=False)
        dataset = loading.get_dataset(p, p.dataset.train_splits)
        return self.loader(dataset.subset(self.split(dataset.labels)[1]), training=False)

    def test_dataloader(self):
        p = self.params
        return self.loader(loading.get_dataset(p, p.dataset.test_splits), training=False)


# ---- learning rates ----


def for_linear_stage(params: LinearClassifierMethodParams, plan: optimizers.Plan, groups: list[dict]) -> dict:
    """The optimizer that `params` names over groups with rates of their own, which fall together: to a tenth at 60 %
    and at 80 % of the training, or along half a cosine to 0."""
    groups = [{**group, "lr": group["lr"] * plan.lr_factor} for group in groups]
    curve = {"cosine": linear_cosine, "steps": linear_steps}[params.lr_schedule]
    optimizer = optimizers.get_optimizer(params, groups, plan.lr, params.nesterov)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    return optimizers.per_step(optimizers.Schedule(optimizer, partial(curve, plan), plan.steps, decays))


def linear_cosine(plan: optimizers.Plan, step: int) -> float:
    """Share of the highest rate."""
    return optimizers.warmup_cosine(step, plan.steps, plan.warmup_steps, peak=1.0, end=0.0)


def linear_steps(plan: optimizers.Plan, step: int) -> float:
    """Share of the highest rate."""
    share = optimizers.steps_down(step / plan.steps, milestones=(0.6, 0.8), factor=0.1)
    return share * optimizers.warmup(step, plan.warmup_steps)
