"""The learning rate, logged at every step."""

import math
from typing import Any, Self

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from self_supervised import distributed
from self_supervised.data import files
from self_supervised.data.loader import ResumableDataLoader
from self_supervised.distributed import to_host
from self_supervised.evaluation import validation
from self_supervised.numerics import NotFinite, Scores, not_finite
from self_supervised.training import optimizers
from self_supervised.training.checkpoints import SafeCheckpointIO, refuse_other_steps
from self_supervised.training.parameter_groups import ONLINE

COLLAPSED_STD = 0.15  # step_projection_std below which the mean cosine of different images is 0.98 or more
COLLAPSED_RANK = 2.0  # RankMe below which the embeddings are nearly one direction


class TrainingMonitor(pl.Callback):
    """Both methods bring it along (`configure_callbacks`): any Trainer then stops at a loss that is not finite, says
    once if the embeddings collapse, names unreadable images, and reads and writes checkpoints safely."""

    state_key = "Watch"  # its name in checkpoints of every version

    def __init__(self):
        self.collapse_was_named = False
        self.n_skipped = 0
        self.position: dict | None = None  # where our own loader was when the checkpoint was made
        self.steps: dict | None = None  # of the run that made the checkpoint
        self.random_state: Tensor | None = None  # None: Lightning refused something before `setup`
        self.own_interval: int | None = None  # check_val_every_n_epoch as the user passed it

    @classmethod
    def of(cls, trainer: pl.Trainer, evaluate_every_n_epochs: int) -> list[Self]:
        """What `configure_callbacks` returns: a TrainingMonitor, unless the Trainer has one.

        The Trainer then validates only in the epochs that are evaluated: its callbacks that monitor a score
        (ModelCheckpoint, EarlyStopping) ask for it after validations, and would miss it after an empty one.
        """
        there = next((callback for callback in trainer.callbacks if isinstance(callback, cls)), None)
        watch = there or cls()
        watch.own_interval = watch.own_interval or trainer.check_val_every_n_epoch
        if watch.own_interval is not None:  # None: val_check_interval counts batches across epochs
            trainer.check_val_every_n_epoch = math.lcm(watch.own_interval, evaluate_every_n_epochs)
        return [] if there else [watch]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.random_state = torch.get_rng_state()
        share_seed(pl_module, trainer.strategy.root_device)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not another one of the user's choice
            trainer.strategy.checkpoint_io = SafeCheckpointIO()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Of a run that is resumed; not of `load_from_checkpoint`."""
        if trainer.state.fn != "fit":
            return
        loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        self.position = next(iter(loop.get("combined_loader", [])), None)
        self.steps = checkpoint.get("steps")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if bad := not_finite(pl_module):
            raise ValueError(
                f"{len(bad)} tensors of the method are not finite before the first step (the first: {bad[0]}; "
                f"ckpt_path={trainer.ckpt_path}). Resume from an earlier checkpoint, or start from finite weights"
            )
        loader = trainer.train_dataloader
        if (
            isinstance(loader, ResumableDataLoader)
            and getattr(loader.sampler, "num_replicas", 1) != distributed.world_size() > 1
        ):
            raise ValueError(
                f"the loader deals images out to {loader.sampler.num_replicas} processes, but there are "
                f"{distributed.world_size()}: make its Share(dataset, ddp.world_size(), ddp.rank()) in train_dataloader"
            )
        if ResumableDataLoader.is_position(self.position) and isinstance(loader, ResumableDataLoader):
            loader.load_state_dict(self.position)
        if pl_module.plan is not None:
            refuse_other_steps(self.steps, pl_module.plan.of_checkpoint())
        self.position = None
        self.steps = None
        rank_zero_info(f"{pl_module.plan}; {optimizers.groups_text(trainer.optimizers[0])}")

    # ---- a loss that is not finite ----

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """The answer travels to the host while the device works on the backward pass: nothing waits for it."""
        self.finite = to_host(distributed.gather(loss.detach().isfinite().view(1)))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        finite = self.finite()
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise FloatingPointError(self.describe(trainer, pl_module, bad))

    @staticmethod
    def describe(trainer: pl.Trainer, module: pl.LightningModule, ranks: list[int]) -> str:
        terms = {name: float(value) for name, value in trainer.callback_metrics.items()}
        terms = ", ".join(f"{name}={value:.4g}" for name, value in terms.items() if "loss" in name)
        named = [(name, p.grad.detach().norm()) for name, p in module.named_parameters() if p.grad is not None]
        norm = torch.stack([norm for _, norm in named]).norm().item()
        first = next((name for name, norm in named if not math.isfinite(norm)), "none")
        return (
            f"the loss is not finite at step {trainer.global_step} (epoch {trainer.current_epoch}, batch "
            f"{trainer.fit_loop.batch_idx}) on process {', '.join(map(str, ranks))}; on process {distributed.rank()} "
            f"{terms}; "
            f"learning rate {trainer.optimizers[0].param_groups[0]['lr']:.4g}, gradient norm {norm:.4g}, first "
            f"parameter without a finite gradient: {first}. The weights were not changed by it, and checkpoints are as "
            "they were. Try a lower lr, a longer warm-up, precision 32-true or bf16-mixed, a higher T"
        )

    # ---- once an epoch ----

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.name_collapse(trainer, "step_projection_std", COLLAPSED_STD, "1 is healthy, 0 a single point")
        self.name_skipped(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.name_collapse(trainer, "valid_rank_me", COLLAPSED_RANK, "1 is a single direction")
            self.name_skipped(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.name_skipped(trainer)

    def name_skipped(self, trainer: pl.Trainer) -> None:
        """Unreadable files of this process's share."""
        datasets = [getattr(loader, "dataset", None) for loader in loaders(trainer)]
        self.n_skipped = max(self.n_skipped, files.name_skipped(*datasets, already=self.n_skipped))

    def name_collapse(self, trainer: pl.Trainer, name: str, limit: float, meaning: str) -> None:
        value = float(trainer.callback_metrics.get(name, math.inf))
        if value < limit and not self.collapse_was_named:
            self.collapse_was_named = True
            rank_zero_warn(
                f"collapse: {name}={value:.3f} ({meaning}): all images get nearly the same embedding. Try another "
                "mlp_normalization (bn), more negatives, a predictor (prediction_mlp_layers=2), a lower lr"
            )

    # ---- the end ----

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Training seeds torch anew at every step; what comes after it finds the seed of `pl.seed_everything` again."""
        if self.random_state is not None:
            torch.set_rng_state(self.random_state)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Name the last file of a worker that died."""
        self.teardown(trainer, pl_module, "")
        try:
            self.name_last_file(trainer, exception)
        except RuntimeError:  # PyTorch, which raises once more as soon as it hears of the worker, wherever we are then
            self.name_last_file(trainer, exception)

    @staticmethod
    def name_last_file(trainer: pl.Trainer, exception: BaseException) -> None:
        """Whatever the exception is: often not more than a lost connection."""
        for loader in loaders(trainer):
            if not isinstance(loader, ResumableDataLoader) or not hasattr(loader.dataset, "last_read"):
                continue
            for process, end in loader.dead_workers():
                path = loader.dataset.last_read(process)
                if path is not None:
                    exception.add_note(f"worker {process} died ({end}); the last file that this worker read is {path}")

    def state_dict(self) -> dict[str, Any]:
        return {"collapse_was_named": self.collapse_was_named}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.collapse_was_named = state["collapse_was_named"]


