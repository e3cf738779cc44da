"""What pretraining and the linear stage have in common with Lightning: data, seeds, compilation, checkpoints."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import Dataset

import augmentations
import checkpoints
import data
import ddp
from device import keep_freed_memory
from loader import Loader, images_and_labels
from safe_load import data_only
from watch import Watch


class Stage(pl.LightningModule):
    """A method with `params` and with `augment(images, seed)`, which makes the views of a training batch."""

    def setup(self, stage: str) -> None:
        """Compiles in place, so that parameters keep their names: checkpoints do not tell that a run was compiled."""
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        compiled = self.params.torch_compile
        for module in self.children() if compiled and stage == "fit" else []:
            if isinstance(module, nn.Module) and module._compiled_call_impl is None:
                module.compile(mode="default" if compiled is True else compiled)

    def eagerly(self) -> AbstractContextManager:
        """For validations: compiled code would be made anew for the mode and for the size of the last batch."""
        return torch.compiler.set_stance("force_eager") if self.params.torch_compile else nullcontext()

    # ---- data ----

    def loader(self, dataset: Dataset, training: bool) -> Loader:
        device, accumulated = self.trainer.strategy.root_device, self.trainer.accumulate_grad_batches
        return data.get_loader(self.params, dataset, training, accumulated, device)

    def whole_sets(self, splits: list[tuple[str, ...]]) -> list[Loader]:
        """Loaders for evaluation, one for each of the sets of splits."""
        datasets = [data.get_dataset(self.params, names) for names in splits]
        labels = [dataset.labels for dataset in datasets if self.params.dataset.own]
        if any(of_set.min() < 0 for of_set in labels):
            rank_zero_info(f"{self.params.dataset_name} has no labels: linear_probe and knn are left out")
        elif any(of_set.min() == of_set.max() for of_set in labels):
            rank_zero_info(f"{self.params.dataset_name} has images of one class: linear_probe and knn are left out")
        return [self.loader(dataset, training=False) for dataset in datasets]

    @staticmethod
    def gathered(outputs_of: dict[int, list[tuple]], loaders: Any) -> list[list[Tensor | None]]:
        """(features, labels or None) of each loader, gathered over processes; empties `outputs_of`."""
        loaders, sets = loaders if isinstance(loaders, list | tuple) else [loaders], []
        for index, outputs in sorted(outputs_of.items()):
            parts, loader = zip(*outputs, strict=True), loaders[index]
            sets.append([p[0] if p[0] is None else ddp.gather_evaluated(torch.cat(p), loader) for p in parts])
        outputs_of.clear()
        return sets

    def step_seed(self, batch_idx: int) -> tuple[int, int, int]:
        """Of what all processes draw alike at this batch; with the rank after it, of what each draws for itself."""
        return (self.params.seed, self.current_epoch, batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.params.torch_compile and batch_idx % self.trainer.accumulate_grad_batches == 0:
            # What CUDA graphs made for the step before may be overwritten from here on.
            torch.compiler.cudagraph_mark_step_begin()
        seed_torch((*self.step_seed(batch_idx), ddp.rank()))  # for dropout and the like within encoders

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Any, Tensor | None]:
        """uint8 images become normalized floats on the device, in training a list of views; floats stay as they are."""
        images, labels = images_and_labels(batch)
        if not self.trainer.training:
            return augmentations.for_evaluation(images, self.params), labels
        batch_idx = self.trainer.fit_loop.batch_idx + 1  # Lightning counts a batch after its transfer
        seed = (*self.step_seed(batch_idx), ddp.rank())
        return augmentations.for_training(images, self.augment, seed), labels

    # ---- checkpoints ----

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Self:
        """Lightning's; a damaged file, or one that would run code, is refused in words."""
        checkpoints.read(checkpoint_path)
        with data_only(str(checkpoint_path)):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def configure_callbacks(self) -> list[pl.Callback]:
        return Watch.unless_there(self.trainer)


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
