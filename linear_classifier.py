"""LinearClassifierMethod: a linear classifier on an encoder that stays frozen (MoCo's protocol) or is fine-tuned.

From a checkpoint of pretraining it takes `hyper_parameters` and the weights whose names start with `model.`.
"""

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.model_helpers import _restricted_classmethod
from torch import Tensor, nn

from lars import split_by_patterns
from self_supervised import distributed
from self_supervised.catalogue import ViewSettings
from self_supervised.data import data_sets, loading, subsets
from self_supervised.data.batches import check_views, explain_batch_of_one, gathered, numbered
from self_supervised.data.facts import count_classes, require_labels
from self_supervised.data.files import UNREADABLE, nan_where_unreadable
from self_supervised.linear_params import LINEAR_PRESETS

# earlier versions defined these here
from self_supervised.linear_params import FineTuneParams as FineTuneParams
from self_supervised.linear_params import LinearClassifierMethodParams as LinearClassifierMethodParams
from self_supervised.linear_params import LinearMoCoParams as LinearMoCoParams
from self_supervised.linear_params import LinearSGDParams as LinearSGDParams
from self_supervised.linear_params import SemiSupervised1Params as SemiSupervised1Params
from self_supervised.linear_params import SemiSupervised10Params as SemiSupervised10Params
from self_supervised.networks import modules
from self_supervised.networks.encoders import embeddings_of, get_encoder
from self_supervised.networks.frozen_encoder import SHARED_FIELDS
from self_supervised.networks.pretrained import load_encoder
from self_supervised.numerics import at_least_float32, rank_of, seeded
from self_supervised.setting_groups import FROM_PRETRAINING
from self_supervised.training import advice, label_checks, optimizers
from self_supervised.training.base_method import BaseMethod
from self_supervised.training.fit_checks import refuse_callbacks, refuse_last_batch_of_one
from self_supervised.training.hyperparameters import ParamsLike, resolve
from self_supervised.training.parameter_groups import check_matches, layer_groups
from self_supervised.training.plan import get_plan
from self_supervised.training.schedules import classifier_lr_fraction
from self_supervised.views import augmentations

SCORES = ("loss", "acc1", "acc5")

LINEAR_VIEW = ViewSettings(
    crop_scale=(0.08, 1.0), jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0
)


