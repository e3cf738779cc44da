"""SelfSupervisedMethod: one LightningModule for all joint-embedding methods.

Sizes: N images on this process, C channels, E width of the embeddings, D = params.dim, K keys in the queue.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import attrs
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model_params import ALL_VIEW_LOSSES, LABEL_LOSSES, PRESETS, PROTOTYPE_LOSSES, ModelParams
from self_supervised import distributed, losses, multi_view_losses, numerics
from self_supervised.convolutions import weights_shared
from self_supervised.custom_loss import CustomLoss, as_pair_loss
from self_supervised.data import batches, data_sets, loading
from self_supervised.data.batches import check_views, gathered, is_of_dataset_name, list_of_loaders
from self_supervised.data.files import nan_where_unreadable
from self_supervised.evaluation import validation
from self_supervised.networks import encoders, modules, output_sizes
from self_supervised.networks.heads import MLP
from self_supervised.networks.keys import KeyQueue, Prototypes, ema_update, frozen_copy, nearest_keys, restore_queue
from self_supervised.networks.teacher import Teacher
from self_supervised.numerics import Scores, as_tensors, at_least_float32, in_parts, mean_of_each, stacked
from self_supervised.training import advice, fit_checks, online_classifier, optimizers, parameter_groups, resuming
from self_supervised.training.base_method import BaseMethod
from self_supervised.training.hyperparameters import ParamsLike, resolve
from self_supervised.training.micro_batches import MicroBatches, backward_of_parts, prepare_strategy
from self_supervised.training.plan import get_plan, resolved_warmup_epochs
from self_supervised.training.precision import refuse_half_precision
from self_supervised.training.record import callbacks_of_record
from self_supervised.training.schedules import cosine, prototypes_are_frozen, scheduled
from self_supervised.training.verdict import name_of_start
from self_supervised.views import augmentations


class EncodedView(NamedTuple):
    z: Tensor  # projections [N, D]
    q: Tensor  # queries [N, D], which the loss compares with keys: the predictor's output, or z without a predictor
    embeddings: Tensor  # [N, E]


class SelfSupervisedMethod(BaseMethod):
    """LightningModule that trains MoCo, BYOL, SimCLR, VICReg and all other presets, as `params` says.

        view i -> model -> projection_model -> z -> prediction_model -> q      query: trained by gradients
        view j -> lagging_model -> lagging_projection_model -> k               key: moving average of the weights above

    The loss compares q and k for every (i, j) in `params.pairs`. Without a lagging model, k is z of view j.

    Args:
        params: settings, as ModelParams or dict, or a preset or its name: "simclr". The default is MoCo v2.
        encoder: your own module, [N, C, H, W] -> [N, E], in place of `params.encoder_arch`.
        loss: your own loss(q, k, queue), in place of that of `params.loss_type` (see `custom_loss.as_pair_loss`).
            Checkpoints do not store it: pass it to `load_from_checkpoint`, too.
        fields: single settings that override those of `params`.
    """

    CLASSIFIER = "online_classifier"
    is_recorded = True  # False: the program that trains writes settings and scores itself
    new_keys: Sequence[Tensor] = ()  # keys of each key view; set by training_step, pushed by on_after_backward
    micro_batches: MicroBatches | None = None  # set by encode_each, used up by backward
    lost_loss = False  # True: the weights are those of a checkpoint that was trained with a `custom_loss`

    def __init__(
        self,
        params: ParamsLike[ModelParams] = None,
        *,
        encoder: nn.Module | None = None,
        loss: CustomLoss | None = None,
        **fields: Any,
    ):
        super().__init__()
        self.params, self.seed_was_drawn = resolve(PRESETS, params, encoder, fields)
        p = self.params
        with numerics.seeded(p.seed):
            self.model, width = encoders.get_encoder(p, encoder)
            modules.set_modes(self.model)
            output_sizes.check_small_views(self.model, width, p)
            self.teacher = Teacher(p) if p.teacher else None  # not a module: checkpoints do not store it
            if self.teacher is not None:
                self.params = p = attrs.evolve(p, dim=self.teacher.width, teacher=self.teacher.name)
            self.projection_model = MLP(width, output_dim=p.dim, **p.head("projection"))
            self.prediction_model = MLP(p.dim, output_dim=p.dim, **p.head("prediction"))
            self.prototypes = Prototypes(p) if p.loss_type in PROTOTYPE_LOSSES else None
            trial_shape = None if encoder is None else p.input_shape
            self.lagging_model = frozen_copy(self.model, trial_shape) if p.use_lagging_model else None
            self.lagging_projection_model = frozen_copy(self.projection_model) if p.use_lagging_model else None
            self.lagging_prototypes = frozen_copy(self.prototypes) if self.prototypes and p.use_lagging_model else None
            self.queue = KeyQueue(p.K, p.dim) if p.has_queue else None
            self.online_classifier = online_classifier.build(width, p) if p.online_classifier else None
            if (p.global_batch_size or p.batch_size) == 1:  # fail early
                fit_checks.try_one_image(self)
        self.trained_at_start = {name for name, weight in self.named_parameters() if weight.requires_grad}
        fit_checks.check_patterns(self)
        # All processes push the same keys, so DDP need not send 4 K D bytes in every forward pass.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, ["queue.keys", "queue.position"])
        self.record_settings(embedding_dim=width)
        self.custom_loss = None if loss is None else as_pair_loss(loss)
        self.augment = augmentations.training_views(p)
        self.started_from, self.hash_of_start = encoders.source_of_weights(p)
        self.validation_outputs: dict[int, list[tuple[Tensor, Tensor | None]]] = {}

    def configure_callbacks(self) -> list[pl.Callback]:
        return super().configure_callbacks() + (callbacks_of_record(self.trainer) if self.is_recorded else [])

    # ---- Method ----

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings [N, E] of normalized images [N, C, H, W]."""
        return self.model(x)

    def encode(self, x: Tensor) -> EncodedView:
        """Return projections, queries and embeddings of one view, normalized images [N, C, H, W]."""
        with batches.explain_batch_of_one(x):
            embeddings = self.model(x)
            z = self.projection_model(embeddings)
            return EncodedView(self.on_sphere(z), self.on_sphere(self.prediction_model(z)), embeddings)

    @torch.no_grad()
    def encode_lagging(self, x: Tensor, batch_idx: int) -> Tensor:
        """Return the keys [N, D] of one view, without gradient."""

        def encode_key(x: Tensor) -> Tensor:
            return self.on_sphere(self.lagging_projection_model(self.lagging_model(x)))

        if self.params.shuffle_batch_norm:
            return distributed.shuffled(encode_key, x, self.step_seed(batch_idx), self.params.n_virtual_devices)
        return encode_key(x)

    def on_sphere(self, z: Tensor) -> Tensor:
        """Return vectors in at least float32, scaled to unit length if `use_unit_sphere_projection` is set."""
        z = at_least_float32(z)
        return F.normalize(z, dim=1) if self.params.use_unit_sphere_projection else z

    def encode_views(self, views: list[Tensor], batch_idx: int) -> tuple[dict[int, EncodedView], dict[int, Tensor]]:
        """Return the encoded views {i: ...} of the queries, and the keys {j: [N, D]}. Each view is encoded once."""
        p = self.params
        query_views, key_views = map(set, zip(*p.pairs, strict=True))
        if self.teacher is not None:  # first, while no activations of the encoder are kept
            keys = {j: self.on_sphere(self.teacher(views[j])) for j in key_views}
            return self.encode_each(views, query_views), keys
        if self.lagging_model is not None:
            encoded = self.encode_each(views, query_views)
            parts = {j: in_parts(views[j], p.micro_batch_size) for j in key_views}
            return encoded, {j: torch.cat([self.encode_lagging(x, batch_idx) for x in parts[j]]) for j in key_views}
        encoded = self.encode_each(views, query_views | key_views)
        return encoded, {j: encoded[j].z.detach() if p.stop_gradient_of_keys else encoded[j].z for j in key_views}

    def encode_each(self, views: list[Tensor], which: set[int]) -> dict[int, EncodedView]:
        """Return {view i: encode(view i)}. With `micro_batch_size`, set `micro_batches` and return leaves: `backward`
        passes their gradients on to the networks, one part after the other."""
        if (size := self.params.micro_batch_size) is None:
            return {i: self.encode(views[i]) for i in which}
        networks = (self.model, self.projection_model, self.prediction_model)
        chosen = {i: views[i] for i in which}
        self.micro_batches = MicroBatches(networks, self.encode, chosen, size, torch.initial_seed())
        return {i: EncodedView(*outputs) for i, outputs in self.micro_batches.outputs.items()}

    def training_step(self, batch: tuple[list[Tensor], Tensor | None], batch_idx: int) -> Tensor:
        p = self.params
        views, labels = batch
        check_views(views, p.n_views)
        for prototypes in filter(None, (self.prototypes, self.lagging_prototypes)):
            prototypes.begin_step(self.global_step / self.plan.steps_per_epoch)
        # Activation checkpointing encodes again in the backward pass, outside of the context.
        sharing = () if p.activation_checkpointing else (self.model, self.lagging_model)
        with weights_shared(*sharing):
            encoded, keys = self.encode_views(views, batch_idx)
        with torch.autocast(self.device.type, enabled=False):
            scalars = self.compare(encoded, keys, labels, batch_idx)
        loss = scalars.pop("loss") * p.loss_factor
        if self.queue is not None:
            new_keys = [keys[j].detach() for j in sorted(keys)]  # gathered by view, in the order of a single process
            self.new_keys = [k if p.gather_keys_for_queue is False else distributed.gather(k) for k in new_keys]
        constants = as_tensors({"m": self.momentum(), "T": p.T}, like=loss)
        self.log_step({"step_train_loss": loss.detach(), **constants, **scalars})
        return (loss + self.online_loss(encoded[0].embeddings, labels)) if p.online_classifier else loss

    def compare(
        self, encoded: dict[int, EncodedView], keys: dict[int, Tensor], labels: Tensor | None, batch_idx: int
    ) -> losses.Scalars:
        """Return the loss of the views that `encode_views` has encoded, and scalars to log, both means over pairs."""
        p = self.params
        scheduled_values = scheduled(p, self.global_step, self.plan)
        queue = None if self.queue is None else at_least_float32(self.queue.keys)
        queries = {i: view.q if self.prototypes is None else self.prototypes(view.q) for i, view in encoded.items()}
        targets = self.targets(keys, queue, scheduled_values.get("sce_target_T", p.sce_target_T))
        if self.custom_loss is None and p.loss_type in ALL_VIEW_LOSSES:
            loss_of_views = multi_view_losses.get_loss_of_views(p, self.step_seed(batch_idx))
            scalars = loss_of_views(stacked(queries), stacked(targets))
        else:
            loss_of = self.custom_loss or losses.get_loss_in_parts(p, **scheduled_values, labels=labels)
            scalars = mean_of_each([loss_of(queries[i], targets[j], queue) for i, j in p.pairs])
        cosines = mean_of_each([losses.cosines(encoded[i].z, keys[j]) for i, j in p.pairs])
        return {**cosines, **scalars, **as_tensors(scheduled_values, like=queries[0])}

    def targets(self, keys: dict[int, Tensor], queue: Tensor | None, target_T: float) -> dict[int, Tensor]:
        """Return what queries are compared with: scores of prototypes, nearest keys of the queue, or the keys."""
        if self.prototypes is not None:
            prototypes = self.prototypes if self.lagging_prototypes is None else self.lagging_prototypes
            return prototypes.targets(keys, queue, target_T)
        return {j: nearest_keys(k, queue) for j, k in keys.items()} if self.params.use_nearest_keys else keys

    def online_loss(self, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        """Return the online classifier's loss. No gradient reaches the encoder, which never sees labels."""
        with torch.autocast(self.device.type, enabled=False):
            loss, accuracy = online_classifier.loss_and_accuracy(self.online_classifier, embeddings, labels)
        self.log_step({"online_train_loss": loss.detach(), "online_train_acc1": accuracy})
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)
        if self.params.micro_batch_size is not None:
            backward_of_parts(self)

    def on_after_backward(self) -> None:
        if self.prototypes is not None and prototypes_are_frozen(self.params, self.global_step, self.plan):
            self.prototypes.weight.grad = None
        if self.queue is not None:  # not earlier: backward() still reads the keys that push() overwrites
            self.queue.push_views(self.new_keys)

    def momentum(self) -> float:
        """Return the fraction of itself that the lagging model keeps at this optimizer step."""
        if not self.params.use_momentum_schedule:
            return self.params.m
        return cosine(self.params.m, 1.0, self.global_step / self.plan.steps)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        m = self.momentum()
        super().optimizer_step(*args, **kwargs)
        for lagging, online in self.lagging_pairs():  # once per optimizer step, also with accumulated batches
            ema_update(lagging, online, 1 - m)

    def lagging_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (lagging, online) of each network of the lagging model; [] if there is none."""
        pairs = [
            (self.lagging_model, self.model),
            (self.lagging_projection_model, self.projection_model),
            (self.lagging_prototypes, self.prototypes),
        ]
        return [(lagging, online) for lagging, online in pairs if lagging is not None]

    def configure_optimizers(self) -> dict:
        self.plan = get_plan(self.params, self.trainer, resolved_warmup_epochs(self.params))
        groups = parameter_groups.optimizer_groups(self.parameter_table(), dict(self.named_parameters()), self.params)
        return optimizers.for_pretraining(self.params, self.plan, groups)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        if self.online_classifier is None:
            return super().configure_gradient_clipping(optimizer, *args, **kwargs)
        with online_classifier.hide_gradients(self.online_classifier):
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def parameter_table(self) -> list[parameter_groups.ParameterRow]:
        """Return a row of optimizer settings for each trainable parameter (`parameter_groups.printed` formats it)."""
        return parameter_groups.parameter_table(self, self.params)

    # ---- Start of a training, and data ----

    def on_train_start(self) -> None:
        super().on_train_start()
        now = {modules.plain_name(row.name) for row in self.parameter_table()}
        was_trainable = any(name.startswith("model.") for name in self.trained_at_start)
        modules.set_modes(self.model, says_if_frozen=was_trainable)  # otherwise it was said at construction
        if self.lagging_model is not None:
            modules.copy_modes(self.model, self.lagging_model)
        if self.params.micro_batch_size is not None:
            prepare_strategy(self.trainer)
        fit_checks.refuse_last_batch_of_one(self)
        for line in [*advice.frozen_since(self.trained_at_start, now), *fit_checks.doubts_at_start(self)]:
            rank_zero_info(f"warning: {line}")

    def reads_labels(self, training: bool) -> bool:
        p = self.params
        needed = p.loss_type in LABEL_LOSSES if training else validation.need_labels(p.evaluations)
        return needed or self.online_classifier is not None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            fit_checks.refuse_constant_heads(self.params)
            fit_checks.refuse_callbacks(self.trainer.callbacks, {row.lr for row in self.parameter_table()})
            if self.lagging_model is not None:
                refuse_half_precision(self.trainer.precision, self.params.m)

    def train_dataloader(self):
        self.trains_on_dataset_name = True
        p = self.params
        return self.loader(data_sets.get_dataset(p, p.dataset.pretraining_splits, p.views), training=True)

    def val_dataloader(self) -> list:
        """Return loaders of the validation set and, with `probe_on_training_set`, of the labeled training set.

        There are none while the user's own loader is fitted, whose images may be unrelated to `dataset_name`.
        """
        p = self.params
        if not (self.trains_on_dataset_name and p.is_evaluated):
            return loading.no_loaders()
        splits = [p.dataset.scored_splits]
        if p.probe_on_training_set:
            splits.append(p.dataset.train_splits)
        return self.evaluation_loaders(splits)

    def test_dataloader(self) -> list:
        """Return loaders of the test set and of the labeled training set, on which the probes are fitted."""
        return self.evaluation_loaders([self.params.dataset.test_splits, self.params.dataset.train_splits])

    # ---- Evaluation ----

    def starting_point(self) -> str:
        """Return the name of the encoder from which a training starts now."""
        return "starting encoder" if self.was_trained else name_of_start(self.params, self.started_from)

    def on_validation_epoch_start(self) -> None:
        self.validation_outputs.clear()  # left by an interrupted validation
        distributed.share_buffers(self.model)

    def validation_step(self, batch: tuple[Tensor, Tensor | None], batch_idx: int, dataloader_idx: int = 0) -> None:
        due = self.trainer.state.fn != "fit" or (self.current_epoch + 1) % self.params.evaluate_every_n_epochs == 0
        if due and self.params.is_evaluated and not self.trainer.sanity_checking:
            self.keep_embeddings(batch, dataloader_idx)

    def keep_embeddings(self, batch: tuple[Tensor, Tensor | None], dataloader_idx: int) -> None:
        """Keep embeddings and labels of a batch for `scores_of_loaders`."""
        with self.eagerly():
            features = encoders.embeddings_of(self.model, batch[0], self.params.micro_batch_size).float()
        self.validation_outputs.setdefault(dataloader_idx, []).append((features, batch[1]))

    def scores_of_loaders(self) -> list[Scores]:
        """Return the scores of each loader, of the embeddings that were kept since the last call.

        Probes are fitted to the last loader if it has the training set, otherwise to half of the scored images.
        """
        testing = self.trainer.testing
        loaders = list_of_loaders(self.trainer.test_dataloaders if testing else self.trainer.val_dataloaders)
        sets = gathered(self.validation_outputs, loaders)
        has_train = (testing or self.params.probe_on_training_set) and all(map(is_of_dataset_name, loaders))
        train = tuple(sets.pop()) if has_train and len(sets) > 1 else None
        scores = [self.scores(x, y, train) for x, y in sets]
        return [batches.numbered(of_loader, index) for index, of_loader in enumerate(scores)]

    def on_validation_epoch_end(self) -> None:
        for scores in self.scores_of_loaders():
            self.log_scores(scores)
            if scores:
                of = "scores" if self.was_trained and self.epoch == 0 else f"epoch {self.epoch}"  # of earlier training
                self.print(f"{of}:", ", ".join(f"{k} {value:.4g}" for k, value in scores.items()))

    def predict_step(self, batch: tuple[Tensor, Tensor | None], *_: int) -> Tensor:
        """Return the embeddings [N, E] of a batch in at least float32, NaN for images that could not be read."""
        with self.eagerly():
            x = encoders.embeddings_of(self.model, batch[0], self.params.micro_batch_size)
            return nan_where_unreadable(at_least_float32(x), batch[1])

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def on_test_epoch_end(self) -> None:
        """Log the scores under names that start with "test_"."""
        for scores in self.scores_of_loaders():
            self.log_dict({validation.test_name(name): value for name, value in scores.items()})

    def scores(self, x: Tensor, y: Tensor | None, train: tuple[Tensor, Tensor] | None) -> Scores:
        """Return the scores of embeddings x [N, E] with labels y, and those of the online classifier."""
        p = self.params
        scores = distributed.on_rank_zero(lambda: validation.scores_or_nan(p.evaluations, x, y, train, p.probe_solver))
        return scores | online_classifier.accuracies(self.online_classifier, x, validation.one_label_each(y))

    # ---- Checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Add the origin of the starting weights and, if processes have their own queues, all queues."""
        super().on_save_checkpoint(checkpoint)
        checkpoint |= {"started_from": self.started_from, "started_from_hash": self.hash_of_start}
        checkpoint["has_custom_loss"] = self.custom_loss is not None
        if self.teacher is not None:
            checkpoint["teacher"] = self.teacher.hash
        if self.queue is not None and self.params.gather_keys_for_queue is False:
            device = self.trainer.strategy.root_device  # after a training, Lightning has moved the method to the CPU
            checkpoint["queues"] = self.queue.states_of_processes(device)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Restore the origin of the starting weights and the queue of this process, and check the teacher."""
        self.started_from, self.hash_of_start = resuming.origin_of(checkpoint, given=self.started_from)
        self.lost_loss = checkpoint.get("has_custom_loss", False)
        if self.teacher is not None:
            self.teacher.refuse_another(checkpoint.get("teacher"))
        restore_queue(checkpoint, same_number=self._trainer is not None and self.trainer.state.fn == "fit")
        super().on_load_checkpoint(checkpoint)
