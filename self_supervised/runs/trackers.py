"""Loggers of a run: metrics.csv, and TensorBoard, W&B or MLflow if they were chosen."""

import os
from pathlib import Path

from pytorch_lightning import loggers
from pytorch_lightning.utilities import rank_zero_only

from self_supervised.runs.run_options import RunOptions
from self_supervised.training.run_folder import csv_logger, starts_of


def wandb_logger(out: Path, title: str, run_id: str, options: RunOptions) -> loggers.WandbLogger:
    """Return a logger whose run has the same id whenever the run of this directory is resumed."""
    import wandb  # optional, and slow to import

    wandb.finish()  # ends the run of the previous stage, which would otherwise receive these metrics
    about = {"project": options.tracker_project, "tags": options.tracker_tags or None}
    return loggers.WandbLogger(title, save_dir=out, id=run_id, resume="allow", **about)


def mlflow_logger(out: Path, title: str, run_id: str, options: RunOptions) -> loggers.MLFlowLogger:
    """Return a logger that continues the run with the tag `self_supervised.run_id`, if the experiment has one. Runs
    side by side share an experiment, and a database unless MLFLOW_TRACKING_URI names a server."""
    from mlflow import MlflowClient  # optional, and slow to import

    above = out.resolve().parent
    database = f"sqlite:///{above / 'mlflow.db'}"  # MLflow 3 does not support plain files
    tracking = os.environ.get("MLFLOW_TRACKING_URI", database)
    name = options.tracker_project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or above.name or "runs"
    tags = {"self_supervised.run_id": run_id, **dict(tag.partition("=")[::2] for tag in options.tracker_tags)}
    known = []
    if rank_zero_only.rank == 0 and (experiment := MlflowClient(tracking).get_experiment_by_name(name)):
        query = f"tags.`self_supervised.run_id` = '{run_id}'"
        known = MlflowClient(tracking).search_runs([experiment.experiment_id], query)
    joined = known[0].info.run_id if known else None
    logger = loggers.MLFlowLogger(name, run_name=title, tracking_uri=tracking, tags=tags, run_id=joined)
    if joined:  # MLflow refuses other parameters than those of the first start
        logger.log_hyperparams = lambda *_: None
    return logger


def get_loggers(out: Path, stage: str, options: RunOptions, first_step: int) -> list[loggers.Logger]:
    """Return the logger of metrics.csv and those in `options.logger`. All continue at `first_step`; metrics.csv and
    TensorBoard hide what was logged after it."""
    title = f"{options.tracker_name or out.resolve().name}_{stage}"
    last = next(reversed(starts_of(out)), {})
    run_id = f"{last['id']}_{stage}" if last.get("id") else f"{out.name}_{stage}"  # the latter in earlier versions
    makers = {
        "csv": lambda: csv_logger(out, stage, first_step),
        "tensorboard": lambda: loggers.TensorBoardLogger(out, name=stage, version="", purge_step=first_step),
        "wandb": lambda: wandb_logger(out, title, run_id, options),
        "mlflow": lambda: mlflow_logger(out, title, run_id, options),
    }
    return [makers[one]() for one in dict.fromkeys(["csv", *options.logger])]
