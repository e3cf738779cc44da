"""How a run is carried out and where it is kept. What it computes is in ModelParams."""

import importlib.util
import re
from typing import Any

from attrs import asdict, field, fields, frozen

from fields import check_types, choice, non_negative, number, path, positive

LOGGERS = {"tensorboard": "tensorboard", "csv": None, "wandb": "wandb", "mlflow": "mlflow"}  # name -> package it needs
OF_THE_TRAINER = (
    "precision", "devices", "num_nodes", "strategy", "accumulate_grad_batches", "sync_batchnorm", "max_time",
    "limit_train_batches", "log_every_n_steps", "deterministic",
)  # fmt: skip
OF_THE_COMMAND = ("out", "resume", "dry_run", "preview", "print_config")  # do not make another run


@frozen(kw_only=True)
class RunOptions:
    """The programs' options."""

    # instead of a run
    dry_run: bool = False  # build everything, train two steps, validate one batch, print a summary; leaves no files
    preview: str | None = path()  # draw the first images and their views into this PNG
    print_config: bool = False  # print the settings as YAML, as --config reads them

    # the run
    out: str | None = path()  # its folder; none: runs/PRESET_DATASET
    resume: str | None = path()  # auto: from the newest good checkpoint of --out, if any; else a checkpoint
    logger: list[str] = field(factory=lambda: ["tensorboard"])  # of tensorboard, wandb, mlflow; csv is always there
    log_gradient_norms: bool = False  # grad_norm_PART at every logged step

    # checkpoints
    checkpoint_every_n_steps: int = positive(1000)  # and after every epoch; the newest two stay, to resume from
    save_best: list[str] = field(factory=list)  # best_NAME.ckpt; lowest of a loss, else highest; or NAME:min, NAME:max
    save_every_n_epochs: int | None = positive(None)  # epoch_N.ckpt, which stay

    # the linear classifier
    linear_epochs: int = non_negative(0)  # train LinearClassifierMethod this long afterwards
    linear_lr: float = positive(30.0)  # meant for 256 images in one optimizer step

    # the Trainer
    precision: str = choice("32-true", ("32-true", "16-mixed", "bf16-mixed"))  # of numbers: mixed, for GPUs
    devices: int | str | list[int] = "auto"  # how many, or which
    num_nodes: int = positive(1)  # machines
    strategy: str = "auto"  # ddp, ddp_find_unused_parameters_true, fsdp, ...
    accumulate_grad_batches: int = positive(1)  # batches of one optimizer step
    sync_batchnorm: bool = False  # batch statistics over all processes
    max_time: str | None = None  # DD:HH:MM:SS, after which the training ends as if it were finished
    limit_train_batches: int | float | None = number(None, above=0)  # of an epoch: whole: batches; else: share
    log_every_n_steps: int = positive(50)  # rows of metrics.csv; choose fewer where an epoch has fewer
    deterministic: bool = False  # algorithms with the same bits every time, or an error; slower

    def __attrs_post_init__(self):
        check_types(self)
        for name in self.logger:
            if name not in LOGGERS:
                raise ValueError(f"logger={name!r} is unknown: choose of {', '.join(LOGGERS)}")
            if LOGGERS[name] and importlib.util.find_spec(LOGGERS[name]) is None:
                raise ValueError(f"logger={name!r} needs a package that is not installed: pip install {LOGGERS[name]}")
        for wanted in self.save_best:
            if ":" in wanted and wanted.split(":")[1] not in ("min", "max"):
                raise ValueError(f"save_best={wanted!r} must be the name of a figure, NAME:min or NAME:max")
        if self.max_time is not None and not re.fullmatch(r"\d+(:\d\d){3}", self.max_time):
            raise ValueError(f"max_time={self.max_time!r} must be DD:HH:MM:SS: 00:10:00:00 for ten hours")
        share = self.limit_train_batches
        if isinstance(share, float) and share > 1:
            raise ValueError(f"limit_train_batches={share} is no share: give a whole number of batches, or at most 1.0")

    def of_the_trainer(self) -> dict[str, Any]:
        """Arguments of pl.Trainer."""
        return {name: getattr(self, name) for name in OF_THE_TRAINER}

    def of_the_run(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in OF_THE_COMMAND}


NAMES = tuple(attribute.name for attribute in fields(RunOptions))