def share_seed(method: pl.LightningModule, device: torch.device) -> None:
    """All processes train with one seed and from the same weights: where seeds were drawn, with that of the first.

    Raises:
        ValueError: processes were given different seeds.
    """
    mine = torch.tensor([[method.params.seed, method.seed_was_drawn]], device=device)
    seeds, drawn = distributed.gather(mine).T.tolist()
    if len(set(seeds)) == 1:
        return
    given = sorted({seed for seed, was_drawn in zip(seeds, drawn, strict=True) if not was_drawn})
    if len(given) > 1:
        raise ValueError(f"seed differs between processes ({seeds}): give all the same")
    if method.seed_was_drawn:
        method.change(seed=given[0] if given else seeds[0])
    for tensor in method.state_dict().values():
        tensor.copy_(distributed.from_rank_zero(tensor.to(device)))


def scores(names: list[str], x: Tensor, y: Tensor | None, train: tuple | None, probe_solver: str) -> Scores:
    """Scores by `evaluation.evaluate`, all nan where embeddings are not finite: the training goes on, for early running
    statistics of batch norm may be far off, and recover."""
    try:
        return validation.evaluate(names, x, y, train, probe_solver)
    except NotFinite as error:
        rank_zero_info(f"not evaluated: {error}")
    blank = x.new_zeros(len(x), 1)  # has the same scores
    train = None if train is None else (train[0].new_zeros(len(train[0]), 1), train[1])
    return dict.fromkeys(validation.evaluate(names, blank, y, train, probe_solver), math.nan)


def loaders(trainer: pl.Trainer) -> list:
    """Those that the Trainer has at hand."""
    all_of_them = [trainer.train_dataloader, trainer.val_dataloaders, trainer.test_dataloaders]
    return [one for some in all_of_them for one in (some if isinstance(some, list) else [some])]


# ---- Norms of the gradients, logged part by part on request ----


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


# ---- The learning rate, logged at every step ----


class LearningRate(pl.Callback):
    """`lr`, with which this step will be taken: the highest of all groups of parameters but the online classifier's.

    It is filled in on the device: nothing waits for a copy.
    """

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
        rate = max(group["lr"] for group in groups if not group.get("name", "").startswith(ONLINE))
        pl_module.log("lr", torch.full((), rate, device=pl_module.device))
