"""What pretraining and the linear stage have in common with Lightning: data, seeds, compilation, checkpoints."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, Self

import attrs
import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.data import AttributeDict
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from self_supervised import catalogue, distributed
from self_supervised.data import loading
from self_supervised.data.class_labels import in_classes
from self_supervised.data.files import readable_rows
from self_supervised.data.foreign_paths import vetted
from self_supervised.data.loader import ResumableDataLoader, images_and_labels, whole_numbers
from self_supervised.distributed import keep_freed_memory
from self_supervised.networks import layers
from self_supervised.safe_files import class_names_allowed, data_only
from self_supervised.training import checkpoints, optimizers
from self_supervised.training.monitor import TrainingMonitor
from self_supervised.views import augmentations


class Settings(AttributeDict):
    """The record of a method's settings (`hparams`): a change would have no effect, and is refused."""

    def refuse(self, *names: Any, **fields: Any) -> NoReturn:
        named = ", ".join(map(str, [*names, *fields]))
        raise ValueError(
            f"hparams cannot be changed ({named}): they record the settings with which the method was built. Build it "
            "with others: SelfSupervisedMethod(params, lr=0.3), load_from_checkpoint(path, lr=0.3)"
        )

    update = setdefault = __ior__ = refuse

    def __setitem__(self, name: str, value: Any) -> None:
        """Refuse, unless it says the same: Lightning's Tuner sets `method.lr`, and then the record."""
        if name not in self or self[name] != value:
            self.refuse(name, value)

    __setattr__ = __setitem__

    def __reduce__(self) -> tuple:
        """For copies and for other processes, which would set item after item."""
        return type(self), (dict(self),)