class LinearClassifierMethod(BaseMethod):
    """Linear classifier on the embeddings of an encoder.

        image -> model -> normalize (optional) -> classifier -> logits

    Training images get a random resized crop and, if the data set's images may be mirrored, a random flip. They are
    normalized as in pretraining. Without `encoder_lr` the encoder is frozen, including its batch statistics.

    Args:
        params: settings, as LinearClassifierMethodParams or dict, or a preset or its name: "linear_sgd".
        encoder: your own module, if pretraining used one.
        fields: single settings that override those of `params`.
    """

    CLASSIFIER = "classifier"
    needs_labels = True

    def __init__(
        self,
        params: ParamsLike[LinearClassifierMethodParams] = None,
        *,
        encoder: nn.Module | None = None,
        **fields: Any,
    ):
        super().__init__()
        self.params, self.seed_was_drawn = resolve(LINEAR_PRESETS, params, encoder, fields)
        p = self.params
        with seeded(p.seed):
            self.model, width = get_encoder(p, encoder)
            self.normalize = nn.BatchNorm1d(width, eps=1e-6, affine=False) if p.normalize_features else None
            names = p.class_names
            n = p.n_classes or len(names or ())
            n, names = (n, names) if n else count_classes(p)
            self.classifier = nn.Linear(width, require_labels(n, p))
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)
        if not self.trains_encoder or not modules.requires_gradient(self.model):
            self.model.requires_grad_(self.trains_encoder)  # otherwise, parts that the user froze stay frozen
        self.record_settings(embedding_dim=width, class_names=names)

        of_data = p.dataset.view
        flips = of_data.flip_probability if p.transform_flip_probability is None else p.transform_flip_probability
        self.view = attrs.evolve(LINEAR_VIEW, crop_size=p.crop_size, flip_probability=flips)
        if not of_data.flip_probability:  # digits: a small crop would cut off what distinguishes the classes
            self.view = attrs.evolve(self.view, crop_scale=of_data.crop_scale)
        self.validation_scores: dict[int, list[tuple[Tensor, Tensor]]] = {}  # loader -> (scores, labels) of each batch
        self.augment = partial(augmentations.augment, views=[self.view], mean=p.mean, std=p.std)

    @_restricted_classmethod
    def from_moco_checkpoint(
        cls, path: str | Path, encoder: nn.Module | None = None, preset: str = "linear_moco", **overrides: Any
    ) -> "LinearClassifierMethod":
        """Return a new classifier on the encoder of a checkpoint.

        Args:
            path: checkpoint, or any other file or name that `load_encoder` accepts.
            encoder: your own module, if pretraining used one.
            preset: name in LINEAR_PRESETS.
            overrides: fields of LinearClassifierMethodParams. With another dataset_name, images keep the size and the
                normalization constants of pretraining.

        Raises:
            ValueError: the tensors of the checkpoint are not exactly those of the encoder. The message lists them.
        """
        if isinstance(encoder, str):
            raise ValueError(f"encoder={encoder!r} is not a module. Is it a preset? Pass preset={encoder!r}.")
        for name in {"params", "hparams"} & overrides.keys():
            raise ValueError(f"{name}: preset has the settings. Pass preset='linear_sgd', or fields such as lr=1.0.")
        with modules.modes_kept(encoder) if isinstance(encoder, nn.Module) else nullcontext():  # load_encoder freezes
            source = load_encoder(path, encoder=encoder, **{k: v for k, v in overrides.items() if k in SHARED_FIELDS})
        settings = {name: getattr(source.params, name) for name in FROM_PRETRAINING}
        method = cls(preset, encoder=encoder, **{**settings, **overrides})
        if encoder is None:
            method.model.load_state_dict(source.model.state_dict())
        rank_zero_info(str(source.report))
        return method

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, classes] of normalized images [N, C, H, W] or clips [N, C, T, H, W].

        For multiple clips per video, [N, clips, C, T, H, W], return the logarithm of their mean probabilities, as is
        usual for videos (SlowFast, https://arxiv.org/abs/1812.03982, section 4.1).
        """
        if x.dim() == 6:
            each = self(x.flatten(0, 1)).float().log_softmax(1)
            return each.unflatten(0, x.shape[:2]).logsumexp(1) - math.log(x.shape[1])
        if self.model.training and not self.trains_encoder:  # Lightning has not called train() yet
            self.model.eval()
        with explain_batch_of_one(x):
            with torch.set_grad_enabled(self.trains_encoder and torch.is_grad_enabled()):
                h = embeddings_of(self.model, x)
            return self.classifier(h if self.normalize is None else self.normalize(h))

    @property
    def trains_encoder(self) -> bool:
        return self.params.encoder_lr is not None

    def train(self, mode: bool = True) -> "LinearClassifierMethod":
        """Set the mode, except that a frozen encoder stays in eval mode, so that its batch statistics do not drift."""
        super().train(mode)
        self.model.train(mode and self.trains_encoder)
        return self

    def on_fit_start(self) -> None:
        """Take the names of classes from the data set of a user's loader, not from `dataset_name`."""
        super().on_fit_start()
        if not self.trains_on_dataset_name and self.params.class_names is None:
            name_of_class = label_checks.names_in(getattr(self.trainer.train_dataloader, "dataset", None), self.params)
            names = [*name_of_class.values()] if len(name_of_class) == self.n_outputs else None
            self.save_hyperparameters({"class_names": names, "n_classes": self.n_outputs})

    def on_train_start(self) -> None:
        """Put an encoder that is trained, and in eval mode as a whole, into train mode, which Lightning does not do."""
        super().on_train_start()
        if self.trains_encoder:
            modules.set_modes(self.model)
        else:
            self.model.eval()
        refuse_last_batch_of_one(self)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            refuse_callbacks(self.trainer.callbacks, {group["lr"] for group in self.parameter_groups()})
            for line in advice.doubts_of_classifier(self.params, modules.requires_gradient(self.model)):
                rank_zero_info(f"warning: {line}")

    def training_step(self, batch: tuple[list[Tensor], Tensor], batch_idx: int) -> Tensor:
        views, labels = batch
        check_views(views, 1)
        means = self.losses_and_accuracies((views[0], labels)).mean(0)
        self.log_step({f"step_train_{name}": value for name, value in zip(SCORES, means.detach(), strict=True)})
        return means[0]

    def on_validation_epoch_start(self) -> None:
        self.validation_scores.clear()  # left by an interrupted validation
        distributed.share_buffers(self.model, self.normalize)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        with self.eagerly():
            self.validation_scores.setdefault(dataloader_idx, []).append((self.losses_and_accuracies(batch), batch[1]))

    def on_validation_epoch_end(self) -> None:
        self.log_means("valid", self.trainer.val_dataloaders)

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def on_test_epoch_end(self) -> None:
        self.log_means("test", self.trainer.test_dataloaders)

    def log_means(self, prefix: str, loaders: Any) -> None:
        """Log the mean scores of each loader over all processes, with each image counted once."""
        for index, (scores, _) in enumerate(gathered(self.validation_scores, loaders)):
            means = {f"{prefix}_{name}": value for name, value in zip(SCORES, scores.mean(0), strict=True)}
            self.log_scores(numbered(means, index), prog_bar=True, sync_dist=True)

    def predict_step(self, batch: tuple[Tensor, Tensor | None], *_: int) -> Tensor:
        """Return the logits [N, classes] of a batch in at least float32, NaN for images that could not be read.

        `softmax(1)` makes them probabilities; `hparams.class_names` names the classes, if their names are known.
        """
        with self.eagerly():
            return nan_where_unreadable(at_least_float32(self(batch[0])), batch[1])

    def losses_and_accuracies(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return loss, acc1 and acc5 of each image, [N, 3]. The accuracies are 0 or 100 (percent)."""
        images, labels = batch
        if labels is None:
            raise ValueError("labels=None: a classifier needs labels. Let the loader yield (images, labels).")
        logits = at_least_float32(self(images))
        labels = labels.where(labels != UNREADABLE, 0)  # scores of unreadable images are left out later
        rank = rank_of(labels, logits)
        accuracies = [100.0 * (rank < k) for k in (1, 5)]
        return torch.stack([F.cross_entropy(logits, labels, reduction="none"), *accuracies], dim=1)

    def configure_optimizers(self) -> dict:
        self.plan = get_plan(self.params, self.trainer, self.params.warmup_epochs)
        fraction = partial(classifier_lr_fraction, self.params.lr_schedule, self.plan)
        return optimizers.with_schedule(self.params, self.plan, self.parameter_groups(), fraction)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups, with learning rates before `lr_scaling`.

        The classifier comes first. If the encoder is trained, its stages follow from the last to the first. The
        learning rate of each is `layer_decay` times that of the group before (ELECTRA,
        https://arxiv.org/abs/2003.10555, appendix A; BEiT).
        """
        p = self.params
        parts = [("classifier", p.lr, {*self.classifier.parameters()})]
        stages = layer_groups(self.model).items() if self.trains_encoder else []
        for depth, (name, group) in enumerate(reversed(stages)):
            parts.append((f"model.{name}", p.encoder_lr * p.layer_decay**depth, {*group.values()}))
        check_matches(p, [name for name, _ in self.named_parameters()])
        adapted, excluded = split_by_patterns(self, p.exclude_matching_parameters_from_lars)
        kinds = ((adapted, "", {"adapt": True}), (excluded, "/no_decay", {"adapt": False, "weight_decay": 0.0}))
        return [
            {"name": name + which, "lr": lr, "params": [*chosen.values()], "param_names": [*chosen], **options}
            for name, lr, part in parts
            for kind, which, options in kinds
            if (chosen := {name: parameter for name, parameter in kind.items() if parameter in part})
        ]

    # ---- Data ----

    def split(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of images to train on, and of those to validate on in place of the test set.

        A subset of labels is drawn from the images that remain after holding out, so its size excludes the latter.
        """
        p = self.params
        require_labels(1 + int(labels.max()), p)  # 0: no image has a label
        source, name = f"dataset_name={p.dataset_name!r}", p.dataset_name
        label_checks.refuse_wrong_labels(labels, source, self.n_outputs, name, required=True, each=True)
        fit = np.arange(len(labels))
        score = fit[:0]
        if p.validate_on == "held_out":
            fit, score = subsets.held_out(labels, p.held_out_fraction, p.split_seed)
        if p.label_fraction is not None or p.labels_per_class is not None:
            number = {"fraction": p.label_fraction, "per_class": p.labels_per_class}
            fit = fit[subsets.stratified(labels[fit], **number, seed=p.split_seed)]
        return fit, score

    def train_dataloader(self):
        self.trains_on_dataset_name = True
        p = self.params
        dataset = data_sets.get_dataset(p, p.dataset.train_splits, [self.view])
        return self.loader(dataset.subset(self.split(dataset.labels)[0]), training=True)

    def val_dataloader(self):
        """Return the loader of the images to validate on; none while the user's own loader is fitted."""
        p = self.params
        if not self.trains_on_dataset_name:
            return loading.no_loaders()
        if p.validate_on == "test":
            return self.loader(data_sets.get_dataset(p, p.dataset.test_splits), training=False)
        dataset = data_sets.get_dataset(p, p.dataset.train_splits)
        return self.loader(dataset.subset(self.split(dataset.labels)[1]), training=False)

    def test_dataloader(self):
        p = self.params
        return self.loader(data_sets.get_dataset(p, p.dataset.test_splits), training=False)
