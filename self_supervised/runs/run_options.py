"""How a run is carried out and where it is stored: precision, devices, checkpoints, loggers, all options that do not
belong to the method."""

import importlib.util
import re
from typing import Any

from attrs import field, fields, frozen

from self_supervised import distributed
from self_supervised.fields import check_types, choice, non_negative, number, path, positive

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")  # names that pl.Trainer accepts
PRECISIONS = ("auto", "32-true", "64-true", "16-mixed", "bf16-mixed", "bf16-true")
LOGGERS = {"tensorboard": "tensorboard", "csv": None, "wandb": "wandb", "mlflow": "mlflow"}  # name -> package it needs
TRAINER_OPTIONS = (
    "precision", "accelerator", "devices", "num_nodes", "strategy", "accumulate_grad_batches", "sync_batchnorm",
    "max_time", "limit_train_batches", "limit_val_batches", "gradient_clip_val", "log_every_n_steps", "deterministic",
)  # fmt: skip


@frozen(kw_only=True)
class RunOptions:
    """Options of a run: how it is carried out and where it is stored. What it computes is in ModelParams."""

    # instead of a run
    dry_run: bool = False  # build everything, train two steps, validate one batch, print a summary; writes no files
    # memory for the training, such as 8GB: with dry_run, find the micro_batch_size that fits, and print no summary
    fit_memory: str | None = None
    preview: str | None = path()  # PNG file into which the first images and their views are drawn
    print_config: bool = False  # print the settings as YAML that --config reads

    # the run
    out: str | None = path()  # run directory; none: runs/PRESET_DATASET
    # settings for a kind of data, to start from: digits, folder, cifar10_laptop, ... (docs/recipes.md); other options
    # override them
    recipe: str | None = None
    # checkpoint, or directory of a run, to resume from; auto: the newest valid checkpoint in --out, if there is one
    resume: str | None = path()
    logger: list[str] = field(factory=lambda: ["tensorboard"])  # tensorboard, wandb, mlflow; csv is always written
    log_gradient_norms: bool = False  # log grad_norm_PART of each part of the model at every logged step
    # project of W&B, experiment of MLflow; none: WANDB_PROJECT or lightning_logs; MLFLOW_EXPERIMENT_NAME or the name of
    # the directory that holds the run directory
    tracker_project: str | None = None
    tracker_name: str | None = None  # name of the run in W&B and MLflow; none: the name of the run directory
    tracker_tags: list[str] = field(factory=list)  # tags of the run in W&B and MLflow; MLflow takes KEY=VALUE, too

    # checkpoints
    checkpoint_every_n_steps: int = positive(1000)  # interval in steps, and after every epoch; the newest two are kept
    # metrics whose best checkpoint is kept as best_NAME.ckpt: lowest if NAME contains "loss", else highest; or
    # NAME:min, NAME:max
    save_best: list[str] = field(factory=list)
    save_every_n_epochs: int | None = positive(None)  # epochs between checkpoints epoch_N.ckpt, all of which are kept

    # the linear classifier
    linear_epochs: int = non_negative(0)  # epochs of LinearClassifierMethod after pretraining; 0: none
    linear_lr: float = positive(30.0)  # learning rate of the linear classifier, for 256 images in one optimizer step

    # the Trainer
    precision: str = choice("auto", PRECISIONS)  # floating point; auto: bfloat16 where it is faster, else float32
    accelerator: str = choice("auto", ACCELERATORS)  # kind of device; auto: a GPU if there is one
    devices: int | str | list[int] = "auto"  # number of devices, or a list of them; auto: all, or as torchrun says
    num_nodes: int = positive(1)  # number of machines; 1: or as torchrun says
    strategy: str = "auto"  # distributed strategy: ddp, ddp_find_unused_parameters_true, ...
    accumulate_grad_batches: int = positive(1)  # batches per optimizer step
    sync_batchnorm: bool = False  # compute batch statistics over all processes
    max_time: str | None = None  # time limit DD:HH:MM:SS, after which the training ends as if it were finished
    limit_train_batches: int | float | None = number(None, above=0)  # number of batches per epoch, or fraction of them
    # number of batches per validation, or fraction of them, from which all scores are computed; 0: no validation
    limit_val_batches: int | float | None = number(None)
    gradient_clip_val: float | None = number(None, above=0)  # norm to which the gradients of all weights are clipped
    # optimizer steps per row of metrics.csv; none: 50, or a third of an epoch if that is less
    log_every_n_steps: int | None = positive(None)
    deterministic: bool = False  # use only algorithms with bit-identical results, or raise an error; slower

    def __attrs_post_init__(self):
        if isinstance(self.max_time, int):
            raise ValueError(f"max_time={self.max_time}: YAML reads 10:00:00:00 as a number. Put it in quotes.")
        check_types(self)
        distributed.refuse_sharding(self.strategy)
        if self.fit_memory and not self.dry_run:
            raise ValueError(f"fit_memory={self.fit_memory}: is a part of the dry run. Pass --dry_run, too.")
        if self.fit_memory:
            bytes_of(self.fit_memory)
        names = [wanted.partition(":")[0] for wanted in self.save_best]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"save_best={self.save_best}: names {', '.join(repeated)} more than once. Pass each metric once."
            )
        for name in self.logger:
            if name not in LOGGERS:
                raise ValueError(f"logger={name!r}: unknown logger. Choose from {', '.join(LOGGERS)}.")
            if LOGGERS[name] and importlib.util.find_spec(LOGGERS[name]) is None:
                raise ValueError(f"logger={name!r}: a package is not installed. Run pip install {LOGGERS[name]}.")
        for wanted in self.save_best:
            if ":" in wanted and wanted.split(":")[1] not in ("min", "max"):
                raise ValueError(f"save_best={wanted!r}: unknown mode. Pass a metric's NAME, NAME:min or NAME:max.")
        if self.max_time is not None and not re.fullmatch(r"\d+(:\d\d){3}", self.max_time):
            raise ValueError(f"max_time={self.max_time!r}: must be DD:HH:MM:SS, such as 00:10:00:00 for ten hours.")
        for name in ("limit_train_batches", "limit_val_batches"):
            limit = getattr(self, name)
            if isinstance(limit, float) and limit > 1:
                raise ValueError(
                    f"{name}={limit}: a fraction is at most 1.0. Pass a whole number to limit the batches."
                )

    def without_effect(self) -> list[str]:
        """Return a line for each option that was changed and has no effect with the others."""
        needs = {} if self.linear_epochs else {"linear_lr": "linear_epochs"}
        if not {"wandb", "mlflow"} & set(self.logger):
            needs |= dict.fromkeys(("tracker_project", "tracker_name", "tracker_tags"), "logger=wandb or mlflow")
        changed = {name: getattr(self, name) for name in needs if getattr(self, name) != getattr(RunOptions(), name)}
        return [f"{k}={v!r}: no effect with the other options. {k} needs {needs[k]}" for k, v in changed.items()]

    @property
    def n_processes(self) -> int:
        """Number of processes on CPUs. "auto" is one."""
        given = self.trainer_arguments()
        return given["num_nodes"] * (number_of_devices(given["devices"]) or 1)

    def trainer_arguments(self) -> dict[str, Any]:
        """Return the arguments of pl.Trainer.

        Raises:
            ValueError: torchrun started other processes.
        """
        given = {name: getattr(self, name) for name in TRAINER_OPTIONS}
        if started := distributed.torchrun_layout():
            on_node, nodes = started
            if number_of_devices(self.devices) not in (None, on_node) or self.num_nodes not in (1, nodes):
                raise ValueError(
                    f"devices={self.devices!r}, num_nodes={self.num_nodes}: torchrun started {on_node} processes on "
                    f"each of {nodes} nodes. Leave both options out."
                )
            given |= {"devices": on_node if self.devices == "auto" else self.devices, "num_nodes": nodes}
        return given


def number_of_devices(devices: int | str | list[int]) -> int | None:
    """Return the number of devices, or None if it is not given as a number or a list."""
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdigit() else None


RUN_OPTION_NAMES = tuple(attribute.name for attribute in fields(RunOptions))


def bytes_of(text: str) -> int:
    """Return the number of bytes of a text: 8GB is 8 x 10^9, 8GiB is 8 x 2^30.

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B", text.strip())
    if not match:
        raise ValueError(f"fit_memory={text!r}: must be a size in bytes, such as 8GB, 7.5GiB or 900MB.")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))
