"""BaseMethod: what Lightning calls on both methods except their own steps: loaders, batches, checkpoints, exports."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import attrs
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.model_helpers import _restricted_classmethod
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.hooks import RemovableHandle

from self_supervised import distributed
from self_supervised.data import data_sets, loading
from self_supervised.data.batches import (
    ResumableDataLoader,
    class_indices,
    first_batches_of_user,
    images_and_labels,
    is_of_dataset_name,
    list_of_loaders,
    size_of_batches,
)
from self_supervised.data.class_labels import lacking
from self_supervised.networks import modules
from self_supervised.numerics import generator
from self_supervised.torch_files import class_names_allowed, data_only
from self_supervised.training import checkpoints, fit_checks, hyperparameters, label_checks, preparation, resuming
from self_supervised.training.monitor import TrainingMonitor, step_metrics_are_read
from self_supervised.training.plan import Plan, plan_of_own_optimizers
from self_supervised.training.trainer_state import batch_hooks_of_user, is_cut_short, validating
from self_supervised.views import augmentations, input_checks

ASSUMED_BATCH_SIZE = 2**16  # of a loader that has none; above any real one
TRAINED_FURTHER = (
    "the weights are already trained: this training starts from them, and epochs, views and schedules start over. To "
    "continue the earlier training instead, pass its checkpoint: fit(model, ckpt_path=...)"
)


class BaseMethod(pl.LightningModule):
    """Base class of SelfSupervisedMethod and LinearClassifierMethod.

    A subclass sets `CLASSIFIER`, `params` and `augment(images, seed, positions=...)`, which returns the list of views
    of a training batch. It may override `needs_labels` and `reads_labels`.
    """

    CLASSIFIER: str  # name of the linear layer that is trained on labels
    needs_labels = False  # also for validation
    plan: Plan | None = None  # length of the training, set with the optimizers
    built_params: Any = None  # settings with which it was built, or to which `change` has set them since
    seed_was_drawn = False  # True if `seed` was None
    step_metrics: dict[str, Tensor] = {}  # the latest ones of this training, logged or not
    latest_scores: tuple[int, dict[str, Any]] = (-1, {})  # optimizer step and scores of the latest validation
    trains_on_dataset_name = False  # False: on the user's loader
    loaded_names: list[str] | None = None  # names of the loaded weights' classes; None: none loaded; []: not known
    was_trained = False  # True: the weights are those of a checkpoint, or of an earlier training
    float32_hooks: Sequence[RemovableHandle] = ()  # of layers that a CPU cannot train in bfloat16
    about_labels = ""  # the text on the labels of our data set, once it was logged
    about_skipped = ""  # why evaluations that need labels are skipped, once it was logged
    first_epoch = 1  # number of the first epoch in the loggers' files; 0: in runs of earlier versions

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fit_checks.refuse_hooks_without_super(cls)

    def setup(self, stage: str) -> None:
        """Refuse what cannot work, and prepare the networks for this machine: in place, so that checkpoints keep their
        keys."""
        if stage == "fit":
            distributed.refuse_sharding(type(self.trainer.strategy).__name__)
            hyperparameters.refuse_replaced(self.params, self.built_params)
            fit_checks.refuse_manual_optimization(self)
            self.plan = self.loaded_names = None  # of an earlier training
        self.of_videos = self.params.dataset.of_videos  # looked up here, not at every step
        self.trains_on_dataset_name = stage != "fit"  # when fitting: as soon as train_dataloader() is called
        self.checked_loaders: set[tuple] = set()  # (for training, index) of loaders whose images were checked
        distributed.end_group_at_exit()
        self.float32_hooks = preparation.prepare(self, stage)

    def teardown(self, stage: str) -> None:
        for hook in self.float32_hooks:
            hook.remove()
        self.float32_hooks = ()

    def configure_callbacks(self) -> list[pl.Callback]:
        fit_checks.refuse_finetuning(self.trainer.callbacks)  # whose own setup looks for parts that a method lacks
        return TrainingMonitor.of(self.trainer, getattr(self.params, "evaluate_every_n_epochs", 1))

    def labels_result(self) -> dict[str, str]:
        """Return the text on the labels as a result; {} for packed data sets, whose classes are known."""
        return {"labels": self.about_labels} if self.about_labels else {}

    @property
    def epoch(self) -> int:
        """Number of the epoch as users count it: 0 before the training, n in the n-th epoch and after it. Lightning's
        `current_epoch` is n - 1 until the end of the n-th epoch."""
        return self.current_epoch + (self.trainer.state.fn == "fit")

    def eagerly(self) -> AbstractContextManager:
        """Return a context for validation without compiled code, which would be compiled again for eval mode and for
        the size of the last batch."""
        return torch.compiler.set_stance("force_eager") if self.params.torch_compile else nullcontext()

    # ---- Settings: as attributes, for Lightning's Tuner, and as hyperparameters ----

    @property
    def lr(self) -> float:
        """Learning rate of the settings. A value that is set is used as it is: `lr_scaling` becomes None. The
        `encoder_lr` of a classifier changes in proportion, and so do start and end of the schedule if they would be
        above `lr`."""
        return self.params.lr

    @lr.setter
    def lr(self, value: float) -> None:
        others = hyperparameters.other_rates(self.params, float(value))
        self.change(lr=float(value), lr_scaling=None, **others)

    @property
    def batch_size(self) -> int:
        """Images per process and batch."""
        return self.params.batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        hyperparameters.refuse_batch_size(self.params, value)
        self.change(batch_size=value)

    def change(self, **fields: Any) -> None:
        """Change settings, and the hyperparameters that a checkpoint keeps."""
        self.params = attrs.evolve(self.params, **fields)
        self.built_params = attrs.evolve(self.params)  # a copy, because users can assign `params`
        self.save_hyperparameters(fields)

    def _set_hparams(self, hp: Any) -> None:
        """Override Lightning's method to keep the record read-only for others, and free of objects. It is changed in
        place, because the Tuner compares the record that it holds with the new value."""
        is_record = isinstance(self.hparams, hyperparameters.HyperparameterRecord)
        self._hparams = self.hparams if is_record else hyperparameters.HyperparameterRecord()
        dict.update(self._hparams, hyperparameters.without_objects(self._to_hparams_dict(hp)))

    def remove_ignored_hparams(self, ignore_list: list[str]) -> None:
        for name in ignore_list:
            dict.pop(self._hparams, name, None)

    def counted_classes(self) -> dict[str, int]:
        """Return {"n_classes": ...} if the classes were counted in files, which may be gone or changed when the
        checkpoint is loaded; otherwise {}."""
        packed = self.params.dataset.is_packed
        return {} if packed or self.n_outputs is None else {"n_classes": self.n_outputs}

    def record_settings(self, **determined: Any) -> None:
        """Keep the settings with which the networks were built, as flat hyperparameters for `load_from_checkpoint`.

        encoder_weights is dropped, because a checkpoint has its own weights.

        Args:
            determined: settings that the files or the networks have determined.
        """
        settings = attrs.asdict(self.params) | determined | self.counted_classes() | {"encoder_weights": None}
        self.save_hyperparameters(settings)
        self.built_params = copy.deepcopy(self.params)  # lists in it can be changed

    @property
    def n_outputs(self) -> int | None:
        """Number of classes of the classifier that is trained here, if there is one."""
        classifier = getattr(self, self.CLASSIFIER)
        return None if classifier is None else classifier.out_features

    # ---- Loaders ----

    def loader(self, dataset: Dataset, training: bool, in_order: bool = False) -> ResumableDataLoader:
        """Return the loader of one of our data sets, after a check of its labels, which are logged once."""
        p = self.params
        if self.n_outputs is not None:
            each = self.needs_labels and not in_order  # in order: only predicted
            source, name = f"dataset_name={p.dataset_name!r}", p.dataset_name
            label_checks.refuse_wrong_labels(dataset.labels, source, self.n_outputs, name, required=True, each=each)
        if (text := getattr(dataset, "about_labels", "")) and text != self.about_labels:
            self.about_labels = text
            rank_zero_info(f"labels: {text}")
        accumulated, device = self.trainer.accumulate_grad_batches, self.trainer.strategy.root_device
        return loading.get_loader(p, dataset, training, accumulated, device, in_order)

    def predict_dataloader(self) -> ResumableDataLoader:
        """Return the loader of the test set, in its order."""
        p = self.params
        return self.loader(data_sets.get_dataset(p, p.dataset.test_splits), training=False, in_order=True)

    def evaluation_loaders(self, splits: list[tuple[str, ...]]) -> list[ResumableDataLoader]:
        """Return evaluation loaders, one per tuple of splits, over all of their images, whatever `data_fraction` is."""
        p = attrs.evolve(self.params, data_fraction=1.0)
        datasets = [data_sets.get_dataset(p, names) for names in splits]
        labels = [dataset.labels for dataset in datasets if p.dataset.is_custom]
        if (lack := lacking(labels)) and lack != self.about_skipped:
            self.about_skipped = lack
            rank_zero_info(f"dataset_name={p.dataset_name!r} has {lack}: linear_probe and knn are skipped")
        return [self.loader(dataset, training=False) for dataset in datasets]

    def loader_of(self, dataloader_idx: int, training: bool) -> Any:
        """Return the loader from which a batch comes: of the test, if one runs, or of training or validation."""
        trainer = self.trainer
        evaluated = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        return list_of_loaders(trainer.train_dataloader if training else evaluated)[dataloader_idx]

    # ---- Start of a training, and batches ----

    def on_fit_start(self) -> None:
        fit_checks.refuse_used_trainer(self.trainer)
        if self.plan is None:  # a subclass has its own configure_optimizers
            self.plan = plan_of_own_optimizers(self.params, self.trainer)
        if not is_of_dataset_name(self.trainer.train_dataloader):
            fit_checks.refuse_subsets(self.params)

    def on_train_start(self) -> None:
        """Check the first batch of the user's validation loaders now, not after an epoch of training. Put a method in
        eval mode into train mode, which Lightning does not do; a subclass does so with its encoder."""
        if not self.training:
            self.train()
            self.model.eval()
        if self.was_trained and self.global_step == 0:
            rank_zero_info(TRAINED_FURTHER)
        self.step_metrics = {}
        if self.global_step == 0 < self.latest_scores[0]:
            self.latest_scores = (-1, {})  # of an earlier training
        if batch_hooks_of_user(self.trainer) - {"on_before_batch_transfer"}:  # the others need the device
            return
        for index, batch in first_batches_of_user(self.trainer.val_dataloaders):
            batch = self.trainer.precision_plugin.convert_input(batch)
            with validating(self.trainer):  # of a LightningDataModule
                batch = self._on_before_batch_transfer(batch, dataloader_idx=index)
            self.check_batch(batch, training=False)
            self.check_first(images_and_labels(batch)[0], False, index)

    def step_seed(self, batch_idx: int) -> tuple[int, int, int]:
        """Return the seed of a batch, which all processes share if they pass the same number."""
        return (self.params.seed, self.current_epoch, batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.params.torch_compile and batch_idx % self.trainer.accumulate_grad_batches == 0:
            # From here on, outputs of the previous step's CUDA graphs may be overwritten.
            torch.compiler.cudagraph_mark_step_begin()
        # The number of this batch among those of all processes, so that each process draws its own numbers.
        seed = self.step_seed(batch_idx * distributed.world_size() + distributed.rank())
        torch.manual_seed(int(generator(seed).integers(2**63)))  # for dropout etc. within encoders

    def _apply_batch_transfer_handler(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        """Leave an example input as it is, for which Lightning passes no device: of exports, of `example_input_array`
        in the summary, and of a logger's graph."""
        if device is None:
            return self.transfer_batch_to_device(batch, self.device, dataloader_idx)
        return super()._apply_batch_transfer_handler(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Any, Tensor | None]:
        """Turn uint8 images into normalized floats on the device: a list of views in training, full images otherwise.

        Float images stay as they are. All get the type of the weights, which is float32 except with precision
        "bf16-true", "16-true" and "64-true".
        """
        images, labels = images_and_labels(batch)
        training = self.trainer.training
        loader = None if self.trainer.predicting else self.loader_of(dataloader_idx, training)
        if loader is not None and not is_of_dataset_name(loader):
            self.check_batch(batch, training)
        labels = class_indices(labels)
        self.check_first(images, training, dataloader_idx)
        if not training:
            return augmentations.for_evaluation(images, self.params).to(self.dtype), labels
        batch_idx = self.trainer.fit_loop.batch_idx + 1  # Lightning counts a batch after its transfer
        n = len(images if isinstance(images, Tensor) else images[0])
        size = size_of_batches(loader) or ASSUMED_BATCH_SIZE  # not n: the last batch may be smaller
        positions = distributed.positions(batch_idx * size, n)
        seed = (self.params.seed, self.current_epoch)
        views = augmentations.for_training(images, self.augment, seed, positions, self.of_videos)
        return [view.to(self.dtype) for view in views], labels

    def reads_labels(self, training: bool) -> bool:
        """Return whether labels are used, of training batches or of those for evaluation."""
        return True

    def check_batch(self, batch: Any, training: bool) -> None:
        """Check the labels of a batch of the user's loader."""
        _, labels = images_and_labels(batch)
        is_first = training and self.trainer.fit_loop.batch_idx < 0
        if self.reads_labels(training) and label_checks.is_checked(labels, is_first):
            name, each, required = self.params.dataset_name, self.needs_labels, training or self.needs_labels
            label_checks.refuse_wrong_labels(labels, "the loader", self.n_outputs, name, required=required, each=each)

    def check_first(self, images: Tensor | list[Tensor], training: bool, dataloader_idx: int) -> None:
        """Check the images of the first batch of each loader, and its classes. More would make the host wait often."""
        if (training, dataloader_idx) in self.checked_loaders:
            return
        self.checked_loaders.add((training, dataloader_idx))
        input_checks.check_batch_images(images, self.params)
        if training and len(images if isinstance(images, Tensor) else images[0]) == 1:
            fit_checks.refuse_one_image(self)
        known = self.hparams.get("class_names") if self.loaded_names is None else self.loaded_names
        if known and not self.trainer.predicting and (self.was_trained or self.trainer.state.fn == "fit"):
            dataset = getattr(self.loader_of(dataloader_idx, training), "dataset", None)
            names = label_checks.names_in(dataset, self.params)
            label_checks.refuse_other_numbers(known, names, "the loader's data set")

    def log_step(self, metrics: dict[str, Tensor]) -> None:
        """Log metrics of a training step if they are read, or new: after the first step, all names are known.

        On a GPU, `log_dict` at every step took a quarter of the host's time.
        """
        metrics = {name: value.detach() for name, value in metrics.items()}
        is_new = not metrics.keys() <= self.step_metrics.keys()
        self.step_metrics = {**self.step_metrics, **metrics}
        if is_new or self._trainer is None or step_metrics_are_read(self._trainer):
            self.log_dict(metrics)

    def log_scores(self, scores: dict[str, Any], **options: Any) -> None:
        """Log scores of a validation with `log_dict`, and add them to `latest_scores`."""
        self.log_dict(scores, **options)
        step, before = self.latest_scores
        self.latest_scores = (self.global_step, {**(before if step == self.global_step else {}), **scores})

    # ---- Checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Add the number of steps. An epoch that was cut short is not done: a resumed run goes on within it.

        Hyperparameters of a LightningDataModule become text if they are objects, which could not be read as data only.
        """
        if (of_data := checkpoint.get(pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY)) is not None:
            checkpoint[pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY] = hyperparameters.as_data(of_data)
        if self.plan is not None:
            checkpoint["steps"] = self.plan.step_sizes()
        if self._trainer is not None and is_cut_short(self.trainer):
            for counter in ("total", "current"):
                epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"][counter]
                epochs["processed"] = min(epochs["processed"], max(0, epochs["started"] - 1))
                epochs["completed"] = min(epochs["completed"], epochs["processed"])

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Name tensors as here, and check that a run can be resumed. Loading a checkpoint otherwise needs no check."""
        modules.rename_as_in(self, checkpoint["state_dict"])
        if self._trainer is None:
            return
        self.loaded_names = checkpoint.get("hyper_parameters", {}).get("class_names") or []
        if self.trainer.state.fn != "fit":
            self.was_trained = True
            return
        resuming.refuse_unresumable(checkpoint, self, self.trainer)
        resuming.convert_position(checkpoint, self.trainer.accumulate_grad_batches)
        hyperparameters.use_earlier_defaults(self, checkpoint)
        if self.seed_was_drawn and "seed" in checkpoint.get("hyper_parameters", {}):
            self.change(seed=checkpoint["hyper_parameters"]["seed"])

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights, and remember that they are not random, unless a Trainer loads them to resume."""
        keys = super().load_state_dict(*args, **kwargs)
        if not any(name.startswith("lagging_") for name in keys.missing_keys):  # otherwise the start is half random
            self.was_trained |= not resuming.loads_itself(self._trainer)
        return keys

    @_restricted_classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Self:
        """Load a method as Lightning does, but read the file as data only.

        The images need not exist any more: the number of classes is that of the file. Paths in the file are used only
        as data/foreign_paths.py allows; pass data_path, splits_path, ... to use others.

        Raises:
            ValueError: the file is corrupt, is not a checkpoint, would run code, or does not fit what is passed.
        """
        content = checkpoints.read_checkpoint(checkpoint_path)
        settings = hyperparameters.overrides_of_checkpoint(content, checkpoint_path, cls, kwargs)
        explained = hyperparameters.explain_size_mismatch(checkpoint_path, cls, kwargs)
        with data_only(str(checkpoint_path)), class_names_allowed(content), explained:
            method = super().load_from_checkpoint(checkpoint_path, *args, **settings)
        method.was_trained = True
        return method

    # ---- Lightning's exports ----

    def to_onnx(self, *args: Any, **kwargs: Any) -> Any:
        """Export `forward`, for normalized images, as Lightning does, in eval mode.

        `self-supervised export` also writes weights files, and verifies what it writes.
        """
        with modules.in_eval_mode(self):
            return super().to_onnx(*args, **kwargs)

    def to_torchscript(self, file_path: Any = None, method: str = "trace", *args: Any, **kwargs: Any) -> Any:
        """Export `forward` as Lightning does, in eval mode, by tracing `example_inputs`; see `to_onnx`."""
        if method != "trace":
            raise ValueError(f"method={method!r} cannot compile every encoder. Use 'trace', and pass example_inputs.")
        with modules.in_eval_mode(self):
            return super().to_torchscript(file_path, method, *args, **kwargs)
