"""Callbacks that observe a training: TrainingMonitor (warnings and checks), and those that log more."""

import math
import zlib
from pathlib import Path
from typing import Any, Self

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from self_supervised import distributed
from self_supervised.data import files
from self_supervised.data.batches import ResumableDataLoader, list_of_loaders
from self_supervised.distributed import to_host
from self_supervised.numerics import not_finite
from self_supervised.training import optimizers
from self_supervised.training.checkpoints import SafeCheckpointIO, take_back_begun_batch
from self_supervised.training.parameter_groups import ONLINE
from self_supervised.training.resuming import refuse_other_steps
from self_supervised.views.input_checks import REPAIR, count_not_finite

COLLAPSED_STD = 0.15  # step_projection_std below which the mean cosine of different images is 0.98 or more
LOG_INTERVAL = 50  # optimizer steps per row of metrics.csv
SHARED_OUT = "The directory of the checkpoints (--out) must be on a disk that all machines share"
COLLAPSED_RANK = 2.0  # RankMe below which the embeddings are nearly one direction


class TrainingMonitor(pl.Callback):
    """Callback that both methods add to any Trainer (`configure_callbacks`).

    It prints the effective settings, stops at a loss that is not finite, warns once if the embeddings collapse, reports
    unreadable images, and makes Lightning read and write checkpoints safely.
    """

    state_key = "Watch"  # its name in checkpoints of all versions

    def __init__(self):
        self.collapse_was_named = False
        self.is_to_stop = False  # whether something has told the Trainer to stop during this training
        self.n_skipped = 0
        self.position: dict | None = None  # state of our own loader in the checkpoint that is resumed
        self.steps: dict | None = None  # `Plan.step_sizes()` of the run that is resumed
        self.random_state: Tensor | None = None  # the CPU's, before the training; None if `setup` was never reached
        self.cuda_states: list[Tensor] = []  # those of the GPUs
        self.own_interval: int | None = None  # check_val_every_n_epoch as the user passed it
        self.batch: Any = None  # of the step whose gradients are computed
        self.early_stopping: list[EarlyStopping] = []  # those of scores that may look after the validation

    @classmethod
    def of(cls, trainer: pl.Trainer, evaluate_every_n_epochs: int) -> list[Self]:
        """Return the callbacks for `configure_callbacks`: a TrainingMonitor, the Trainer's own if it has one. It comes
        after the user's callbacks and Lightning's Timer, which may tell the Trainer to stop.

        The Trainer is set to validate only in epochs that are evaluated, because callbacks that monitor a score
        (ModelCheckpoint, EarlyStopping) look for it after every validation, and would not find it after an empty one.
        """
        present = next((callback for callback in trainer.callbacks if isinstance(callback, cls)), None)
        monitor = present or cls()
        if present:
            trainer.callbacks.remove(present)
        monitor.own_interval = monitor.own_interval or trainer.check_val_every_n_epoch
        if monitor.own_interval is not None:  # None: val_check_interval counts batches across epochs
            trainer.check_val_every_n_epoch = math.lcm(monitor.own_interval, evaluate_every_n_epochs)
        free = (one for one in trainer.early_stopping_callbacks if one._check_on_train_epoch_end is None)
        monitor.early_stopping = [one for one in free if one.monitor.startswith("valid_")]
        return [monitor]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.random_state = torch.get_rng_state()
        self.cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.position = self.steps = None  # of a checkpoint that a Tuner has loaded
        device = trainer.strategy.root_device
        refuse_differing("precision", trainer.precision, "Pass the same --precision to all", device)
        refuse_differing("stage", getattr(stage, "value", stage), SHARED_OUT, device)
        share_seed(pl_module, device)
        if pl_module.first_epoch == 1:
            count_epochs(trainer, pl_module)
        # With max_steps, Lightning resumes at the end of an epoch as if within one, and skips the images of the next.
        trainer.fit_loop._iteration_based_training = lambda: False
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # one that the user chose stays
            trainer.strategy.checkpoint_io = SafeCheckpointIO()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        resumed = Path(trainer.ckpt_path or "").name
        refuse_differing("ckpt_path", resumed, SHARED_OUT, trainer.strategy.root_device)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Keep what `on_train_start` compares and restores, if a run is resumed."""
        if trainer.state.fn != "fit":
            return
        loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        self.position = next(iter(loop.get("combined_loader", [])), None)
        self.steps = checkpoint.get("steps")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if bad := not_finite(pl_module):
            raise ValueError(
                f"ckpt_path={trainer.ckpt_path}: {len(bad)} tensors of the method are not finite before the first step "
                f"(the first: {bad[0]}). Resume from an earlier checkpoint, or start from finite weights."
            )
        loader = trainer.train_dataloader
        if (
            isinstance(loader, ResumableDataLoader)
            and getattr(loader.sampler, "num_replicas", 1) != distributed.world_size() > 1
        ):
            raise ValueError(
                f"the loader deals images out to {loader.sampler.num_replicas} processes, but there are "
                f"{distributed.world_size()}. Build its ResumableSampler(dataset, distributed.world_size(), "
                "distributed.rank()) in train_dataloader."
            )
        own = getattr(getattr(getattr(loader, "sampler", None), "dataset", None), "_sampler", None)  # within a wrapper
        if distributed.world_size() > 1 and own is not None and getattr(own, "generator", own) is None:
            raise ValueError(
                f"the sampler {type(own).__name__} draws other indices on each process. Give it "
                "generator=torch.Generator().manual_seed(0), so that all processes draw the same."
            )
        if ResumableDataLoader.is_position(self.position) and isinstance(loader, ResumableDataLoader):
            loader.load_state_dict(self.position)
        if pl_module.plan is not None:
            refuse_other_steps(self.steps, pl_module.plan.step_sizes())
        for stopping in self.early_stopping if sum(trainer.num_val_batches) else ():
            stopping._check_on_train_epoch_end = False  # at once, before `Checkpoints` saves its state
        self.position = None
        self.steps = None
        self.is_to_stop = False
        rank_zero_info(f"{pl_module.plan}; {optimizers.groups_text(trainer.optimizers[0])}")

    # ---- At every step: a loss that is not finite ----

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        self.batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Start copying to the host whether the loss is finite; the copy runs during the backward pass."""
        self.finite = to_host(distributed.gather(loss.detach().isfinite().view(1)))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        finite = self.finite()
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise FloatingPointError(self.describe(trainer, pl_module, bad))
        self.batch = None

    def describe(self, trainer: pl.Trainer, module: pl.LightningModule, ranks: list[int]) -> str:
        """Return the error message for a loss that is not finite on processes `ranks`."""
        n = int(distributed.gather(torch.tensor([count_not_finite(self.batch)], device=module.device)).sum())
        terms = ", ".join(f"{name}={value:.4g}" for name, value in module.step_metrics.items() if "loss" in name)
        named = [(name, p.grad.detach().norm()) for name, p in module.named_parameters() if p.grad is not None]
        norm = torch.stack([norm for _, norm in named]).norm().item()
        first = next((name for name, norm in named if not math.isfinite(norm)), "none")
        remedy = "Try a lower lr, a longer warm-up, precision 32-true or bf16-mixed, or a higher T"
        if n:
            remedy = f"{n} images of this batch have pixels that are not finite. {REPAIR}"
        return (
            f"the loss is not finite at step {trainer.global_step} (epoch {trainer.current_epoch + 1}, batch "
            f"{trainer.fit_loop.batch_idx}) on process {', '.join(map(str, ranks))}; on process {distributed.rank()} "
            f"{terms}; "
            f"learning rate {trainer.optimizers[0].param_groups[0]['lr']:.4g}, gradient norm {norm:.4g}, first "
            f"parameter without a finite gradient: {first}. Neither the weights nor the checkpoints were changed. "
            f"{remedy}"
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let a training that is to stop, for example after `max_time`, take the optimizer step that has begun."""
        pl_module.was_trained = True
        self.is_to_stop |= trainer.should_stop
        if self.is_to_stop:
            has_stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
            trainer.should_stop = has_stepped or trainer.is_last_batch
            pl_module.log_dict(pl_module.step_metrics)  # Lightning logs what it has

    # ---- Once per epoch: no batch, collapse and unreadable images ----

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an epoch without a batch, which Lightning would repeat for ever until `max_steps`."""
        loop, step, steps = trainer.fit_loop, trainer.global_step, pl_module.plan.steps
        if loop.batch_idx < 0 and not trainer.should_stop and not loop.restarted_mid_epoch:
            raise ValueError(
                f"the loader yielded no batch in epoch {pl_module.epoch}, after {step} of {steps} steps. "
                f"Let an iterable data set start over at each __iter__{f', or set max_steps={step}' if step else ''}."
            )
        self.warn_of_collapse(trainer, "step_projection_std", COLLAPSED_STD, "1 is healthy, 0 a single point")
        self.report_unreadable(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            if pl_module.was_trained:
                self.warn_of_collapse(trainer, "valid_rank_me", COLLAPSED_RANK, "1 is a single direction")
            self.report_unreadable(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.report_unreadable(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        take_back_begun_batch(checkpoint)  # also if another callback saves, after an exception

    def report_unreadable(self, trainer: pl.Trainer) -> None:
        """Report unreadable files among those that this process reads, if there are more than before."""
        datasets = [getattr(loader, "dataset", None) for loader in loaders(trainer)]
        self.n_skipped = max(self.n_skipped, files.name_skipped(*datasets, already=self.n_skipped))

    def warn_of_collapse(self, trainer: pl.Trainer, name: str, limit: float, meaning: str) -> None:
        value = float(trainer.callback_metrics.get(name, math.inf))
        if value < limit and not self.collapse_was_named:
            self.collapse_was_named = True
            rank_zero_warn(
                f"collapse: {name}={value:.3f} ({meaning}): all images get nearly the same embedding. Try another "
                "mlp_normalization (bn), more negatives, a predictor (prediction_mlp_layers=2), or a lower lr"
            )

    # ---- After the training, or an exception ----

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore what `setup` has changed in the Trainer, and torch's random states from before the training, which
        seeds all devices at every step."""
        vars(trainer._logger_connector).pop("log_metrics", None)
        vars(trainer.fit_loop).pop("_iteration_based_training", None)
        if self.random_state is not None:
            torch.set_rng_state(self.random_state)
            torch.cuda.set_rng_state_all(self.cuda_states)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore what an interrupted validation has put into eval mode, in which a later `fit` would train. Add the
        file that a dead worker read last to the exception, and correct Lightning's advice."""
        self.teardown(trainer, pl_module, "")
        if "multiple optimizers" in str(exception):  # Lightning's, which advises what `setup` refuses
            exception.add_note("Manual optimization is refused: return one optimizer with several parameter groups")
        loop = trainer._active_loop
        if loop is not None and not trainer.training:
            loop._module_mode.restore(pl_module)
        try:
            self.add_last_file(trainer, exception)
        except RuntimeError:  # PyTorch's handler of SIGCHLD, which may raise in any line of ours
            self.add_last_file(trainer, exception)

    @staticmethod
    def add_last_file(trainer: pl.Trainer, exception: BaseException) -> None:
        """Add a note for each dead worker, whatever the exception is: often it is only a lost connection."""
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


# ---- What the processes share, and what the Trainer holds ----


def count_epochs(trainer: pl.Trainer, method: pl.LightningModule) -> None:
    """Let the Trainer's loggers get `method.epoch` in place of Lightning's epoch.

    If it were logged by the method, it would be among the scores that `validate` returns, too.
    """
    connector = trainer._logger_connector
    log_metrics = type(connector).log_metrics

    def with_epoch(metrics: dict[str, Any], step: int | None = None) -> None:
        log_metrics(connector, {"epoch": method.epoch, **metrics} if metrics else metrics, step)

    connector.log_metrics = with_epoch


def refuse_differing(name: str, value: str, advice: str, device: torch.device) -> None:
    """Raise ValueError on all processes if a value differs between them. Otherwise they would wait for one another."""
    hashes = distributed.gather(torch.tensor([zlib.crc32(value.encode())], device=device))
    if (hashes != hashes[0]).any():
        raise ValueError(
            f"{name}={value!r} on process {distributed.rank()}, but another process has another one. {advice}"
        )


def share_seed(method: pl.LightningModule, device: torch.device) -> None:
    """Make all processes use the same seed and start from the same weights.

    Seeds that were drawn give way to one that was passed, else to that of the first process.

    Raises:
        ValueError: different seeds were passed to different processes.
    """
    mine = torch.tensor([[method.params.seed, method.seed_was_drawn]], device=device)
    seeds, drawn = distributed.gather(mine).T.tolist()
    if len(set(seeds)) == 1:
        return
    passed = sorted({seed for seed, was_drawn in zip(seeds, drawn, strict=True) if not was_drawn})
    if len(passed) > 1:
        raise ValueError(f"seed differs between processes ({seeds}). Pass the same seed to all.")
    if method.seed_was_drawn:
        method.change(seed=passed[0] if passed else seeds[0])
    for tensor in method.state_dict().values():
        tensor.copy_(distributed.from_rank_zero(tensor.to(device)))


def step_metrics_are_read(trainer: pl.Trainer) -> bool:
    """Return whether a logger, a checkpoint, a validation or the end of an epoch reads the metrics of this step."""
    if trainer.fast_dev_run or trainer._logger_connector.should_update_logs:
        return True
    savers = [saver for saver in trainer.checkpoint_callbacks if getattr(saver, "monitor", None)]
    intervals = (getattr(saver, "_every_n_train_steps", 0) for saver in savers)
    may_save = any(getattr(saver, "_train_time_interval", None) is not None for saver in savers)
    if may_save or any(n and (trainer.global_step + 1) % n == 0 for n in intervals):
        return True
    loop, of_all = trainer.fit_loop, trainer.check_val_every_n_epoch is None
    batches = (loop.total_batch_idx if of_all else loop.batch_idx) + 1
    is_validated = batches % (trainer.val_check_batch or math.inf) == 0
    return is_validated or trainer.is_last_batch or trainer.global_step + 1 == trainer.max_steps


def loaders(trainer: pl.Trainer) -> list:
    """Return all loaders that the Trainer holds at the moment."""
    held = (trainer.train_dataloader, trainer.val_dataloaders, trainer.test_dataloaders)
    return [loader for some in held for loader in list_of_loaders(some)]


# ---- Metrics of the optimization ----


class GradientNorms(pl.Callback):
    """Log grad_norm_PART, the Euclidean norm of the gradients of each trained part: model, projection_model, ...

    It is taken over all parameters of the part, before any clipping. Nothing waits for the device.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        norms = {}
        for name, part in pl_module.named_children():
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            if gradients:
                norms[f"grad_norm_{name}"] = torch.stack(torch._foreach_norm(gradients)).norm()
        pl_module.log_step(norms)


class LogInterval(pl.Callback):
    """Log every 50 steps, or three times per epoch if that is more often.

    SelfSupervisedMethod adds it to a Trainer that has Lightning's default, 50.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.log_every_n_steps = 1  # until the length of an epoch is known: Lightning warns of more

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.log_every_n_steps = min(LOG_INTERVAL, max(1, pl_module.plan.steps_per_epoch // 3))


class LearningRate(pl.Callback):
    """Log `lr`, the learning rate of the coming step: the highest of all groups except the online classifier's."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
        lr = max(group["lr"] for group in groups if not group.get("name", "").startswith(ONLINE))
        on_device = torch.full((), lr, device=pl_module.device)  # filled there: a copy would wait
        pl_module.log_step({"lr": on_device})