class BaseMethod(pl.LightningModule):
    """A method with `params` and with `augment(images, seed)`, which makes the views of a training batch."""

    CLASSIFIER: str  # name of its linear layer
    plan: optimizers.Plan | None = None  # the training's length, once there is a Trainer
    seed_was_drawn = False  # since `seed` was None

    def setup(self, stage: str) -> None:
        """Compiles in place, so that parameters keep their names: checkpoints do not tell that a run was compiled."""
        self.checked_loaders: set[tuple] = set()  # (stage, number) of those whose float images were checked
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        compiled = self.params.torch_compile
        for module in self.children() if compiled and stage == "fit" else []:
            if isinstance(module, nn.Module) and module._compiled_call_impl is None:
                module.compile(mode="default" if compiled is True else compiled)

    def refuse_callbacks(self, rates: set[float]) -> None:
        """Raise ValueError for callbacks of Lightning's that would silently undo what the settings say.

        Args:
            rates: the highest learning rates of all groups of parameters.
        """
        for callback in self.trainer.callbacks:
            if isinstance(callback, StochasticWeightAveraging):
                raise ValueError(
                    "StochasticWeightAveraging replaces the schedule of the learning rate and resets the statistics of "
                    "every batch norm, a frozen encoder's as well. Use WeightAveraging or EMAWeightAveraging"
                )
            if isinstance(callback, LearningRateFinder | BatchSizeFinder) and not callback._early_exit:
                raise ValueError(
                    f"{type(callback).__name__} as a callback comes after the schedule of the learning rate was made. "
                    "Call lr_find or scale_batch_size of a Tuner(trainer), then trainer.fit(model)"
                )
            if isinstance(callback, LearningRateFinder) and len(rates) > 1:
                raise ValueError(
                    f"lr_find tries one rate in all groups of parameters, which have {len(rates)} here "
                    f"({', '.join(f'{rate:g}' for rate in sorted(rates))}). Leave parameter_options, layer_decay, "
                    "encoder_lr and online_classifier out while you search"
                )

    # ---- Lightning's Tuner, which sets these attributes ----

    @property
    def lr(self) -> float:
        """Learning rate of the settings. To set it is to set the rate that the optimizer gets: `lr_scaling` is None
        from then on."""
        return self.params.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.change(lr=float(value), lr_scaling=None)

    @property
    def batch_size(self) -> int:
        """Images of each process in one batch."""
        return self.params.batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        if self.params.global_batch_size is not None:
            raise ValueError(
                f"global_batch_size={self.params.global_batch_size} decides the size of a batch, not "
                f"batch_size={value}. Set global_batch_size=None"
            )
        self.change(batch_size=value)

    def change(self, **fields: Any) -> None:
        """Change settings and the hyperparameters that a checkpoint keeps."""
        self.params = attrs.evolve(self.params, **fields)
        self.save_hyperparameters(fields)

    def eagerly(self) -> AbstractContextManager:
        """For validations: compiled code would be made anew for the mode and for the size of the last batch."""
        return torch.compiler.set_stance("force_eager") if self.params.torch_compile else nullcontext()

    # ---- labels ----

    n_outputs: int | None = None  # classes of the classifier that is trained here, if there is one

    def counted_classes(self) -> dict[str, int]:
        """Hyperparameter of a classifier whose classes were counted in files, which may be gone or others one day."""
        packed = self.params.dataset.is_packed
        return {} if packed or self.n_outputs is None else {"n_classes": self.n_outputs}

    needs_labels = False  # also to validate

    def reads_labels(self, training: bool) -> bool:
        """Whether labels of training batches, or of those for evaluation, matter."""
        return True

    def check_labels(self, labels: Tensor | np.ndarray | None, what: str, needed: bool = True) -> None:
        """Raise ValueError for labels that are not classes, or not those of the classifier."""
        if labels is None or (labels.ndim == 2 and labels.shape[1] > 1):
            if self.n_outputs is not None and needed:
                found = "no labels" if labels is None else f"labels of shape {tuple(labels.shape)}"
                raise ValueError(f"{what} has {found}: a classifier needs labels [N], one class an image")
            return
        if isinstance(labels, Tensor):
            labels = (labels.double() if labels.is_floating_point() else labels).cpu().numpy()
        classes = in_classes(labels, what)
        if self.n_outputs is not None and len(classes) and (highest := classes.max()) >= self.n_outputs:
            raise ValueError(
                f"{what} has the label {highest}, and the classifier has n_classes={self.n_outputs}, for dataset_name="
                f"{self.params.dataset_name!r}: number the classes from 0, or choose the data set of these images"
            )

    def check_batch(self, batch: Any, loader: Any, training: bool) -> None:
        """Check the labels of a batch of the user's loader. On a GPU, which would have to wait, only those of the first
        training batch of an epoch, and floats."""
        _, labels = images_and_labels(batch)
        first = training and self.trainer.fit_loop.batch_idx < 0
        waits = labels is not None and labels.device.type != "cpu" and not labels.is_floating_point() and not first
        if not isinstance(loader, ResumableDataLoader) and self.reads_labels(training) and not waits:
            self.check_labels(labels, "the loader", needed=training or self.needs_labels)

    def on_train_start(self) -> None:
        """Check the first batch of the user's loaders for validation, which would come only after an epoch."""
        loaders = self.trainer.val_dataloaders
        for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
            if isinstance(loader, DataLoader) and not isinstance(loader, ResumableDataLoader):
                with isolate_rng():
                    self.check_batch(next(iter(loader)), loader, training=False)

    def loader_of(self, dataloader_idx: int) -> Any:
        """The loader from which batches come now."""
        trainer = self.trainer
        evaluated = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        loaders = trainer.train_dataloader if trainer.training else evaluated
        return loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders

    # ---- data ----

    def loader(self, dataset: Dataset, training: bool, in_order: bool = False) -> ResumableDataLoader:
        if self.n_outputs is not None:
            self.check_labels(dataset.labels, f"dataset_name={self.params.dataset_name!r}")
        device, accumulated = self.trainer.strategy.root_device, self.trainer.accumulate_grad_batches
        return loading.get_loader(self.params, dataset, training, accumulated, device, in_order)

    def predict_dataloader(self) -> ResumableDataLoader:
        """The test set, in its order."""
        p = self.params
        return self.loader(loading.get_dataset(p, p.dataset.test_splits), training=False, in_order=True)

    def whole_sets(self, splits: list[tuple[str, ...]]) -> list[ResumableDataLoader]:
        """Loaders for evaluation, one for each of the sets of splits: all images, whatever `data_fraction` is."""
        p = attrs.evolve(self.params, data_fraction=1.0)
        datasets = [loading.get_dataset(p, names) for names in splits]
        labels = [dataset.labels for dataset in datasets if self.params.dataset.is_custom]
        if any(of_set.min() < 0 for of_set in labels):
            rank_zero_info(f"{self.params.dataset_name} has no labels: linear_probe and knn are left out")
        elif any(of_set.min() == of_set.max() for of_set in labels):
            rank_zero_info(f"{self.params.dataset_name} has images of one class: linear_probe and knn are left out")
        return [self.loader(dataset, training=False) for dataset in datasets]

    @staticmethod
    def gathered(outputs_of: dict[int, list[tuple]], loaders: Any) -> list[tuple[Tensor | None, ...]]:
        """(features, labels or None) of each loader, gathered over processes; empties `outputs_of`. Unreadable files
        are left out."""
        loaders, sets = loaders if isinstance(loaders, list | tuple) else [loaders], []
        for index, outputs in sorted(outputs_of.items()):
            parts, loader = zip(*outputs, strict=True), loaders[index]
            x, y = (p[0] if p[0] is None else distributed.gather_evaluated(torch.cat(p), loader) for p in parts)
            sets.append(readable_rows(y, x))
        outputs_of.clear()
        return sets

    def step_seed(self, batch_idx: int) -> tuple[int, int, int]:
        """Of what all processes draw alike at this batch; with the rank after it, of what each draws for itself."""
        return (self.params.seed, self.current_epoch, batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.params.torch_compile and batch_idx % self.trainer.accumulate_grad_batches == 0:
            # What CUDA graphs made for the step before may be overwritten from here on.
            torch.compiler.cudagraph_mark_step_begin()
        seed_torch((*self.step_seed(batch_idx), distributed.rank()))  # for dropout and the like within encoders

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Any, Tensor | None]:
        """uint8 images become normalized floats on the device, in training a list of views; floats stay as they are.
        All get the type of the weights, which is float32 but for precision "bf16-true", "16-true" and "64-true"."""
        if self._trainer is None or self._trainer.state.stage is None:
            return batch  # the sample of to_onnx() or to_torchscript()
        images, labels = images_and_labels(batch)
        if not self.trainer.predicting:
            self.check_batch(batch, self.loader_of(dataloader_idx), self.trainer.training)
        labels = whole_numbers(labels)
        self.check_first(images, dataloader_idx)
        if not self.trainer.training:
            return augmentations.for_evaluation(images, self.params).to(self.dtype), labels
        batch_idx = self.trainer.fit_loop.batch_idx + 1  # Lightning counts a batch after its transfer
        seed = (*self.step_seed(batch_idx), distributed.rank())
        return [view.to(self.dtype) for view in augmentations.for_training(images, self.augment, seed)], labels

    def check_first(self, images: Tensor | list[Tensor], dataloader_idx: int) -> None:
        """Check the values of float images, in the first batch of each loader: it takes a copy to the host."""
        loader, first = (self.trainer.state.stage, dataloader_idx), images if isinstance(images, Tensor) else images[0]
        if first.is_floating_point() and loader not in self.checked_loaders:
            self.checked_loaders.add(loader)
            augmentations.check_floats(first, self.params)

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        if self.plan is not None:
            checkpoint["steps"] = self.plan.of_checkpoint()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Of a run that is resumed: what cannot be resumed by these settings is refused."""
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        checkpoints.refuse_another_model(checkpoint, self, self.trainer)
        checkpoints.count_batches_anew(checkpoint, self.trainer.accumulate_grad_batches)
        if self.seed_was_drawn and "seed" in checkpoint.get("hyper_parameters", {}):
            self.change(seed=checkpoint["hyper_parameters"]["seed"])

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Self:
        """Lightning's; a damaged file, or one that would run code, is refused in words. The images may be gone: the
        classifier has as many classes as in the file. Paths in the file are used only where
        data/foreign_paths.py says so; pass data_path, splits_path, ... to use others."""
        content = checkpoints.read_checkpoint(checkpoint_path)
        settings = content.get("hyper_parameters", {})
        said = vetted(settings, checkpoint_path, kwargs)
        weight = content["state_dict"].get(f"{cls.CLASSIFIER}.weight")
        n_classes = {} if weight is None or len(weight) == packed_classes(settings) else {"n_classes": len(weight)}
        with data_only(str(checkpoint_path)), class_names_allowed(content):
            return super().load_from_checkpoint(checkpoint_path, *args, **{**said, **n_classes, **kwargs})

    def _set_hparams(self, hp: Any) -> None:
        """Lightning's, of a record that others cannot change. In place: the Tuner compares the record that it has with
        the new value."""
        self._hparams = self.hparams if isinstance(self.hparams, Settings) else Settings()
        dict.update(self._hparams, self._to_hparams_dict(hp))

    def configure_callbacks(self) -> list[pl.Callback]:
        return TrainingMonitor.of(self.trainer, getattr(self.params, "evaluate_every_n_epochs", 1))

    # ---- other programs' files ----

    def to_onnx(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's: images that are normalized already -> what `forward` returns. `self-supervised export` also
        writes weights files, and verifies what it writes."""
        with layers.in_eval_mode(self):
            return super().to_onnx(*args, **kwargs)

    def to_torchscript(self, file_path: Any = None, method: str = "trace", *args: Any, **kwargs: Any) -> Any:
        """Lightning's, by tracing `example_inputs`; see `to_onnx`."""
        if method != "trace":
            raise ValueError(f"method={method!r} cannot compile every encoder: choose 'trace', with example_inputs")
        with layers.in_eval_mode(self):
            return super().to_torchscript(file_path, method, *args, **kwargs)


def packed_classes(settings: dict[str, Any]) -> int | None:
    """Number of classes of the data set in a checkpoint's settings, where it is packed and has always as many."""
    info = catalogue.DATASETS.get(settings.get("dataset_name"))
    return None if info is None or not info.is_packed else info.n_classes


@contextmanager
def one_image_explained(x: Tensor) -> Iterator[None]:
    """Around a network in train mode: one image alone has no batch statistics, and PyTorch does not say what to do."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        way_out = "choose a larger batch_size, or drop_last_batch=None if it is the last one"
        raise ValueError(f"a batch of {len(x)} image has no batch statistics: {way_out} ({error})") from error


def seed_torch(seed: tuple[int, ...]) -> None:
    torch.manual_seed(int(augmentations.generator(seed).integers(2**63)))
